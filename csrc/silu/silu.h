#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace effkernels {

struct SiluArgs {
  DType dtype;           // of all tensors
  void* output;          // [size]
  const void* input;     // [size]
  const void* residual;  // [size] or null
  int64_t size;
  Activation activation;
  Parallel parallel;
};

struct SiluBackwardArgs {
  DType dtype;           // of all tensors
  void* input_gradient;  // [size]
  const void* upstream;  // [size]: gradient for the output
  const void* input;     // [size]
  int64_t size;
  Activation activation;
  Parallel parallel;
};

EFFKERNELS_OP(silu, SiluArgs)
EFFKERNELS_OP(silu_backward, SiluBackwardArgs)

}  // namespace effkernels
