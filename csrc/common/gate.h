// The gate of squeeze-and-excitation for one image.
#pragma once

#include "common/activation.h"
#include "common/scratch.h"

namespace effkernels {
namespace EFFKERNELS_ISA {

// Dot product in four chains of fma, added in a fixed order.
inline float dot(const float* a, const float* b, int64_t count) {
  Vec sums[4];
  for (Vec& sum : sums) sum = Vec::set1(0.0f);
  int64_t i = 0;
  for (; i + 4 * Vec::size <= count; i += 4 * Vec::size) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const int64_t at = i + j * Vec::size;
      sums[j] = fma(Vec::load(a + at), Vec::load(b + at), sums[j]);
    }
  }
  for (; i < count; i += Vec::size) {
    const int64_t n = min_of(count - i, Vec::size);
    sums[0] = fma(Vec::load(a + i, n), Vec::load(b + i, n), sums[0]);
  }
  alignas(64) float lanes[Vec::size];
  ((sums[0] + sums[1]) + (sums[2] + sums[3])).store(lanes);
  double total = 0.0;
  for (float lane : lanes) total += lane;
  return static_cast<float>(total);
}

// values[i] = activation(values[i] + bias[i])
inline void activate_row(float* values, const float* bias, int64_t count, Activation activation) {
  Epilogue epilogue;
  epilogue.bias = bias;
  epilogue.activation = activation;
  int64_t i = 0;
  for (; i + Vec::size <= count; i += Vec::size) {
    finish_rows<float>(values + i, 0, 1, Vec::size, epilogue, i, nullptr, values + i, 0, nullptr);
  }
  if (i < count) {
    alignas(64) float lanes[Vec::size];
    Vec::load(values + i, count - i).store(lanes);
    finish_rows<float>(lanes, 0, 1, count - i, epilogue, i, nullptr, values + i, 0, nullptr);
  }
}

constexpr int64_t kRowChain = 64;  // rows added up in one chain of fma: rounds like its root

// out[c] = sum over r < count of factors[r * stride] * rows[r * columns + c]; without factors they
// are 1. Four vectors of columns go down the rows side by side.
inline void add_rows(const float* factors, int64_t stride, const float* rows, int64_t count,
                     int64_t columns, float* out) {
  const auto group = [&](int64_t c, auto vectors, int64_t n) EFFKERNELS_LAMBDA_INLINE {
    constexpr int kVectors = decltype(vectors)::value;
    const auto load = [n](const float* p) EFFKERNELS_LAMBDA_INLINE {
      return n == Vec::size ? Vec::load(p) : Vec::load(p, n);
    };
    for (int64_t begin = 0; begin == 0 || begin < count; begin += kRowChain) {
      Vec sums[kVectors];
      for (Vec& sum : sums) sum = Vec::set1(0.0f);
      for (int64_t r = begin; r < min_of(count, begin + kRowChain); r++) {
        const Vec factor = Vec::set1(factors == nullptr ? 1.0f : factors[r * stride]);
        const float* row = rows + r * columns + c;
        for (int v = 0; v < kVectors; v++) {
          sums[v] = fma(factor, load(row + v * Vec::size), sums[v]);
        }
      }
      for (int v = 0; v < kVectors; v++) {
        float* to = out + c + v * Vec::size;
        store_first(begin == 0 ? sums[v] : sums[v] + load(to), to, n);
      }
    }
  };
  int64_t c = 0;
  for (; c + 4 * Vec::size <= columns; c += 4 * Vec::size) {
    group(c, std::integral_constant<int, 4>{}, Vec::size);
  }
  for (; c < columns; c += Vec::size) {
    group(c, std::integral_constant<int, 1>{}, min_of(columns - c, Vec::size));
  }
}

// Before the activation: reduce_weight * mean, without the bias.
inline void reduce_row(const SqueezeExciteWeights& w, const float* mean, float* hidden) {
  for (int64_t r = 0; r < w.reduced; r++) {
    hidden[r] = dot(mean, w.reduce_weight + r * w.channels, w.channels);
  }
}

// gate[channels] from mean[channels]. Reads both weight matrices once, along their rows: the
// expanding one comes transposed.
inline void gate_row(const SqueezeExciteWeights& w, const float* mean, float* gate) {
  float* hidden = scratch(ScratchUse::kPanelRows, static_cast<size_t>(w.reduced));
  reduce_row(w, mean, hidden);
  activate_row(hidden, w.reduce_bias, w.reduced, w.activation);
  add_rows(hidden, 1, w.expand_weight, w.reduced, w.channels, gate);
  activate_row(gate, w.expand_bias, w.channels, w.gate_activation);
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
