// The depthwise convolution of a block in training, forward and backward.
//
// Both directions walk down an image with a ring of rows in scratch: rows of the image that the
// window reads, normalised, activated and padded, and backward rows of the output's gradient. A
// row of the ring is cut into panels of kTileChannels, [panels][width][kTileChannels], as the
// window wants them; memory is read and written row by row.
#pragma once

#include "common/gemm.h"
#include "common/window.h"
#include "mbconv_training/cpu_rows.h"

namespace effkernels {
namespace EFFKERNELS_ISA {

struct RowRing {
  float* data;    // [slots][panels][width][kTileChannels], then a row of one panel's zeros
  int64_t slots;  // row y lives in slot y % slots
  int64_t width;  // pixels of a row with its padding
  int64_t panels;

  int64_t panel_size() const { return width * kTileChannels; }
  size_t size() const { return static_cast<size_t>((slots * panels + 1) * panel_size()); }
  float* row(int64_t y) const { return data + y % slots * panels * panel_size(); }
  const float* zeros() const { return data + slots * panels * panel_size(); }
  // Where channel c of pixel 0 of a row is; pixels are kTileChannels apart.
  int64_t at(int64_t c) const { return c / kTileChannels * panel_size() + c % kTileChannels; }
};

inline RowRing make_ring(int64_t slots, int64_t width, int64_t channels) {
  RowRing ring{nullptr, slots, width, ceil_div(channels, kTileChannels)};
  ring.data = scratch(ScratchUse::kRing, ring.size());
  std::memset(ring.data, 0, ring.size() * sizeof(float));  // what no row writes stays zero
  return ring;
}

// Images are cut into bands of whole blocks of rows; `block` rows have about kPixelBlock pixels.
inline int64_t rows_of_block(int64_t width) { return max_of(1, kPixelBlock / max_of(width, 1)); }

template <class T>
void depthwise(const TrainingDepthwiseArgs& args) {
  const Geometry& g = args.geometry;
  const Images& in = args.in;
  const int64_t channels = in.channels, out_row = args.out_width * channels;
  const int64_t block = rows_of_block(args.out_width), blocks = ceil_div(args.out_height, block);
  const int64_t all = in.count * blocks;
  Arena arena{scratch(ScratchUse::kBlock, static_cast<size_t>(kNormVectors * padded(channels) + 64 +
                                                              moments_size(all, channels)))};
  const NormVectors norm = norm_vectors(args.norm, channels, arena);
  const Moments moments = make_moments(arena.take(moments_size(all, channels)), all, channels);
  const int64_t reach = g.dilation_h * (g.kernel_h - 1), weight_stride = round_up(channels, kPanel);
  const int64_t row_size = in.width * channels;
  const int64_t width = (args.out_width - 1) * g.stride_w + g.dilation_w * (g.kernel_w - 1) + 1;
  const int64_t columns = max_of(0, min_of(in.width, width - g.left));  // that some window sees
  // Every band makes the rows that it shares with its neighbour again, so as few as will do.
  const int64_t bands = min_of(blocks, ceil_div(args.parallel.threads, max_of(in.count, 1)));
  with_activation(args.norm.activation, [&](auto activation) {
    parallel_for(args.parallel, in.count * bands, [&](int64_t begin, int64_t end) {
      const RowRing ring = make_ring(reach + 1, width, channels);
      const size_t taps = static_cast<size_t>(g.kernel_h);
      const float** rows = static_cast<const float**>(__builtin_alloca(taps * sizeof(float*)));
      const float** panel = static_cast<const float**>(__builtin_alloca(taps * sizeof(float*)));
      for (int64_t task = begin; task < end; task++) {
        const int64_t image = task / bands, band = task % bands;
        const T* input = static_cast<const T*>(args.input) + image * in.size();
        T* output = static_cast<T*>(args.output) + image * args.out_height * out_row;
        int64_t next = 0;
        for (int64_t b = band * blocks / bands; b < (band + 1) * blocks / bands; b++) {
          const int64_t first = b * block, last = min_of(args.out_height, first + block);
          for (int64_t y = first; y < last; y++) {
            const int64_t top = y * g.stride_h - g.top;
            next = max_of(next, top);
            for (; next < min_of(in.height, top + reach + 1); next++) {
              const T* from = input + next * in.width * channels;
              float* to = ring.row(next) + g.left * kTileChannels;
              for (int64_t x = 0; x < columns; x++, from += channels, to += kTileChannels) {
                for (int64_t c = 0; c < channels; c += Vec::size) {
                  prefetch(from + c + row_size);
                  Vec value = load_upto(from + c, min_of(channels - c, Vec::size));
                  if (norm.mean != nullptr) {
                    const Vec d = value - Vec::load(norm.mean + c);
                    value = activate<decltype(activation)::value>(
                        fma(d, Vec::load(norm.scale + c), Vec::load(norm.bias + c)));
                  }
                  value.store(to + ring.at(c));
                }
              }
            }
            for (int64_t i = 0; i < g.kernel_h; i++) {
              const int64_t row = top + i * g.dilation_h;
              rows[i] = row < 0 || row >= in.height ? nullptr : ring.row(row);
            }
            for (int64_t c = 0; c < channels; c += kTileChannels) {
              for (int64_t i = 0; i < g.kernel_h; i++) {
                panel[i] = rows[i] == nullptr ? nullptr : rows[i] + ring.at(c);
              }
              padded_window_row<kTileChannels>(panel, g, args.out_width, args.weight + c,
                                               weight_stride, min_of(channels - c, kTileChannels),
                                               Epilogue{}, c, output + y * out_row + c, channels,
                                               nullptr);
            }
          }
          block_moments(output + first * out_row, (last - first) * args.out_width, moments,
                        image * blocks + b);
        }
      }
    });
  });
  const auto size = [&](int64_t b) {
    const int64_t first = b % blocks * block;
    return (min_of(args.out_height, first + block) - first) * args.out_width;
  };
  join_moments(moments, size, args.mean, args.var, args.parallel);
}

// ---- Backward

// total[t * stride] += the products of a row of the image with a row of the gradient, for kTaps
// neighbouring taps t and all channels of a panel.
template <int kTaps>
EFFKERNELS_INLINE void tap_products(const float* image, const float* gradient, int64_t width,
                                    int64_t step, float* total, int64_t stride) {
  constexpr int kVecs = kTileChannels / Vec::size;
  Vec sums[kTaps][kVecs];
#pragma GCC unroll 8
  for (int t = 0; t < kTaps; t++) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v++) sums[t][v] = Vec::set1(0.0f);
  }
  for (int64_t x = 0; x < width; x++) {
    Vec pixel[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v++) pixel[v] = Vec::load(image + x * kTileChannels + v * Vec::size);
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; t++) {
      const float* p = gradient + (x + t * step) * kTileChannels;
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; v++) {
        sums[t][v] = fma(pixel[v], Vec::load(p + v * Vec::size), sums[t][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTaps; t++) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v++) {
      float* p = total + t * stride + v * Vec::size;
      (Vec::load(p) + sums[t][v]).store(p);
    }
  }
}

// The gradient for the depthwise convolution's raw output, by rows.
struct OutputGradient {
  NormVectors norm;
  const float *factor, *slope, *constant;
};

template <class T, Activation kActivation>
inline void gradient_row(const TrainingDepthwiseBackwardArgs& args, const OutputGradient& by,
                         int64_t image, int64_t y, const RowRing& ring) {
  const Geometry& g = args.geometry;
  const int64_t channels = args.in.channels;
  const int64_t at = (image * args.out_height + y) * args.out_width * channels;
  const T* upstream = static_cast<const T*>(args.upstream) + at;
  const T* output = static_cast<const T*>(args.output) + at;
  const float* gate = args.gate == nullptr ? nullptr : args.gate + image * channels;
  const float* offset = args.offset == nullptr ? nullptr : args.offset + image * channels;
  const int64_t start = g.dilation_w * (g.kernel_w - 1) - g.left;
  for (int64_t x = 0; x < args.out_width; x++) {
    const int64_t column = x * g.stride_w + start;
    if (column < 0 || column >= ring.width) continue;  // went into no pixel
    float* to = ring.row(y) + column * kTileChannels;
    for (int64_t c = 0; c < channels; c += Vec::size) {
      const int64_t n = min_of(channels - c, Vec::size);
      prefetch(upstream + (x + args.out_width) * channels + c);
      prefetch(output + (x + args.out_width) * channels + c);
      Vec u = load_upto(upstream + x * channels + c, n);
      if (gate != nullptr) u = u * load_upto(gate + c, n);
      if (offset != nullptr) u = u + load_upto(offset + c, n);
      const Vec d = load_upto(output + x * channels + c, n) - Vec::load(by.norm.mean + c);
      const Vec s =
          slope<kActivation>(fma(d, Vec::load(by.norm.scale + c), Vec::load(by.norm.bias + c)));
      const Vec rest = fma(d, Vec::load(by.slope + c), Vec::load(by.constant + c));
      fma(u * s, Vec::load(by.factor + c), rest).store(to + ring.at(c));
    }
  }
}

// The coefficients of the output's BatchNorm from the sums over every image.
inline OutputGradient output_gradient(const TrainingDepthwiseBackwardArgs& args, Arena& arena) {
  const int64_t channels = args.in.channels, size = padded(channels);
  OutputGradient by{};
  by.norm = norm_vectors(args.output_norm, channels, arena);
  float* coefficients = arena.take(3 * size);
  const double pixels = static_cast<double>(args.in.count * args.out_height * args.out_width);
  for (int64_t c = 0; c < 3 * size; c++) coefficients[c] = 0.0f;
  for (int64_t c = 0; c < channels; c++) {
    double t = 0.0, product = 0.0;
    for (int64_t n = 0; n < args.in.count; n++) {
      const float* sums = args.sums + n * kProductSums * channels + c;
      const double gate = args.gate == nullptr ? 1.0 : args.gate[n * channels + c];
      const double offset = args.offset == nullptr ? 0.0 : args.offset[n * channels + c];
      t += gate * sums[channels] + offset * sums[2 * channels];
      product += gate * sums[3 * channels] + offset * sums[4 * channels];
    }
    norm_coefficients(args.output_norm, c, t, product, pixels, coefficients, size,
                      args.output_norm_weight_gradient, args.output_norm_bias_gradient);
  }
  by.factor = coefficients;
  by.slope = coefficients + size;
  by.constant = coefficients + 2 * size;
  return by;
}

// What a band sums up, [taps + 2, channels]: the taps' gradients, then t and t * d of the norm.
struct BandSums {
  float* data;
  int64_t stride;
};

// Row y of the input: its gradient, and what it adds to the sums. `image_row` and `slopes` hold
// the activated row and its slopes, `gradient` what becomes of it; `row_sums` is [2, channels].
template <class T, Activation kActivation>
inline void backward_row(const TrainingDepthwiseBackwardArgs& args, const NormVectors& norm,
                         const float* const* rows, const float** panel, const RowRing& ring,
                         int64_t image, int64_t y, const RowRing& row, const BandSums& sums,
                         float* row_sums) {
  const Geometry& g = args.geometry;
  const int64_t channels = args.in.channels, width = args.in.width;
  float *values = row.row(0), *slopes = row.row(1), *gradient = row.row(2);
  const int64_t start = (image * args.in.height + y) * width * channels;
  const T* input = static_cast<const T*>(args.input) + start;
  for (int64_t x = 0; x < width; x++) {
    for (int64_t c = 0; c < channels; c += Vec::size) {
      prefetch(input + (x + width) * channels + c);
      Vec value = load_upto(input + x * channels + c, min_of(channels - c, Vec::size));
      const int64_t at = x * kTileChannels + row.at(c);
      if (norm.mean != nullptr) {
        const Vec d = value - Vec::load(norm.mean + c);
        const auto [activated, s] = activate_with_slope<kActivation>(
            fma(d, Vec::load(norm.scale + c), Vec::load(norm.bias + c)));
        value = activated;
        s.store(slopes + at);
      }
      value.store(values + at);
    }
  }
  Geometry dense = g;  // the gradient has been spread out by the stride
  dense.stride_h = dense.stride_w = 1;
  for (int64_t c = 0; c < channels; c += kTileChannels) {
    for (int64_t i = 0; i < g.kernel_h; i++) {
      panel[i] = rows[i] == nullptr ? nullptr : rows[i] + ring.at(c);
    }
    if (args.input_gradient != nullptr) {
      padded_window_row<kTileChannels>(panel, dense, width, args.weight + c,
                                       round_up(channels, kPanel),
                                       min_of(channels - c, kTileChannels), Epilogue{}, c,
                                       gradient + row.at(c), kTileChannels, nullptr);
    }
    if (args.weight_gradient == nullptr) continue;
    for (int64_t i = 0; i < g.kernel_h; i++) {
      if (panel[i] == nullptr) continue;
      const float* pixels = values + row.at(c);
      float* taps = sums.data + i * g.kernel_w * sums.stride + c;
      const auto products = [&](auto count, int64_t j) EFFKERNELS_LAMBDA_INLINE {
        tap_products<decltype(count)::value>(pixels, panel[i] + j * g.dilation_w * kTileChannels,
                                             width, g.dilation_w, taps + j * sums.stride,
                                             sums.stride);
      };
      int64_t j = 0;
      for (; j + 5 <= g.kernel_w; j += 5) products(std::integral_constant<int, 5>{}, j);
      for (; j + 3 <= g.kernel_w; j += 3) products(std::integral_constant<int, 3>{}, j);
      for (; j < g.kernel_w; j++) products(std::integral_constant<int, 1>{}, j);
    }
  }
  if (args.input_gradient == nullptr) return;
  T* out = static_cast<T*>(args.input_gradient) + start;
  const T* residual = static_cast<const T*>(args.residual);
  for (int64_t c = 0; c < 2 * sums.stride; c++) row_sums[c] = 0.0f;
  for (int64_t x = 0; x < width; x++) {
    for (int64_t c = 0; c < channels; c += Vec::size) {
      const int64_t n = min_of(channels - c, Vec::size), at = x * kTileChannels + row.at(c);
      Vec t = Vec::load(gradient + at);
      if (norm.mean != nullptr) {
        t = t * Vec::load(slopes + at);
        const Vec d = load_upto(input + x * channels + c, n) - Vec::load(norm.mean + c);
        float *ts = row_sums + c, *products = ts + sums.stride;
        (Vec::load(ts) + t).store(ts);
        fma(t, d, Vec::load(products)).store(products);
      }
      if (residual != nullptr) t = t + load_upto(residual + start + x * channels + c, n);
      store_upto(t, out + x * channels + c, n);
    }
  }
  float* total = sums.data + g.kernel_h * g.kernel_w * sums.stride;
  for (int64_t c = 0; c < 2 * sums.stride; c += Vec::size) {
    (Vec::load(total + c) + Vec::load(row_sums + c)).store(total + c);
  }
}

template <class T>
void depthwise_backward(const TrainingDepthwiseBackwardArgs& args) {
  const Geometry& g = args.geometry;
  const Images& in = args.in;
  const int64_t channels = in.channels, stride = padded(channels), taps = g.kernel_h * g.kernel_w;
  const int64_t reach_h = g.dilation_h * (g.kernel_h - 1);
  const int64_t width = in.width + g.dilation_w * (g.kernel_w - 1);
  // Bands of input rows: by the shape alone, for each has sums of its own.
  constexpr int64_t kTasks = 8, kBandRows = 8;
  const int64_t bands =
      max_of(1, min_of(ceil_div(kTasks, max_of(in.count, 1)), in.height / kBandRows));
  const int64_t sums_size = (taps + 2) * stride;
  Arena arena{scratch(ScratchUse::kBlock, static_cast<size_t>((2 * kNormVectors + 3) * stride + 64 +
                                                              in.count * bands * sums_size))};
  const OutputGradient by = output_gradient(args, arena);
  const NormVectors norm = norm_vectors(args.norm, channels, arena);
  float* sums = arena.take(in.count * bands * sums_size);
  const auto run = [&](auto output_activation, auto activation) {
    parallel_for(args.parallel, in.count * bands, [&](int64_t begin, int64_t end) {
      const RowRing ring = make_ring(reach_h / g.stride_h + 1, width, channels);
      RowRing row{nullptr, 3, in.width, ring.panels};  // activated, slopes, gradient
      row.data = scratch(ScratchUse::kPanelRows, row.size() + static_cast<size_t>(2 * stride));
      float* row_sums = row.data + row.size();
      std::memset(row.data, 0, row.size() * sizeof(float));
      const size_t height = static_cast<size_t>(g.kernel_h);
      const float** rows = static_cast<const float**>(__builtin_alloca(height * sizeof(float*)));
      const float** panel = static_cast<const float**>(__builtin_alloca(height * sizeof(float*)));
      for (int64_t task = begin; task < end; task++) {
        const int64_t image = task / bands, band = task % bands;
        const BandSums total{sums + task * sums_size, stride};
        for (int64_t i = 0; i < sums_size; i++) total.data[i] = 0.0f;
        int64_t next = 0;
        for (int64_t y = band * in.height / bands; y < (band + 1) * in.height / bands; y++) {
          const int64_t least = y + g.top - reach_h;  // times stride_h: rows of the output
          if (least > 0) next = max_of(next, ceil_div(least, g.stride_h));
          for (; next < min_of(args.out_height, (y + g.top) / g.stride_h + 1); next++) {
            gradient_row<T, decltype(output_activation)::value>(args, by, image, next, ring);
          }
          for (int64_t i = 0; i < g.kernel_h; i++) {
            const int64_t at = least + i * g.dilation_h, from = at / g.stride_h;
            const bool outside = at < 0 || at % g.stride_h != 0 || from >= args.out_height;
            rows[i] = outside ? nullptr : ring.row(from);
          }
          backward_row<T, decltype(activation)::value>(args, norm, rows, panel, ring, image, y, row,
                                                       total, row_sums);
        }
      }
    });
  };
  with_activation(args.output_norm.activation, [&](auto activation) {
    if (norm.mean == nullptr) {
      run(activation, ActivationConstant<Activation::none>{});
    } else {
      run(activation, activation);
    }
  });
  const int64_t tasks = in.count * bands;
  const auto total = [&](int64_t i, int64_t c) {
    double sum = 0.0;
    for (int64_t task = 0; task < tasks; task++) sum += sums[task * sums_size + i * stride + c];
    return sum;
  };
  parallel_for(args.parallel, channels, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) {
      for (int64_t i = 0; i < taps && args.weight_gradient != nullptr; i++) {  // taps are reversed
        args.weight_gradient[(taps - 1 - i) * channels + c] = static_cast<float>(total(i, c));
      }
      if (args.coefficients == nullptr) continue;
      norm_coefficients(args.norm, c, total(taps, c), total(taps + 1, c),
                        static_cast<double>(in.count * in.pixels()), args.coefficients, channels,
                        args.norm_weight_gradient, args.norm_bias_gradient);
    }
  });
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
