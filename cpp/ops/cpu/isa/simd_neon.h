// The section of simd.h for 64-bit ARM: a vector is two registers, so that 32 registers hold what AVX2's 16 do.
//
// Included by simd.h inside the unnamed namespace of kernels_<isa>.cpp. NB_ISA_NEON needs nothing but Advanced SIMD;
// NB_ISA_NEON_DOTPROD adds sdot (FEAT_DotProd), NB_ISA_NEON_I8MM usdot and usmmla (FEAT_I8MM) for int8 products. All
// three give the same integers, and everything else is the same code. Source: Arm C Language Extensions.
#pragma once

constexpr int kLanes = 8;

struct F {
  float32x4_t low, high;
};
struct I {
  int32x4_t low, high;
};

inline F f_set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline F f_zero() { return f_set1(0.0f); }
inline F f_load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline void f_store(float* p, F a) {
  vst1q_f32(p, a.low);
  vst1q_f32(p + 4, a.high);
}
inline F f_load_f16(const uint8_t* p) {
  const float16x8_t halves = vreinterpretq_f16_u8(vld1q_u8(p));
  return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}
inline F operator+(F a, F b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
inline F operator-(F a, F b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
inline F operator*(F a, F b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
inline F operator/(F a, F b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
inline F f_max(F a, F b) { return {vmaxq_f32(a.low, b.low), vmaxq_f32(a.high, b.high)}; }
inline F f_min(F a, F b) { return {vminq_f32(a.low, b.low), vminq_f32(a.high, b.high)}; }
inline F f_abs(F a) { return {vabsq_f32(a.low), vabsq_f32(a.high)}; }
inline F fma(F a, F b, F c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
inline F muladd(F a, F b, F c) { return fma(a, b, c); }
inline float32x4_t keep_where(uint32x4_t mask, float32x4_t a) {
  return vreinterpretq_f32_u32(vandq_u32(mask, vreinterpretq_u32_f32(a)));
}
inline F keep_if_ge(F a, F x, F y) {
  return {keep_where(vcgeq_f32(x.low, y.low), a.low), keep_where(vcgeq_f32(x.high, y.high), a.high)};
}
inline I round_to_int(F a) { return {vcvtnq_s32_f32(a.low), vcvtnq_s32_f32(a.high)}; }
inline F to_float(I a) { return {vcvtq_f32_s32(a.low), vcvtq_f32_s32(a.high)}; }
inline F bits_to_float(I a) { return {vreinterpretq_f32_s32(a.low), vreinterpretq_f32_s32(a.high)}; }
inline I float_to_bits(F a) { return {vreinterpretq_s32_f32(a.low), vreinterpretq_s32_f32(a.high)}; }

inline I i_set1(int32_t x) { return {vdupq_n_s32(x), vdupq_n_s32(x)}; }
inline I i_load(const void* p) {
  const int8_t* bytes = static_cast<const int8_t*>(p);
  return {vreinterpretq_s32_s8(vld1q_s8(bytes)), vreinterpretq_s32_s8(vld1q_s8(bytes + 16))};
}
inline I operator+(I a, I b) { return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)}; }
inline I operator&(I a, I b) { return {vandq_s32(a.low, b.low), vandq_s32(a.high, b.high)}; }
inline I operator|(I a, I b) { return {vorrq_s32(a.low, b.low), vorrq_s32(a.high, b.high)}; }
template <int kBits>
inline I shift_left(I a) {
  return {vshlq_n_s32(a.low, kBits), vshlq_n_s32(a.high, kBits)};
}
template <int kBits>
inline int32x4_t shift_right_unsigned(int32x4_t a) {
  return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), kBits));
}
template <int kBits>
inline I shift_right(I a) {
  return {shift_right_unsigned<kBits>(a.low), shift_right_unsigned<kBits>(a.high)};
}
template <int kBits>
inline I shift_right_signed(I a) {
  return {vshrq_n_s32(a.low, kBits), vshrq_n_s32(a.high, kBits)};
}
inline I i_load_u8(const uint8_t* p) {
  const uint16x8_t wide = vmovl_u8(vld1_u8(p));
  return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide))), vreinterpretq_s32_u32(vmovl_high_u16(wide))};
}
inline I i_load_s8(const uint8_t* p) {
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p)));
  return {vmovl_s16(vget_low_s16(wide)), vmovl_high_s16(wide)};
}
inline void store_low_bytes(int8_t* p, I a) { vst1_s8(p, vmovn_s16(vmovn_high_s32(vmovn_s32(a.low), a.high))); }

#if defined(NB_ISA_NEON_I8MM)

// Unsigned weights times signed activations, as x86 has it: a code of 8 bits is used as it is stored.
inline int32x4_t dot_bytes(int32x4_t acc, int32x4_t w, int32x4_t x) {
  return vusdotq_s32(acc, vreinterpretq_u8_s32(w), vreinterpretq_s8_s32(x));
}
inline I dot_biased8(I acc, I w, I x) {
  return {dot_bytes(acc.low, w.low, x.low), dot_bytes(acc.high, w.high, x.high)};
}
constexpr bool kBiasedDot = true;

// usmmla multiplies matrices of 2 x 8 bytes: two lanes of codes by two rows of x, 8 columns at a time.
#define NB_PAIR_DOTS

/// Sums of two rows of x: vector i holds [lane 2i, first row] [2i, second] [2i + 1, first] [2i + 1, second].
struct PairSums {
  int32x4_t v[kLanes / 2];
};
/// Codes of 8 columns: vector i holds those of lanes 2i and 2i + 1.
struct PairCodes {
  uint8x16_t v[kLanes / 2];
};

inline PairSums join_rows(I first, I second) {
  return {{vzip1q_s32(first.low, second.low), vzip2q_s32(first.low, second.low), vzip1q_s32(first.high, second.high),
           vzip2q_s32(first.high, second.high)}};
}
inline void split_rows(const PairSums& sums, I& first, I& second) {
  first = {vuzp1q_s32(sums.v[0], sums.v[1]), vuzp1q_s32(sums.v[2], sums.v[3])};
  second = {vuzp2q_s32(sums.v[0], sums.v[1]), vuzp2q_s32(sums.v[2], sums.v[3])};
}
/// From four columns a lane and the next four.
inline PairCodes join_columns(I four, I next) {
  return {{vreinterpretq_u8_s32(vzip1q_s32(four.low, next.low)), vreinterpretq_u8_s32(vzip2q_s32(four.low, next.low)),
           vreinterpretq_u8_s32(vzip1q_s32(four.high, next.high)),
           vreinterpretq_u8_s32(vzip2q_s32(four.high, next.high))}};
}
/// sums += codes * 8 values of each of two rows of x.
inline void dot_pairs(PairSums& sums, const PairCodes& codes, const int8_t* x, const int8_t* next_x) {
  const int8x16_t both = vcombine_s8(vld1_s8(x), vld1_s8(next_x));
  for (int i = 0; i < kLanes / 2; ++i) sums.v[i] = vusmmlaq_s32(sums.v[i], codes.v[i], both);
}

#else

#if defined(NB_ISA_NEON_DOTPROD)
inline int32x4_t dot_bytes(int32x4_t acc, int32x4_t w, int32x4_t x) {
  return vdotq_s32(acc, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
}
#else
// Two products of at most 128 * 127 = 16256 each fit a signed 16-bit lane; the pairs of a lane are added in 32 bits.
inline int32x4_t dot_bytes(int32x4_t acc, int32x4_t w, int32x4_t x) {
  const int8x16_t a = vreinterpretq_s8_s32(w), b = vreinterpretq_s8_s32(x);
  const int16x8_t first = vmull_s8(vget_low_s8(a), vget_low_s8(b)), second = vmull_high_s8(a, b);
  return vpadalq_s16(acc, vpaddq_s16(first, second));
}
#endif

// Both factors are signed here: the weights become what they were before 128 was added.
inline int32x4_t dot_biased_bytes(int32x4_t acc, int32x4_t w, int32x4_t x) {
  return dot_bytes(acc, veorq_s32(w, vdupq_n_s32(static_cast<int32_t>(0x80808080u))), x);
}
inline I dot_biased8(I acc, I w, I x) {
  return {dot_biased_bytes(acc.low, w.low, x.low), dot_biased_bytes(acc.high, w.high, x.high)};
}
constexpr bool kBiasedDot = false;

#endif

inline I dot_u6(I acc, I w, I x) { return {dot_bytes(acc.low, w.low, x.low), dot_bytes(acc.high, w.high, x.high)}; }
inline I dot_u6(I acc, I low, I x_low, I high, I x_high) { return dot_u6(dot_u6(acc, low, x_low), high, x_high); }
