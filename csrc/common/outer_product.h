// Weight gradients of 1x1 convolutions: C[m, n] += sum over rows r of A[r, m] * B[r, n].
//
// The register tile is gemm.h's: up to kTileRows values of m, whose scalars lie side by side in a
// row of A, times kTileChannels of n. 128 rows at a time: a panel of B (16 KB) then stays in L1
// while the tiles of m pass over it, and C's tile moves once per 128 rows.
#pragma once

#include "common/gemm.h"

namespace effkernels {
namespace EFFKERNELS_ISA {

constexpr int64_t kOuterRows = 128;

template <int kRows>
inline void outer_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                       int64_t rows, float* c, int64_t c_stride) {
  constexpr int kVecs = kTileChannels / Vec::size;
  Vec sums[kRows][kVecs];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; v++) sums[m][v] = Vec::set1(0.0f);
  }
  for (int64_t r = 0; r < rows; r++) {
    Vec values[kVecs];
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; v++) values[v] = Vec::load(b + r * b_stride + v * Vec::size);
    const float* scalars = a + r * a_stride;
#pragma GCC unroll 16
    for (int m = 0; m < kRows; m++) {
      const Vec x = Vec::set1(scalars[m]);
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; v++) sums[m][v] = fma(x, values[v], sums[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; v++) {
      float* p = c + m * c_stride + v * Vec::size;
      (Vec::load(p) + sums[m][v]).store(p);
    }
  }
}

using OuterTile = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t);

template <int kRows>
inline OuterTile outer_tile_for(int64_t rows) {
  if constexpr (kRows == 1) {
    return outer_tile<1>;
  } else {
    return rows == kRows ? outer_tile<kRows> : outer_tile_for<kRows - 1>(rows);
  }
}

// A is [rows, m], B [rows, n], C [m, n]. b_stride and c_stride are n rounded up to kTileChannels
// at least: what is beyond n is computed, too.
inline void outer_product(const float* a, int64_t a_stride, int64_t m, const float* b,
                          int64_t b_stride, int64_t n, int64_t rows, float* c, int64_t c_stride) {
  const int64_t tiles = ceil_div(m, kTileRows);
  const int64_t size = m / tiles, larger = m - size * tiles;  // as in gemm_rows
  const OuterTile functions[2] = {outer_tile_for<kTileRows>(size),
                                  outer_tile_for<kTileRows>(size + (larger > 0))};
  for (int64_t first = 0; first < rows; first += kOuterRows) {
    const int64_t count = min_of(kOuterRows, rows - first);
    for (int64_t j = 0; j < n; j += kTileChannels) {
      int64_t i = 0;
      for (int64_t t = 0; t < tiles; t++) {
        functions[t < larger](a + first * a_stride + i, a_stride, b + first * b_stride + j,
                              b_stride, count, c + i * c_stride + j, c_stride);
        i += size + (t < larger);
      }
    }
  }
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
