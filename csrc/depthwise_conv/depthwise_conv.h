#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace effkernels {

struct DepthwiseConvArgs {
  DType dtype;        // of output, mean and input
  void* output;       // [count, out_height, out_width, channels]
  void* mean;         // [count, channels] or null
  const void* input;  // [count, height, width, channels]
  Images in;
  int64_t out_height, out_width;
  const float* weight;  // [kernel_h * kernel_w, channels rounded up to kPanel]
  Geometry geometry;
  Epilogue epilogue;
  Parallel parallel;
};

EFFKERNELS_OP(depthwise_conv, DepthwiseConvArgs)

// Gradients of a plain depthwise convolution; null leaves one out.
struct DepthwiseConvBackwardArgs {
  DType dtype;             // of the images
  void* input_gradient;    // [count, height, width, channels] or null
  float* weight_gradient;  // [kernel_h * kernel_w, channels] or null
  const void* upstream;    // [count, out_height, out_width, channels]: gradient for the output
  const void* input;       // [count, height, width, channels]
  Images in;
  int64_t out_height, out_width;
  const float* weight;  // [kernel_h * kernel_w, channels rounded up to kPanel]
  Geometry geometry;
  Parallel parallel;
};

EFFKERNELS_OP(depthwise_conv_backward, DepthwiseConvBackwardArgs)

}  // namespace effkernels
