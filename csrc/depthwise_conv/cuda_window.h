// What the depthwise kernels share: a block's tile, its rows in shared memory, and the prologue.
#pragma once

#include "common/cuda.h"
#include "depthwise_conv/cuda.h"

namespace effkernels {
namespace {

constexpr int kOperandVectors = 7;  // in the order of `operand_vector`
constexpr int kBias = 7, kVectors = 8;

// Pairs of channels in 16 bytes.
template <class T>
constexpr int kPairs = kVector<T> / 2;

__host__ __device__ inline int smaller(int a, int b) { return a < b ? a : b; }
__host__ __device__ inline int larger(int a, int b) { return a > b ? a : b; }

// Two neighbouring values of a vector over channels, `other` where there are none.
__device__ inline float2 channel_pair(const float* vector, int channel, int channels, float other) {
  float2 result = {other, other};
  if (vector != nullptr && channel < channels) result.x = vector[channel];
  if (vector != nullptr && channel + 1 < channels) result.y = vector[channel + 1];
  return result;
}

// This thread's place in a block's tile: a pair of channels of one strip of one image.
struct Place {
  int pair, strip, slot;  // slot: of the image, in the block
  int image, channel;
  bool active;  // the thread has something to compute

  __device__ Place(int first_channel, int first_image, const DepthwiseTile& tile, int batch,
                   int channels) {
    const int thread = static_cast<int>(threadIdx.x), each = tile.pairs * tile.strips;
    slot = thread / each;
    strip = thread % each / tile.pairs;
    pair = thread % tile.pairs;
    image = first_image + slot;
    channel = first_channel + 2 * pair;
    active = slot < tile.images && image < batch && channel < channels;
  }
};

// The part of a block's rows that a thread brings to shared memory or takes from it: 16-byte
// vectors of one pixel's channels, of every kPairs * strips-th column, kCount at most. Steps are
// the same for all threads, and so cost no registers; the rest is kept in shared memory.
template <class T, int kCount>
struct RowPart {
  unsigned inside = 0;  // bit j: the thread's vector j lies in the image
  int shared = 0;       // of the first: bytes from the row in shared memory,
  int64_t global = 0;   // and values from the tensor's start to where row 0 of the image has it

  static __device__ int global_step(const DepthwiseTile& tile, int channels) {
    return kPairs<T> * tile.strips * channels;
  }
  static __device__ int shared_step(const DepthwiseTile& tile) {
    return tile.pairs * tile.strips * 16;
  }
  // The first channel of the thread's vectors.
  static __device__ int channel(const DepthwiseTile& tile, int first_channel) {
    const int thread = static_cast<int>(threadIdx.x) % (tile.pairs * tile.strips);
    return first_channel + thread % (tile.pairs / kPairs<T>)*kVector<T>;
  }

  // `columns` of a row, of which the first is column `x` of an image height x width.
  __device__ RowPart(const Place& place, const DepthwiseTile& tile, int columns, int x, int height,
                     int width, int batch, int channels, int first_channel) {
    const int vectors = tile.pairs / kPairs<T>;
    const int thread = static_cast<int>(threadIdx.x) % (tile.pairs * tile.strips);
    const int column = thread / vectors, first = channel(tile, first_channel);
    shared = ((place.slot * columns + column) * vectors + thread % vectors) * 16;
    global = (int64_t{place.image} * height * width + x + column) * channels + first;
    if (place.slot >= tile.images || place.image >= batch || first >= channels) return;
#pragma unroll
    for (int j = 0; j < kCount; j++) {
      const int at = column + j * kPairs<T> * tile.strips;
      if (at < columns && static_cast<unsigned>(x + at) < static_cast<unsigned>(width)) {
        inside |= 1u << j;
      }
    }
  }

  __device__ RowPart(const Words& words)
      : inside(words.word[0]),
        shared(static_cast<int>(words.word[1])),
        global(static_cast<int64_t>(uint64_t{words.word[3]} << 32 | words.word[2])) {}

  __device__ Words words() const {  // to be kept
    Words words;
    words.words = {inside, static_cast<unsigned>(shared), static_cast<unsigned>(global),
                   static_cast<unsigned>(global >> 32)};
    return words;
  }

  // Zeros for what `fetch` never writes.
  __device__ void clear(T* shared_row, const Place& place, const DepthwiseTile& tile, int columns,
                        bool vectors) const {
    const int each = tile.pairs * tile.strips;
    const int first = static_cast<int>(threadIdx.x) % each;
    if (place.slot >= tile.images) return;
    unsigned char* row = reinterpret_cast<unsigned char*>(shared_row) +
                         place.slot * columns * tile.pairs / kPairs<T> * 16;
#pragma unroll 1
    for (int j = 0; j < kCount; j++) {
      const int at = first + j * each;
      if (at < columns * tile.pairs / kPairs<T> && !(vectors && (inside >> j & 1))) {
        Words zero;
        zero.words = {0, 0, 0, 0};
        store_words(row + at * 16, zero);
      }
    }
  }

  // Row `y` of `tensor`, `row_values` apart; zeros if it is not `real`.
  __device__ void fetch(T* shared_row, const void* tensor, int y, int row_values, bool real,
                        const DepthwiseTile& tile, int channels) const {
    unsigned char* row = reinterpret_cast<unsigned char*>(shared_row) + shared;
    const T* from = static_cast<const T*>(tensor) + (global + int64_t{real ? y : 0} * row_values);
#pragma unroll
    for (int j = 0; j < kCount; j++) {
      copy_async_if(inside >> j & 1, row, from, real);
      row += shared_step(tile);
      from += global_step(tile, channels);
    }
  }

  // The same one by one, where 16-byte accesses are not possible.
  __device__ void fetch_values(T* shared_row, const void* tensor, int y, int row_values, bool real,
                               const DepthwiseTile& tile, int channels, int first_channel) const {
    unsigned char* row = reinterpret_cast<unsigned char*>(shared_row) + shared;
    const T* from = static_cast<const T*>(tensor) + (global + int64_t{real ? y : 0} * row_values);
    const int left = channels - channel(tile, first_channel);
#pragma unroll 1
    for (int j = 0; j < kCount; j++) {
      T* to = reinterpret_cast<T*>(row + j * shared_step(tile));
      if (!(inside >> j & 1)) continue;
#pragma unroll 1
      for (int c = 0; c < kVector<T> && c < left; c++) {
        to[c] = real ? from[j * global_step(tile, channels) + c] : from_float<T>(0.0f);
      }
    }
  }

  __device__ void store(void* tensor, int y, int row_values, const T* shared_row,
                        const DepthwiseTile& tile, int channels, int first_channel,
                        bool vectors) const {
    const unsigned char* row = reinterpret_cast<const unsigned char*>(shared_row) + shared;
    T* to = static_cast<T*>(tensor) + (global + int64_t{y} * row_values);
    if (vectors) {
#pragma unroll
      for (int j = 0; j < kCount; j++) {
        if (inside >> j & 1) store_words(to, load_words(row));
        row += shared_step(tile);
        to += global_step(tile, channels);
      }
      return;
    }
    const int left = channels - channel(tile, first_channel);
#pragma unroll 1
    for (int j = 0; j < kCount; j++) {
      const T* from = reinterpret_cast<const T*>(row + j * shared_step(tile));
      if (!(inside >> j & 1)) continue;
#pragma unroll 1
      for (int c = 0; c < kVector<T> && c < left; c++) {
        to[j * global_step(tile, channels) + c] = from[c];
      }
    }
  }
};

// The window's taps times `scale`; `flipped`: the last one first.
template <int kTaps, class T>
__device__ inline void load_taps(float2 (&taps)[kTaps], const T* from, const float* scales,
                                 int channel, int channels, bool flipped) {
  const float2 scale = channel_pair(scales, channel, channels, 1.0f);
  const int step = flipped ? -channels : channels;
  from += channel + (flipped ? (kTaps - 1) * channels : 0);
#pragma unroll
  for (int i = 0; i < kTaps; i++) {
    taps[i] = {0.0f, 0.0f};
    if (channel < channels) taps[i].x = to_float(from[i * step]) * scale.x;
    if (channel + 1 < channels) taps[i].y = to_float(from[i * step + 1]) * scale.y;
  }
}

// Words that a thread keeps at the beginning of shared memory between their uses, 16 bytes each.
constexpr int kKeptPitch = kDepthwiseThreads * 16;

__device__ inline unsigned char* kept(int what) {
  return dynamic_shared() + what * kKeptPitch + threadIdx.x * 16;
}

// ---- Prologue

__device__ inline float2 operand_vector(const DepthwiseOperand& operand, int index, int image,
                                        int channel, int channels) {
  const int64_t at = int64_t{image} * channels;
  switch (index) {
    case 0:
      return channel_pair(operand.scale, channel, channels, 1.0f);
    case 1:
      return channel_pair(operand.shift, channel, channels, 0.0f);
    case 2:
      return channel_pair(operand.gate ? operand.gate + at : nullptr, channel, channels, 1.0f);
    case 3:
      return channel_pair(operand.offset ? operand.offset + at : nullptr, channel, channels, 0.0f);
    case 4:
      return channel_pair(operand.factor, channel, channels, 1.0f);
    case 5:
      return channel_pair(operand.slope, channel, channels, 0.0f);
    default:
      return channel_pair(operand.constant, channel, channels, 0.0f);
  }
}

// Calls f(SiLU as a constant) or f(activation), which is then asked for at every value: networks
// that do not have SiLU have something cheaper.
struct Silu : ActivationConstant<Activation::silu> {
  static constexpr int kUnroll = 2;  // of loops
};
struct AnyActivation {
  static constexpr int kUnroll = 1;
  Activation activation;
  __device__ Activation operator()() const { return activation; }
};

template <class F>
__device__ inline void with_silu(Activation activation, F&& f) {
  if (activation == Activation::silu) return f(Silu{});
  f(AnyActivation{activation});
}

template <class Constant>
__device__ inline float2 activate_pair(Constant constant, float2 x) {
  if constexpr (std::is_same_v<Constant, AnyActivation>) {
    with_activation(constant(), [&](auto known) { x = activate_pair(known, x); });
    return x;
  } else {
    return {activate<Constant{}()>(x.x), activate<Constant{}()>(x.y)};
  }
}

template <class Constant>
__device__ inline float2 slope_pair(Constant constant, float2 x) {
  if constexpr (std::is_same_v<Constant, AnyActivation>) {
    with_activation(constant(), [&](auto known) { x = slope_pair(known, x); });
    return x;
  } else {
    return {slope<Constant{}()>(x.x), slope<Constant{}()>(x.y)};
  }
}

__device__ inline float2 fma_pair(float2 a, float2 b, float2 c) {
  return {a.x * b.x + c.x, a.y * b.y + c.y};
}

template <class Constant>
__device__ inline float2 forward_operand(Constant activation, float2 z,
                                         const float2 (&v)[kOperandVectors]) {
  const float2 value = activate_pair(activation, fma_pair(z, v[0], v[1]));
  return {value.x * v[2].x, value.y * v[2].y};
}

template <class Constant>
__device__ inline float2 gradient_operand(Constant activation, float2 upstream, float2 z,
                                          const float2 (&v)[kOperandVectors]) {
  const float2 slope = slope_pair(activation, fma_pair(z, v[0], v[1]));
  const float2 arriving = fma_pair(upstream, v[2], v[3]);
  const float2 t = {arriving.x * slope.x, arriving.y * slope.y};
  return fma_pair(v[4], t, fma_pair(v[5], z, v[6]));
}

// The operand of a row in shared memory, in its place: `count` columns of a pair of channels,
// `step` values apart. vectors: the pair's, `pitch` floats apart.
template <class T>
__device__ inline void apply_operand(const DepthwiseOperand& operand, T* row, const T* z, int count,
                                     int step, const float* vectors, int pitch) {
  if (count == 0) return;
  float2 v[kOperandVectors];
  const bool forward = operand.kind == DepthwiseOperand::forward;
#pragma unroll
  for (int i = 0; i < 3; i++) v[i] = load2(vectors + i * pitch);
  if (forward) {
    with_silu(operand.activation, [&](auto activation) {
#pragma unroll(decltype(activation)::kUnroll)
      for (int x = 0; x < count; x++, row += step) {
        store2(row, forward_operand(activation, load2(row), v));
      }
    });
    return;
  }
#pragma unroll
  for (int i = 3; i < kOperandVectors; i++) v[i] = load2(vectors + i * pitch);
  with_silu(operand.activation, [&](auto activation) {
#pragma unroll(decltype(activation)::kUnroll)
    for (int x = 0; x < count; x++, row += step, z += step) {
      const float2 before = operand.z ? load2(z) : float2{0.0f, 0.0f};
      store2(row, gradient_operand(activation, load2(row), before, v));
    }
  });
}

// ---- Sums

// Mean and sum of (value - mean)^2 of `count` values, and of `other_count` more (Chan, Golub and
// LeVeque).
__device__ inline void merge_moments_of(float count, float& mean, float& squares, float other_count,
                                        float other_mean, float other_squares) {
  const float total = count + other_count;
  const float share = total > 0.0f ? divide_fast(other_count, total) : 0.0f;
  const float distance = other_mean - mean;
  squares += other_squares + distance * distance * count * share;
  mean += distance * share;
}

}  // namespace
}  // namespace effkernels
