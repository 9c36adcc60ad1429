// A vector of floats in the registers of one instruction set. The only file with intrinsics.
//
// Every Vec has: size; load/store of float and bf16, whole or the first n; set1; + - * /;
// fma(a, b, c) = a * b + c; min and max that return the second operand when one is NaN;
// abs; larger_magnitude(a, b): the larger of two that are not negative, NaN the largest;
// all_below(a, limit): every value is less than limit (none is NaN);
// select_negative(x, a, b) = x < 0 ? a : b;
// exponent_from(z): the float whose bits are those of z shifted left by 23 (see activation.h).
#pragma once

#include <cstring>

#include "common/isa.h"
#include "common/types.h"

#if EFFKERNELS_ISA_ID == EFFKERNELS_ID_avx2 || EFFKERNELS_ISA_ID == EFFKERNELS_ID_avx512
#include <immintrin.h>
#elif EFFKERNELS_ISA_ID == EFFKERNELS_ID_neon
#include <arm_neon.h>
#endif

#define EFFKERNELS_INLINE inline __attribute__((always_inline))
#define EFFKERNELS_LAMBDA_INLINE __attribute__((always_inline))

namespace effkernels {
namespace EFFKERNELS_ISA {

// The same pointer, which the compiler no longer knows to be a sum: it will not keep the parts.
template <class T>
EFFKERNELS_INLINE const T* opaque(const T* p) {
  asm("" : "+r"(p));
  return p;
}

// Asks for a line: into the second cache, or into the first where it is needed soon.
EFFKERNELS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
EFFKERNELS_INLINE void prefetch_first(const void* p) { __builtin_prefetch(p, 0, 3); }

// bf16 is the upper half of a float; the store rounds to nearest even and keeps NaN.
EFFKERNELS_INLINE float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

EFFKERNELS_INLINE bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

#if EFFKERNELS_ISA_ID == EFFKERNELS_ID_avx512

struct Vec {
  static constexpr int size = 16;
  __m512 v;

  static EFFKERNELS_INLINE __mmask16 first(int64_t n) {
    return static_cast<__mmask16>((1u << n) - 1);
  }
  static EFFKERNELS_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static EFFKERNELS_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static EFFKERNELS_INLINE Vec load(const float* p, int64_t n) {
    return {_mm512_maskz_loadu_ps(first(n), p)};
  }
  static EFFKERNELS_INLINE Vec load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  EFFKERNELS_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  EFFKERNELS_INLINE void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  EFFKERNELS_INLINE void store(bf16* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  }
};

EFFKERNELS_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
EFFKERNELS_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
EFFKERNELS_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
EFFKERNELS_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
EFFKERNELS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
EFFKERNELS_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
EFFKERNELS_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
EFFKERNELS_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
EFFKERNELS_INLINE bool all_below(Vec a, float limit) {
  return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(limit), _CMP_NLT_UQ) == 0;
}
EFFKERNELS_INLINE Vec select_negative(Vec x, Vec a, Vec b) {
  const __mmask16 negative = _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_LT_OQ);
  return {_mm512_mask_blend_ps(negative, b.v, a.v)};
}
EFFKERNELS_INLINE Vec exponent_from(Vec z) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(z.v), 23))};
}
EFFKERNELS_INLINE Vec larger_magnitude(Vec a, Vec b) {
  const __m512i bits = _mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v));
  return {_mm512_castsi512_ps(bits)};
}

// table[z mod 16], z with an integer in its last bits (avx512 only).
EFFKERNELS_INLINE Vec lookup(Vec table, Vec z) {
  return {_mm512_permutexvar_ps(_mm512_castps_si512(z.v), table.v)};
}

// x * 2^n, n rounded down; infinity or 0 where that is no float (avx512 only).
EFFKERNELS_INLINE Vec scale_by_power(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }

#elif EFFKERNELS_ISA_ID == EFFKERNELS_ID_avx2

struct Vec {
  static constexpr int size = 8;
  __m256 v;

  static EFFKERNELS_INLINE __m256i first(int64_t n) {
    alignas(32) static const int32_t kMasks[16] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                                   0,  0,  0,  0,  0,  0,  0,  0};
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMasks + 8 - n));
  }
  static EFFKERNELS_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static EFFKERNELS_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static EFFKERNELS_INLINE Vec load(const float* p, int64_t n) {
    return {_mm256_maskload_ps(p, first(n))};
  }
  static EFFKERNELS_INLINE Vec load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  EFFKERNELS_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  EFFKERNELS_INLINE void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, first(n), v); }
  EFFKERNELS_INLINE void store(bf16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i wide = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
};

EFFKERNELS_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
EFFKERNELS_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
EFFKERNELS_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
EFFKERNELS_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
EFFKERNELS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
EFFKERNELS_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
EFFKERNELS_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
EFFKERNELS_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
EFFKERNELS_INLINE bool all_below(Vec a, float limit) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, _mm256_set1_ps(limit), _CMP_NLT_UQ)) == 0;
}
EFFKERNELS_INLINE Vec select_negative(Vec x, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.v, a.v, x.v)};  // by sign bit: callers give equal a and b at -0
}
// Bits shifted left, and added as integers (avx2 only).
template <int kLeft>
EFFKERNELS_INLINE Vec shift_bits(Vec z) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(z.v), kLeft))};
}
EFFKERNELS_INLINE Vec add_bits(Vec a, Vec b) {
  const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v));
  return {_mm256_castsi256_ps(bits)};
}
EFFKERNELS_INLINE Vec exponent_from(Vec z) { return shift_bits<23>(z); }
EFFKERNELS_INLINE Vec larger_magnitude(Vec a, Vec b) {
  const __m256i bits = _mm256_max_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v));
  return {_mm256_castsi256_ps(bits)};
}

// The bits of table[z mod 4], z with an integer in its last bits; the table twice (avx2 only).
EFFKERNELS_INLINE Vec lookup(const uint32_t* table, Vec z) {
  const __m256 powers = _mm256_loadu_ps(reinterpret_cast<const float*>(table));
  return {_mm256_permutevar_ps(powers, _mm256_castps_si256(z.v))};
}

#elif EFFKERNELS_ISA_ID == EFFKERNELS_ID_neon

struct Vec {
  static constexpr int size = 4;
  float32x4_t v;

  static EFFKERNELS_INLINE Vec set1(float x) { return {vdupq_n_f32(x)}; }
  static EFFKERNELS_INLINE Vec load(const float* p) { return {vld1q_f32(p)}; }
  static EFFKERNELS_INLINE Vec load(const float* p, int64_t n) {
    float lanes[size] = {0, 0, 0, 0};
    std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(float));
    return {vld1q_f32(lanes)};
  }
  static EFFKERNELS_INLINE Vec load(const bf16* p) {
    const uint16x4_t half = vld1_u16(reinterpret_cast<const uint16_t*>(p));
    return {vreinterpretq_f32_u32(vshll_n_u16(half, 16))};
  }
  EFFKERNELS_INLINE void store(float* p) const { vst1q_f32(p, v); }
  EFFKERNELS_INLINE void store(float* p, int64_t n) const {
    float lanes[size];
    vst1q_f32(lanes, v);
    std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(float));
  }
  EFFKERNELS_INLINE void store(bf16* p) const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    const uint32x4_t number = vceqq_f32(v, v);
    vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(vbslq_u32(number, rounded, quiet), 16));
  }
};

EFFKERNELS_INLINE Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
EFFKERNELS_INLINE Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
EFFKERNELS_INLINE Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
EFFKERNELS_INLINE Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
EFFKERNELS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
EFFKERNELS_INLINE Vec min(Vec a, Vec b) { return {vminq_f32(a.v, b.v)}; }
EFFKERNELS_INLINE Vec max(Vec a, Vec b) { return {vmaxq_f32(a.v, b.v)}; }
EFFKERNELS_INLINE Vec abs(Vec a) { return {vabsq_f32(a.v)}; }
EFFKERNELS_INLINE bool all_below(Vec a, float limit) {
  return vminvq_u32(vcltq_f32(a.v, vdupq_n_f32(limit))) != 0;
}
EFFKERNELS_INLINE Vec select_negative(Vec x, Vec a, Vec b) {
  return {vbslq_f32(vcltq_f32(x.v, vdupq_n_f32(0.0f)), a.v, b.v)};
}
EFFKERNELS_INLINE Vec exponent_from(Vec z) {
  return {vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(z.v), 23))};
}
EFFKERNELS_INLINE Vec larger_magnitude(Vec a, Vec b) {
  const uint32x4_t bits = vmaxq_u32(vreinterpretq_u32_f32(a.v), vreinterpretq_u32_f32(b.v));
  return {vreinterpretq_f32_u32(bits)};
}

#else  // portable: plain C++ that a compiler can vectorise for whatever it targets

struct Vec {
  static constexpr int size = 8;
  float v[size];

  static EFFKERNELS_INLINE Vec set1(float x) {
    Vec r;
    for (int i = 0; i < size; i++) r.v[i] = x;
    return r;
  }
  static EFFKERNELS_INLINE Vec load(const float* p) {
    Vec r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static EFFKERNELS_INLINE Vec load(const float* p, int64_t n) {
    Vec r = set1(0.0f);
    for (int64_t i = 0; i < n; i++) r.v[i] = p[i];
    return r;
  }
  static EFFKERNELS_INLINE Vec load(const bf16* p) {
    Vec r;
    for (int i = 0; i < size; i++) r.v[i] = to_float(p[i]);
    return r;
  }
  EFFKERNELS_INLINE void store(float* p) const { std::memcpy(p, v, sizeof v); }
  EFFKERNELS_INLINE void store(float* p, int64_t n) const {
    for (int64_t i = 0; i < n; i++) p[i] = v[i];
  }
  EFFKERNELS_INLINE void store(bf16* p) const {
    for (int i = 0; i < size; i++) p[i] = to_bf16(v[i]);
  }
};

#define EFFKERNELS_EACH(expression)                        \
  Vec r;                                                   \
  for (int i = 0; i < Vec::size; i++) r.v[i] = expression; \
  return r
EFFKERNELS_INLINE Vec operator+(Vec a, Vec b) { EFFKERNELS_EACH(a.v[i] + b.v[i]); }
EFFKERNELS_INLINE Vec operator-(Vec a, Vec b) { EFFKERNELS_EACH(a.v[i] - b.v[i]); }
EFFKERNELS_INLINE Vec operator*(Vec a, Vec b) { EFFKERNELS_EACH(a.v[i] * b.v[i]); }
EFFKERNELS_INLINE Vec operator/(Vec a, Vec b) { EFFKERNELS_EACH(a.v[i] / b.v[i]); }
EFFKERNELS_INLINE Vec fma(Vec a, Vec b, Vec c) { EFFKERNELS_EACH(a.v[i] * b.v[i] + c.v[i]); }
EFFKERNELS_INLINE Vec min(Vec a, Vec b) { EFFKERNELS_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
EFFKERNELS_INLINE Vec max(Vec a, Vec b) { EFFKERNELS_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
EFFKERNELS_INLINE Vec abs(Vec a) { EFFKERNELS_EACH(__builtin_fabsf(a.v[i])); }
EFFKERNELS_INLINE bool all_below(Vec a, float limit) {
  bool below = true;
  for (int i = 0; i < Vec::size; i++) below &= a.v[i] < limit;
  return below;
}
EFFKERNELS_INLINE Vec select_negative(Vec x, Vec a, Vec b) {
  EFFKERNELS_EACH(x.v[i] < 0.0f ? a.v[i] : b.v[i]);
}
EFFKERNELS_INLINE Vec exponent_from(Vec z) {
  Vec r;
  for (int i = 0; i < Vec::size; i++) {
    uint32_t bits;
    std::memcpy(&bits, &z.v[i], sizeof bits);
    bits <<= 23;
    std::memcpy(&r.v[i], &bits, sizeof bits);
  }
  return r;
}
EFFKERNELS_INLINE Vec larger_magnitude(Vec a, Vec b) {
  EFFKERNELS_EACH(a.v[i] >= b.v[i] || a.v[i] != a.v[i] ? a.v[i] : b.v[i]);
}
#undef EFFKERNELS_EACH

#endif

// The first n values of a bf16 vector go through the stack: a masked 16-bit move is rare.
EFFKERNELS_INLINE Vec load_first(const float* p, int64_t n) { return Vec::load(p, n); }
EFFKERNELS_INLINE Vec load_first(const bf16* p, int64_t n) {
  bf16 lanes[Vec::size] = {};
  for (int64_t i = 0; i < n; i++) lanes[i] = p[i];
  return Vec::load(lanes);
}
EFFKERNELS_INLINE void store_first(Vec value, float* p, int64_t n) { value.store(p, n); }
EFFKERNELS_INLINE void store_first(Vec value, bf16* p, int64_t n) {
  bf16 lanes[Vec::size];
  value.store(lanes);
  for (int64_t i = 0; i < n; i++) p[i] = lanes[i];
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
