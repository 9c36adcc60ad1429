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
// register by vpermps and degree 3 0.088, the same with vscalefps for the exponent 0.092; two
// vectors side by side made no difference to EfficientNet-B0.
// On a Xeon (avx512, avx2): 0.220 0.254; a Newton reciprocal 0.222; one check for two vectors 0.190
// 0.248, which made EfficientNet-B0 no faster (6.83 -> 6.88 ms); vscalefps for the exponent and one
// constant for ln 2, two operations fewer, 0.193 -> 0.168. Limits on x in place of the check are no
// faster, and silu would be 0 below -88.7.
// On Zen 3 (avx2), with a bias: 0.442, two vectors side by side 0.346; 2^(j / 4) from a register by
// vpermilps and degree 4 0.333, two vectors 0.277, three 0.275, four 0.299; 2^(j / 8) by vpermps
// and degree 3 with two vectors 0.267, but 1.5e-7 off, always downwards; that with a Newton
// reciprocal 0.296.
// Without a table degree 5 (7.5e-8) is one fma less, but all its results were low by 2.5e-8 on
// average, and EfficientNet-B0's by up to 2.8 times PyTorch's error.
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

// 1 + exp(-x[i]) where exp(-x) and its inverse are normal numbers, kCount vectors side by side.
// With a register of powers of two that n's last bits look up, q is small and its polynomial short.
#if EFFKERNELS_ISA_ID == EFFKERNELS_ID_avx512
// A register holds 2^(j / 16), so that degree 3 is enough (3e-9): n is -x / ln 2 rounded to
// sixteenths, of which the lookup sees the last four bits and scale_by_power the rest. One constant
// for ln 2 errs by 2e-9 n, 2.4e-7 at most.
template <int kCount>
EFFKERNELS_INLINE void one_plus_exp_minus(const Vec* x, Vec* out) {
  alignas(64) static const float kPowers[16] = {1.0f,        1.04427378f, 1.09050773f, 1.13878863f,
                                                1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
                                                1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                                1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
  const Vec magic = Vec::set1(786432.0f);  // 1.5 * 2^19: the last bit is worth 1 / 16
#pragma GCC unroll 4
  for (int i = 0; i < kCount; i++) {
    const Vec z = fma(x[i], Vec::set1(-1.44269504f), magic);
    const Vec n = z - magic;
    const Vec q = fma(n, Vec::set1(0.693147181f), x[i]);
    const Vec power = lookup(Vec::load(kPowers), z);
    const Vec p = fma(fma(q, Vec::set1(-1.0f / 6.0f), Vec::set1(0.5f)), q, Vec::set1(-1.0f));
    out[i] = scale_by_power(fma(power * q, p, power), n) + Vec::set1(1.0f);
  }
}
#elif EFFKERNELS_ISA_ID == EFFKERNELS_ID_avx2
// The same with 2^(j / 4), n in quarters and degree 4 (9e-9, of both signs): j is taken off the
// exponents' bits of the powers, since the bits of n that are added to them end in it.
template <int kCount>
EFFKERNELS_INLINE void one_plus_exp_minus(const Vec* x, Vec* out) {
  alignas(32) static const uint32_t kPowers[8] = {0x3f800000, 0x3f7837f0, 0x3f7504f3, 0x3f7744fd,
                                                  0x3f800000, 0x3f7837f0, 0x3f7504f3, 0x3f7744fd};
  const Vec magic = Vec::set1(3145728.0f);  // 1.5 * 2^21: the last bit is worth 1 / 4
  Vec n[kCount], q[kCount], power[kCount], p[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; i++) {
    const Vec z = fma(x[i], Vec::set1(-1.44269504f), magic);
    n[i] = z - magic;
    power[i] = add_bits(lookup(kPowers, z), shift_bits<21>(z));
  }
#pragma GCC unroll 4
  for (int i = 0; i < kCount; i++) q[i] = fma(n[i], Vec::set1(0.693147181f), x[i]);
#pragma GCC unroll 4
  for (int i = 0; i < kCount; i++) {
    p[i] = fma(q[i], Vec::set1(0.0416666667f), Vec::set1(-0.166716714f));
  }
#pragma GCC unroll 4
  for (int i = 0; i < kCount; i++) p[i] = fma(p[i], q[i], Vec::set1(0.5f));
#pragma GCC unroll 4
  for (int i = 0; i < kCount; i++) p[i] = fma(p[i], q[i], Vec::set1(-1.0f));
#pragma GCC unroll 4
  for (int i = 0; i < kCount; i++) p[i] = fma(power[i] * q[i], p[i], power[i]);
#pragma GCC unroll 4
  for (int i = 0; i < kCount; i++) out[i] = p[i] + Vec::set1(1.0f);
}
#else
template <int kCount>
EFFKERNELS_INLINE void one_plus_exp_minus(const Vec* x, Vec* out) {
#pragma GCC unroll 4
  for (int i = 0; i < kCount; i++) out[i] = exp_minus<0>(x[i]) + Vec::set1(1.0f);
}
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

// x[i] = silu or sigmoid of x[i], kCount vectors side by side.
template <bool kSilu, int kCount>
EFFKERNELS_INLINE void sigmoid_product(Vec* x) {
  Vec largest = abs(x[0]);
#pragma GCC unroll 4
  for (int i = 1; i < kCount; i++) largest = larger_magnitude(largest, abs(x[i]));
  if (__builtin_expect(!all_below(largest, kLargest), 0)) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; i++) x[i] = sigmoid_anywhere<kSilu>(x[i]);
    return;
  }
  Vec divisor[kCount];
  one_plus_exp_minus<kCount>(x, divisor);
#pragma GCC unroll 4
  for (int i = 0; i < kCount; i++) x[i] = (kSilu ? x[i] : Vec::set1(1.0f)) / divisor[i];
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
    sigmoid_product<true, 1>(&x);
    return x;
  } else if constexpr (kActivation == Activation::sigmoid) {
    sigmoid_product<false, 1>(&x);
    return x;
  } else {
    return x;
  }
}

// Vectors that the epilogue activates side by side. A vector's operations wait for one another; a
// core looks ahead past them to the next vector's, but not far enough where its schedulers are
// small.
#if EFFKERNELS_ISA_ID == EFFKERNELS_ID_avx2
constexpr int kTogether = 2;
#else
constexpr int kTogether = 1;
#endif

template <Activation kActivation, int kCount>
EFFKERNELS_INLINE void activate_together(Vec* x) {
  if constexpr (kActivation == Activation::silu || kActivation == Activation::sigmoid) {
    sigmoid_product<kActivation == Activation::silu, kCount>(x);
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; i++) x[i] = activate<kActivation>(x[i]);
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
    const Vec s = activate<Activation::sigmoid>(x);
    return s * fma(x, one - s, one);
  } else if constexpr (kActivation == Activation::sigmoid) {
    const Vec s = activate<Activation::sigmoid>(x);
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
    const Vec s = activate<Activation::sigmoid>(x), value = x * s;
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

// One vector of channels of finish_rows_as below, n of them; returns the column sums, if kSum.
template <class T, Activation kActivation, bool kWhole, bool kResidual, bool kSum>
EFFKERNELS_INLINE Vec finish_column(const float* tile, int64_t tile_stride, int64_t rows, int64_t n,
                                    Vec scale, Vec bias, const T* residual, T* out,
                                    int64_t out_stride) {
  Vec total = Vec::set1(0.0f);
  const auto finish = [&](auto count) EFFKERNELS_LAMBDA_INLINE {
    constexpr int kCount = decltype(count)::value;
    Vec x[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; i++) {
      x[i] = fma(Vec::load(tile + i * tile_stride), scale, bias);
      if constexpr (kResidual) {
        const T* p = residual + i * out_stride;
        x[i] = x[i] + (kWhole ? Vec::load(p) : load_first(p, n));
      }
    }
    activate_together<kActivation, kCount>(x);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; i++) {
      if constexpr (kSum) total = total + x[i];
      if constexpr (kWhole) {
        x[i].store(out + i * out_stride);
      } else {
        store_first(x[i], out + i * out_stride, n);
      }
    }
    tile += kCount * tile_stride;
    out += kCount * out_stride;
    if constexpr (kResidual) residual += kCount * out_stride;
  };
  for (; rows >= kTogether; rows -= kTogether) {
    finish(std::integral_constant<int, kTogether>{});
  }
  if constexpr (kTogether > 1) {
    for (; rows > 0; rows--) finish(std::integral_constant<int, 1>{});
  }
  return total;
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
    const auto vector = [&](const float* p, float otherwise) {
      if (p == nullptr) return Vec::set1(otherwise);
      return whole ? Vec::load(p + c) : Vec::load(p + c, n);
    };
    const Vec a = vector(scale, 1.0f), b = vector(bias, 0.0f);
    const auto column = [&](auto all, auto added, auto summed) EFFKERNELS_LAMBDA_INLINE {
      constexpr bool kResidual = decltype(added)::value;
      return finish_column<T, kActivation, decltype(all)::value, kResidual,
                           decltype(summed)::value>(tile + c, tile_stride, rows, n, a, b,
                                                    kResidual ? residual + c : nullptr, out + c,
                                                    out_stride);
    };
    constexpr std::true_type yes;
    constexpr std::false_type no;
    Vec total;  // of the pairs that are frequent, one loop each
    if (residual != nullptr) {
      total = whole ? column(yes, yes, yes) : column(no, yes, yes);
    } else if (sum != nullptr) {
      total = whole ? column(yes, no, yes) : column(no, no, yes);
    } else {
      total = whole ? column(yes, no, no) : column(no, no, yes);
    }
    if (sum != nullptr) store_first(total + vector(sum, 0.0f), sum + c, n);
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
