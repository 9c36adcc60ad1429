// The gate's gradient. With e for the second product, before its activation, and h for the first:
//
//   expanded = upstream * gate_activation'(e)             [N, C]
//   gradient = (expand_weight^T * expanded) * activation'(h)     [N, R]
//
//   mean_gradient          = reduce_weight^T * gradient
//   reduce_weight_gradient = sum over n of gradient[n] x mean[n],  its bias's: sum of gradient[n]
//   expand_weight_gradient = sum over n of expanded[n] x activation(h[n]), its bias's: of
//   expanded[n]
//
// Two kernels. In the first a block takes 2 images from their partial sums to `gradient`: it does
// the forward work again and reads the second matrix once more (332 KB at B0's last blocks, 3.6 us
// at 55 bytes a clock). The second has all that is left, three products of the form
// sum over k of a[k, i] * b[k, j] (which is why the first also writes `gradient` transposed): 32 x
// 32 results a block, k in steps of 64 that are on their way while the last is multiplied. Each
// result is summed by four threads, and these added in order: no atomics. Float32 throughout, no
// tensor cores: at batch 256 it is 42 million products, 1.5 us of an H100's multiply-adds if they
// were all there is, and rounding them to tf32 would show in sums over few images.
//
// promise: hidden_gradient_kernel<.*> threads 512, shared 98816, warps 16, loads 16
// promise: products_kernel<.*> threads 256, shared 16896, warps 16, loads 16
#pragma once

#include "squeeze_excite/cuda_gate.h"

namespace effkernels {
namespace {

constexpr int kGradientImages = 2;  // of a block

template <class T>
struct HiddenGradient {
  Gate<T> gate;       // its result may be null
  Partials upstream;  // gradient for the gate
  float* mean;        // [images, channels]: the sums of the partial ones, times their factor
  float* expanded;    // [images, channels]: gradient for the second product
  float* hidden;      // [images, stride]: activation(hidden vector)
  float* gradient;    // [images, stride]: for the hidden vector before its activation
  float* transposed;  // [reduced, image_stride]: the same
  int stride, image_stride;
};

template <class T>
__global__ void __launch_bounds__(kGateThreads) hidden_gradient_kernel(HiddenGradient<T> args) {
  constexpr int kImages = kGradientImages, kV = kVector<T>;
  const Gate<T>& gate = args.gate;
  const int padded = gate.padded(), padded_reduced = gate.padded_reduced();
  const int channels = gate.channels, reduced = gate.reduced;
  const int first = static_cast<int>(blockIdx.x) * kImages;
  float* mean = reinterpret_cast<float*>(dynamic_shared());
  float* expanded = mean + kImages * padded;  // gradient for the gate, then for what is before it
  float* hidden = expanded + kImages * padded;
  float* slopes = hidden + kImages * padded_reduced;
  float* scratch = slopes + kImages * padded_reduced;

  multiply_means<T, kImages>(gate, mean, scratch, [&] {
    add_partials<T, kImages>(args.upstream, gate, first, expanded, scratch);
    __syncthreads();
    add_partials<T, kImages>(gate.mean, gate, first, mean, scratch);
    __syncthreads();
    for (int i = threadIdx.x; i < kImages * padded; i += kGateThreads) {
      const int image = i / padded, c = i - image * padded;
      if (first + image < gate.images && c < channels) {
        args.mean[int64_t{first + image} * channels + c] =
            mean[image * padded + place<T>(c, padded)];
      }
    }
  });
  const auto wait = [&] {
    __syncthreads();
    activate_hidden<T, kImages>(
        gate, scratch, hidden, [&](int image, int r, float before, float after) {
          float value = before;
          with_activation(gate.activation,
                          [&](auto constant) { value = slope<decltype(constant){}()>(value); });
          slopes[image * padded_reduced + r] = value;
          if (first + image < gate.images) {
            args.hidden[int64_t{first + image} * args.stride + r] = after;
          }
        });
    __syncthreads();
  };
  multiply_hidden<T, kImages>(gate, hidden, 0, channels, wait, [&](int c, float (&sums)[kImages]) {
    const float bias = gate.expand_bias.data ? value_at<T>(gate.expand_bias, c) : 0.0f;
    with_activation(gate.gate_activation, [&](auto constant) {
      constexpr Activation kActivation = decltype(constant){}();
#pragma unroll
      for (int image = 0; image < kImages; image++) {
        const float before = sums[image] + bias;
        float& gradient = expanded[image * padded + place<T>(c, padded)];
        gradient *= slope<kActivation>(before);
        if (first + image < gate.images) {
          const int64_t at = int64_t{first + image} * channels + c;
          args.expanded[at] = gradient;
          if (gate.gate) gate.gate[at] = from_float<T>(activate<kActivation>(before));
        }
      }
    });
  });
  __syncthreads();

  // The second matrix once more, transposed: a lane adds up its vector of the hidden values.
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  const int lanes = gate.lanes, rows = kWarp / lanes, own = lane % lanes, group = lane / lanes;
  const int width = lanes * kV;
  for (int start = 0; start < padded_reduced; start += width) {
    const int at = start + own * kV;
    float sum[kImages][kV] = {};
    for (int base = warp * kSteps * rows; base < channels; base += kGateWarps * kSteps * rows) {
      Words words[kSteps];
      with_alignment(gate.expand_aligned, [&](auto aligned) {
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          const int c = base + step * rows + group;
          words[step] = load_first(gate.expand_weight + int64_t{c} * reduced + at,
                                   c < channels ? reduced - at : 0, aligned);
        }
      });
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        const int c = base + step * rows + group;
        if (c >= channels) break;
        float weight[kV];
        unpack<T>(words[step], weight);
#pragma unroll
        for (int image = 0; image < kImages; image++) {
          const float gradient = expanded[image * padded + place<T>(c, padded)];
#pragma unroll
          for (int i = 0; i < kV; i++) sum[image][i] += weight[i] * gradient;
        }
      }
    }
#pragma unroll
    for (int image = 0; image < kImages; image++) {
#pragma unroll
      for (int i = 0; i < kV; i++) {
        for (int distance = lanes; distance < kWarp; distance *= 2) {
          sum[image][i] += __shfl_xor_sync(kAllLanes, sum[image][i], distance);
        }
      }
      if (group == 0)
        store_floats<T>(scratch + (warp * kImages + image) * width + own * kV, sum[image]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kImages * width; i += kGateThreads) {
      const int image = i / width, r = start + i - image * width;
      if (r < reduced && first + image < gate.images) {
        float total = 0.0f;
        for (int w = 0; w < kGateWarps; w++) total += scratch[w * kImages * width + i];
        total *= slopes[image * padded_reduced + r];
        args.gradient[int64_t{first + image} * args.stride + r] = total;
        args.transposed[int64_t{r} * args.image_stride + first + image] = total;
      }
    }
    __syncthreads();
  }
}

// ---- output[i, j] = Σ_k a[k, i] * b[k, j]: what follows for the weights and the mean

constexpr int kProductThreads = 256;
constexpr int kTile = 32;       // of i and of j
constexpr int kDepth = 64;      // values of k that are in shared memory
constexpr int kThreadTile = 4;  // a thread has 4 x 4 results of every fourth k
constexpr int kTileThreads = kTile / kThreadTile * (kTile / kThreadTile);
constexpr int kSharers = kProductThreads / kTileThreads;

struct Product {
  const float* a;  // [k, a_stride]
  Values b;        // [k, b_stride]
  int a_stride, b_stride, k, i, j;
  Written output;  // [i, j]; null: only the bias is wanted
  Written bias;    // [i]: Σ_k a[k, i]; may be null
  int blocks;      // of the grid
};

struct Products {
  Product products[3];
};

template <class T>
__device__ inline void load_quad(const Values& from, int64_t at, int count, float (&values)[4]) {
  const float* floats = static_cast<const float*>(from.data) + at;
  if (from.is_float && count >= 4 && is_aligned(floats)) {
    const Words words = load_words(floats);
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = words.value[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) values[i] = i < count ? value_at<T>(from, at + i) : 0.0f;
}

template <class T>
__global__ void __launch_bounds__(kProductThreads, 2) products_kernel(Products all) {
  float* a_tile = reinterpret_cast<float*>(dynamic_shared());  // [kDepth, kTile]
  float* b_tile = a_tile + kDepth * kTile;
  int block = static_cast<int>(blockIdx.x), which = 0;
  while (block >= all.products[which].blocks) block -= all.products[which++].blocks;
  const Product& product = all.products[which];
  const int tiles = (product.j + kTile - 1) / kTile;
  const int first_i = block / tiles * kTile, first_j = block % tiles * kTile;
  const int thread = static_cast<int>(threadIdx.x);

  constexpr int kLoads = kDepth * kTile / 4 / kProductThreads;
  float a_next[kLoads][4], b_next[kLoads][4];
  const int row = thread / (kTile / 4), quad = thread % (kTile / 4) * 4;
  const auto fetch = [&](int start) {
#pragma unroll
    for (int l = 0; l < kLoads; l++) {
      const int k = start + l * (kDepth / kLoads) + row;
      const bool inside = k < product.k;
      load_quad<T>({product.a, true}, int64_t{k} * product.a_stride + first_i + quad,
                   inside ? product.i - first_i - quad : 0, a_next[l]);
      load_quad<T>(product.b, int64_t{k} * product.b_stride + first_j + quad,
                   inside ? product.j - first_j - quad : 0, b_next[l]);
    }
  };
  const int sharer = thread / kTileThreads, within = thread % kTileThreads;
  const int i = within / (kTile / kThreadTile) * kThreadTile;
  const int j = within % (kTile / kThreadTile) * kThreadTile;
  float sum[kThreadTile][kThreadTile] = {}, total[kThreadTile] = {};
  fetch(0);
  for (int start = 0; start < product.k; start += kDepth) {
#pragma unroll
    for (int l = 0; l < kLoads; l++) {
      const int at = (l * (kDepth / kLoads) + row) * kTile + quad;
      store_floats<float>(a_tile + at, a_next[l]);
      store_floats<float>(b_tile + at, b_next[l]);
    }
    __syncthreads();
    if (start + kDepth < product.k) fetch(start + kDepth);
#pragma unroll 4
    for (int k = sharer; k < kDepth; k += kSharers) {
      const Words a = load_words(a_tile + k * kTile + i), b = load_words(b_tile + k * kTile + j);
#pragma unroll
      for (int m = 0; m < kThreadTile; m++) {
        total[m] += a.value[m];
#pragma unroll
        for (int n = 0; n < kThreadTile; n++) sum[m][n] += a.value[m] * b.value[n];
      }
    }
    __syncthreads();
  }

  // The sharers' sums take the operands' place, and are added up in order.
  float* sums = a_tile;                     // [kSharers, kTile, kTile]
  float* totals = b_tile + kDepth * kTile;  // [kSharers, kTile]
#pragma unroll
  for (int m = 0; m < kThreadTile; m++) {
    store_floats<float>(sums + (sharer * kTile + i + m) * kTile + j, sum[m]);
    if (j == 0) totals[sharer * kTile + i + m] = total[m];
  }
  __syncthreads();
  if (product.output.data) {
    for (int at = thread; at < kTile * kTile; at += kProductThreads) {
      const int to_i = first_i + at / kTile, to_j = first_j + at % kTile;
      if (to_i >= product.i || to_j >= product.j) continue;
      float value = 0.0f;
#pragma unroll
      for (int s = 0; s < kSharers; s++) value += sums[s * kTile * kTile + at];
      write_value<T>(product.output, int64_t{to_i} * product.j + to_j, value);
    }
  }
  if (product.bias.data && first_j == 0 && thread < kTile && first_i + thread < product.i) {
    float value = 0.0f;
#pragma unroll
    for (int s = 0; s < kSharers; s++) value += totals[s * kTile + thread];
    write_value<T>(product.bias, first_i + thread, value);
  }
}

constexpr int64_t kProductBytes = 4 * (2 * kDepth * kTile + kSharers * kTile);

}  // namespace
}  // namespace effkernels
