#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace effkernels {

struct PointwiseConvArgs {
  DType dtype;        // of output, mean, input and residual
  void* output;       // [count, height, width, out_channels]
  void* mean;         // [count, out_channels] or null
  const void* input;  // [count, height, width, channels]
  Images in;
  int64_t out_channels;
  const float* weight;  // panels, see common/gemm.h
  const float* gate;    // [count, channels] or null
  Epilogue epilogue;
  Parallel parallel;
};

EFFKERNELS_OP(pointwise_conv, PointwiseConvArgs)

}  // namespace effkernels
