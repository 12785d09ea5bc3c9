// Keys of int4 on the device: where they stand in a sealed cell and in an open one, and how they are read.
//
// What a cell keeps is in quant/kv_format.h. Keys lie before rotation, so eight numbers that are read together are four
// of the first half of a head and the four that rotation pairs them up with: eighth e of a key has dimensions 4 e to
// 4 e + 3, then those half a head further. A sealed cell:
//   [16 tokens][head_dim / 8 eighths] of eight codes of 4 bits, then [head_dim / 8] of eight scales of a byte and eight
//   bases + 128, then the fp16 unit, the bits of tokens that are not finite, and 12 bytes that say nothing
// Who reads a key adds base and bias and rotates it to its position by the numbers of the rotation table: one way, so
// that a key is the same for every reader.
#pragma once

#include "cuda/formulas.cuh"
#include "cuda/kv_cells.cuh"

namespace nb::cuda {

template <class Number>
inline constexpr bool kIsSealed = std::is_same_v<Number, Sealed>;

/// Where the scales of a sealed cell begin, and its unit.
NB_DEVICE int sealed_scales_at(int dim) { return 8 * dim; }
NB_DEVICE int sealed_unit_at(int dim) { return 10 * dim; }

/// The scale that a byte of a cell stands for: (16 + code % 16) / 16 * 2^(code / 16 - 15) units.
NB_DEVICE float sealed_scale(float unit, unsigned code) { return unit * bits_to_float((code << 19) + (112u << 23)); }

/// Of `from`, byte i.
NB_DEVICE unsigned byte_of(unsigned from, int i) { return from >> 8 * i & 0xffu; }

/// Eight numbers of a key as they are in memory.
template <>
struct Eight<Sealed> {
  unsigned words[8];  ///< sealed: codes, scales (2), bases (2), unit and bits of tokens; open: floats
  int token;          ///< in its block; -1: open
};

/// Eight numbers of a key, rotated: four, then those half a head further.
struct RotatedEight {
  float values[8];

  NB_DEVICE float code(int i) const { return values[i]; }
};

/// `words` and `vectors`: the same cell in global or shared memory, as unsigned and as uint4.
template <class Words, class Vectors>
NB_DEVICE void take_sealed(Words words, Vectors vectors, int dim, int token, int eighth, Eight<Sealed>& eight) {
  const uint4 factors = vectors[sealed_scales_at(dim) / 16 + eighth];
  eight.words[0] = words[token * (dim / 8) + eighth];
  eight.words[1] = factors.x;
  eight.words[2] = factors.y;
  eight.words[3] = factors.z;
  eight.words[4] = factors.w;
  eight.words[5] = words[sealed_unit_at(dim) / 4];
  eight.token = token;
}

NB_DEVICE void take_sealed(const std::uint8_t* cell, int dim, int token, int eighth, Eight<Sealed>& eight) {
  take_sealed(reinterpret_cast<const unsigned*>(cell), reinterpret_cast<const uint4*>(cell), dim, token, eighth, eight);
}

NB_DEVICE void take_open(const float* cell, int dim, int token, int eighth, Eight<Sealed>& eight) {
  NB_UNROLL
  for (int i = 0; i < 8; ++i) {
    const int d = i / 4 * (dim / 2) + 4 * eighth + i % 4;
    eight.words[i] = float_to_bits(cell[d * kBlockTokens + token]);
  }
  eight.token = -1;
}

/// Of the four pairs of an eighth, in the order of both halves.
struct Angles {
  float4 cos, sin;
};

NB_DEVICE Angles take_angles(const ops::RopeTable& rope, int position, int eighth) {
  const float* angle = rope.cos_sin + static_cast<std::int64_t>(position) * rope.head_dim + 4 * eighth;
  return {*reinterpret_cast<const float4*>(angle), *reinterpret_cast<const float4*>(angle + rope.head_dim / 2)};
}

/// Number i of eight before rotation, with what the bias of the projection adds to it.
NB_DEVICE float unrotated(const Eight<Sealed>& eight, int i, float bias) {
  if (eight.token < 0) return bits_to_float(eight.words[i]) + bias;
  const float unit = to_float(Fp16{static_cast<std::uint16_t>(eight.words[5])});
  const float scale = sealed_scale(unit, byte_of(eight.words[1 + i / 4], i % 4));
  const float base = byte_to_float(byte_of(eight.words[3 + i / 4], i % 4)) - 128.0f;
  return fmaf(byte_to_float(eight.words[0] >> 4 * i & 0xfu), scale, fmaf(scale, base, bias));
}

NB_DEVICE bool is_marked(const Eight<Sealed>& eight) {
  return eight.token >= 0 && (eight.words[5] >> 16 >> eight.token & 1u) != 0;
}

/// `low` and `high`: biases of the numbers, in the same order.
NB_DEVICE RotatedEight rotated(const Eight<Sealed>& eight, const Angles& angles, const float4& low,
                               const float4& high) {
  const float lows[4] = {low.x, low.y, low.z, low.w}, highs[4] = {high.x, high.y, high.z, high.w};
  const float cos[4] = {angles.cos.x, angles.cos.y, angles.cos.z, angles.cos.w};
  const float sin[4] = {angles.sin.x, angles.sin.y, angles.sin.z, angles.sin.w};
  const bool marked = is_marked(eight);
  RotatedEight out;
  NB_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float angle[2] = {cos[i], sin[i]};
    float first = unrotated(eight, i, lows[i]), second = unrotated(eight, i + 4, highs[i]);
    rotate(first, second, angle, 1);
    out.values[i] = marked ? to_float(kFp16Nan) : first;
    out.values[i + 4] = marked ? to_float(kFp16Nan) : second;
  }
  return out;
}

/// A key before bias and rotation; at(d) is dimension d.
struct SealedKey {
  const std::uint8_t* cell;
  int dim, token;

  NB_DEVICE float at(int d) const {
    Eight<Sealed> eight;
    take_sealed(cell, dim, token, d % (dim / 2) / 4, eight);
    return is_marked(eight) ? to_float(kFp16Nan) : unrotated(eight, d / (dim / 2) * 4 + d % 4, 0.0f);
  }
};

/// The same in an open cell, from the key's first number on.
struct OpenKey {
  const float* numbers;

  NB_DEVICE float at(int d) const { return numbers[d * kBlockTokens]; }
};

/// The position of key i of a run, to which it is rotated. Of keys behind the last one: any that there is.
NB_DEVICE int key_position(const ops::AttentionArgs& a, const ops::AttentionRun& run, int i) {
  i = i < run.num_keys ? i : run.num_keys - 1;
  const int position = run.positions_begin < 0 ? i : a.key_positions[run.positions_begin + i];
  return position < a.rope.num_positions ? position : a.rope.num_positions - 1;
}

}  // namespace nb::cuda
