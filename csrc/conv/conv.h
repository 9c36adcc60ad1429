#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace effkernels {

// Products per convolution by Winograd's algorithm.
constexpr int64_t kWinogradMatrices = 16;

struct ConvArgs {
  DType dtype;        // of output, input and residual
  void* output;       // [count, out_height, out_width, out_channels]
  const void* input;  // [count, height, width, channels], or if planar
  bool planar;        // [count, channels, height, width]
  Images in;
  int64_t out_height, out_width, out_channels;
  const float* weight;  // panels over depth kernel_h * kernel_w * channels, see common/gemm.h
  Geometry geometry;
  Epilogue epilogue;
  Parallel parallel;
  // For Winograd's algorithm, see winograd.h; `weight` is then as given, [K, C, 3, 3].
  const float* transformed = nullptr;
};

EFFKERNELS_OP(conv, ConvArgs)

}  // namespace effkernels
