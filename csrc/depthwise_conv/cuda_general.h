// Depthwise convolution and weight gradient for kernels, strides and dilations that cuda.cu's tuned
// kernels are not for: one value at a time, nothing kept. A warp has 32 neighbouring channels.
#pragma once

#include "depthwise_conv/cuda_window.h"

namespace effkernels {
namespace {

constexpr int kGeneralWarps = 4, kGeneralBlocks = 8;

struct GeneralArguments {
  void* output;
  const void* input;
  const void* taps;
  const float* scale;
  const float* bias;
  float* sums;
  float sum_factor;
  float* counts;
  float* partials;
  DepthwiseOperand operand;
  int channels, height, width, out_height, out_width, rows;
  int kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, between_h, between_w;
  int top, left;
  int chunks, row_blocks;
  bool flipped;
  Activation activation;
};

// The operand of one value, `at` values from the tensor's start.
struct OperandOfChannel {
  float2 vectors[kOperandVectors];

  __device__ OperandOfChannel(const DepthwiseOperand& operand, int image, int channel,
                              int channels) {
    for (int i = 0; i < kOperandVectors; i++) {
      vectors[i] = operand_vector(operand, i, image, channel, channels);
    }
  }

  template <class T>
  __device__ float operator()(const DepthwiseOperand& operand, const void* input,
                              int64_t at) const {
    const float value = to_float(static_cast<const T*>(input)[at]);
    const AnyActivation activation{operand.activation};
    if (operand.kind == DepthwiseOperand::plain) return value;
    if (operand.kind == DepthwiseOperand::forward) {
      return forward_operand(activation, {value, value}, vectors).x;
    }
    const float z = operand.z ? to_float(static_cast<const T*>(operand.z)[at]) : 0.0f;
    return gradient_operand(activation, {value, value}, {z, z}, vectors).x;
  }
};

template <class T>
__global__ void __launch_bounds__(kGeneralWarps* kWarp, kGeneralBlocks)
    general_kernel(GeneralArguments a) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int block = static_cast<int>(blockIdx.x);
  const int channel = block % a.chunks * kWarp + lane;
  block /= a.chunks;
  const int part = block, image = block / a.row_blocks;
  const int first_y = block % a.row_blocks * a.rows;
  const int end_y = smaller(first_y + a.rows, a.out_height);
  float total = 0.0f, count = 0.0f, mean = 0.0f, squares = 0.0f;
  if (channel < a.channels) {
    const OperandOfChannel operand(a.operand, image, channel, a.channels);
    const int64_t in_image = int64_t{image} * a.height * a.width;
    const int64_t out_image = int64_t{image} * a.out_height * a.out_width;
    const float scale = a.scale ? a.scale[channel] : 1.0f, bias = a.bias ? a.bias[channel] : 0.0f;
    for (int out_y = first_y, out_x = warp; out_y < end_y; out_x += kGeneralWarps) {
      for (; out_x >= a.out_width; out_x -= a.out_width) out_y++;
      if (out_y >= end_y) break;
      const int64_t pixel = int64_t{out_y} * a.out_width + out_x;
      float sum = 0.0f;
      for (int i = 0; i < a.kernel_h; i++) {
        const int y = out_y * a.stride_h + i * a.dilation_h - a.top;
        if (y < 0 || y % a.between_h != 0 || y / a.between_h >= a.height) continue;
        for (int j = 0; j < a.kernel_w; j++) {
          const int x = out_x * a.stride_w + j * a.dilation_w - a.left;
          if (x < 0 || x % a.between_w != 0 || x / a.between_w >= a.width) continue;
          const int64_t at = in_image + int64_t{y / a.between_h} * a.width + x / a.between_w;
          int tap = i * a.kernel_w + j;
          if (a.flipped) tap = a.kernel_h * a.kernel_w - 1 - tap;
          const float weight =
              to_float(static_cast<const T*>(a.taps)[int64_t{tap} * a.channels + channel]);
          sum += weight *
                 operand.template operator()<T>(a.operand, a.input, at * a.channels + channel);
        }
      }
      float values[] = {sum * scale + bias};
      activate_all(a.activation, values);
      static_cast<T*>(a.output)[(out_image + pixel) * a.channels + channel] =
          from_float<T>(values[0]);
      total += values[0];
      merge_moments_of(count, mean, squares, 1.0f, values[0], 0.0f);
      count += 1.0f;
    }
  }
  if (a.sums == nullptr && a.counts == nullptr) return;
  float* shared = reinterpret_cast<float*>(dynamic_shared());  // [4, warps, 32]
  const float values[] = {total, count, mean, squares};
  for (int i = 0; i < 4; i++) shared[(i * kGeneralWarps + warp) * kWarp + lane] = values[i];
  __syncthreads();
  if (warp > 0 || channel >= a.channels) return;
  for (int w = 1; w < kGeneralWarps; w++) {
    const float* other = shared + w * kWarp + lane;
    constexpr int kNext = kGeneralWarps * kWarp;
    total += other[0];
    merge_moments_of(count, mean, squares, other[kNext], other[2 * kNext], other[3 * kNext]);
    count += other[kNext];
  }
  if (a.sums != nullptr) a.sums[int64_t{part} * a.channels + channel] = total * a.sum_factor;
  if (a.counts != nullptr) {
    float* to = a.partials + int64_t{2} * part * a.channels + channel;
    to[0] = mean * count;
    to[a.channels] = squares;
    if (channel == 0) a.counts[part] = count;
  }
}

struct GeneralGradientArguments {
  const void* upstream;
  const void* input;
  float* partials;  // [programs, taps + 1, channels]: the last is the bias's
  DepthwiseOperand gradient, forward;
  int64_t pixels, pixels_each;  // of the upstream gradient: all, a program's
  int channels, height, width, up_height, up_width;
  int kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, top, left;
  int chunks;
};

// A block has one tap, or the bias, of 32 channels and a program's pixels.
template <class T>
__global__ void __launch_bounds__(kGeneralWarps* kWarp, kGeneralBlocks)
    general_gradient_kernel(GeneralGradientArguments a) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int block = static_cast<int>(blockIdx.x);
  const int channel = block % a.chunks * kWarp + lane;
  block /= a.chunks;
  const int taps = a.kernel_h * a.kernel_w, tap = block % (taps + 1), program = block / (taps + 1);
  const int64_t first = program * a.pixels_each;
  const int64_t end = first + a.pixels_each < a.pixels ? first + a.pixels_each : a.pixels;
  float total = 0.0f;
#pragma unroll 1
  for (int64_t pixel = first + warp; pixel < end && channel < a.channels; pixel += kGeneralWarps) {
    const int64_t row = pixel / a.up_width;
    const int image = static_cast<int>(row / a.up_height);
    const int y =
        static_cast<int>(row % a.up_height) * a.stride_h + tap / a.kernel_w * a.dilation_h - a.top;
    const int x = static_cast<int>(pixel % a.up_width) * a.stride_w +
                  tap % a.kernel_w * a.dilation_w - a.left;
    const bool inside = y >= 0 && y < a.height && x >= 0 && x < a.width;
    if (tap < taps && !inside) continue;
    float value = OperandOfChannel(a.gradient, image, channel, a.channels)
                      .template operator()<T>(a.gradient, a.upstream, pixel * a.channels + channel);
    if (tap < taps) {
      const int64_t at = (int64_t{image} * a.height + y) * a.width + x;
      value *= OperandOfChannel(a.forward, image, channel, a.channels)
                   .template operator()<T>(a.forward, a.input, at * a.channels + channel);
    }
    total += value;
  }
  float* shared = reinterpret_cast<float*>(dynamic_shared());  // [warps, 32]
  shared[threadIdx.x] = total;
  __syncthreads();
  if (warp > 0 || channel >= a.channels) return;
#pragma unroll
  for (int w = 1; w < kGeneralWarps; w++) total += shared[w * kWarp + lane];
  a.partials[(int64_t{program} * (taps + 1) + tap) * a.channels + channel] = total;
}

}  // namespace
}  // namespace effkernels
