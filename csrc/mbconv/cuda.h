#pragma once

#include <cstdint>

#include "common/types.h"

namespace effkernels {

// An inverted residual's expansion and depthwise convolution.
struct ExpandDepthwiseCuda {
  DType dtype;                // of all tensors except those of float
  void* output;               // [images, output_height, output_width, expanded]
  float* partials;            // [images, tiles, expanded] or null: sums over a tile's pixels
  const void* input;          // [images, height, width, channels]
  const void* expand_weight;  // [expanded, channels]
  const float* expand_scale;  // [expanded] each, or null
  const float* expand_bias;
  const void* taps;  // [kernel * kernel, expanded]
  const float* scale;
  const float* bias;
  Images in;
  int64_t expanded, output_height, output_width;
  Geometry geometry;
  int64_t tile_height, tile_width;  // outputs of a block
  int64_t groups;                   // that share the expanded channels of a tile
  Activation activation;
  void* stream;
};

void expand_depthwise_cuda(const ExpandDepthwiseCuda& args);

}  // namespace effkernels
