// What kernels over [rows, channels] share: which thread takes what, and loads of any width.
#pragma once

#include "common/cuda.h"

namespace effkernels {

// A vector of the tensors' dtype T, or of float: parameters may be either.
struct Values {
  const void* data = nullptr;
  bool is_float = true;
};

// The same to be written; null: it is not wanted.
struct Written {
  void* data = nullptr;
  bool is_float = true;
};

template <class T>
__device__ inline float value_at(const Values& values, int64_t index) {
  return values.is_float ? static_cast<const float*>(values.data)[index]
                         : to_float(static_cast<const T*>(values.data)[index]);
}

template <class T>
__device__ inline void write_value(const Written& to, int64_t index, float value) {
  if (to.is_float) {
    static_cast<float*>(to.data)[index] = value;
  } else {
    static_cast<T*>(to.data)[index] = from_float<T>(value);
  }
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

template <bool kValue>
struct BoolConstant {
  __host__ __device__ constexpr operator bool() const { return kValue; }
};

// Calls f(constant that is `aligned`): one branch around all the accesses of a step, which follow
// each other without one then.
template <class F>
__device__ inline void with_alignment(bool aligned, F&& f) {
  if (aligned) {
    f(BoolConstant<true>{});
  } else {
    f(BoolConstant<false>{});
  }
}

// Of a vector as `load_first` gave it, to global memory.
template <class T>
__device__ inline void store_first(T* to, int count, bool aligned, const Words& words) {
  if (aligned) {
    if (count >= kVector<T>) store_global(to, words);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector<T>; i++) {
    if constexpr (sizeof(T) == 4) {
      if (i < count) to[i] = words.value[i];
    } else {
      if (i < count) to[i] = T{static_cast<uint16_t>(words.word[i / 2] >> (16 * (i % 2)))};
    }
  }
}

// Four values of a vector, which has kVector<T> / 4 such parts: kernels take one after the other,
// so that what they need of the channels takes fewer registers.
template <class T>
constexpr int kParts = kVector<T> / 4;

template <class T>
__device__ inline void unpack_part(const Words& words, int part, float (&values)[4]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = words.value[i];
  } else {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float2 pair = unpack2<T>(words.word[2 * part + i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}

template <class T>
__device__ inline void pack_part(const float (&values)[4], int part, Words& words) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; i++) words.value[i] = values[i];
  } else {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      words.word[2 * part + i] = pack2<T>(values[2 * i], values[2 * i + 1]);
    }
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
  int v;      // place of its vector among the block's
};

template <class T>
__device__ inline Lane lane_of(const Tiles& tiles, int chunk) {
  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread / tiles.width, v = thread - row * tiles.width;
  const int c = (chunk * tiles.width + v) * kVector<T>, left = tiles.channels - c;
  const int count = row >= tiles.lanes || left < 0 ? 0 : left;
  return {row, c, count < kVector<T> ? count : kVector<T>, v};
}

// A table in shared memory of what belongs to the channels of a block: rows of width * kVector<T>
// floats, of which a thread takes four at a time. Those of one part of the vectors are side by
// side, so that neighbouring threads do not meet in the banks.
template <class T>
__device__ inline int table_place(const Tiles& tiles, int column) {
  const int v = column / kVector<T>, i = column % kVector<T>;
  return (i / 4 * tiles.width + v) * 4 + i % 4;
}

template <class T>
__device__ inline void load_part(const float* table, int row, const Tiles& tiles, const Lane& lane,
                                 int part, float (&values)[4]) {
  const int at = (row * kParts<T> + part) * tiles.width + lane.v;
  const Words words = load_words(table + at * 4);
#pragma unroll
  for (int i = 0; i < 4; i++) values[i] = words.value[i];
}

// Sums table[lane][column] over the lanes into table[0]: by all threads, in a fixed order; column c
// is complete for thread c.
template <int kThreads>
__device__ inline void merge_lanes(float* table, int lanes, int columns) {
  const int thread = static_cast<int>(threadIdx.x), most = kThreads / columns;
  const int parts = most < lanes ? (most > 1 ? most : 1) : lanes;
  const int part = thread / columns;
  __syncthreads();
  if (part < parts) {
    float sum = table[thread];
    for (int lane = part + parts; lane < lanes; lane += parts) {
      sum += table[thread + (lane - part) * columns];
    }
    table[thread] = sum;
  }
  __syncthreads();
  if (thread < columns) {
    float sum = table[thread];
    for (int other = 1; other < parts; other++) sum += table[other * columns + thread];
    table[thread] = sum;
  }
}

template <class T>
__device__ inline void store_floats(float* to, const float (&values)[kVector<T>]) {
#pragma unroll
  for (int i = 0; i < kVector<T>; i += 4) {
    Words words;
#pragma unroll
    for (int j = 0; j < 4; j++) words.value[j] = values[i + j];
    store_words(to + i, words);
  }
}

}  // namespace effkernels
