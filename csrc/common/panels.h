// Packing of a matrix for common/gemm.h.
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

}  // namespace effkernels
