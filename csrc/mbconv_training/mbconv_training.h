// The stages of an inverted-residual block in training (effkernels/ops/mbconv_training.py).
//
// What lies between two convolutions is no tensor: a stage normalises, activates and gates while
// it reads what the convolution before it put out, and its gradient is recomputed in the same way.
#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace effkernels {

// BatchNorm with the batch's statistics and the activation that follows; mean null: neither.
struct TrainingNorm {
  const float* mean;    // [channels]
  const float* var;     // [channels]
  const float* weight;  // [channels] or null
  const float* bias;    // [channels] or null
  double eps;
  Activation activation;
};

// output = weight * (gate . activation(norm(input))), a 1x1 convolution, and its statistics.
struct TrainingProductArgs {
  DType dtype;
  void* output;       // [count, height, width, out_channels]
  float *mean, *var;  // [out_channels]: of the output
  const void* input;  // [count, height, width, channels]
  Images in;
  TrainingNorm norm;
  const float* gate;    // [count, channels] or null
  const float* weight;  // panels (common/gemm.h)
  int64_t out_channels;
  Parallel parallel;
};
EFFKERNELS_OP(mbconv_training_product, TrainingProductArgs)

// output = depthwise convolution of activation(norm(input)), and its statistics.
struct TrainingDepthwiseArgs {
  DType dtype;
  void* output;       // [count, out_height, out_width, channels]
  float *mean, *var;  // [channels]: of the output
  const void* input;  // [count, height, width, channels]
  Images in;
  TrainingNorm norm;
  const float* weight;  // [kernel_h * kernel_w, channels rounded up to kPanel]
  Geometry geometry;
  int64_t out_height, out_width;
  Parallel parallel;
};
EFFKERNELS_OP(mbconv_training_depthwise, TrainingDepthwiseArgs)

// pooled = spatial mean of activation(norm(input)).
struct TrainingPoolArgs {
  DType dtype;
  float* pooled;      // [count, channels]
  const void* input;  // [count, height, width, channels]
  Images in;
  TrainingNorm norm;
  Parallel parallel;
};
EFFKERNELS_OP(mbconv_training_pool, TrainingPoolArgs)

// output = keep * norm(input) + residual.
struct TrainingFinishArgs {
  DType dtype;
  void* output;       // [count, height, width, channels]
  const void* input;  // like output
  Images in;
  TrainingNorm norm;     // its activation is none
  const float* keep;     // [count] or null
  const void* residual;  // like output, or null
  Parallel parallel;
};
EFFKERNELS_OP(mbconv_training_finish, TrainingFinishArgs)

// The backward pass of a BatchNorm whose upstream gradient is keep * upstream, in three numbers a
// channel: gradient for its input = factor * t + slope * (input - mean) + constant.
struct TrainingNormBackwardArgs {
  DType dtype;
  float* coefficients;                     // [3, channels]: factor, slope, constant
  float *weight_gradient, *bias_gradient;  // [channels] or null
  const void *upstream, *input;            // [count, height, width, channels]
  Images in;
  TrainingNorm norm;  // its activation is none
  const float* keep;  // [count] or null
  Parallel parallel;
};
EFFKERNELS_OP(mbconv_training_norm_backward, TrainingNormBackwardArgs)

// The gradients of mbconv_training_product, from the gradient t = keep * upstream for what its
// output's BatchNorm put out: the gradient for the output itself is made by `coefficients` on the
// way. Null leaves one out.
//
// input_gradient is the one for gate . activation(norm(input)). `sums` is what the stage before
// needs of it, per image; with u that gradient, x and s activation and its slope at norm(input), d
// = input - mean:
//   sum of u x, u s, s, u s d, s d
constexpr int64_t kProductSums = 5;
struct TrainingProductBackwardArgs {
  DType dtype;
  void* input_gradient;       // [count, height, width, channels]
  float* weight_gradient;     // [out_channels, channels]
  float* sums;                // [count, kProductSums, channels]
  const void* upstream;       // [count, height, width, out_channels]
  const void* output;         // [count, height, width, out_channels]: what the product put out
  const float* output_mean;   // [out_channels]
  const float* coefficients;  // [3, out_channels]
  const float* keep;          // [count] or null
  const void* input;          // [count, height, width, channels]
  Images in;
  TrainingNorm norm;
  const float* gate;     // [count, channels] or null
  const float* weight;   // panels of the transposed weight
  const void* residual;  // added to input_gradient: like input, or null
  int64_t out_channels;
  Parallel parallel;
};
EFFKERNELS_OP(mbconv_training_product_backward, TrainingProductBackwardArgs)

// The gradients of mbconv_training_depthwise, from `upstream`, the gradient for gate .
// activation(output_norm(output)) with its `sums`: t = (gate * upstream + offset) * slope.
// input_gradient is the one for norm(input), past the activation; `coefficients` are those of
// norm's backward pass.
struct TrainingDepthwiseBackwardArgs {
  DType dtype;
  void* input_gradient;    // [count, height, width, channels] or null
  float* weight_gradient;  // [kernel_h * kernel_w, channels] or null
  float* coefficients;     // [3, channels]: of norm, or null where it has no mean
  float *norm_weight_gradient, *norm_bias_gradient;                // [channels] or null
  float *output_norm_weight_gradient, *output_norm_bias_gradient;  // [channels] or null
  const void* upstream;  // [count, out_height, out_width, channels]
  const void* output;    // [count, out_height, out_width, channels]
  TrainingNorm output_norm;
  const float* sums;    // [count, kProductSums, channels]
  const float* gate;    // [count, channels] or null
  const float* offset;  // [count, channels] or null: gradient for the pooled vector / pixels
  const void* input;    // [count, height, width, channels]
  Images in;
  TrainingNorm norm;
  const float* weight;  // reversed taps, [kernel_h * kernel_w, channels rounded up to kPanel]
  Geometry geometry;    // of the forward convolution
  int64_t out_height, out_width;
  const void* residual;  // added to input_gradient: like input, or null; only without a norm
  Parallel parallel;
};
EFFKERNELS_OP(mbconv_training_depthwise_backward, TrainingDepthwiseBackwardArgs)

}  // namespace effkernels
