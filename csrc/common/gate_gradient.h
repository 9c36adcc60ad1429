// The backward pass of the gate of squeeze-and-excitation (common/gate.h).
//
// With h = reduce_weight * mean + reduce_bias, g = expand_weight * activation(h) + expand_bias:
//   for g    = upstream * gate_activation'(g)                   expand_bias: its sum over images
//   for h    = (expand_weight^T * for g) * activation'(h)       reduce_bias: its sum over images
//   for mean = reduce_weight^T * for h
//   for expand_weight = for g x activation(h), for reduce_weight = for h x mean, over images
// h and g are computed again: two products more, of six, instead of vectors kept.
//
// B0's 16 gates at batch 16, one thread, with the calls around them: PyTorch's formula 4.0 ms, this
// 3.8; against a second for the whole step there is nothing to gain by more images at a time.
#pragma once

#include "common/gate.h"

namespace effkernels {
namespace EFFKERNELS_ISA {

// What the gradients of the weights are made of, of all images.
struct GateWork {
  float* hidden;           // [count, reduced]: activation(h)
  float* hidden_gradient;  // [count, reduced]: for h
  float* gate_gradient;    // [count, channels]: for g

  static int64_t size(const SqueezeExciteWeights& w, int64_t count) {
    return count * (2 * w.reduced + w.channels);
  }
  static GateWork in(float* memory, const SqueezeExciteWeights& w, int64_t count) {
    return {memory, memory + count * w.reduced, memory + 2 * count * w.reduced};
  }
};

// Of x = slopes[i] + bias[i] the derivative of the activation into slopes[i], and its value into
// values[i] unless that is null.
inline void differentiate_row(float* slopes, const float* bias, int64_t count,
                              Activation activation, float* values) {
  with_activation(activation, [&](auto constant) {
    constexpr Activation kActivation = decltype(constant)::value;
    for (int64_t i = 0; i < count; i += Vec::size) {
      const int64_t n = min_of(count - i, Vec::size);
      Vec x = Vec::load(slopes + i, n);
      if (bias != nullptr) x = x + Vec::load(bias + i, n);
      slope<kActivation>(x).store(slopes + i, n);
      if (values != nullptr) activate<kActivation>(x).store(values + i, n);
    }
  });
}

// values[i] *= factors[i]
inline void multiply_row(float* values, const float* factors, int64_t count) {
  for (int64_t i = 0; i < count; i += Vec::size) {
    const int64_t n = min_of(count - i, Vec::size);
    (Vec::load(values + i, n) * Vec::load(factors + i, n)).store(values + i, n);
  }
}

// Of one image, whose rows of `work` are written: the gradient for mean[channels] from
// upstream[channels], and the gate itself; null pointers leave theirs out.
inline void gate_gradient_row(const SqueezeExciteWeights& w, const float* mean,
                              const float* upstream, int64_t image, const GateWork& work,
                              float* mean_gradient, float* gate) {
  float* hidden = work.hidden + image * w.reduced;
  float* for_hidden = work.hidden_gradient + image * w.reduced;
  float* for_gate = work.gate_gradient + image * w.channels;
  reduce_row(w, mean, for_hidden);
  differentiate_row(for_hidden, w.reduce_bias, w.reduced, w.activation, hidden);
  add_rows(hidden, 1, w.expand_weight, w.reduced, w.channels, for_gate);
  differentiate_row(for_gate, w.expand_bias, w.channels, w.gate_activation, gate);
  multiply_row(for_gate, upstream, w.channels);
  for (int64_t r = 0; r < w.reduced; r++) {
    for_hidden[r] *= dot(for_gate, w.expand_weight + r * w.channels, w.channels);
  }
  if (mean_gradient != nullptr) {
    add_rows(for_hidden, 1, w.reduce_weight, w.reduced, w.channels, mean_gradient);
  }
}

// The gradients of the weights, summed over images in their order, from all rows of `work`.
inline void gate_weight_gradients(const SqueezeExciteWeights& w, const float* mean, int64_t count,
                                  const GateWork& work, const SqueezeExciteGradients& out,
                                  const Parallel& parallel) {
  if (out.reduce_bias != nullptr) {
    add_rows(nullptr, 0, work.hidden_gradient, count, w.reduced, out.reduce_bias);
  }
  if (out.expand_bias != nullptr) {
    add_rows(nullptr, 0, work.gate_gradient, count, w.channels, out.expand_bias);
  }
  if (out.reduce_weight == nullptr && out.expand_weight == nullptr) return;
  parallel_for(parallel, w.reduced, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      if (out.reduce_weight != nullptr) {
        add_rows(work.hidden_gradient + r, w.reduced, mean, count, w.channels,
                 out.reduce_weight + r * w.channels);
      }
      if (out.expand_weight != nullptr) {
        add_rows(work.hidden + r, w.reduced, work.gate_gradient, count, w.channels,
                 out.expand_weight + r * w.channels);
      }
    }
  });
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
