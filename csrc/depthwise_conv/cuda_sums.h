// The second stage of the sums: partial results of many blocks, added in a fixed order.
//
//   totals[b, c] = factor * sum over r of partials[b, r, c]
//   mean, variance: of all values, from each block's count, sum and sum of (value - its mean)^2
//
// Moves the partials once (moments twice, from the L2). A block has 32 channels, so that a warp
// reads 128 bytes side by side, and 32 rows at a time.
#pragma once

#include "common/cuda.h"

namespace effkernels {
namespace {

constexpr int kSumRows = 32, kSumThreads = kSumRows * kWarp;
constexpr int kMostMoments = 512, kMomentsGroup = 64;  // more are merged by groups first

// The sum of a column of the block's values, in the threads of its first warp.
__device__ inline float sum_of_rows(float value, float* shared) {
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  __syncthreads();  // the memory's former use is over
  shared[row * kWarp + lane] = value;
  __syncthreads();
  float total = 0.0f;
  for (int r = 0; r < kSumRows; r++) total += shared[r * kWarp + lane];
  return total;
}

__global__ void __launch_bounds__(kSumThreads)
    totals_kernel(float* totals, const float* partials, int rows, int channels, float factor) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const int blocks = (channels + kWarp - 1) / kWarp;
  const int batch = static_cast<int>(blockIdx.x) / blocks;
  const int c = static_cast<int>(blockIdx.x) % blocks * kWarp + threadIdx.x % kWarp;
  float total = 0.0f;
  if (c < channels) {
    const float* from = partials + int64_t{batch} * rows * channels + c;
#pragma unroll 4
    for (int r = threadIdx.x / kWarp; r < rows; r += kSumRows) total += from[int64_t{r} * channels];
  }
  total = sum_of_rows(total, shared);
  if (threadIdx.x < kWarp && c < channels) totals[int64_t{batch} * channels + c] = total * factor;
}

// Merges each `group` of rows; `last`: to the mean and variance of everything.
__global__ void __launch_bounds__(kSumThreads)
    moments_kernel(float* merged_counts, float* merged, const float* counts, const float* partials,
                   int rows, int channels, int group, bool last) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const int blocks = (channels + kWarp - 1) / kWarp;
  const int index = static_cast<int>(blockIdx.x) / blocks;
  const int c = static_cast<int>(blockIdx.x) % blocks * kWarp + threadIdx.x % kWarp;
  const int begin = index * group + threadIdx.x / kWarp;
  const int end = (index + 1) * group < rows ? (index + 1) * group : rows;
  float count = 0.0f, total = 0.0f, squares = 0.0f;
#pragma unroll 4
  for (int r = begin; r < end; r += kSumRows) {
    count += counts[r];
    if (c < channels) total += partials[int64_t{2} * r * channels + c];
  }
  count = sum_of_rows(count, shared);
  total = sum_of_rows(total, shared);
  const float mean = total / count;
#pragma unroll 4
  for (int r = begin; r < end; r += kSumRows) {
    if (c >= channels || counts[r] == 0.0f) continue;
    const float* at = partials + int64_t{2} * r * channels + c;
    const float distance = at[0] / counts[r] - mean;
    squares += at[channels] + counts[r] * distance * distance;
  }
  squares = sum_of_rows(squares, shared);
  if (threadIdx.x >= kWarp || c >= channels) return;
  float* to = merged + int64_t{2} * index * channels + c;
  to[0] = last ? mean : total;
  to[channels] = last ? squares / count : squares;
  if (!last && c == 0) merged_counts[index] = count;
}

inline void sum_rows(float* totals, const float* partials, int64_t batch, int64_t rows,
                     int64_t channels, float factor, Stream stream) {
  launch(totals_kernel, dim3(static_cast<unsigned>(batch * ceil_div(channels, kWarp))), kSumThreads,
         kSumThreads * 4, stream, totals, partials, static_cast<int>(rows),
         static_cast<int>(channels), factor);
}

// Floats that `rows` partial moments take, with those of their groups.
inline int64_t moments_workspace(int64_t rows, int64_t channels) {
  const int64_t merged = rows > kMostMoments ? ceil_div(rows, kMomentsGroup) : 0;
  return (rows + merged) * (1 + 2 * channels);
}

// [2, channels] from counts [rows] and partials [rows, 2, channels], which `workspace` begins with.
inline void merge_moments(float* moments, float* workspace, int64_t rows, int64_t channels,
                          Stream stream) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(channels, kWarp));
  const float* counts = workspace;
  const float* partials = workspace + rows;
  if (rows > kMostMoments) {
    const int64_t groups = ceil_div(rows, kMomentsGroup);
    float* merged_counts = workspace + rows * (1 + 2 * channels);
    launch(moments_kernel, dim3(static_cast<unsigned>(groups) * blocks), kSumThreads,
           kSumThreads * 4, stream, merged_counts, merged_counts + groups, counts, partials,
           static_cast<int>(rows), static_cast<int>(channels), kMomentsGroup, false);
    counts = merged_counts;
    partials = merged_counts + groups;
    rows = groups;
  }
  launch(moments_kernel, dim3(blocks), kSumThreads, kSumThreads * 4, stream, nullptr, moments,
         counts, partials, static_cast<int>(rows), static_cast<int>(channels),
         static_cast<int>(rows), true);
}

}  // namespace
}  // namespace effkernels
