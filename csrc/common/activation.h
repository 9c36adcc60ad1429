// The activations on vectors, and the epilogue that every convolution ends in.
//
// exp(-|x|) = 2^n * exp(r), n = round(-|x| / ln 2), |r| <= ln(2) / 2, exp(r) by a polynomial of
// degree 6 (relative error 2e-9, below float32's rounding). 2^n is kept multiplied by 2^32, so
// that it is still a normal number where x * exp(x) is one: silu is then accurate to 1e-6 for
// every x whose result is a normal float. |x| is clamped at 110, where the scaled 2^n has become
// exactly 0: a finite x gives +-0 and -infinity gives NaN, as PyTorch does.
//
// Tried: exp clamped to the float range and a true division: 20 % slower on Zen 3 (both the
// division and the second clamp), and wrong by 1e5 epsilons below x = -87.
#pragma once

#include "common/vec.h"

namespace effkernels {
namespace EFFKERNELS_ISA {

constexpr float kExpScale = 4294967296.0f;            // 2^32
constexpr float kExpUnscale = 1.0f / 4294967296.0f;   // 2^-32

// 2^32 * exp(-magnitude) for magnitude >= 0 (or NaN).
EFFKERNELS_INLINE Vec scaled_exp_minus(Vec magnitude) {
  // min returns its second operand for NaN, so NaN stays.
  const Vec x = min(Vec::set1(110.3f), magnitude);
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits; 127 + 32 more make
  // those bits the exponent of 2^(n + 32).
  const Vec magic = Vec::set1(12582912.0f + 159.0f);
  const Vec z = fma(x, Vec::set1(-1.44269504f), magic);
  const Vec n = z - magic;
  Vec r = fma(n, Vec::set1(-0.693359375f), Vec::set1(0.0f) - x);
  r = fma(n, Vec::set1(2.12194440e-4f), r);
  Vec p = Vec::set1(0.0013836846f);
  p = fma(p, r, Vec::set1(0.008374816f));
  p = fma(p, r, Vec::set1(0.041668225f));
  p = fma(p, r, Vec::set1(0.1666642f));
  p = fma(p, r, Vec::set1(0.4999999f));
  p = fma(p, r, Vec::set1(1.0f));
  p = fma(p, r, Vec::set1(1.0f));
  return p * exponent_from(z);
}

template <Activation kActivation>
EFFKERNELS_INLINE Vec activate(Vec x) {
  if constexpr (kActivation == Activation::relu) {
    return max(Vec::set1(0.0f), x);
  } else if constexpr (kActivation == Activation::relu6) {
    return min(Vec::set1(6.0f), max(Vec::set1(0.0f), x));
  } else if constexpr (kActivation == Activation::hard_swish) {
    const Vec gate = min(Vec::set1(6.0f), max(Vec::set1(0.0f), x + Vec::set1(3.0f)));
    return x * (gate * Vec::set1(1.0f / 6.0f));
  } else if constexpr (kActivation == Activation::silu) {
    const Vec e = scaled_exp_minus(abs(x));
    const Vec r = reciprocal(fma(e, Vec::set1(kExpUnscale), Vec::set1(1.0f)));
    return select_negative(x, x * e * Vec::set1(kExpUnscale), x) * r;
  } else if constexpr (kActivation == Activation::sigmoid) {
    const Vec e = scaled_exp_minus(abs(x));
    const Vec r = reciprocal(fma(e, Vec::set1(kExpUnscale), Vec::set1(1.0f)));
    return select_negative(x, e * r * Vec::set1(kExpUnscale), r);
  } else {
    return x;
  }
}

// Calls body(constant) with the activation as a compile-time constant.
template <Activation kActivation>
struct ActivationConstant {
  static constexpr Activation value = kActivation;
};

template <class F>
EFFKERNELS_INLINE void with_activation(Activation activation, F&& body) {
  switch (activation) {
    case Activation::none:
      return body(ActivationConstant<Activation::none>{});
    case Activation::relu:
      return body(ActivationConstant<Activation::relu>{});
    case Activation::relu6:
      return body(ActivationConstant<Activation::relu6>{});
    case Activation::silu:
      return body(ActivationConstant<Activation::silu>{});
    case Activation::hard_swish:
      return body(ActivationConstant<Activation::hard_swish>{});
    case Activation::sigmoid:
      return body(ActivationConstant<Activation::sigmoid>{});
  }
}

// The epilogue on `rows` rows of raw sums: tile[row * tile_stride + c] for c < channels.
// Row r goes to out + r * out_stride (counted in T). The rows of `residual`, if any, have the
// same stride. Column sums of the results are added to sum[c], if given.
template <class T, Activation kActivation>
inline void finish_rows_as(const float* tile, int64_t tile_stride, int64_t rows, int64_t channels,
                           const float* scale, const float* bias, const T* residual, T* out,
                           int64_t out_stride, float* sum) {
  for (int64_t c = 0; c < channels; c += Vec::size) {
    const int64_t n = min_of(channels - c, Vec::size);
    const bool whole = n == Vec::size;
    const Vec zero = Vec::set1(0.0f);
    const auto vector = [&](const float* p, Vec otherwise) {
      if (p == nullptr) return otherwise;
      return whole ? Vec::load(p + c) : Vec::load(p + c, n);
    };
    const Vec a = vector(scale, Vec::set1(1.0f));
    const Vec b = vector(bias, zero);
    Vec total = zero;
    for (int64_t r = 0; r < rows; r++) {
      Vec x = fma(Vec::load(tile + r * tile_stride + c), a, b);
      if (residual != nullptr) {
        const T* p = residual + r * out_stride + c;
        x = x + (whole ? Vec::load(p) : load_first(p, n));
      }
      x = activate<kActivation>(x);
      total = total + x;
      T* p = out + r * out_stride + c;
      if (whole) {
        x.store(p);
      } else {
        store_first(x, p, n);
      }
    }
    if (sum != nullptr) {
      total = total + vector(sum, zero);
      if (whole) {
        total.store(sum + c);
      } else {
        total.store(sum + c, n);
      }
    }
  }
}

// As above with the epilogue of channels [first, first + channels) of the whole output.
template <class T>
inline void finish_rows(const float* tile, int64_t tile_stride, int64_t rows, int64_t channels,
                        const Epilogue& epilogue, int64_t first, const T* residual, T* out,
                        int64_t out_stride, float* sum) {
  const float* scale = epilogue.scale == nullptr ? nullptr : epilogue.scale + first;
  const float* bias = epilogue.bias == nullptr ? nullptr : epilogue.bias + first;
  with_activation(epilogue.activation, [&](auto activation) {
    finish_rows_as<T, decltype(activation)::value>(tile, tile_stride, rows, channels, scale, bias,
                                                   residual, out, out_stride, sum);
  });
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
