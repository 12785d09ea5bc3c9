// The small vector type that CPU kernels are written over: F (floats) and I (32-bit integers) of kLanes lanes.
//
// Included once per instruction set by kernels_<isa>.cpp, inside that file's unnamed namespace; NB_ISA_AVX512,
// NB_ISA_AVX2 or NB_ISA_NEON (with or without more) selects the variant, else plain C++. Every operation rounds like
// IEEE f32; `fma` is fused in every variant, `muladd` is fused only where the machine has it. C headers and intrinsics
// only.
#pragma once

inline float half_to_float(const uint8_t* p) {
  const uint32_t half = static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8;
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return __builtin_bit_cast(float, sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  const float scaled = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
  return __builtin_bit_cast(float, sign | __builtin_bit_cast(uint32_t, scaled));
}

#if defined(NB_ISA_AVX512)

constexpr int kLanes = 16;

struct F {
  __m512 v;
};
struct I {
  __m512i v;
};

inline F f_zero() { return {_mm512_setzero_ps()}; }
inline F f_set1(float x) { return {_mm512_set1_ps(x)}; }
inline F f_load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void f_store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline F f_load_f16(const uint8_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F f_max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F f_min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F f_abs(F a) { return {_mm512_abs_ps(a.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F muladd(F a, F b, F c) { return fma(a, b, c); }
/// a where x >= y, else 0.
inline F keep_if_ge(F a, F x, F y) { return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_GE_OQ), a.v)}; }
inline I round_to_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }
inline F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline F bits_to_float(I a) { return {_mm512_castsi512_ps(a.v)}; }
inline I float_to_bits(F a) { return {_mm512_castps_si512(a.v)}; }

inline I i_set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I i_load(const void* p) { return {_mm512_loadu_si512(p)}; }
inline I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I operator&(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
template <int kBits>
inline I shift_left(I a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
inline I shift_right(I a) {
  return {_mm512_srli_epi32(a.v, kBits)};
}
template <int kBits>
inline I shift_right_signed(I a) {
  return {_mm512_srai_epi32(a.v, kBits)};
}
inline I operator|(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
/// One byte per lane.
inline I i_load_u8(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline I i_load_s8(const uint8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
/// Stores the low byte of each lane, in lane order.
inline void store_low_bytes(int8_t* p, I a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

/// acc + sum over the 4 bytes of each lane of w * x; w in [0, 63], x in [-127, 127].
inline I dot_u6(I acc, I w, I x) { return {_mm512_dpbusd_epi32(acc.v, w.v, x.v)}; }
/// The same for two vectors of codes: low * x_low and high * x_high.
inline I dot_u6(I acc, I low, I x_low, I high, I x_high) {
  return {_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(acc.v, low.v, x_low.v), high.v, x_high.v)};
}
/// acc + sum over bytes of w * x, with w stored as code + 128. The result is too large by 128 * sum(x) if kBiasedDot.
inline I dot_biased8(I acc, I w, I x) { return {_mm512_dpbusd_epi32(acc.v, w.v, x.v)}; }
constexpr bool kBiasedDot = true;

inline float fold_lanes(__m256 a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
/// Sum of the lanes, halves folded onto each other.
inline float sum_lanes(F a) {
  return fold_lanes(_mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)));
}
inline float max_lanes(F a) { return _mm512_reduce_max_ps(a.v); }

#if defined(NB_ISA_AVX512BF16)
/// Whether kernels multiply pairs of bf16 numbers; then queries and the weights of values are rounded to bf16 too.
constexpr bool kBf16Dot = true;
/// acc + the products of the upper halves, then + those of the lower halves; both halves of every lane are bf16.
inline F dot_bf16(F acc, I a, I b) {
  return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
/// Rounds `count` (a multiple of kLanes) floats to bf16, nearest even, one after the other; `out` may be `values`.
inline void pack_bf16(const float* values, int count, void* out) {
  for (int i = 0; i < count; i += kLanes) {
    const __m256bh packed = _mm512_cvtneps_pbh(_mm512_loadu_ps(values + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint8_t*>(out) + 2 * i),
                        reinterpret_cast<__m256i>(packed));
  }
}
#endif

#elif defined(NB_ISA_AVX2)

constexpr int kLanes = 8;

struct F {
  __m256 v;
};
struct I {
  __m256i v;
};

inline F f_zero() { return {_mm256_setzero_ps()}; }
inline F f_set1(float x) { return {_mm256_set1_ps(x)}; }
inline F f_load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void f_store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
inline F f_load_f16(const uint8_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F f_max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F f_min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F f_abs(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F muladd(F a, F b, F c) { return fma(a, b, c); }
inline F keep_if_ge(F a, F x, F y) { return {_mm256_and_ps(a.v, _mm256_cmp_ps(x.v, y.v, _CMP_GE_OQ))}; }
inline I round_to_int(F a) { return {_mm256_cvtps_epi32(a.v)}; }
inline F to_float(I a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline F bits_to_float(I a) { return {_mm256_castsi256_ps(a.v)}; }
inline I float_to_bits(F a) { return {_mm256_castps_si256(a.v)}; }

inline I i_set1(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline I i_load(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
inline I operator+(I a, I b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline I operator&(I a, I b) { return {_mm256_and_si256(a.v, b.v)}; }
template <int kBits>
inline I shift_left(I a) {
  return {_mm256_slli_epi32(a.v, kBits)};
}
template <int kBits>
inline I shift_right(I a) {
  return {_mm256_srli_epi32(a.v, kBits)};
}
template <int kBits>
inline I shift_right_signed(I a) {
  return {_mm256_srai_epi32(a.v, kBits)};
}
inline I operator|(I a, I b) { return {_mm256_or_si256(a.v, b.v)}; }
inline I i_load_u8(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
inline I i_load_s8(const uint8_t* p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
inline void store_low_bytes(int8_t* p, I a) {
  const __m256i low = _mm256_shuffle_epi8(a.v, _mm256_set1_epi32(0x0c080400));
  const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), both);
}

#if defined(NB_ISA_AVXVNNI)
// Nothing but integers: the sums, and so all bits that depend on them, are those of avx2.
inline I dot_u6(I acc, I w, I x) { return {_mm256_dpbusd_avx_epi32(acc.v, w.v, x.v)}; }
inline I dot_u6(I acc, I low, I x_low, I high, I x_high) { return dot_u6(dot_u6(acc, low, x_low), high, x_high); }
inline I dot_biased8(I acc, I w, I x) { return dot_u6(acc, w, x); }
constexpr bool kBiasedDot = true;
#else
inline I dot_u6(I acc, I w, I x) {
  const __m256i pairs = _mm256_maddubs_epi16(w.v, x.v);
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
// Two pairs of at most 63 * 127 * 2 = 16002 each fit a signed 16-bit lane, so both vectors share one widening.
inline I dot_u6(I acc, I low, I x_low, I high, I x_high) {
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low.v, x_low.v), _mm256_maddubs_epi16(high.v, x_high.v));
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
// Moves the sign of the weight to the activation: |w| <= 128 and |x| <= 127 give at most 32512 per pair, no overflow.
inline I dot_biased8(I acc, I w, I x) {
  const __m256i code = _mm256_xor_si256(w.v, _mm256_set1_epi8(static_cast<char>(0x80)));
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(x.v, code));
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
constexpr bool kBiasedDot = false;
#endif

#elif defined(NB_ISA_NEON)

#include "ops/cpu/isa/simd_neon.h"

#else

constexpr int kLanes = 4;

struct F {
  float v[kLanes];
};
struct I {
  int32_t v[kLanes];
};

#define NB_EACH_LANE(Type, expression)                      \
  Type out;                                                 \
  for (int i = 0; i < kLanes; ++i) out.v[i] = (expression); \
  return out

inline F f_set1(float x) { NB_EACH_LANE(F, x); }
inline F f_zero() { return f_set1(0.0f); }
inline F f_load(const float* p) { NB_EACH_LANE(F, p[i]); }
inline void f_store(float* p, F a) {
  for (int i = 0; i < kLanes; ++i) p[i] = a.v[i];
}
inline F f_load_f16(const uint8_t* p) { NB_EACH_LANE(F, half_to_float(p + 2 * i)); }
inline F operator+(F a, F b) { NB_EACH_LANE(F, a.v[i] + b.v[i]); }
inline F operator-(F a, F b) { NB_EACH_LANE(F, a.v[i] - b.v[i]); }
inline F operator*(F a, F b) { NB_EACH_LANE(F, a.v[i] * b.v[i]); }
inline F operator/(F a, F b) { NB_EACH_LANE(F, a.v[i] / b.v[i]); }
inline F f_max(F a, F b) { NB_EACH_LANE(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F f_min(F a, F b) { NB_EACH_LANE(F, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F f_abs(F a) { NB_EACH_LANE(F, __builtin_fabsf(a.v[i])); }
inline F fma(F a, F b, F c) { NB_EACH_LANE(F, __builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
inline F muladd(F a, F b, F c) { NB_EACH_LANE(F, a.v[i] * b.v[i] + c.v[i]); }
inline F keep_if_ge(F a, F x, F y) { NB_EACH_LANE(F, x.v[i] >= y.v[i] ? a.v[i] : 0.0f); }
// Adding and subtracting 1.5 * 2^23 rounds to nearest even for |a| < 2^22; callers stay far below.
inline int32_t round_one(float a) { return static_cast<int32_t>((a + 12582912.0f) - 12582912.0f); }
inline I round_to_int(F a) { NB_EACH_LANE(I, round_one(a.v[i])); }
inline F to_float(I a) { NB_EACH_LANE(F, static_cast<float>(a.v[i])); }
inline F bits_to_float(I a) { NB_EACH_LANE(F, __builtin_bit_cast(float, a.v[i])); }
inline I float_to_bits(F a) { NB_EACH_LANE(I, __builtin_bit_cast(int32_t, a.v[i])); }

inline I i_set1(int32_t x) { NB_EACH_LANE(I, x); }
inline I i_load(const void* p) {
  I out;
  memcpy(out.v, p, sizeof(out.v));
  return out;
}
inline I operator+(I a, I b) { NB_EACH_LANE(I, a.v[i] + b.v[i]); }
inline I operator&(I a, I b) { NB_EACH_LANE(I, a.v[i] & b.v[i]); }
template <int kBits>
inline I shift_left(I a) {
  NB_EACH_LANE(I, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << kBits));
}
template <int kBits>
inline I shift_right(I a) {
  NB_EACH_LANE(I, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> kBits));
}
template <int kBits>
inline I shift_right_signed(I a) {
  NB_EACH_LANE(I, a.v[i] >> kBits);
}
inline I operator|(I a, I b) { NB_EACH_LANE(I, a.v[i] | b.v[i]); }
inline I i_load_u8(const uint8_t* p) { NB_EACH_LANE(I, p[i]); }
inline I i_load_s8(const uint8_t* p) { NB_EACH_LANE(I, static_cast<int8_t>(p[i])); }
inline void store_low_bytes(int8_t* p, I a) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}

inline int32_t byte_of(int32_t lane, int index) { return (lane >> (8 * index)) & 0xff; }
inline int32_t signed_byte_of(int32_t lane, int index) { return static_cast<int8_t>(lane >> (8 * index)); }
inline I dot_u6(I acc, I w, I x) {
  for (int b = 0; b < 4; ++b) {
    for (int i = 0; i < kLanes; ++i) acc.v[i] += byte_of(w.v[i], b) * signed_byte_of(x.v[i], b);
  }
  return acc;
}
inline I dot_u6(I acc, I low, I x_low, I high, I x_high) {
  for (int b = 0; b < 4; ++b) {
    for (int i = 0; i < kLanes; ++i) {
      acc.v[i] +=
          byte_of(low.v[i], b) * signed_byte_of(x_low.v[i], b) + byte_of(high.v[i], b) * signed_byte_of(x_high.v[i], b);
    }
  }
  return acc;
}
inline I dot_biased8(I acc, I w, I x) {
  for (int b = 0; b < 4; ++b) {
    for (int i = 0; i < kLanes; ++i) acc.v[i] += (byte_of(w.v[i], b) - 128) * signed_byte_of(x.v[i], b);
  }
  return acc;
}
constexpr bool kBiasedDot = false;

#undef NB_EACH_LANE

#endif

#if !defined(NB_ISA_AVX512BF16)
// Nobody calls these where kBf16Dot is false; whoever does shall notice.
constexpr bool kBf16Dot = false;
inline F dot_bf16(F, I, I) { __builtin_trap(); }
inline void pack_bf16(const float*, int, void*) { __builtin_trap(); }
#endif

#if defined(NB_ISA_AVX512) || defined(NB_ISA_AVX2)
/// Sum of 16 signed bytes.
inline int32_t sum_16_bytes(const int8_t* p) {
  const __m128i biased = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi8(-128));
  const __m128i halves = _mm_sad_epu8(biased, _mm_setzero_si128());
  return _mm_cvtsi128_si32(_mm_add_epi32(halves, _mm_unpackhi_epi64(halves, halves))) - 16 * 128;
}
#else
inline int32_t sum_16_bytes(const int8_t* p) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += p[i];
  return sum;
}
#endif

/// Whether F and I are vectors of the machine.
#if defined(NB_ISA_AVX512) || defined(NB_ISA_AVX2) || defined(NB_ISA_NEON)
constexpr bool kHasVectors = true;
#else
constexpr bool kHasVectors = false;
#endif

/// Vectors that cover the 16 rows of a tile.
constexpr int kParts = 16 / kLanes;

/// Four activation bytes, or two bf16 numbers, in every lane.
inline I i_broadcast4(const void* p) {
  int32_t bytes;
  memcpy(&bytes, p, sizeof(bytes));
  return i_set1(bytes);
}

#if !defined(NB_ISA_AVX512)
/// Sum of the lanes in a fixed order (halves folded onto each other).
inline float sum_lanes(F a) {
  float lanes[kLanes];
  f_store(lanes, a);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

inline float max_lanes(F a) {
  float lanes[kLanes];
  f_store(lanes, a);
  float best = lanes[0];
  for (int i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}
#endif

/// 2^x for x <= 127; exactly 0 below -126. Polynomial of degree 6 on [-0.5, 0.5] (Taylor of 2^x), relative error
/// below 2e-7.
inline F exp2(F x) {
  const F lowest = f_set1(-126.0f);
  const F clamped = f_max(x, lowest);
  const I n = round_to_int(clamped);
  const F f = clamped - to_float(n);
  F p = f_set1(1.5403530e-4f);
  p = muladd(p, f, f_set1(1.3333558e-3f));
  p = muladd(p, f, f_set1(9.6181291e-3f));
  p = muladd(p, f, f_set1(5.5504109e-2f));
  p = muladd(p, f, f_set1(2.4022651e-1f));
  p = muladd(p, f, f_set1(6.9314718e-1f));
  p = muladd(p, f, f_set1(1.0f));
  const F scale = bits_to_float(shift_left<23>(n + i_set1(127)));
  return keep_if_ge(p * scale, x, lowest);
}
