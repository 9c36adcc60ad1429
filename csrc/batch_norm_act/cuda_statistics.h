// mean[c] and var[c] (biased) of [rows, channels]: two stages, no atomics, the same bits every
// time.
//
// A thread takes 4 rows' vectors at a time: their mean, the squares of their distances from it, and
// then both are merged with what it has (Chan, Golub and LeVeque, 1979). So nothing is lost where
// the mean is far larger than the deviation, as it would be in E[x^2] - E[x]^2. Merging 4 rows
// takes 5.2 instructions a value (bfloat16, sm_90); reading at 3.0 TB/s leaves an H100 time for 19
// (132 processors, 128 lanes, 1.7 GHz).
// Blocks, 3 a processor: 24 warps with 4 loads each have 48 KB under way, where 3.0 TB/s at 600 ns
// need 14. Lanes of a block are merged about their mean, which is found twice, the second time from
// distances that rounding takes nothing of: with the first alone, or by merging lane after lane,
// weight gradients had up to 16 times PyTorch's error. Blocks are merged about the first one's
// mean. As compiled: 57 to 80 registers.
//
// Tried: all 8 channels of a vector at a time instead of 4 and 4: spills at 80 registers on
// sm_100. A predicate for each row of a step instead of a loop for the last rows: spills as well.
//
// promise: statistics_kernel<.*> threads 256, shared 25600, warps 24, loads 16
// promise: merge_statistics_kernel threads 512, shared 2048, warps 32
#pragma once

#include "common/cuda.h"
#include "common/cuda_rows.h"

namespace effkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWidest = 32;  // vectors of a row that a block takes: 512 bytes
constexpr int kUnroll = 4;   // accesses under way per thread
constexpr int kMergeChannels = 8, kMergeLanes = 64;  // of a block that merges partial results

__device__ inline int least(int64_t left, int most) {
  return left < most ? static_cast<int>(left) : most;
}

template <class T>
struct Statistics {
  const T* input;
  float* partials;  // [blocks, 2, channels]: mean, Σ (x - mean)²; or mean and var, if blocks is 1
  float* mean;
  float* var;
  int64_t rows;
  int block_rows, blocks;
  Tiles tiles;
  bool aligned;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 3) statistics_kernel(Statistics<T> args) {
  constexpr int kV = kVector<T>;
  const Tiles& tiles = args.tiles;
  const int chunk = static_cast<int>(blockIdx.x) % tiles.chunks;
  const int block = static_cast<int>(blockIdx.x) / tiles.chunks;
  const Lane lane = lane_of<T>(tiles, chunk);
  const int64_t first = int64_t{block} * args.block_rows;
  const int rows = least(args.rows - first, args.block_rows);

  float mean[kV] = {}, squares[kV] = {}, count = 0.0f;
  int64_t at = (first + lane.row) * tiles.channels + lane.c;
  const int stride = tiles.lanes * tiles.channels;
  if (lane.count > 0) {
    int row = lane.row;
    for (; row + (kUnroll - 1) * tiles.lanes < rows; row += kUnroll * tiles.lanes) {
      Words words[kUnroll];
      with_alignment(args.aligned, [&](auto aligned) {
#pragma unroll
        for (int u = 0; u < kUnroll; u++) {
          words[u] = load_first(args.input + at + u * stride, lane.count, aligned);
        }
      });
      at += kUnroll * stride;
      // The mean of these few, their distances from it, and how it moves the mean of all so far.
      const float weight = kUnroll / (count + kUnroll);
#pragma unroll
      for (int part = 0; part < kParts<T>; part++) {
        float fresh[4] = {}, x[kUnroll][4];
#pragma unroll
        for (int u = 0; u < kUnroll; u++) {
          unpack_part<T>(words[u], part, x[u]);
#pragma unroll
          for (int i = 0; i < 4; i++) fresh[i] += x[u][i];
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
          fresh[i] *= 1.0f / kUnroll;
          float& sum = squares[4 * part + i];
#pragma unroll
          for (int u = 0; u < kUnroll; u++) {
            const float away = x[u][i] - fresh[i];
            sum += away * away;
          }
          const float distance = fresh[i] - mean[4 * part + i];
          sum += distance * distance * (count * weight);
          mean[4 * part + i] += distance * weight;
        }
      }
      count += kUnroll;
    }
    for (; row < rows; row += tiles.lanes) {  // of the last block
      float x[kV];
      unpack<T>(load_first(args.input + at, lane.count, args.aligned), x);
      at += stride;
      count += 1.0f;
      const float weight = 1.0f / count;
#pragma unroll
      for (int i = 0; i < kV; i++) {
        const float distance = x[i] - mean[i];
        mean[i] += distance * weight;
        squares[i] += distance * (x[i] - mean[i]);
      }
    }
  }

  // Tables with a row for each lane. Distances from the first lane's mean are small, and so is what
  // rounding takes from their sum.
  const int columns = tiles.width * kV, thread = static_cast<int>(threadIdx.x);
  float* means = reinterpret_cast<float*>(dynamic_shared());
  float* sums = means + tiles.lanes * columns;
  float* moved = sums + tiles.lanes * columns;
  float* center = moved + tiles.lanes * columns;  // [columns]
  if (lane.row < tiles.lanes) {
    const int place = lane.row * columns + lane.c - chunk * columns;
    store_floats<T>(means + place, mean);
    store_floats<T>(sums + place, squares);
  }
  __syncthreads();
  const auto each = [&](auto&& f) {  // f(index, column, rows of this lane)
    for (int i = thread; i < tiles.lanes * columns; i += kThreads) {
      const int row = i / columns, of_lane = (rows - row + tiles.lanes - 1) / tiles.lanes;
      f(i, i - row * columns, of_lane > 0 ? static_cast<float>(of_lane) : 0.0f);
    }
  };
  // Twice: what rounding took from a sum of large distances is found by that of small ones.
  if (thread < columns) center[thread] = means[thread];
  for (int turn = 0; turn < 2; turn++) {
    __syncthreads();
    each([&](int i, int column, float of_lane) {
      moved[i] = of_lane > 0.0f ? of_lane * (means[i] - center[column]) : 0.0f;
    });
    merge_lanes<kThreads>(moved, tiles.lanes, columns);
    if (thread < columns) center[thread] += moved[thread] / static_cast<float>(rows);
  }
  __syncthreads();
  each([&](int i, int column, float of_lane) {
    const float distance = means[i] - center[column];
    if (of_lane > 0.0f) sums[i] += of_lane * distance * distance;
  });
  merge_lanes<kThreads>(sums, tiles.lanes, columns);
  const int c = chunk * columns + thread;
  if (thread < columns && c < tiles.channels) {
    if (args.blocks == 1) {
      args.mean[c] = center[thread];
      args.var[c] = sums[thread] / static_cast<float>(rows);
    } else {
      float* partial = args.partials + int64_t{block} * 2 * tiles.channels + c;
      partial[0] = center[thread];
      partial[tiles.channels] = sums[thread];
    }
  }
}

// The sum over a block of `value`, in every thread, for threads with the same threadIdx.x %
// kMergeChannels; `table` has kMergeLanes rows of them.
__device__ inline float merge_sum(float* table, float value) {
  const int column = threadIdx.x % kMergeChannels, lane = threadIdx.x / kMergeChannels;
  __syncthreads();
  table[lane * kMergeChannels + column] = value;
  __syncthreads();
  for (int half = kMergeLanes / 2; half > 0; half /= 2) {
    if (lane < half) {
      table[lane * kMergeChannels + column] += table[(lane + half) * kMergeChannels + column];
    }
    __syncthreads();
  }
  return table[column];
}

struct Merge {
  const float* partials;  // [blocks, 2, channels]
  float* mean;
  float* var;
  int64_t rows;
  int block_rows, blocks, channels;
};

__global__ void __launch_bounds__(kMergeChannels* kMergeLanes) merge_statistics_kernel(Merge args) {
  float* table = reinterpret_cast<float*>(dynamic_shared());
  const int lane = threadIdx.x / kMergeChannels;
  const int c = static_cast<int>(blockIdx.x) * kMergeChannels + threadIdx.x % kMergeChannels;
  const int64_t stride = int64_t{2} * args.channels;
  const float* from = args.partials + c;
  const float rows = static_cast<float>(args.rows), usual = static_cast<float>(args.block_rows);
  const float last = static_cast<float>(args.rows - int64_t{args.blocks - 1} * args.block_rows);
  // Distances from the first block's mean are small, and so is what rounding takes from them.
  const float start = c < args.channels ? from[0] : 0.0f;
  float moved = 0.0f, squares = 0.0f;
  if (c < args.channels) {
#pragma unroll 4
    for (int block = lane; block < args.blocks; block += kMergeLanes) {
      const float count = block == args.blocks - 1 ? last : usual;
      moved += count * (from[block * stride] - start);
    }
  }
  const float mean = start + merge_sum(table, moved) / rows;
  if (c < args.channels) {
#pragma unroll 4
    for (int block = lane; block < args.blocks; block += kMergeLanes) {
      const float count = block == args.blocks - 1 ? last : usual;
      const float distance = from[block * stride] - mean;
      squares += from[block * stride + args.channels] + count * distance * distance;
    }
  }
  squares = merge_sum(table, squares);
  if (lane == 0 && c < args.channels) {
    args.mean[c] = mean;
    args.var[c] = squares / rows;
  }
}

}  // namespace
}  // namespace effkernels
