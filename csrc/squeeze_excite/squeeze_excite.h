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

struct SqueezeExciteGateBackwardArgs {
  float* mean_gradient;   // [count, channels] or null
  const float* upstream;  // [count, channels]: gradient for the gate
  const float* mean;      // [count, channels]
  int64_t count;
  SqueezeExciteWeights weights;
  SqueezeExciteGradients gradients;
  Parallel parallel;
};

struct SqueezeExciteBackwardArgs {
  DType dtype;           // of input_gradient, upstream and input
  void* input_gradient;  // [count, height, width, channels] or null
  const void* upstream;  // [count, height, width, channels]: gradient for the output
  const void* input;     // [count, height, width, channels]
  Images in;
  SqueezeExciteWeights weights;
  SqueezeExciteGradients gradients;
  Parallel parallel;
};

EFFKERNELS_OP(squeeze_excite_gate, SqueezeExciteGateArgs)
EFFKERNELS_OP(squeeze_excite, SqueezeExciteArgs)
EFFKERNELS_OP(squeeze_excite_gate_backward, SqueezeExciteGateBackwardArgs)
EFFKERNELS_OP(squeeze_excite_backward, SqueezeExciteBackwardArgs)

}  // namespace effkernels
