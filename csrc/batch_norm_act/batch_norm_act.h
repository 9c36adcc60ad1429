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

// Gradients of the above; null pointers leave theirs out.
struct BatchNormActBackwardArgs {
  DType dtype;              // of the images
  void* input_gradient;     // [count, height, width, channels] or null
  void* residual_gradient;  // likewise
  float* weight_gradient;   // [channels] or null, as the next three
  float* bias_gradient;
  float* mean_gradient;  // of the running statistics, in inference
  float* var_gradient;
  const void* upstream;  // [count, height, width, channels]: gradient for the output
  const void* input;     // likewise
  Images in;
  const float* mean;           // [channels]: the batch's in training, the running ones otherwise
  const float* var;            // [channels], biased
  const float* weight;         // [channels] or null
  const float* bias;           // [channels] or null
  const void* residual;        // like input, or null
  const float* upstream_mean;  // [channels] or null: gradients for the batch's statistics
  const float* upstream_var;   // [channels] or null
  bool training;
  double eps;
  Activation activation;
  Parallel parallel;
};

EFFKERNELS_OP(batch_norm_act_backward, BatchNormActBackwardArgs)

}  // namespace effkernels
