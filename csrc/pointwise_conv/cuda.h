#pragma once

#include <cstdint>

#include "common/types.h"

namespace effkernels {

struct PointwiseConvCuda {
  DType dtype;           // of all tensors except those of float
  void* output;          // [images, pixels, outputs]
  float* sums;           // [images, places, outputs] of zeros, or null
  const void* input;     // [images, pixels, channels]
  const void* weight;    // [outputs, channels]
  const float* scale;    // [outputs] or null
  const float* bias;     // [outputs] or null
  const void* gate;      // [images, channels] or null
  const void* residual;  // like output, or null
  int64_t images, pixels, channels, outputs;
  int64_t places;
  Activation activation;
  void* stream;
};

// Places of `sums`, whose sum over places is the output's over pixels.
int64_t pointwise_conv_cuda_places(int64_t pixels);

void pointwise_conv_cuda(const PointwiseConvCuda& args);

}  // namespace effkernels
