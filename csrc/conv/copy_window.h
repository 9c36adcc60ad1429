// A window of an image as a row of a matrix (im2col).
#pragma once

#include "common/gemm.h"
#include "conv/conv.h"

namespace effkernels {
namespace EFFKERNELS_ISA {

// The window of output pixel (y, x): [kernel_h, kernel_w, channels] float32, zero outside.
template <class T>
inline void copy_window(const T* image, const Images& in, const Geometry& g, int64_t y, int64_t x,
                        float* to) {
  const int64_t tap_row = g.kernel_w * in.channels;
  const int64_t left = x * g.stride_w - g.left;
  const bool inside = g.dilation_w == 1 && left >= 0 && left + g.kernel_w <= in.width;
  for (int64_t ky = 0; ky < g.kernel_h; ky++, to += tap_row) {
    const int64_t row = y * g.stride_h - g.top + ky * g.dilation_h;
    if (row < 0 || row >= in.height) {
      std::memset(to, 0, static_cast<size_t>(tap_row) * sizeof(float));
      continue;
    }
    const T* from = image + row * in.width * in.channels;
    if (inside) {
      convert_row<T>(from + left * in.channels, nullptr, tap_row, to);
      continue;
    }
    for (int64_t kx = 0; kx < g.kernel_w; kx++) {
      const int64_t column = left + kx * g.dilation_w;
      float* tap = to + kx * in.channels;
      if (column < 0 || column >= in.width) {
        std::memset(tap, 0, static_cast<size_t>(in.channels) * sizeof(float));
      } else {
        convert_row<T>(from + column * in.channels, nullptr, in.channels, tap);
      }
    }
  }
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
