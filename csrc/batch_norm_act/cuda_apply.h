// output = activation((input - mean) * scale + bias + residual): one pass.
//
// (x - mean) * scale, not x * scale + shift, which would lose digits where the mean is large.
// A block makes mean, scale and bias of its channels (256 at most) once, in shared memory, while
// its first rows are on their way; a thread then takes 4 rows at a time (2 and 2 of the residual),
// 4 channels after 4. bfloat16 with SiLU on sm_90: 12.1 instructions a value, 2 of them MUFU, where
// 3.0 TB/s leave time for 38 and 4.8. 64 registers, 32 warps, 64 KB of loads under way.
//
// Tried: the vectors of the channels in registers: 79 of them, and 24 warps; 16 to 240 bytes of
// spills where 64 were asked for. The activation behind one branch for all 4 rows' values: 97.
// Each access with a branch of its own for tensors that are not aligned: the loads of a step were
// 50 instructions apart, now they follow each other.
//
// promise: apply_kernel<.*> threads 256, shared 3072, warps 32, loads 16, stores 16
#pragma once

#include "batch_norm_act/cuda_statistics.h"

namespace effkernels {
namespace {

struct Normalization {
  Values mean, var, weight, bias;
  float eps;
};

template <class T>
__device__ inline float factor_of(const Normalization& n, int c) {
  const float factor = rsqrtf(value_at<T>(n.var, c) + n.eps);
  return n.weight.data ? factor * value_at<T>(n.weight, c) : factor;
}

// The rows of the table of a block's channels: before = (x - mean) * scale + bias.
enum { kMean, kScale, kBias, kNormalization };

// `slope`, if there is one, adds the rows kSlope and kConstant of the gradient.
enum { kSlope = kNormalization, kConstant, kGradient };

template <class T>
__device__ inline void fill_table(float* table, const Normalization& n, const float* slope,
                                  const Tiles& tiles, int chunk) {
  const int columns = tiles.width * kVector<T>;
  for (int column = threadIdx.x; column < columns; column += kThreads) {
    const int c = chunk * columns + column;
    const bool inside = c < tiles.channels;
    float* to = table + table_place<T>(tiles, column);
    to[kMean * columns] = inside ? value_at<T>(n.mean, c) : 0.0f;
    to[kScale * columns] = inside ? factor_of<T>(n, c) : 0.0f;
    to[kBias * columns] = inside && n.bias.data ? value_at<T>(n.bias, c) : 0.0f;
    if (slope) {
      to[kSlope * columns] = inside ? slope[c] : 0.0f;
      to[kConstant * columns] = inside ? slope[tiles.channels + c] : 0.0f;
    }
  }
}

constexpr int kApplyBlocks = 4;

template <class T>
struct Apply {
  T* output;
  const T* input;
  const T* residual;
  Normalization normalization;
  int64_t rows;
  int steps;
  Tiles tiles;
  bool aligned;
  Activation activation;
};

template <class T, bool kResidual>
__global__ void __launch_bounds__(kThreads, kApplyBlocks) apply_kernel(Apply<T> args) {
  constexpr int kRows = kResidual ? kUnroll / 2 : kUnroll;
  float* table = reinterpret_cast<float*>(dynamic_shared());
  const Tiles& tiles = args.tiles;
  const int chunk = static_cast<int>(blockIdx.x) % tiles.chunks;
  const Lane lane = lane_of<T>(tiles, chunk);
  const int64_t first =
      static_cast<int64_t>(blockIdx.x / tiles.chunks) * (args.steps * kRows * tiles.lanes);
  const int left = least(args.rows - first - lane.row, args.steps * kRows * tiles.lanes);
  int64_t at = (first + lane.row) * tiles.channels + lane.c;
  const int stride = tiles.lanes * tiles.channels;

  Words x[kRows], added[kRows];
  const auto fetch = [&](int done) {
    with_alignment(args.aligned, [&](auto aligned) {
#pragma unroll
      for (int u = 0; u < kRows; u++) {
        const int count = done + u * tiles.lanes < left ? lane.count : 0;
        x[u] = load_first(args.input + at + u * stride, count, aligned);
        if (kResidual) added[u] = load_first(args.residual + at + u * stride, count, aligned);
      }
    });
  };
  fetch(0);
  fill_table<T>(table, args.normalization, nullptr, tiles, chunk);
  __syncthreads();
  if (lane.count == 0) return;
  for (int done = 0; done < left;) {
    with_activation(args.activation, [&](auto constant) {
#pragma unroll
      for (int part = 0; part < kParts<T>; part++) {
        float mean[4], scale[4], bias[4];
        load_part<T>(table, kMean, tiles, lane, part, mean);
        load_part<T>(table, kScale, tiles, lane, part, scale);
        load_part<T>(table, kBias, tiles, lane, part, bias);
#pragma unroll
        for (int u = 0; u < kRows; u++) {
          float values[4], other[4];
          unpack_part<T>(x[u], part, values);
          if (kResidual) unpack_part<T>(added[u], part, other);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            values[i] = (values[i] - mean[i]) * scale[i] + bias[i];
            if (kResidual) values[i] += other[i];
            values[i] = activate<decltype(constant){}()>(values[i]);
          }
          pack_part<T>(values, part, x[u]);
        }
      }
    });
    with_alignment(args.aligned, [&](auto aligned) {
#pragma unroll
      for (int u = 0; u < kRows; u++) {
        const int count = done + u * tiles.lanes < left ? lane.count : 0;
        store_first(args.output + at + u * stride, count, aligned, x[u]);
      }
    });
    done += kRows * tiles.lanes;
    at += kRows * stride;
    if (done < left) fetch(done);
  }
}

}  // namespace
}  // namespace effkernels
