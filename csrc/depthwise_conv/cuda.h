#pragma once

#include <cstdint>

#include "common/types.h"

namespace effkernels {

// What a kernel makes of a tensor [count, height, width, channels] while it loads it; see
// effkernels/operands.py for the formulas. Null vectors leave their term out.
struct DepthwiseOperand {
  enum Kind { plain, forward, gradient } kind = plain;
  const void* z = nullptr;          // like the tensor, or null: only of a gradient
  const float* scale = nullptr;     // [channels]
  const float* shift = nullptr;     // [channels]
  const float* gate = nullptr;      // [count, channels]
  const float* offset = nullptr;    // [count, channels], of a gradient, as all that follow
  const float* factor = nullptr;    // [channels]
  const float* slope = nullptr;     // [channels]
  const float* constant = nullptr;  // [channels]
  Activation activation = Activation::none;
};

// What a block works on; effkernels/cuda/depthwise_conv_config.py.
struct DepthwiseTile {
  int pairs;   // of channels
  int strips;  // of depthwise_columns outputs, side by side
  int images;
  int rows;  // of outputs
};

// Outputs of a thread, side by side. 7 divides the widths of a 224-pixel network; the taps of a 7x7
// leave room for 4.
constexpr int depthwise_columns(int64_t kernel) { return kernel == 7 ? 4 : 7; }
// Groups of stride columns of the input, in the kernel for its gradient: as many as shared memory
// has room for.
constexpr int depthwise_gradient_columns(int64_t stride) { return stride == 1 ? 7 : 4; }
constexpr int kDepthwiseThreads = 128;  // at most: pairs * strips * images, in whole warps

struct DepthwiseConvCuda {
  DType dtype;        // of output, input and taps
  void* output;       // [count, out_height, out_width, channels]
  const void* input;  // [count, height, width, channels]
  Images in;
  int64_t out_height, out_width;
  const void* taps;       // [kernel_h * kernel_w, channels]
  Geometry geometry;      // left and top may be negative here
  int64_t between_h = 1;  // the input is seen with `between - 1` zeros between its pixels
  int64_t between_w = 1;
  bool flipped = false;  // the taps are taken in reverse order
  const float* scale;    // [channels] or null
  const float* bias;     // [channels] or null
  Activation activation;
  DepthwiseOperand operand;  // of the input
  float* sums;       // [count, depthwise_blocks, channels] or null: of the output, over pixels
  float* mean;       // [count, channels] or null; needs sums, unless there is one block
  float* moments;    // [2, channels] or null: mean and biased variance of the output
  float* workspace;  // depthwise_workspace floats, for moments
  DepthwiseTile tile;
  void* stream;
};

// Whether the window fits into registers; else the general kernel runs.
bool depthwise_is_tuned(const Geometry& geometry, int64_t between_h, int64_t between_w);

// Blocks that an image is cut into: the partial sums of its mean.
int64_t depthwise_blocks(const DepthwiseConvCuda& args);

// Floats for partial moments.
int64_t depthwise_workspace(const DepthwiseConvCuda& args);

void depthwise_conv_cuda(const DepthwiseConvCuda& args);

// The gradients of a depthwise convolution for its input and for its taps and bias.
struct DepthwiseGradientCuda {
  DType dtype;           // of output, upstream, input and taps
  void* output;          // [count, height, width, channels]: the gradient for the input, or null
  float* totals;         // [kernel_h * kernel_w + 1, channels] or null: for the taps, then the bias
  float* partials;       // [programs] of totals
  const void* upstream;  // [count, up_height, up_width, channels]
  const void* input;     // [count, height, width, channels]; unread without totals
  Images in;             // of the input
  int64_t up_height, up_width;
  const void* taps;           // [kernel_h * kernel_w, channels]; unread without output
  Geometry geometry;          // of the convolution
  const float* scale;         // [channels] or null: of the convolution, for output
  DepthwiseOperand gradient;  // of upstream
  DepthwiseOperand forward;   // of input
  DepthwiseTile tile;         // of groups of stride outputs
  int64_t programs;           // that share the sums for totals
  void* stream;
};

// Whether one kernel gives both; else totals alone are given, by the general kernel.
bool depthwise_gradient_is_tuned(const DepthwiseGradientCuda& args);

void depthwise_gradient_cuda(const DepthwiseGradientCuda& args);

}  // namespace effkernels
