// What csrc/ computes, in double and in plain loops, on random values of random cases.
//
// Shares nothing with the kernels but common/types.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <random>
#include <type_traits>
#include <vector>

#include "common/types.h"

namespace reference {

using namespace effkernels;

using Values = std::vector<double>;

// ---- Values as the kernels see them.

inline float bf16_nearest(double value) {
  const float single = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  if (std::isfinite(single)) bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline double stored(DType dtype, double value) {
  return dtype == DType::f32 ? static_cast<float>(value) : bf16_nearest(value);
}

// A tensor between two margins of NaN, aligned to 4 bytes and no more.
class Tensor {
 public:
  Tensor(DType dtype, int64_t size) : dtype_(dtype), size_(size) { clear(); }
  Tensor(DType dtype, const Values& values) : Tensor(dtype, static_cast<int64_t>(values.size())) {
    for (int64_t i = 0; i < size_; i++) {
      const float value = static_cast<float>(stored(dtype, values[i]));
      std::memcpy(at(i), reinterpret_cast<const char*>(&value) + 4 - width(), width());
    }
  }
  void clear() { bytes_.assign(2 * kMargin + size_ * width(), 0xff); }
  void* data() { return at(0); }
  float* floats() { return static_cast<float*>(data()); }
  double operator[](int64_t i) const {
    float value = 0.0f;  // little-endian: bf16 is its last two bytes
    std::memcpy(reinterpret_cast<char*>(&value) + 4 - width(), at(i), width());
    return value;
  }
  bool margins_intact() const {
    const auto untouched = [](unsigned char byte) { return byte == 0xff; };
    return std::all_of(bytes_.begin(), bytes_.begin() + kMargin, untouched) &&
           std::all_of(bytes_.end() - kMargin, bytes_.end(), untouched);
  }
  bool operator==(const Tensor& other) const { return bytes_ == other.bytes_; }
  DType dtype() const { return dtype_; }
  int64_t size() const { return size_; }

 private:
  static constexpr size_t kMargin = 68;
  unsigned char* at(int64_t i) { return bytes_.data() + kMargin + i * width(); }
  const unsigned char* at(int64_t i) const { return bytes_.data() + kMargin + i * width(); }
  size_t width() const { return dtype_ == DType::f32 ? 4 : 2; }
  DType dtype_;
  int64_t size_;
  std::vector<unsigned char> bytes_;
};

// ---- Random cases: the same on every machine.

inline std::mt19937 generator(20250101);

inline double uniform(double low, double high) {
  return low + (high - low) * generator() * 0x1p-32;
}
inline bool coin() { return (generator() >> 16 & 1) != 0; }
inline int64_t pick(std::initializer_list<int64_t> choices) {
  return choices.begin()[(generator() >> 8) % choices.size()];
}
inline Activation pick_activation() { return static_cast<Activation>(pick({0, 1, 2, 3, 4, 5})); }

inline Values draw(DType dtype, int64_t size, double largest = 1.0, double center = 0.0) {
  Values values(size);
  for (double& value : values) value = stored(dtype, center + uniform(-largest, largest));
  return values;
}

inline constexpr int64_t kChannels[] = {1, 3, 8, 16, 17, 33};

struct Window {
  int64_t height, width, kernel, stride, dilation, left, right, top, bottom;

  int64_t out(int64_t size) const { return (size - dilation * (kernel - 1) - 1) / stride + 1; }
  int64_t out_height() const { return out(height + top + bottom); }
  int64_t out_width() const { return out(width + left + right); }
  Geometry geometry() const {
    return {kernel, kernel, stride, stride, dilation, dilation, left, top};
  }
};

inline constexpr Window kWindows[] = {
    {9, 7, 3, 1, 1, 1, 1, 1, 1},  {9, 13, 3, 2, 1, 1, 1, 1, 1},
    {8, 10, 3, 2, 1, 0, 1, 0, 1},  // SAME at stride 2
    {5, 6, 5, 1, 1, 2, 2, 2, 2},  {11, 8, 5, 2, 1, 1, 2, 2, 1},
    {7, 5, 1, 1, 1, 0, 0, 0, 0},  {6, 8, 1, 2, 1, 0, 0, 0, 0},  // the last column is not read
    {1, 1, 5, 1, 1, 2, 2, 2, 2},                                // padding on all sides
    {3, 61, 3, 1, 1, 0, 3, 3, 0},                               // windows of nothing but padding
    {11, 9, 3, 1, 2, 2, 2, 2, 2}, {7, 30, 3, 1, 1, 1, 1, 1, 1},
    {9, 33, 5, 2, 1, 1, 2, 2, 1},  // rows of several register tiles
    {6, 31, 1, 2, 1, 0, 0, 0, 0},
};

// ---- The ops in double. Images are [n, y, x, c], as in memory.

inline double activate(Activation activation, double x) {
  if (std::isnan(x)) return x;
  switch (activation) {
    case Activation::relu:
      return std::max(0.0, x);
    case Activation::relu6:
      return std::min(6.0, std::max(0.0, x));
    case Activation::silu:
      return x * (1.0 / (1.0 + std::exp(-x)));  // as PyTorch: NaN at -infinity
    case Activation::hard_swish:
      return x * (std::min(6.0, std::max(0.0, x + 3.0)) / 6.0);
    case Activation::sigmoid:
      return 1.0 / (1.0 + std::exp(-x));
    case Activation::hard_sigmoid:
      return std::min(6.0, std::max(0.0, x + 3.0)) / 6.0;
    default:
      return x;
  }
}

// The derivative of `activate`, PyTorch's choice at the corners.
inline double slope(Activation activation, double x) {
  const double s = 1.0 / (1.0 + std::exp(-x));
  switch (activation) {
    case Activation::relu:
      return x > 0.0 ? 1.0 : 0.0;
    case Activation::relu6:
      return x > 0.0 && x < 6.0 ? 1.0 : 0.0;
    case Activation::silu:
      return s * (1.0 + x * (1.0 - s));
    case Activation::hard_swish:
      return x <= -3.0 ? 0.0 : x >= 3.0 ? 1.0 : x / 3.0 + 0.5;
    case Activation::sigmoid:
      return s * (1.0 - s);
    case Activation::hard_sigmoid:
      return x > -3.0 && x < 3.0 ? 1.0 / 6.0 : 0.0;
    default:
      return 1.0;
  }
}

// weight [out_channels, kernel * kernel, depth]; depth is all channels, or 1: depthwise.
inline Values convolve(const Values& input, const Images& in, const Window& w, const Values& weight,
                       int64_t out_channels, int64_t depth) {
  Values out;
  for (int64_t n = 0; n < in.count; n++) {
    for (int64_t y = 0; y < w.out_height(); y++) {
      for (int64_t x = 0; x < w.out_width(); x++) {
        for (int64_t k = 0; k < out_channels; k++) {
          double sum = 0.0;
          for (int64_t tap = 0; tap < w.kernel * w.kernel; tap++) {
            const int64_t row = y * w.stride - w.top + tap / w.kernel * w.dilation;
            const int64_t column = x * w.stride - w.left + tap % w.kernel * w.dilation;
            if (row < 0 || row >= in.height || column < 0 || column >= in.width) continue;
            const int64_t at = ((n * in.height + row) * in.width + column) * in.channels;
            const double* values = input.data() + at + (depth == 1 && in.channels > 1 ? k : 0);
            const double* weights = weight.data() + (k * w.kernel * w.kernel + tap) * depth;
            for (int64_t c = 0; c < depth; c++) sum += values[c] * weights[c];
          }
          out.push_back(sum);
        }
      }
    }
  }
  return out;
}

inline Values spatial_mean(const Values& values, int64_t count, int64_t channels) {
  Values mean(count * channels);
  const int64_t size = static_cast<int64_t>(values.size()) / count;
  for (int64_t i = 0; i < count * size; i++) {
    mean[i / size * channels + i % channels] += values[i] * channels / size;
  }
  return mean;
}

inline void multiply_gate(Values& values, const Values& gate, int64_t count, int64_t channels) {
  const int64_t size = static_cast<int64_t>(values.size()) / count;
  for (int64_t i = 0; i < count * size; i++) values[i] *= gate[i / size * channels + i % channels];
}

// ---- Weights: drawn, packed, and applied in double.

struct Weights {
  int64_t rows, depth;
  Values values;  // [rows, depth]
  Tensor packed;

  Weights(int64_t rows, int64_t depth, bool depthwise)
      : rows(rows),
        depth(depth),
        values(draw(DType::f32, rows * depth, 1.7 / std::sqrt(depth))),  // results are about 1
        packed(DType::f32, pack(depthwise)) {}

 private:
  // Panels [ceil(rows / 16), depth, 16]; depthwise taps [depth, rows rounded up to 16].
  Values pack(bool depthwise) const {
    const int64_t wide = depthwise ? round_up(rows, kPanel) : kPanel;
    Values result(round_up(rows, kPanel) * depth);
    for (int64_t i = 0; i < rows * depth; i++) {
      const int64_t row = i / depth;
      result[row / wide * depth * wide + i % depth * wide + row % wide] = values[i];
    }
    return result;
  }
};

struct DrawnEpilogue {
  bool has_scale = coin(), has_bias = coin();
  Values scale, bias, residual;
  Activation activation = pick_activation();
  Tensor scale_memory, bias_memory, residual_memory;

  DrawnEpilogue(int64_t channels, DType dtype = DType::f32, int64_t residual_size = 0)
      : scale(draw(DType::f32, channels, 0.5, 1.0)),
        bias(draw(DType::f32, channels)),
        residual(draw(dtype, residual_size)),
        scale_memory(DType::f32, scale),
        bias_memory(DType::f32, bias),
        residual_memory(dtype, residual) {}

  Epilogue pointers() {
    return {has_scale ? scale_memory.floats() : nullptr, has_bias ? bias_memory.floats() : nullptr,
            residual.empty() ? nullptr : residual_memory.data(), activation};
  }
  void apply(Values& sums) const {
    for (size_t i = 0; i < sums.size(); i++) {
      const size_t c = i % scale.size();
      double x = sums[i] * (has_scale ? scale[c] : 1.0) + (has_bias ? bias[c] : 0.0);
      if (!residual.empty()) x += residual[i];
      sums[i] = activate(activation, x);
    }
  }
};

struct DrawnGate {
  int64_t channels, reduced = pick({1, 3, 8});
  Values reduce, expand;
  DrawnEpilogue hidden{reduced}, gate{channels};
  Tensor reduce_memory, expand_memory;

  explicit DrawnGate(int64_t channels)
      : channels(channels),
        reduce(draw(DType::f32, reduced * channels, 1.7 / std::sqrt(channels))),
        expand(draw(DType::f32, reduced * channels, 1.7 / std::sqrt(reduced))),
        reduce_memory(DType::f32, reduce),
        expand_memory(DType::f32, expand) {
    hidden.has_scale = gate.has_scale = false;
  }
  SqueezeExciteWeights pointers() {
    return {channels,
            reduced,
            reduce_memory.floats(),
            hidden.pointers().bias,
            expand_memory.floats(),
            gate.pointers().bias,
            hidden.activation,
            gate.activation};
  }
  Values apply(const Values& mean) const {
    Values result;
    for (size_t n = 0; n < mean.size() / channels; n++) {
      Values inner(reduced), outer(channels);
      for (int64_t i = 0; i < reduced * channels; i++) {
        inner[i / channels] += reduce[i] * mean[n * channels + i % channels];
      }
      hidden.apply(inner);
      for (int64_t i = 0; i < reduced * channels; i++) {
        outer[i % channels] += expand[i] * inner[i / channels];
      }
      gate.apply(outer);
      result.insert(result.end(), outer.begin(), outer.end());
    }
    return result;
  }

  // Gradients for means and parameters, [reduced, channels] both matrices, from the gates'.
  struct Gradients {
    Values mean, reduce, reduce_bias, expand, expand_bias;
  };
  Gradients differentiate(const Values& mean, const Values& upstream) const {
    Gradients out{Values(mean.size()), Values(reduce.size()), Values(reduced),
                  Values(expand.size()), Values(channels)};
    for (size_t n = 0; n < mean.size() / channels; n++) {
      Values inner(reduced), value(reduced), for_inner(reduced), outer(channels);
      for (int64_t r = 0; r < reduced; r++) {
        inner[r] = hidden.has_bias ? hidden.bias[r] : 0.0;
        for (int64_t c = 0; c < channels; c++) {
          inner[r] += reduce[r * channels + c] * mean[n * channels + c];
        }
        value[r] = activate(hidden.activation, inner[r]);
      }
      for (int64_t c = 0; c < channels; c++) {
        outer[c] = gate.has_bias ? gate.bias[c] : 0.0;
        for (int64_t r = 0; r < reduced; r++) outer[c] += expand[r * channels + c] * value[r];
        const double t = upstream[n * channels + c] * slope(gate.activation, outer[c]);
        out.expand_bias[c] += t;
        for (int64_t r = 0; r < reduced; r++) {
          out.expand[r * channels + c] += t * value[r];
          for_inner[r] += t * expand[r * channels + c];
        }
      }
      for (int64_t r = 0; r < reduced; r++) {
        for_inner[r] *= slope(hidden.activation, inner[r]);
        out.reduce_bias[r] += for_inner[r];
        for (int64_t c = 0; c < channels; c++) {
          out.reduce[r * channels + c] += for_inner[r] * mean[n * channels + c];
          out.mean[n * channels + c] += for_inner[r] * reduce[r * channels + c];
        }
      }
    }
    return out;
  }
};

}  // namespace reference
