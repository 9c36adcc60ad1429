// The activations on vectors, and the epilogue that every convolution ends in.
//
// silu(x) = x / (1 + exp(-x)), sigmoid(x) = 1 / (1 + exp(-x)); exp(-x) = 2^n * exp(-q) with
// n = round(-x / ln 2) and |q| <= ln(2) / 2, exp(-q) by a polynomial of degree 6 (relative error
// 3e-9). That holds while 2^n is a normal number: a vector with any |x| >= 87 (or NaN) takes a
// slower path instead that is right everywhere, so the common one needs no clamps. Both are within
// 1e-6 of the exact value wherever that is a normal float; silu(-infinity) is NaN as PyTorch's.
//
// Ladder, ns per value in L1 on Zen 4 (avx512, avx2), one run:
//   exp(-|x|), degree 6, 2^n scaled by 2^32, Newton reciprocal, blend by sign   0.334  0.442
//   the same with a division: the divider works beside the multipliers          0.299  0.381
//   x / (1 + exp(-x)) clamped at +-87.3, degree 5: wrong below -87              0.209  0.260
//   no clamps, the first for large |x|                                          0.221  0.245
//   that with a Newton reciprocal                                               0.255  0.299
// On Zen 5 (avx512): polynomial 0.113, that with a Newton reciprocal 0.147, 2^(j / 16) from a
// register by vpermps and degree 3 0.088, the same with vscalefps for the exponent 0.092.
// On a Xeon (avx512, avx2): 0.220 0.254; a Newton reciprocal 0.222; one check for two vectors 0.190
// 0.248, which made EfficientNet-B0 no faster (6.83 -> 6.88 ms); vscalefps for the exponent and one
// constant for ln 2, two operations fewer, 0.193 -> 0.168. Limits on x in place of the check are no
// faster, and silu would be 0 below -88.7.
// Degree 5 (7.5e-8) is one fma less, but all its results were low by 2.5e-8 on average, and
// EfficientNet-B0's by up to 2.8 times PyTorch's error.
#pragma once

#include "common/vec.h"

namespace effkernels {
namespace EFFKERNELS_ISA {

constexpr float kLargest = 87.0f;                 // exp(-x) and its inverse are normal below
constexpr float kUnscale = 1.0f / 4294967296.0f;  // 2^-32

// exp(-q) for |q| <= ln(2) / 2. The first two coefficients are exactly 1, so that small q have no
// error of one sign: it would add up over the layers of a network.
EFFKERNELS_INLINE Vec exp_minus_small(Vec q) {
  Vec p = Vec::set1(0.00138146f);
  p = fma(p, q, Vec::set1(-0.00836871f));
  p = fma(p, q, Vec::set1(0.04166839f));
  p = fma(p, q, Vec::set1(-0.16666521f));
  p = fma(p, q, Vec::set1(0.49999993f));
  p = fma(p, q, Vec::set1(-1.0f));
  return fma(p, q, Vec::set1(1.0f));
}

// 2^shift * exp(-x). Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits;
// 127 + shift more make those bits the exponent of 2^(n + shift).
template <int kShift>
EFFKERNELS_INLINE Vec exp_minus(Vec x) {
  const Vec magic = Vec::set1(12582912.0f + 127.0f + kShift);
  const Vec z = fma(x, Vec::set1(-1.44269504f), magic);
  const Vec n = z - magic;
  Vec q = fma(n, Vec::set1(0.693359375f), x);  // ln 2 in two parts
  q = fma(n, Vec::set1(-2.12194440e-4f), q);
  return exp_minus_small(q) * exponent_from(z);
}

// exp(-x) where it and its inverse are normal numbers.
#if EFFKERNELS_ISA_ID == EFFKERNELS_ID_avx512
// A register holds 2^(j / 16), so that degree 3 is enough (3e-9): n is -x / ln 2 rounded to
// sixteenths, of which the lookup sees the last four bits and scale_by_power the rest. One constant
// for ln 2 errs by 2e-9 n, 2.4e-7 at most.
EFFKERNELS_INLINE Vec exp_minus_normal(Vec x) {
  alignas(64) static const float kPowers[16] = {1.0f,        1.04427378f, 1.09050773f, 1.13878863f,
                                                1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
                                                1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                                1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
  const Vec magic = Vec::set1(786432.0f);  // 1.5 * 2^19: the last bit is worth 1 / 16
  const Vec z = fma(x, Vec::set1(-1.44269504f), magic);
  const Vec n = z - magic;
  const Vec q = fma(n, Vec::set1(0.693147181f), x);
  const Vec power = lookup(Vec::load(kPowers), z);
  const Vec p = fma(fma(q, Vec::set1(-1.0f / 6.0f), Vec::set1(0.5f)), q, Vec::set1(-1.0f));
  return scale_by_power(fma(power * q, p, power), n);
}
#else
EFFKERNELS_INLINE Vec exp_minus_normal(Vec x) { return exp_minus<0>(x); }
#endif

// silu (x * sigmoid) or sigmoid of any x: from exp(-|x|), which cannot overflow, kept multiplied
// by 2^32 so that it is a normal number where x * exp(x) is one. At 110 the scaled power of two
// has become exactly 0: finite x give 0, -infinity gives NaN. min passes NaN, its second operand.
template <bool kSilu>
__attribute__((noinline)) Vec sigmoid_anywhere(Vec x) {
  const Vec one = Vec::set1(1.0f), unscale = Vec::set1(kUnscale);
  const Vec e = exp_minus<32>(min(Vec::set1(110.3f), abs(x)));
  const Vec factor = kSilu ? x : one;
  return select_negative(x, factor * e * unscale, factor) / fma(e, unscale, one);
}

template <bool kSilu>
EFFKERNELS_INLINE Vec sigmoid_product(Vec x) {
  if (__builtin_expect(!all_below(abs(x), kLargest), 0)) return sigmoid_anywhere<kSilu>(x);
  const Vec one = Vec::set1(1.0f);
  return (kSilu ? x : one) / (exp_minus_normal(x) + one);
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
  } else if constexpr (kActivation == Activation::hard_sigmoid) {
    const Vec gate = min(Vec::set1(6.0f), max(Vec::set1(0.0f), x + Vec::set1(3.0f)));
    return gate * Vec::set1(1.0f / 6.0f);
  } else if constexpr (kActivation == Activation::silu) {
    return sigmoid_product<true>(x);
  } else if constexpr (kActivation == Activation::sigmoid) {
    return sigmoid_product<false>(x);
  } else {
    return x;
  }
}

// The derivative at x, PyTorch's choice at the corners.
template <Activation kActivation>
EFFKERNELS_INLINE Vec slope(Vec x) {
  const Vec zero = Vec::set1(0.0f), one = Vec::set1(1.0f), three = Vec::set1(3.0f);
  if constexpr (kActivation == Activation::relu) {
    return select_negative(zero - x, one, zero);
  } else if constexpr (kActivation == Activation::relu6) {
    return select_negative(zero - x, select_negative(x - Vec::set1(6.0f), one, zero), zero);
  } else if constexpr (kActivation == Activation::hard_swish) {
    const Vec inside = fma(x, Vec::set1(1.0f / 3.0f), Vec::set1(0.5f));
    return select_negative(x - three, select_negative(zero - three - x, inside, zero), one);
  } else if constexpr (kActivation == Activation::hard_sigmoid) {
    const Vec inside = Vec::set1(1.0f / 6.0f);
    return select_negative(x - three, select_negative(zero - three - x, inside, zero), zero);
  } else if constexpr (kActivation == Activation::silu) {
    const Vec s = sigmoid_product<false>(x);
    return s * fma(x, one - s, one);
  } else if constexpr (kActivation == Activation::sigmoid) {
    const Vec s = sigmoid_product<false>(x);
    return s * (one - s);
  } else {
    return one;
  }
}

// The activation and its derivative, which share the exponential.
struct ActivationAndSlope {
  Vec value, slope;
};

template <Activation kActivation>
EFFKERNELS_INLINE ActivationAndSlope activate_with_slope(Vec x) {
  if constexpr (kActivation == Activation::silu) {
    const Vec s = sigmoid_product<false>(x), value = x * s;
    return {value, fma(value, Vec::set1(1.0f) - s, s)};
  } else {
    return {activate<kActivation>(x), slope<kActivation>(x)};
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
    case Activation::hard_sigmoid:
      return body(ActivationConstant<Activation::hard_sigmoid>{});
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
