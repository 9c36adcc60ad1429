// Packing of weights: for common/gemm.h, and for common/window.h.
#pragma once

#include "common/types.h"

namespace effkernels {

// A float32 matrix anywhere in memory.
struct Matrix {
  const float* data;
  int64_t rows, columns;
  int64_t row_step, column_step;  // in values
};

// out[panel][c][k] = matrix[panel * kPanel + k][c], zero beyond its rows.
inline void write_panels(const Matrix& matrix, float* out, const Parallel& parallel) {
  parallel_for(parallel, ceil_div(matrix.rows, kPanel), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; panel++) {
      const float* from = matrix.data + panel * kPanel * matrix.row_step;
      const int64_t rows = min_of(kPanel, matrix.rows - panel * kPanel);
      float* to = out + panel * kPanel * matrix.columns;
      for (int64_t c = 0; c < matrix.columns; c++, from += matrix.column_step, to += kPanel) {
        int64_t k = 0;
        for (; k < rows; k++) to[k] = from[k * matrix.row_step];
        for (; k < kPanel; k++) to[k] = 0.0f;
      }
    }
  });
}

// out[tap][channel], channels rounded up to kPanel with zeros, from [channels][taps]; the taps in
// the opposite order if reversed.
inline void write_taps(const Matrix& matrix, bool reversed, float* out) {
  const int64_t channels = round_up(matrix.rows, kPanel);
  for (int64_t tap = 0; tap < matrix.columns; tap++, out += channels) {
    const int64_t column = reversed ? matrix.columns - 1 - tap : tap;
    const float* from = matrix.data + column * matrix.column_step;
    int64_t c = 0;
    for (; c < matrix.rows; c++) out[c] = from[c * matrix.row_step];
    for (; c < channels; c++) out[c] = 0.0f;
  }
}

}  // namespace effkernels
