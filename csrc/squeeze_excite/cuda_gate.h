// From partial sums of the mean to the gate, in one kernel:
//
//   hidden[n] = reduce_weight * mean[n] + reduce_bias                                     [R]
//   gate[n]   = gate_activation(expand_weight * activation(hidden[n]) + expand_bias)      [C]
//
// Reads the weights, 221 KB at B0's last blocks (1152 channels, 48 of them reduced, 2 bytes), out
// of the L2: the work is latency. No block can wait for another, so each makes the whole hidden
// vector of its images (110 KB of weights, 1.2 us at 55 bytes a clock) and then a slice of their
// gates, which is the smaller the more processors there are left: 64 channels at batch 1.
//
// What waits for what: the first rows of the first matrix are asked for before the partial sums;
// those before anything is multiplied; the first rows of the second matrix before the hidden vector
// is complete. So a block waits for memory once, and then for the L2's rate. A warp multiplies 4
// rows of the first matrix with the means, which lie in shared memory, so that reading these is no
// more work than the products; lanes side by side share a row of the second matrix (8 lanes at
// R = 48) and read it as it lies in memory.
//
// Of 66 images (on 132 processors) or more a block takes 4, and reads the weights once for them: at
// 256 images 128 blocks read 21 MB, where one block an image would read 57 MB.
// As compiled for sm_90: 64 registers for one image (float16: 81), 88 to 121 for four.
//
// Not tried, as the emulated GPU has none: clusters, whose 8 blocks would make an eighth of the
// hidden vector each (0.2 us instead of 1.2); tensor cores, which have nothing to do at batch 1.
// No GPU has run this.
//
// promise: gate_kernel<.*> threads 512, shared 66560, warps 16, loads 16
#pragma once

#include "common/cuda.h"
#include "common/cuda_rows.h"

namespace effkernels {
namespace {

constexpr int kGateThreads = 512, kGateWarps = kGateThreads / kWarp;
constexpr int kRows = 4;   // of the first matrix that a warp multiplies at once
constexpr int kSteps = 4;  // channels of the second matrix that a lane has under way

// ---- Vectors in shared memory. Lanes that read 8 floats each, next to each other, would meet in
// the banks: the first four of every eight lie in one plane, the others in a second one.

template <class T>
__device__ inline int place(int index, int padded) {
  if constexpr (kVector<T> == 4) return index;
  return index / 8 * 4 + index % 4 + (index % 8 / 4) * (padded / 2);
}

template <class T>
__device__ inline void load_planes(const float* vector, int padded, int v,
                                   float (&values)[kVector<T>]) {
#pragma unroll
  for (int half = 0; half < kVector<T> / 4; half++) {
    const Words words = load_words(vector + half * (padded / 2) + v * 4);
#pragma unroll
    for (int i = 0; i < 4; i++) values[4 * half + i] = words.value[i];
  }
}

// Partial sums [images, blocks, channels], to be added up and multiplied with a factor.
struct Partials {
  Values sums;
  float factor;
  int blocks;
  int parts;  // threads that share those of a channel
  bool aligned;
};

template <class T>
struct Gate {
  T* gate;
  Partials mean;
  const T* reduce_weight;
  Values reduce_bias;
  const T* expand_weight;
  Values expand_bias;
  int images, channels, reduced;
  Activation activation, gate_activation;
  bool reduce_aligned, expand_aligned;
  int splits;         // warps that share a row of the first matrix
  int lanes;          // that share a row of the second matrix: 4, 8, 16 or 32
  int slices, slice;  // blocks that share the channels, channels of each

  __host__ __device__ int padded() const {
    return (channels + kVector<T> - 1) / kVector<T> * kVector<T>;
  }
  __host__ __device__ int padded_reduced() const {
    return (reduced + kVector<T> - 1) / kVector<T> * kVector<T>;
  }
};

// vector[image][place(c)] of kImages images from `first` on, zero where there is none. A barrier
// comes before others see it.
template <class T, int kImages>
__device__ inline void add_partials(const Partials& from, const Gate<T>& args, int first,
                                    float* vector, float* scratch) {
  const int padded = args.padded(), quads = padded / 4, items = kImages * quads;
  const int channels = args.channels;
  for (int i = threadIdx.x; i < items * from.parts; i += kGateThreads) {
    const int part = i / items, item = i - part * items;
    const int image = item / quads, c = (item - image * quads) * 4;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (first + image < args.images) {
      const int64_t base = int64_t{first + image} * from.blocks * channels + c;
      if (from.aligned && c < channels) {
        const float* sums = static_cast<const float*>(from.sums.data) + base;
#pragma unroll 4
        for (int b = part; b < from.blocks; b += from.parts) {
          const Words words = load_words(sums + int64_t{b} * channels);
#pragma unroll
          for (int j = 0; j < 4; j++) sum[j] += words.value[j];
        }
      } else {
#pragma unroll 2
        for (int b = part; b < from.blocks; b += from.parts) {
#pragma unroll
          for (int j = 0; j < 4; j++) {
            if (c + j < channels)
              sum[j] += value_at<T>(from.sums, base + int64_t{b} * channels + j);
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (from.parts == 1) {
        vector[image * padded + place<T>(c + j, padded)] = sum[j] * from.factor;
      } else {
        scratch[(part * kImages + image) * padded + c + j] = sum[j];
      }
    }
  }
  if (from.parts == 1) return;
  __syncthreads();
  for (int i = threadIdx.x; i < kImages * padded; i += kGateThreads) {
    float sum = 0.0f;
    for (int part = 0; part < from.parts; part++) sum += scratch[part * kImages * padded + i];
    const int image = i / padded;
    vector[image * padded + place<T>(i - image * padded, padded)] = sum * from.factor;
  }
}

// The first matrix times the means: scratch[split][image][r], to be added up. `wait` makes the
// means while the first rows are on their way.
template <class T, int kImages, class Wait>
__device__ inline void multiply_means(const Gate<T>& args, const float* mean, float* scratch,
                                      Wait&& wait) {
  const int lane = threadIdx.x % kWarp, padded = args.padded(), vectors = padded / kVector<T>;
  const int groups = (args.reduced + kRows - 1) / kRows;
  const int span = ((vectors + args.splits - 1) / args.splits + kWarp - 1) / kWarp * kWarp;
  const auto fetch = [&](int task, int start, Words(&words)[kRows]) {
    const int r = task % groups * kRows, v = start + lane;
    with_alignment(args.reduce_aligned, [&](auto aligned) {
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        const int count = r + i < args.reduced ? args.channels - v * kVector<T> : 0;
        words[i] = load_first(args.reduce_weight + int64_t{r + i} * args.channels + v * kVector<T>,
                              count, aligned);
      }
    });
  };
  int task = static_cast<int>(threadIdx.x) / kWarp;
  Words following[kRows];
  if (task < groups * args.splits) fetch(task, task / groups * span, following);
  wait();
  for (; task < groups * args.splits; task += kGateWarps) {
    const int split = task / groups, begin = split * span;
    const int end = begin + span < vectors ? begin + span : vectors;
    if (task >= kGateWarps) fetch(task, begin, following);
    float sum[kRows][kImages] = {};
    for (int start = begin; start < end; start += kWarp) {
      float weight[kRows][kVector<T>];
#pragma unroll
      for (int i = 0; i < kRows; i++) unpack<T>(following[i], weight[i]);
      if (start + kWarp < end) fetch(task, start + kWarp, following);
      if (start + lane < vectors) {
#pragma unroll
        for (int image = 0; image < kImages; image++) {
          float values[kVector<T>];
          load_planes<T>(mean + image * padded, padded, start + lane, values);
#pragma unroll
          for (int i = 0; i < kRows; i++) {
#pragma unroll
            for (int j = 0; j < kVector<T>; j++) sum[i][image] += weight[i][j] * values[j];
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      const int r = task % groups * kRows + i;
#pragma unroll
      for (int image = 0; image < kImages; image++) {
        const float total = warp_sum(sum[i][image]);
        if (lane == 0 && r < args.reduced) {
          scratch[(split * kImages + image) * args.reduced + r] = total;
        }
      }
    }
  }
}

// hidden[image][place(r)] = activation of the sum of what `multiply_means` left, zero past the end.
// `use` gets (image, r, before the activation, after it), too.
template <class T, int kImages, class F>
__device__ inline void activate_hidden(const Gate<T>& args, const float* scratch, float* hidden,
                                       F&& use) {
  const int reduced = args.reduced, padded = args.padded_reduced();
  for (int i = threadIdx.x; i < kImages * padded; i += kGateThreads) {
    const int image = i / padded, r = i - image * padded;
    float value = 0.0f;
    if (r < reduced) {
      for (int split = 0; split < args.splits; split++) {
        value += scratch[(split * kImages + image) * reduced + r];
      }
      if (args.reduce_bias.data) value += value_at<T>(args.reduce_bias, r);
      float activated[1] = {value};
      activate_all(args.activation, activated);
      use(image, r, value, activated[0]);
      value = activated[0];
    }
    hidden[image * padded + place<T>(r, padded)] = value;
  }
}

// Calls finish(c, sums of kImages images) with the second matrix times `hidden` for each channel
// of [begin, end), by one thread each. `wait` is called when the first rows are on their way.
template <class T, int kImages, class Wait, class F>
__device__ inline void multiply_hidden(const Gate<T>& args, const float* hidden, int begin, int end,
                                       Wait&& wait, F&& finish) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  const int reduced = args.reduced, padded = args.padded_reduced(), vectors = padded / kVector<T>;
  const int lanes = args.lanes, rows = kWarp / lanes, own = lane % lanes, group = lane / lanes;
  const auto fetch = [&](int base, int start, Words(&words)[kSteps]) {
    const int at = (start + own) * kVector<T>;
    with_alignment(args.expand_aligned, [&](auto aligned) {
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        const int c = base + step * rows + group;
        words[step] = load_first(args.expand_weight + int64_t{c} * reduced + at,
                                 c < end ? reduced - at : 0, aligned);
      }
    });
  };
  Words words[kSteps];
  int base = begin + warp * kSteps * rows;
  fetch(base, 0, words);
  wait();
  for (bool first = true; base < end; base += kGateWarps * kSteps * rows, first = false) {
    float sum[kSteps][kImages] = {};
    for (int start = 0; start < vectors; start += lanes) {
      if (!first || start > 0) fetch(base, start, words);
      if (start + own < vectors) {
#pragma unroll
        for (int image = 0; image < kImages; image++) {
          float values[kVector<T>];
          load_planes<T>(hidden + image * padded, padded, start + own, values);
#pragma unroll
          for (int step = 0; step < kSteps; step++) {
            float weight[kVector<T>];
            unpack<T>(words[step], weight);
#pragma unroll
            for (int j = 0; j < kVector<T>; j++) sum[step][image] += weight[j] * values[j];
          }
        }
      }
    }
    // Each lane gives away half of its channels and adds to the others, twice: three shuffles for
    // four channels where one by one they would take eight.
    float total[kImages];
#pragma unroll
    for (int image = 0; image < kImages; image++) {
      float half[2];
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const float kept = lane & 1 ? sum[k + 2][image] : sum[k][image];
        const float given = lane & 1 ? sum[k][image] : sum[k + 2][image];
        half[k] = kept + __shfl_xor_sync(kAllLanes, given, 1);
      }
      const float kept = lane & 2 ? half[1] : half[0], given = lane & 2 ? half[0] : half[1];
      total[image] = kept + __shfl_xor_sync(kAllLanes, given, 2);
      for (int distance = 4; distance < lanes; distance *= 2) {
        total[image] += __shfl_xor_sync(kAllLanes, total[image], distance);
      }
    }
    const int c = base + ((lane & 1) * 2 + (lane & 2) / 2) * rows + group;
    if (own < 4 && c < end) finish(c, total);
  }
}

template <class T, int kImages>
__global__ void __launch_bounds__(kGateThreads) gate_kernel(Gate<T> args) {
  float* mean = reinterpret_cast<float*>(dynamic_shared());
  float* hidden = mean + kImages * args.padded();
  float* scratch = hidden + kImages * args.padded_reduced();
  const int slice = static_cast<int>(blockIdx.x) % args.slices;
  const int first = static_cast<int>(blockIdx.x) / args.slices * kImages;
  const int begin = slice * args.slice;
  const int end = begin + args.slice < args.channels ? begin + args.slice : args.channels;

  multiply_means<T, kImages>(args, mean, scratch, [&] {
    add_partials<T, kImages>(args.mean, args, first, mean, scratch);
    __syncthreads();
  });
  const auto wait = [&] {
    __syncthreads();
    activate_hidden<T, kImages>(args, scratch, hidden, [](int, int, float, float) {});
    __syncthreads();
  };
  multiply_hidden<T, kImages>(args, hidden, begin, end, wait, [&](int c, float (&values)[kImages]) {
    const float bias = args.expand_bias.data ? value_at<T>(args.expand_bias, c) : 0.0f;
#pragma unroll
    for (int image = 0; image < kImages; image++) values[image] += bias;
    activate_all(args.gate_activation, values);
#pragma unroll
    for (int image = 0; image < kImages; image++) {
      if (first + image < args.images) {
        args.gate[int64_t{first + image} * args.channels + c] = from_float<T>(values[image]);
      }
    }
  });
}

}  // namespace
}  // namespace effkernels
