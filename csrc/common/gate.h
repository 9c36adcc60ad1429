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
  float total = 0.0f;
  for (float lane : lanes) total += lane;
  return total;
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

// gate[channels] from mean[channels]. Reads both weight matrices once, along their rows: the
// expanding one comes transposed, and its rows are added up four at a time.
inline void gate_row(const SqueezeExciteWeights& w, const float* mean, float* gate) {
  float* hidden = scratch(ScratchUse::kPanelRows, static_cast<size_t>(w.reduced));
  for (int64_t r = 0; r < w.reduced; r++) {
    hidden[r] = dot(mean, w.reduce_weight + r * w.channels, w.channels);
  }
  activate_row(hidden, w.reduce_bias, w.reduced, w.activation);
  constexpr int64_t kVecs = 4;
  for (int64_t c = 0; c < w.channels; c += kVecs * Vec::size) {
    Vec sums[kVecs];
    for (Vec& sum : sums) sum = Vec::set1(0.0f);
    const int64_t left = w.channels - c;
    for (int64_t r = 0; r < w.reduced; r++) {
      const Vec h = Vec::set1(hidden[r]);
      const float* row = w.expand_weight + r * w.channels + c;
      if (left >= kVecs * Vec::size) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; v++) {
          sums[v] = fma(h, Vec::load(row + v * Vec::size), sums[v]);
        }
      } else {
        for (int v = 0; v < kVecs && v * Vec::size < left; v++) {
          const int64_t n = min_of(left - v * Vec::size, Vec::size);
          sums[v] = fma(h, Vec::load(row + v * Vec::size, n), sums[v]);
        }
      }
    }
    for (int v = 0; v < kVecs && v * Vec::size < left; v++) {
      store_first(sums[v], gate + c + v * Vec::size, min_of(left - v * Vec::size, Vec::size));
    }
  }
  activate_row(gate, w.expand_bias, w.channels, w.gate_activation);
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
