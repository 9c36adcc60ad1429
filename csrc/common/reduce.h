// Sums over rows in a fixed order.
#pragma once

#include "common/vec.h"

namespace effkernels {
namespace EFFKERNELS_ISA {

// Rows added up before they join a larger sum: that rounds less. All channels of these rows come
// before the next rows where memory is to be read along, 16 rows side by side.
constexpr int64_t kSumRows = 16;

// out[c] = factor * (rows[0][c] + rows[1][c] + ...)
template <class T>
inline void reduce_rows(const float* rows, int64_t count, int64_t channels, float factor, T* out) {
  for (int64_t c = 0; c < channels; c += Vec::size) {
    const int64_t n = min_of(channels - c, Vec::size);
    const bool whole = n == Vec::size;
    Vec total = Vec::set1(0.0f);
    for (int64_t r = 0; r < count; r++) {
      const float* p = rows + r * channels + c;
      total = total + (whole ? Vec::load(p) : Vec::load(p, n));
    }
    total = total * Vec::set1(factor);
    if (whole) {
      total.store(out + c);
    } else {
      store_first(total, out + c, n);
    }
  }
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
