#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace effkernels {

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
  int64_t tile_width = 2;  // 2 or 4 outputs of one row, and of the next
};

EFFKERNELS_OP(conv, ConvArgs)

}  // namespace effkernels
