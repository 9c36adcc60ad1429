// Mean and variance of every channel over all pixels, in training.
//
// Blocks of pixels, each around its own mean so that no large number is subtracted from another,
// joined in double in a fixed order: results do not depend on the number of threads.
#pragma once

#include "common/vec.h"

namespace effkernels {
namespace EFFKERNELS_ISA {

constexpr int64_t kPixelBlock = 128;  // pixels of one partial result, whatever the threads

// What is known of each block, [blocks, channels]: a center close to the mean, the mean's offset
// from it (what rounding left, too small for the center's own bits), and the sum of squared
// distances from the center.
struct Moments {
  int64_t blocks, channels;
  float *centers, *offsets, *squares;
};

inline int64_t moments_size(int64_t blocks, int64_t channels) { return 3 * blocks * channels; }

inline Moments make_moments(float* buffer, int64_t blocks, int64_t channels) {
  const int64_t size = blocks * channels;
  return {blocks, channels, buffer, buffer + size, buffer + 2 * size};
}

// Block `block`: `count` rows of channels.
template <class T>
inline void block_moments(const T* rows, int64_t count, const Moments& moments, int64_t block) {
  const int64_t channels = moments.channels, start = block * channels;
  for (int64_t c = 0; c < channels; c += Vec::size) {
    const int64_t n = min_of(channels - c, Vec::size);
    const auto row = [&](int64_t r) {
      const T* p = rows + r * channels + c;
      return n == Vec::size ? Vec::load(p) : load_first(p, n);
    };
    Vec total = Vec::set1(0.0f);
    for (int64_t r = 0; r < count; r++) total = total + row(r);
    const Vec center = total * Vec::set1(1.0f / static_cast<float>(count));
    Vec squares = Vec::set1(0.0f), rest = Vec::set1(0.0f);
    for (int64_t r = 0; r < count; r++) {
      const Vec distance = row(r) - center;
      squares = fma(distance, distance, squares);
      rest = rest + distance;
    }
    store_first(center, moments.centers + start + c, n);
    store_first(rest * Vec::set1(1.0f / static_cast<float>(count)), moments.offsets + start + c, n);
    store_first(squares, moments.squares + start + c, n);
  }
}

// Joins the blocks, block b of size(b) pixels, perhaps none (Chan, Golub & LeVeque, 1979).
template <class Size>
inline void join_moments(const Moments& moments, Size&& size, float* mean, float* var,
                         const Parallel& parallel) {
  parallel_for(parallel, moments.channels, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) {
      double total = 0.0, m2 = 0.0, count = 0.0;
      for (int64_t b = 0; b < moments.blocks; b++) {
        if (size(b) == 0) continue;
        const int64_t at = b * moments.channels + c;
        const double here = static_cast<double>(size(b)), offset = moments.offsets[at];
        const double distance = moments.centers[at] + offset - total;
        m2 += moments.squares[at] - here * offset * offset +
              distance * distance * count * here / (count + here);
        total += distance * here / (count + here);
        count += here;
      }
      mean[c] = static_cast<float>(total);
      var[c] = static_cast<float>(m2 < 0.0 ? 0.0 : m2 / count);
    }
  });
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
