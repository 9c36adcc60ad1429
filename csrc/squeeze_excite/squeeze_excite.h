#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace effkernels {

struct SqueezeExciteGateArgs {
  float* gate;        // [count, channels]
  const float* mean;  // [count, channels]
  int64_t count;
  SqueezeExciteWeights weights;
  Parallel parallel;
};

struct SqueezeExciteArgs {
  DType dtype;        // of output and input
  void* output;       // [count, height, width, channels]
  const void* input;  // [count, height, width, channels]
  Images in;
  SqueezeExciteWeights weights;
  Parallel parallel;
};

EFFKERNELS_OP(squeeze_excite_gate, SqueezeExciteGateArgs)
EFFKERNELS_OP(squeeze_excite, SqueezeExciteArgs)

}  // namespace effkernels
