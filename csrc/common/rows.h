// What kernels over [rows, channels] share: which thread takes what, and loads of any width.
#pragma once

#include "common/cuda.h"

namespace effkernels {

// A vector of the tensors' dtype T, or of float: parameters may be either.
struct Values {
  const void* data = nullptr;
  bool is_float = true;
};

template <class T>
__device__ inline float value_at(const Values& values, int64_t index) {
  return values.is_float ? static_cast<const float*>(values.data)[index]
                         : to_float(static_cast<const T*>(values.data)[index]);
}

// As `load`, but as they lie in memory, so that several can be under way at once.
template <class T>
__device__ inline Words load_first(const T* from, int count, bool aligned) {
  Words words;
  words.words = {0, 0, 0, 0};
  if (aligned) {
    if (count >= kVector<T>) words = load_words(from);
    return words;
  }
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i < count) words.value[i] = from[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; i++) {
      if (i < count) words.word[i / 2] |= uint32_t{from[i].bits} << (16 * (i % 2));
    }
  }
  return words;
}

// As `store`, to global memory.
template <class T>
__device__ inline void store_first(T* to, int count, bool aligned,
                                   const float (&values)[kVector<T>]) {
  if (aligned && count >= kVector<T>) {
    store_global(to, pack<T>(values));
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector<T>; i++) {
    if (i < count) to[i] = from_float<T>(values[i]);
  }
}

// values[i] of channel c + i for i < count, `otherwise` past them.
template <class T>
__device__ inline void load_vector(const Values& from, int c, int count, float otherwise,
                                   float (&values)[kVector<T>]) {
  if (from.is_float && count >= kVector<T> && is_aligned(from.data)) {
    const float* vector = static_cast<const float*>(from.data) + c;
#pragma unroll
    for (int i = 0; i < kVector<T>; i += 4) {
      const Words words = load_words(vector + i);
#pragma unroll
      for (int j = 0; j < 4; j++) values[i + j] = words.value[j];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector<T>; i++) {
    values[i] = i < count ? value_at<T>(from, c + i) : otherwise;
  }
}

// How blocks share out rows of channels: each takes `width` 16-byte vectors of a row, of as many
// rows at once as it has threads for. Threads next to each other have channels next to each other,
// and what belongs to a thread's channels it loads once for all of its rows.
struct Tiles {
  int channels;
  int width;   // vectors
  int chunks;  // blocks side by side
  int lanes;   // rows at once
};

template <class T>
Tiles tiles_of(int64_t channels, int threads, int widest) {
  const int64_t vectors = ceil_div(channels, kVector<T>), chunks = ceil_div(vectors, widest);
  const int64_t width = chunks == 0 ? 1 : ceil_div(vectors, chunks);
  return {static_cast<int>(channels), static_cast<int>(width), static_cast<int>(chunks),
          threads / static_cast<int>(width)};
}

// What a thread has of a block's tile.
struct Lane {
  int row;
  int c;      // its first channel
  int count;  // of its channels, at most a vector; 0: it has nothing to do
};

template <class T>
__device__ inline Lane lane_of(const Tiles& tiles, int chunk) {
  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread / tiles.width, v = chunk * tiles.width + thread - row * tiles.width;
  const int left = tiles.channels - v * kVector<T>;
  const int count = row >= tiles.lanes || left < 0 ? 0 : left;
  return {row, v * kVector<T>, count < kVector<T> ? count : kVector<T>};
}

}  // namespace effkernels
