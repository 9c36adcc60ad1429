#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace effkernels {

struct MBConvArgs {
  DType dtype;        // of output, input and the residual of `project`
  void* output;       // [count, out_height, out_width, out_channels]
  const void* input;  // [count, height, width, channels]
  Images in;
  int64_t expanded;            // channels of the depthwise convolution
  const float* expand_weight;  // panels (common/gemm.h), or null: expanded = channels
  Epilogue expand;
  const float* depthwise_weight;  // [kernel_h * kernel_w, expanded rounded up to kPanel]
  Geometry geometry;
  Epilogue depthwise;
  bool squeeze_excite;
  SqueezeExciteWeights gate;
  const float* project_weight;  // panels
  Epilogue project;
  int64_t out_height, out_width, out_channels;
  Parallel parallel;
};

EFFKERNELS_OP(mbconv, MBConvArgs)

}  // namespace effkernels
