#pragma once

#include <cstdint>

#include "common/types.h"

namespace effkernels {

struct ActivationCuda {
  DType dtype;           // of all tensors
  void* output;          // [size]: activation(input), or its gradient if there is an upstream
  const void* input;     // [size]
  const void* upstream;  // [size] or null
  int64_t size;
  Activation activation;
  void* stream;
};

void activation_cuda(const ActivationCuda& args);

}  // namespace effkernels
