// BatchNorm's gradient. With t = upstream * activation'(before), x' = input - mean, and the sums
// over all rows of t and t * x':
//
//   factor   = weight / sqrt(var + eps)
//   slope    = -factor / (var + eps) * sum(t * x') / rows
//   constant = -factor * sum(t) / rows
//   input_gradient = factor * t + slope * x' + constant
//
// Two passes over upstream and input: sums, and, when those are known, the gradient; `before` is
// made again in both. bfloat16 with SiLU on sm_90: 21 and 23 instructions a value, where 3.0 TB/s
// leave time for 38 and 57. 4 loads a thread in 16 warps: 32 KB under way.
//
// Tried: 24 warps: 40 to 320 bytes of spills on sm_100; the channels' vectors in registers, as
// they are for `apply`: spills on sm_100 even with 128 registers.
//
// promise: gradient_sums_kernel<.*> threads 256, shared 16384, warps 16, loads 16
// promise: merge_gradient_sums_kernel<.*> threads 512, shared 2048, warps 32
// promise: differentiate_kernel<.*> threads 256, shared 5120, warps 16, loads 16, stores 16
#pragma once

#include "batch_norm_act/cuda_apply.h"

namespace effkernels {
namespace {

struct Finish {
  const float* partials;  // [blocks, 2, channels]: Σ t, Σ t * (x - mean)
  Normalization normalization;
  Written weight_gradient, bias_gradient, mean_gradient, var_gradient;
  const float* mean_upstream;
  const float* var_upstream;
  float* slope;  // [2, channels] with the constants behind, or null
  float rows;
  int blocks, channels;
  bool training;
};

template <class T>
__device__ inline void write(const Written& to, int c, float value) {
  if (to.data) write_value<T>(to, c, value);
}

template <class T>
__device__ inline void finish_gradient(const Finish& args, int c, float total, float product) {
  const Normalization& n = args.normalization;
  const float deviation = rsqrtf(value_at<T>(n.var, c) + n.eps);
  const float factor = n.weight.data ? deviation * value_at<T>(n.weight, c) : deviation;
  product *= deviation;
  write<T>(args.weight_gradient, c, product);
  write<T>(args.bias_gradient, c, total);
  if (args.training) {
    if (!args.slope) return;
    float slope = -factor * deviation * product / args.rows;
    float constant = -factor * total / args.rows;
    if (args.var_upstream) slope += 2.0f * args.var_upstream[c] / args.rows;
    if (args.mean_upstream) constant += args.mean_upstream[c] / args.rows;
    args.slope[c] = slope;
    args.slope[args.channels + c] = constant;
  } else {
    write<T>(args.mean_gradient, c, -factor * total);
    write<T>(args.var_gradient, c, -0.5f * factor * deviation * product);
  }
}

template <class T>
struct Sums {
  const T* upstream;
  const T* input;
  const T* residual;
  Finish finish;
  float* partials;
  int64_t rows;
  int block_rows;
  Tiles tiles;
  bool aligned, reads_residual;
  Activation activation;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) gradient_sums_kernel(Sums<T> args) {
  constexpr int kV = kVector<T>, kRows = kUnroll / 2;
  const Tiles& tiles = args.tiles;
  const int chunk = static_cast<int>(blockIdx.x) % tiles.chunks;
  const int block = static_cast<int>(blockIdx.x) / tiles.chunks;
  const Lane lane = lane_of<T>(tiles, chunk);
  const int64_t first = int64_t{block} * args.block_rows;
  const int rows = least(args.rows - first, args.block_rows);
  int64_t at = (first + lane.row) * tiles.channels + lane.c;
  const int stride = tiles.lanes * tiles.channels;

  float* table = reinterpret_cast<float*>(dynamic_shared());
  fill_table<T>(table, args.finish.normalization, nullptr, tiles, chunk);
  __syncthreads();
  float total[kV] = {}, product[kV] = {};
  if (lane.count > 0) {
    for (int row = lane.row; row < rows; row += kRows * tiles.lanes) {
      Words upstream[kRows], words[kRows], added[kRows];
      with_alignment(args.aligned, [&](auto aligned) {
#pragma unroll
        for (int u = 0; u < kRows; u++) {  // zero past the last row, and so is t
          const int count = row + u * tiles.lanes < rows ? lane.count : 0;
          const int more = args.reads_residual ? count : 0;
          upstream[u] = load_first(args.upstream + at + u * stride, count, aligned);
          words[u] = load_first(args.input + at + u * stride, count, aligned);
          added[u] = load_first(args.residual + at + u * stride, more, aligned);
        }
      });
      at += kRows * stride;
      with_activation(args.activation, [&](auto constant) {
#pragma unroll
        for (int part = 0; part < kParts<T>; part++) {
          float mean[4], scale[4], bias[4];
          load_part<T>(table, kMean, tiles, lane, part, mean);
          load_part<T>(table, kScale, tiles, lane, part, scale);
          load_part<T>(table, kBias, tiles, lane, part, bias);
#pragma unroll
          for (int u = 0; u < kRows; u++) {
            float x[4], t[4], other[4];
            unpack_part<T>(words[u], part, x);
            unpack_part<T>(upstream[u], part, t);
            unpack_part<T>(added[u], part, other);
#pragma unroll
            for (int i = 0; i < 4; i++) {
              x[i] -= mean[i];
              const float before = x[i] * scale[i] + bias[i] + other[i];
              t[i] *= slope<decltype(constant){}()>(before);
              total[4 * part + i] += t[i];
              product[4 * part + i] += t[i] * x[i];
            }
          }
        }
      });
    }
  }
  __syncthreads();  // the sums take the table's place

  const int columns = tiles.width * kV;
  float* totals = reinterpret_cast<float*>(dynamic_shared());
  float* products = totals + tiles.lanes * columns;
  if (lane.row < tiles.lanes) {
    const int at = lane.row * columns + lane.c - chunk * columns;
    store_floats<T>(totals + at, total);
    store_floats<T>(products + at, product);
  }
  merge_lanes<kThreads>(totals, tiles.lanes, columns);
  merge_lanes<kThreads>(products, tiles.lanes, columns);
  const int c = chunk * columns + static_cast<int>(threadIdx.x);
  if (static_cast<int>(threadIdx.x) < columns && c < tiles.channels) {
    if (args.finish.blocks == 1) {
      finish_gradient<T>(args.finish, c, totals[threadIdx.x], products[threadIdx.x]);
    } else {
      float* partial = args.partials + int64_t{block} * 2 * tiles.channels + c;
      partial[0] = totals[threadIdx.x];
      partial[tiles.channels] = products[threadIdx.x];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kMergeChannels* kMergeLanes)
    merge_gradient_sums_kernel(Finish args) {
  float* table = reinterpret_cast<float*>(dynamic_shared());
  const int lane = threadIdx.x / kMergeChannels;
  const int c = static_cast<int>(blockIdx.x) * kMergeChannels + threadIdx.x % kMergeChannels;
  const int64_t stride = int64_t{2} * args.channels;
  float total = 0.0f, product = 0.0f;
  if (c < args.channels) {
#pragma unroll 4
    for (int block = lane; block < args.blocks; block += kMergeLanes) {
      total += args.partials[block * stride + c];
      product += args.partials[block * stride + args.channels + c];
    }
  }
  total = merge_sum(table, total);
  product = merge_sum(table, product);
  if (lane == 0 && c < args.channels) finish_gradient<T>(args, c, total, product);
}

template <class T>
struct Differentiate {
  T* input_gradient;
  T* residual_gradient;
  const T* upstream;
  const T* input;
  const T* residual;
  const float* slope;  // [2, channels], or null
  Normalization normalization;
  int64_t rows;
  int steps;
  Tiles tiles;
  bool aligned, reads_input, reads_residual;
  Activation activation;
};

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 3 : 2)
    differentiate_kernel(Differentiate<T> args) {
  constexpr int kRows = kUnroll / 2;
  float* table = reinterpret_cast<float*>(dynamic_shared());
  const Tiles& tiles = args.tiles;
  const int chunk = static_cast<int>(blockIdx.x) % tiles.chunks;
  const Lane lane = lane_of<T>(tiles, chunk);
  const int64_t first =
      static_cast<int64_t>(blockIdx.x / tiles.chunks) * (args.steps * kRows * tiles.lanes);
  const int left = least(args.rows - first - lane.row, args.steps * kRows * tiles.lanes);
  const int64_t base = first * tiles.channels;  // the same for all threads, as registers are few
  int at = lane.row * tiles.channels + lane.c;
  const int stride = tiles.lanes * tiles.channels;

  Words upstream[kRows], words[kRows], added[kRows];
  const auto fetch = [&](int done) {
    with_alignment(args.aligned, [&](auto aligned) {
#pragma unroll
      for (int u = 0; u < kRows; u++) {
        const int count = done + u * tiles.lanes < left ? lane.count : 0;
        upstream[u] = load_first(args.upstream + base + at + u * stride, count, aligned);
        words[u] =
            load_first(args.input + base + at + u * stride, args.reads_input ? count : 0, aligned);
        added[u] = load_first(args.residual + base + at + u * stride,
                              args.reads_residual ? count : 0, aligned);
      }
    });
  };
  fetch(0);
  fill_table<T>(table, args.normalization, args.slope, tiles, chunk);
  __syncthreads();
  if (lane.count == 0) return;
  for (int done = 0; done < left;) {
    with_activation(args.activation, [&](auto chosen) {
#pragma unroll
      for (int part = 0; part < kParts<T>; part++) {
        float mean[4], scale[4], bias[4], slopes[4] = {}, constant[4] = {};
        load_part<T>(table, kMean, tiles, lane, part, mean);
        load_part<T>(table, kScale, tiles, lane, part, scale);
        load_part<T>(table, kBias, tiles, lane, part, bias);
        if (args.slope) {
          load_part<T>(table, kSlope, tiles, lane, part, slopes);
          load_part<T>(table, kConstant, tiles, lane, part, constant);
        }
#pragma unroll
        for (int u = 0; u < kRows; u++) {
          float x[4], t[4], other[4];
          unpack_part<T>(words[u], part, x);
          unpack_part<T>(upstream[u], part, t);
          unpack_part<T>(added[u], part, other);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            x[i] -= mean[i];
            const float before = x[i] * scale[i] + bias[i] + other[i];
            t[i] *= slope<decltype(chosen){}()>(before);
            x[i] = t[i] * scale[i] + (x[i] * slopes[i] + constant[i]);
          }
          pack_part<T>(t, part, upstream[u]);
          pack_part<T>(x, part, words[u]);
        }
      }
    });
    with_alignment(args.aligned, [&](auto aligned) {
#pragma unroll
      for (int u = 0; u < kRows; u++) {
        const int count = done + u * tiles.lanes < left ? lane.count : 0;
        if (args.residual_gradient) {
          store_first(args.residual_gradient + base + at + u * stride, count, aligned, upstream[u]);
        }
        if (args.input_gradient) {
          store_first(args.input_gradient + base + at + u * stride, count, aligned, words[u]);
        }
      }
    });
    done += kRows * tiles.lanes;
    at += kRows * stride;
    if (done < left) fetch(done);
  }
}

}  // namespace
}  // namespace effkernels
