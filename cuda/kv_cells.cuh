// Cells of keys and values on the device: where the numbers of a token stand, how they are stored and read.
//
// A cell has 16 tokens of one head; quant/kv_format.h says how formats round. Codes come first, so that those of a
// token begin at a whole vector, and scales stand at the end. All cells are multiples of 16 bytes.
//   f32, bf16, f16         [16 tokens][head_dim]
//   int8, keys of mixed    [16 tokens][head_dim] of code + 128, then [16 tokens] of fp16 scales
//   values of mixed        [16 tokens][head_dim / 2] of two codes of 4 bits, the even dimension in the lower ones, then
//                          [groups][16 tokens] of an fp16 scale and an fp16 minimum
//   int4                   values as mixed; keys: sealed_keys.cuh
#pragma once

#include <type_traits>

#include "base/ids.h"
#include "cuda/number.cuh"
#include "ops/args.h"

namespace nb::cuda {

/// Kinds of numbers in cells, beside float, Bf16 and Fp16: codes of 8 bits, and of 4; and keys that are sealed.
struct Code8 {};
struct Code4 {};
struct Sealed {};

template <class Number>
inline constexpr bool kIsCode = false;
template <>
inline constexpr bool kIsCode<Code8> = true;
template <>
inline constexpr bool kIsCode<Code4> = true;
template <>
inline constexpr bool kIsCode<Sealed> = true;

/// Calls visit(Key{}) with the kind of a format's keys.
template <class Visit>
void with_key_number(quant::KvFormat format, Visit&& visit) {
  if (format == quant::KvFormat::f32) return visit(float{});
  if (format == quant::KvFormat::bf16) return visit(Bf16{});
  if (format == quant::KvFormat::f16) return visit(Fp16{});
  if (format == quant::KvFormat::int4) return visit(Sealed{});
  visit(Code8{});
}

/// Calls visit(Key{}, Value{}) with the kinds of a format's numbers.
template <class Visit>
void with_kv_numbers(quant::KvFormat format, Visit&& visit) {
  if (format == quant::KvFormat::f32) return visit(float{}, float{});
  if (format == quant::KvFormat::bf16) return visit(Bf16{}, Bf16{});
  if (format == quant::KvFormat::f16) return visit(Fp16{}, Fp16{});
  if (format == quant::KvFormat::int8) return visit(Code8{}, Code8{});
  if (format == quant::KvFormat::int4) return visit(Sealed{}, Code4{});
  visit(Code8{}, Code4{});
}

/// Whether a token's key and value of a head are stored together, by store_token(), or every number by itself. For host
/// code; `kSingleNumbers` are the formats of the second kind, a bit each.
inline constexpr unsigned kSingleNumbers =
    1u << static_cast<unsigned>(quant::KvFormat::f32) | 1u << static_cast<unsigned>(quant::KvFormat::bf16);
inline bool stores_tokens(quant::KvFormat format) {
  return (kSingleNumbers >> static_cast<unsigned>(format) & 1u) == 0;
}

/// The cell of a block and head that has keys (which = 0) or values (1).
NB_DEVICE std::uint8_t* kv_cell(const ops::KvLayer& kv, int block, int which, int head) {
  const std::int64_t within =
      which == 0 ? head * kv.key_cell_bytes : kv.num_kv_heads * kv.key_cell_bytes + head * kv.value_cell_bytes;
  return kv.base + block * kv.block_stride + within;
}

/// The keys of an open cell, [head_dim][16 tokens] of a head: see OpenKeys.
NB_DEVICE float* open_cell(const ops::KvLayer& kv, const ops::OpenKeys& open, int cell, int head) {
  const std::int64_t head_floats = static_cast<std::int64_t>(kv.head_dim) * kBlockTokens;
  if (cell < 0) return open.step_cells + (static_cast<std::int64_t>(~cell) * kv.num_kv_heads + head) * head_floats;
  return open.cells + cell * open.cell_stride + head * head_floats;
}

/// Stores one value of a token's key (which = 0) or value (1), of f32 or bf16.
NB_DEVICE void store_kv(const ops::KvLayer& kv, int slot, int which, int head, int dim, float value) {
  std::uint8_t* cell = kv_cell(kv, slot / kBlockTokens, which, head);
  const int at = slot % kBlockTokens * kv.head_dim + dim;
  if (kv.format == quant::KvFormat::f32) {
    reinterpret_cast<float*>(cell)[at] = value;
  } else {
    reinterpret_cast<Bf16*>(cell)[at] = to_bf16(value);
  }
}

// ---- storing a token, by a warp: lane i has dimensions 8 i to 8 i + 7 ----

struct EightFloats {
  float values[8];
};

/// Lanes that have no dimensions get zeros.
template <class Floats>
NB_DEVICE EightFloats take_eight(Floats from, int dim) {
  EightFloats x;
  const int first = 8 * lane_id();
  NB_UNROLL
  for (int i = 0; i < 8; ++i) x.values[i] = first < dim ? from[first + i] : 0.0f;
  return x;
}

NB_DEVICE bool all_finite(const EightFloats& x) {
  bool finite = true;
  NB_UNROLL
  for (int i = 0; i < 8; ++i) finite = finite && (float_to_bits(x.values[i]) & 0x7f800000u) != 0x7f800000u;
  return finite;
}

NB_DEVICE void store_halves(std::uint8_t* cell, int dim, int token, const EightFloats& x, bool finite, unsigned other) {
  if (8 * lane_id() >= dim) return;
  unsigned words[4];
  NB_UNROLL
  for (int i = 0; i < 4; ++i) {
    const unsigned low = near_fp16(x.values[2 * i]).bits, high = near_fp16(x.values[2 * i + 1]).bits;
    words[i] = finite ? low | high << 16 : other;
  }
  reinterpret_cast<uint4*>(cell)[token * dim / 8 + lane_id()] = uint4{words[0], words[1], words[2], words[3]};
}

NB_DEVICE void store_codes8(std::uint8_t* cell, int dim, int token, const EightFloats& x) {
  const bool finite = ballot(!all_finite(x)) == 0;
  float peak = 0.0f;
  NB_UNROLL
  for (int i = 0; i < 8; ++i) peak = fmaxf(peak, fabsf(x.values[i]));
  const Fp16 scale = finite ? near_fp16(warp_max(peak) / 127.0f) : kFp16Nan;
  const float step = finite ? to_float(scale) : 0.0f;
  unsigned words[2] = {0x80808080u, 0x80808080u};
  if (step > 0.0f) {
    NB_UNROLL
    for (int w = 0; w < 2; ++w) {
      words[w] = 0;
      NB_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float code = fminf(fmaxf(rintf(x.values[4 * w + i] / step), -127.0f), 127.0f);
        words[w] |= static_cast<unsigned>(static_cast<int>(code) + 128) << 8 * i;
      }
    }
  }
  if (8 * lane_id() < dim) reinterpret_cast<uint2*>(cell)[token * dim / 8 + lane_id()] = uint2{words[0], words[1]};
  if (lane_id() == 0) reinterpret_cast<Fp16*>(cell + kBlockTokens * dim)[token] = scale;
}

NB_DEVICE void store_codes4(std::uint8_t* cell, int dim, int token, const EightFloats& x) {
  constexpr int kGroupLanes = quant::kKvGroup / 8;
  const int lane = lane_id();
  const bool is_here = 8 * lane < dim;
  const unsigned others = ballot(is_here && !all_finite(x)) >> lane / kGroupLanes * kGroupLanes;
  const bool finite = (others & ((1u << kGroupLanes) - 1)) == 0;
  float low = is_here ? x.values[0] : INFINITY, high = is_here ? x.values[0] : -INFINITY;
  NB_UNROLL
  for (int i = 1; i < 8; ++i) {
    low = is_here ? fminf(low, x.values[i]) : low;
    high = is_here ? fmaxf(high, x.values[i]) : high;
  }
  NB_UNROLL
  for (int step = kGroupLanes / 2; step > 0; step /= 2) {
    low = fminf(low, shuffle_xor(low, step));
    high = fmaxf(high, shuffle_xor(high, step));
  }
  if (!is_here) return;
  const Fp16 scale = finite ? near_fp16((high - low) / 15.0f) : Fp16{0};
  const Fp16 minimum = finite ? near_fp16(low + 0.0f) : kFp16Nan;  // not -0
  const float step = to_float(scale), least = to_float(minimum);
  unsigned codes = 0;
  if (step > 0.0f) {
    NB_UNROLL
    for (int i = 0; i < 8; ++i) {
      const float code = fminf(fmaxf(rintf((x.values[i] - least) / step), 0.0f), 15.0f);
      codes |= static_cast<unsigned>(code) << 4 * i;
    }
  }
  reinterpret_cast<unsigned*>(cell)[token * dim / 8 + lane] = codes;
  if (lane % kGroupLanes != 0) return;
  reinterpret_cast<unsigned*>(cell + kBlockTokens / 2 * dim)[lane / kGroupLanes * kBlockTokens + token] =
      scale.bits | static_cast<unsigned>(minimum.bits) << 16;
}

NB_DEVICE void store_open(float* cell, int dim, int token, const EightFloats& x) {
  const int first = 8 * lane_id();
  if (first >= dim) return;
  NB_UNROLL
  for (int i = 0; i < 8; ++i) cell[(first + i) * kBlockTokens + token] = x.values[i];
}

/// Stores a token's key and value of one head; a key that is sealed later, in the open cell of `row`. For a whole warp;
/// head_dim is a multiple of 8 up to 256. `Floats` points into global or shared memory.
template <class Floats>
NB_DEVICE void store_token(const ops::KvLayer& kv, const ops::OpenKeys& open, int row, int slot, int head, Floats key,
                           Floats value) {
  const int dim = kv.head_dim, token = slot % kBlockTokens;
  std::uint8_t* const keys = kv_cell(kv, slot / kBlockTokens, 0, head);
  std::uint8_t* const values = kv_cell(kv, slot / kBlockTokens, 1, head);
  const EightFloats k = take_eight(key, dim), v = take_eight(value, dim);
  if (kv.format == quant::KvFormat::f16) {
    const bool finite = ballot(!all_finite(k) || !all_finite(v)) == 0;
    store_halves(keys, dim, token, k, finite, kFp16Nan.bits * 0x10001u);
    store_halves(values, dim, token, v, finite, 0);
  } else if (kv.format == quant::KvFormat::int4) {
    store_open(open_cell(kv, open, open.row_cells[row], head), dim, token, k);
    store_codes4(values, dim, token, v);
  } else {
    store_codes8(keys, dim, token, k);
    if (kv.format == quant::KvFormat::int8) {
      store_codes8(values, dim, token, v);
    } else {
      store_codes4(values, dim, token, v);
    }
  }
}

// ---- reading 8 dimensions of a token ----

/// Numbers are converted without the slow instruction: a byte in the lowest place of 2^23 counts as it is.
NB_DEVICE float byte_to_float(unsigned byte) { return bits_to_float(0x4b000000u | byte) - 8388608.0f; }

/// As they are in memory. at(i) is number i; where the numbers are codes, code(i) is what is to be multiplied with
/// factor(), and forget() makes zeros of them, whatever the scales are; is_spoilt() says whether one of these is NaN.
template <class Number>
struct Eight {
  uint4 vectors[sizeof(Number) / 2];

  NB_DEVICE float at(int i) const { return element<Number>(vectors[i / kPerVector<Number>], i % kPerVector<Number>); }
  NB_DEVICE float code(int i) const { return at(i); }
};

template <>
struct Eight<Code8> {
  uint2 codes;
  Fp16 scale;

  NB_DEVICE float code(int i) const { return byte_to_float((i < 4 ? codes.x : codes.y) >> i % 4 * 8 & 0xffu) - 128.0f; }
  NB_DEVICE float factor() const { return to_float(scale); }
  NB_DEVICE float at(int i) const { return code(i) * factor(); }
  NB_DEVICE bool is_spoilt() const { return (scale.bits & 0x7fffu) > 0x7c00u; }
  NB_DEVICE void forget() { scale = {0}; }
};

template <>
struct Eight<Code4> {
  unsigned codes;
  unsigned factors;  // a scale, and above it a minimum

  NB_DEVICE float at(int i) const {
    const Fp16 scale = {static_cast<std::uint16_t>(factors)}, minimum = {static_cast<std::uint16_t>(factors >> 16)};
    return fmaf(byte_to_float(codes >> i * 4 & 0xfu), to_float(scale), to_float(minimum));
  }
  NB_DEVICE bool is_spoilt() const { return (factors >> 16 & 0x7fffu) > 0x7c00u; }
  NB_DEVICE void forget() { factors = 0; }
};

/// Dimensions [from, from + 8) of a token in a cell.
template <class Number>
NB_DEVICE Eight<Number> load_eight(const std::uint8_t* cell, int dim, int token, int from) {
  Eight<Number> eight;
  const int at = token * dim + from;
  if constexpr (std::is_same_v<Number, Code8>) {
    eight.codes = *reinterpret_cast<const uint2*>(cell + at);
    eight.scale = reinterpret_cast<const Fp16*>(cell + kBlockTokens * dim)[token];
  } else if constexpr (std::is_same_v<Number, Code4>) {
    eight.codes = *reinterpret_cast<const unsigned*>(cell + at / 2);
    eight.factors =
        reinterpret_cast<const unsigned*>(cell + kBlockTokens / 2 * dim)[from / quant::kKvGroup * kBlockTokens + token];
  } else {
    NB_UNROLL
    for (int v = 0; v < static_cast<int>(sizeof(Number) / 2); ++v) {
      eight.vectors[v] = reinterpret_cast<const uint4*>(reinterpret_cast<const Number*>(cell) + at)[v];
    }
  }
  return eight;
}

/// Dimension d of a token in a cell.
template <class Number>
NB_DEVICE float number_at(const std::uint8_t* cell, int dim, int token, int d) {
  const int at = token * dim + d;
  if constexpr (std::is_same_v<Number, Code8>) {
    const float scale = to_float(reinterpret_cast<const Fp16*>(cell + kBlockTokens * dim)[token]);
    return static_cast<float>(static_cast<int>(cell[at]) - 128) * scale;
  } else if constexpr (std::is_same_v<Number, Code4>) {
    const Fp16* factors =
        reinterpret_cast<const Fp16*>(cell + kBlockTokens / 2 * dim) + 2 * (d / quant::kKvGroup * kBlockTokens + token);
    const int code = cell[at / 2] >> at % 2 * 4 & 15;
    return fmaf(static_cast<float>(code), to_float(factors[0]), to_float(factors[1]));
  } else {
    return to_float(reinterpret_cast<const Number*>(cell)[at]);
  }
}

/// The key of a token and head; at(d) is dimension d.
template <class Number>
struct KeyNumbers {
  const Number* numbers;

  NB_DEVICE KeyNumbers(const ops::KvLayer& kv, int slot, int head)
      : numbers(reinterpret_cast<const Number*>(kv_cell(kv, slot / kBlockTokens, 0, head)) +
                slot % kBlockTokens * kv.head_dim) {}
  NB_DEVICE float at(int d) const { return to_float(numbers[d]); }
};

template <>
struct KeyNumbers<Code8> {
  const std::uint8_t* codes;
  float scale;

  NB_DEVICE KeyNumbers(const ops::KvLayer& kv, int slot, int head) {
    const std::uint8_t* const cell = kv_cell(kv, slot / kBlockTokens, 0, head);
    codes = cell + slot % kBlockTokens * kv.head_dim;
    scale = to_float(reinterpret_cast<const Fp16*>(cell + kBlockTokens * kv.head_dim)[slot % kBlockTokens]);
  }
  NB_DEVICE float at(int d) const { return static_cast<float>(static_cast<int>(codes[d]) - 128) * scale; }
};

}  // namespace nb::cuda
