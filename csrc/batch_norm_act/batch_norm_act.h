#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace effkernels {

struct BatchNormActArgs {
  DType dtype;        // of output, input and residual
  void* output;       // [count, height, width, channels]
  float* mean;        // [channels]: written in training, read otherwise
  float* var;         // [channels], biased: written in training, read otherwise
  const void* input;  // [count, height, width, channels]
  Images in;
  const float* weight;   // [channels] or null
  const float* bias;     // [channels] or null
  const void* residual;  // like output, or null
  bool training;
  double eps;
  Activation activation;
  Parallel parallel;
};

EFFKERNELS_OP(batch_norm_act, BatchNormActArgs)

}  // namespace effkernels
