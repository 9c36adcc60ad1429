// Depthwise sliding windows over rows of NHWC pixels.
//
// A tile is a few neighbouring outputs of one vector of channels: for every tap one load of the
// weights and, per output, one fma with the input from memory, which a core can load as fast as it
// multiplies. Kernel size, dilation and stride stay run-time values: the tap loop's overhead is
// spread over the outputs, and k = 3, 5 and 7 then share one function. Seven outputs are too few
// for that: with avx2, windows of 3x3 and 5x5 are unrolled (Zen 3, operands in L1: 2.6 -> 1.45 and
// 6.7 -> 4.5 ns a vector of outputs; avx512 was not measured), and every pixel is loaded once for
// the outputs that see it: as fast there, but the 3x3 window over rows of 32 channels, whose
// addresses are only known at run time, takes 190 instead of 320 us for 112x112 pixels. In blocks
// of pixels whose three rows fit the first cache it was not faster. A row is cut greedily into
// tiles of 14 (where there are 32 registers), 7, 4, 2 and 1: 7 divides the rows of a 224-pixel
// network, and a single output waits for its one chain of fma (8, 4 and 1 cut 7 into 4 + 1 + 1 +
// 1).
//
// Tried and lost on a Xeon (avx512): an input loaded once for all the outputs of a tile that see it
// (3x3 and 5x5, strides 1 and 2: 2.6 -> 3.4 and 5.2 -> 5.7 ns a vector of outputs in the first
// cache, the network as fast as before); asking for the lines of the output first.
#pragma once

#include "common/activation.h"

namespace effkernels {
namespace EFFKERNELS_ISA {

#if EFFKERNELS_ISA_ID == EFFKERNELS_ID_avx512 || EFFKERNELS_ISA_ID == EFFKERNELS_ID_neon
constexpr int kTilePixels = 14;
#else
constexpr int kTilePixels = 7;
#endif
constexpr int kRowPixels = 56;  // outputs whose sums are finished together

// tile[t * Vec::size] = sum over taps (y, x in [x_begin, x_end)) of
//   weight[(y * kernel_w + x) * weight_stride] * rows[y][x * tap_step + t * pixel_step]
// for kCount outputs; rows[y] null is a row of padding. `valid` channels are read.
template <int kCount, class T>
EFFKERNELS_INLINE void window_tile(const T* const* rows, int64_t offset, const Geometry& g,
                                   int64_t x_begin, int64_t x_end, int64_t tap_step,
                                   int64_t pixel_step, const float* weight, int64_t weight_stride,
                                   int64_t valid, float* tile) {
  Vec sums[kCount];
#pragma GCC unroll 16
  for (int t = 0; t < kCount; t++) sums[t] = Vec::set1(0.0f);
  for (int64_t y = 0; y < g.kernel_h; y++) {
    if (rows[y] == nullptr) continue;
    const T* p = rows[y] + offset + x_begin * tap_step;
    const float* w = weight + (y * g.kernel_w + x_begin) * weight_stride;
    if (valid >= Vec::size) {
      for (int64_t x = x_begin; x < x_end; x++, p += tap_step, w += weight_stride) {
        const Vec tap = Vec::load(w);
#pragma GCC unroll 16
        for (int t = 0; t < kCount; t++) {
          sums[t] = fma(Vec::load(p + t * pixel_step), tap, sums[t]);
        }
      }
    } else {
      for (int64_t x = x_begin; x < x_end; x++, p += tap_step, w += weight_stride) {
        const Vec tap = Vec::load(w);
#pragma GCC unroll 16
        for (int t = 0; t < kCount; t++) {
          sums[t] = fma(load_first(p + t * pixel_step, valid), tap, sums[t]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kCount; t++) sums[t].store(tile + t * Vec::size);
}

// Tiles of kCount outputs have loops of their own, unrolled, for the frequent windows.
template <int kCount>
constexpr bool kUnrolled = EFFKERNELS_ISA_ID == EFFKERNELS_ID_avx2 && kCount >= 4;

inline bool is_frequent(const Geometry& g) {
  return g.kernel_h == g.kernel_w && (g.kernel_h == 3 || g.kernel_h == 5) && g.dilation_w == 1 &&
         (g.stride_w == 1 || g.stride_w == 2);
}

// body(taps, stride) with those of a frequent window as compile-time constants.
template <class F>
EFFKERNELS_INLINE void with_window(const Geometry& g, F&& body) {
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 3> three;
  constexpr std::integral_constant<int, 5> five;
  if (g.kernel_h == 3) {
    g.stride_w == 1 ? body(three, one) : body(three, two);
  } else {
    g.stride_w == 1 ? body(five, one) : body(five, two);
  }
}

// The same for a kernel of kTaps x kTaps, neighbouring taps `pixel` values apart, and whole vectors
// of channels. Every pixel is loaded once for all the outputs that see it, from a pointer that
// walks along the row: where `pixel` is only known at run time, an address each for all of them is
// more than the integer registers hold.
template <int kCount, int kTaps, int kStride, class T>
EFFKERNELS_INLINE void square_window_tile(const T* const* rows, int64_t offset, int64_t pixel,
                                          const float* weight, int64_t weight_stride, float* tile) {
  constexpr int kPixels = (kCount - 1) * kStride + kTaps;
  Vec sums[kCount];
#pragma GCC unroll 16
  for (int t = 0; t < kCount; t++) sums[t] = Vec::set1(0.0f);
  for (int y = 0; y < kTaps; y++, weight += kTaps * weight_stride) {
    if (rows[y] == nullptr) continue;
    const T* p = rows[y] + offset;
    Vec taps[kTaps];
#pragma GCC unroll 8
    for (int x = 0; x < kTaps; x++) taps[x] = Vec::load(weight + x * weight_stride);
#pragma GCC unroll 32
    for (int j = 0; j < kPixels; j++) {
      const Vec value = Vec::load(p);
      if (j + 1 < kPixels) p = opaque(p + pixel);
#pragma GCC unroll 16
      for (int t = 0; t < kCount; t++) {
        const int x = j - t * kStride;
        if (x >= 0 && x < kTaps) sums[t] = fma(value, taps[x], sums[t]);
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kCount; t++) sums[t].store(tile + t * Vec::size);
}

// Calls tile(count, x) with the largest of kCount, 7, 4, 2, 1 outputs that fits, as often as it
// does, until [begin, end) is covered.
template <int kCount, class Tile>
EFFKERNELS_INLINE void cover(int64_t begin, int64_t end, Tile&& tile) {
  for (; begin + kCount <= end; begin += kCount) {
    tile(std::integral_constant<int, kCount>{}, begin);
  }
  if constexpr (kCount > 1) {
    constexpr int kNext = kCount == 14 ? 7 : kCount == 7 ? 4 : kCount / 2;
    cover<kNext>(begin, end, tile);
  }
}

// One output row of an unpadded image for `channels` channels of `image` (its channel 0 at the
// pointer). Row y of the window is image row `top + y * dilation`; outside ones are padding.
template <class T, class Out>
inline void window_row(const T* image, const Images& in, const Geometry& g, int64_t out_y,
                       int64_t out_width, const float* weight, int64_t weight_stride,
                       const Epilogue& epilogue, Out* out, const T** rows, float* sum) {
  const int64_t pixel = in.channels, tap_step = g.dilation_w * pixel;
  const int64_t pixel_step = g.stride_w * pixel;
  const int64_t row_size = in.width * pixel;
  const int64_t reach = g.dilation_w * (g.kernel_w - 1);
  const bool frequent = is_frequent(g);
  for (int64_t y = 0; y < g.kernel_h; y++) {
    const int64_t row = out_y * g.stride_h - g.top + y * g.dilation_h;
    rows[y] = row < 0 || row >= in.height ? nullptr : image + row * row_size;
  }
  // Outputs in [inner_begin, inner_end) see no padding to the left or right.
  const int64_t inner_begin = min_of(out_width, ceil_div(g.left, g.stride_w));
  const int64_t room = in.width - 1 - reach + g.left;
  const int64_t inner_end =
      max_of(inner_begin, room < 0 ? 0 : min_of(out_width, room / g.stride_w + 1));
  alignas(64) float sums[kRowPixels * Vec::size];
  for (int64_t c = 0; c < in.channels; c += Vec::size) {
    const int64_t valid = min_of(in.channels - c, Vec::size);
    for (int64_t begin = 0; begin < out_width; begin += kRowPixels) {
      const int64_t end = min_of(out_width, begin + kRowPixels);
      const auto start = [&](int64_t x) { return x * g.stride_w - g.left; };
      const auto tile = [&](int64_t x) { return sums + (x - begin) * Vec::size; };
      const auto border = [&](int64_t x) {
        const int64_t last = in.width - 1 - start(x);  // the furthest reach inside the image
        const int64_t x_end = last < 0 ? 0 : min_of(g.kernel_w, last / g.dilation_w + 1);
        const int64_t x_begin = start(x) >= 0 ? 0 : ceil_div(-start(x), g.dilation_w);
        window_tile<1>(rows, start(x) * pixel + c, g, min_of(x_begin, x_end), x_end, tap_step,
                       pixel_step, weight + c, weight_stride, valid, tile(x));
      };
      const int64_t from = min_of(end, max_of(begin, inner_begin));
      const int64_t to = max_of(from, min_of(end, inner_end));
      for (int64_t x = begin; x < from; x++) border(x);
      cover<kTilePixels>(from, to, [&](auto count, int64_t x) {
        constexpr int kCount = decltype(count)::value;
        const int64_t at = start(x) * pixel + c;
        if constexpr (kUnrolled<kCount>) {
          const auto square = [&](auto taps, auto stride) EFFKERNELS_LAMBDA_INLINE {
            square_window_tile<kCount, decltype(taps)::value, decltype(stride)::value>(
                rows, at, pixel, weight + c, weight_stride, tile(x));
          };
          if (frequent && valid == Vec::size) return with_window(g, square);
        }
        window_tile<kCount>(rows, at, g, 0, g.kernel_w, tap_step, pixel_step, weight + c,
                            weight_stride, valid, tile(x));
      });
      for (int64_t x = to; x < end; x++) border(x);
      finish_rows<Out>(sums, Vec::size, end - begin, valid, epilogue, c,
                       static_cast<const Out*>(nullptr), out + begin * pixel + c, pixel,
                       sum == nullptr ? nullptr : sum + c);
    }
  }
}

// Raw sums of the outputs [begin, end) of a row whose padding is in memory, `kPixel` floats a
// pixel: no borders, and steps known to the compiler for strides 1 and 2. One vector of channels,
// `channel` values into a pixel of the rows, its taps at `weight`; to sums[x - begin][Vec::size].
template <int kPixel>
inline void padded_window_sums(const float* const* rows, const Geometry& g, int64_t begin,
                               int64_t end, int64_t channel, const float* weight,
                               int64_t weight_stride, float* sums) {
  const int64_t tap_step = g.dilation_w * kPixel;
  const auto tiles = [&](auto count, int64_t x, float* tile) {
    const auto run = [&](int64_t step) EFFKERNELS_LAMBDA_INLINE {
      window_tile<decltype(count)::value>(rows, x * step + channel, g, 0, g.kernel_w, tap_step,
                                          step, weight, weight_stride, Vec::size, tile);
    };
    if (g.stride_w == 1) {
      run(kPixel);
    } else if (g.stride_w == 2) {
      run(2 * kPixel);
    } else {
      run(g.stride_w * kPixel);
    }
  };
  const auto square = [&](auto count, int64_t x, float* tile) {
    constexpr int kCount = decltype(count)::value;
    const auto run = [&](auto taps, auto stride) EFFKERNELS_LAMBDA_INLINE {
      constexpr int64_t step = decltype(stride)::value * kPixel;
      square_window_tile<kCount, decltype(taps)::value, decltype(stride)::value>(
          rows, x * step + channel, kPixel, weight, weight_stride, tile);
    };
    with_window(g, run);
  };
  const bool frequent = is_frequent(g);
  cover<kTilePixels>(begin, end, [&](auto count, int64_t x) {
    float* tile = sums + (x - begin) * Vec::size;
    if constexpr (kUnrolled<decltype(count)::value>) {
      if (frequent) return square(count, x, tile);
    }
    tiles(count, x, tile);
  });
}

// A whole such row, for `channels` channels.
template <int kPixel, class Out>
inline void padded_window_row(const float* const* rows, const Geometry& g, int64_t out_width,
                              const float* weight, int64_t weight_stride, int64_t channels,
                              const Epilogue& epilogue, int64_t first_channel, Out* out,
                              int64_t out_stride, float* sum) {
  alignas(64) float sums[kRowPixels * Vec::size];
  for (int64_t c = 0; c < channels; c += Vec::size) {
    for (int64_t begin = 0; begin < out_width; begin += kRowPixels) {
      const int64_t end = min_of(out_width, begin + kRowPixels);
      padded_window_sums<kPixel>(rows, g, begin, end, c, weight + c, weight_stride, sums);
      finish_rows<Out>(sums, Vec::size, end - begin, min_of(channels - c, Vec::size), epilogue,
                       first_channel + c, static_cast<const Out*>(nullptr),
                       out + begin * out_stride + c, out_stride,
                       sum == nullptr ? nullptr : sum + c);
    }
  }
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
