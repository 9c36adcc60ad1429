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

}  // namespace effkernels
