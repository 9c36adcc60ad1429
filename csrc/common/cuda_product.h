// What GPU kernels with matrix products share: operands between memory and tensor cores.
//
// Shared memory holds operands as rows of 16-byte chunks, channels in a row. A step of a product
// takes 32 bytes of each row, which are 16 channels of a 2-byte type or 8 of float32, and
// `load_matrices` finds in them the fragments of mma.m16n8k16 or of mma.m16n8k8: the same bytes of
// the same lanes. float32 is multiplied as three products of tf32 parts, (a + a')(b + b') without
// a' b', whose error is 2^-22 of a product.
#pragma once

#include "common/cuda.h"

namespace effkernels {

constexpr int kChunk = 16;              // bytes
constexpr int kStepBytes = 2 * kChunk;  // of a row that one step of a product takes
template <class T>
constexpr int kStepValues = kStepBytes / static_cast<int>(sizeof(T));

// Values [first, first + kVector) of a row of `channels` to shared memory, zeros beyond it and
// where not `inside`. Asynchronous if `aligned`: rows then begin and end at multiples of 16 bytes.
template <class T>
__device__ inline void copy_chunk(void* shared, const T* row, int first, int channels, bool inside,
                                  bool aligned) {
  if (aligned) {
    const bool exists = inside && first < channels;
    copy_async(shared, row + (exists ? first : 0), exists);
    return;
  }
  float values[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; i++) {
    values[i] = inside && first + i < channels ? to_float(row[first + i]) : 0.0f;
  }
  store_words(shared, pack<T>(values));
}

// A fragment of N registers; of float32, what tf32 leaves out stands in `rest`.
template <class T, int N>
struct Fragment {
  static constexpr int kRest = sizeof(T) == 4 ? N : 1;
  uint32_t value[N], rest[kRest];

  __device__ explicit Fragment(const uint32_t* raw) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      if constexpr (sizeof(T) == 4) {
        const float whole = word_float(raw[i]);
        value[i] = to_tf32(whole);
        rest[i] = to_tf32(whole - word_float(value[i]));
      } else {
        value[i] = raw[i];
      }
    }
  }
};

// sum[16, 8] += a[16, 32 bytes] * b[8, 32 bytes] transposed
template <class T>
__device__ inline void multiply_add_step(float (&sum)[4], const Fragment<T, 4>& a,
                                         const Fragment<T, 2>& b) {
  if constexpr (sizeof(T) == 4) {
    multiply_add_tf32(sum, a.rest, b.value);  // the small ones first
    multiply_add_tf32(sum, a.value, b.rest);
    multiply_add_tf32(sum, a.value, b.value);
  } else {
    multiply_add<T>(sum, a.value, b.value);
  }
}

}  // namespace effkernels
