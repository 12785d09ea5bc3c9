// Keys of int4: how a block of them is sealed, and how they become rotated f32 cells that score_cells<f32> reads.
//
// Included inside the unnamed namespace of kernels_<isa>.cpp, before attention.h. Keys lie un-rotated, in blocks as
// codes and in open cells as f32 [head_dim][16 tokens]. Whoever reads them gets base and bias added and rotates them to
// their positions with the numbers of the rotation table: one way, so that a key has the same bits for every reader.
#pragma once

// Keys of a tile of up to 4 blocks, those of an open cell, and the angles of a block: see ColumnScratch.
constexpr int kKeyCells = kTileKeys / 16 + 1;

inline int64_t key_scratch_floats(const KvLayer& kv) {
  return quant::seals_keys(kv.format) ? static_cast<int64_t>(kKeyCells + 1) * kv.head_dim * 16 : 0;
}

// Bits of the tokens of an open cell that have an infinity or a NaN.
inline uint16_t bad_tokens(const float* keys, int dim, int num_tokens) {
  uint16_t bits = 0;
  for (int part = 0; part < kParts; ++part) {
    F zeros = f_zero();
    for (int d = 0; d < dim; ++d) zeros = zeros + f_load(keys + d * 16 + part * kLanes) * f_zero();
    float lanes[kLanes];
    f_store(lanes, zeros);
    for (int i = 0; i < kLanes; ++i) {
      if (!(lanes[i] == 0.0f)) bits = static_cast<uint16_t>(bits | 1u << (part * kLanes + i));
    }
  }
  return static_cast<uint16_t>(bits & ((1u << num_tokens) - 1));
}

// See quant/kv_format.h.
inline void seal_cell(const float* keys, int dim, int num_tokens, uint8_t* cell) {
  const int half = dim / 2;
  uint8_t* const scales = cell + int4_scales_at(dim);
  memset(cell, 0, static_cast<size_t>(int4_scales_at(dim) + 2 * dim + 4));
  const uint16_t bad = bad_tokens(keys, dim, num_tokens);
  memcpy(scales + 2 * dim + 2, &bad, sizeof(bad));
  int first = 0;
  while (first < num_tokens && (bad >> first & 1) != 0) ++first;
  if (first == num_tokens) return;
  // Tokens that count for nothing have the numbers of one that counts.
  const bool whole = bad == 0 && num_tokens == 16;
  float patched[16];
  const auto keys_of = [&](int d) {
    const float* own = keys + d * 16;
    if (whole) return own;
    for (int t = 0; t < 16; ++t) patched[t] = t < num_tokens && (bad >> t & 1) == 0 ? own[t] : own[first];
    return static_cast<const float*>(patched);
  };
  const auto wanted_of = [&](const Extent& extent) {
    const float by_range = (extent.largest - extent.smallest) / 15.0f,
                by_base = __builtin_fabsf(extent.smallest) / 127.0f;
    return by_range > by_base ? by_range : by_base;
  };
  float most = 0.0f;
  for (int d = 0; d < dim; ++d) {
    const float wanted = wanted_of(extent_of(keys_of(d), 16));
    most = wanted > most ? wanted : most;
  }
  const float top = most / 31.0f * 16.0f;
  store_half(scales + 2 * dim, to_half(top < kLargestHalf ? top : kLargestHalf));
  const float unit = load_half(scales + 2 * dim);
  if (unit == 0.0f) return;
  for (int d = 0; d < dim; ++d) {
    const float* own = keys_of(d);
    const Extent extent = extent_of(own, 16);
    // Rounds up to 4 bits behind the first one.
    const int code =
        static_cast<int>((__builtin_bit_cast(uint32_t, wanted_of(extent) / unit) + 0x7ffffu) >> 19) - (112 << 4);
    scales[d] = static_cast<uint8_t>(code < 0 ? 0 : code > 255 ? 255 : code);
    const F scale = f_set1(int4_scale(unit, scales[d]));
    const auto steps = [&](F x) {
      return to_float(round_to_int(f_max(f_min(x / scale, f_set1(1e6f)), f_set1(-1e6f))));
    };
    const F base = f_max(f_min(steps(f_set1(extent.smallest)), f_set1(127.0f)), f_set1(-128.0f));
    int8_t codes[16], bases[kLanes];
    store_low_bytes(bases, round_to_int(base));
    scales[dim + d] = static_cast<uint8_t>(bases[0]);
    for (int part = 0; part < kParts; ++part) {
      const F rest = f_max(f_min(steps(f_load(own + part * kLanes)) - base, f_set1(15.0f)), f_zero());
      store_low_bytes(codes + part * kLanes, round_to_int(rest));
    }
    const int i = d < half ? d : d - half;
    uint8_t* const out = cell + i / 4 * 64 + i % 4;
    for (int t = 0; t < num_tokens; ++t) {
      out[t * 4] = static_cast<uint8_t>(out[t * 4] | codes[t] << (d < half ? 0 : 4));
    }
  }
}

inline void kv_seal(const KvSealArgs& a, const Part& part) {
  const Range items = share(a.num_items * a.kv.num_kv_heads, part);
  for (int i = items.begin; i < items.end; ++i) {
    const SealItem& item = a.items[i / a.kv.num_kv_heads];
    const int head = i % a.kv.num_kv_heads;
    seal_cell(open_cell(a.kv, a.open, item.cell, head), a.kv.head_dim, item.num_tokens,
              key_cell(a.kv, item.block, head));
  }
}

// Cosines [dim / 2][16] and then sines of the positions of a block: `first` and those behind it, or `count` listed
// ones.
inline void block_angles(const RopeTable& rope, int first, const int32_t* listed, int count, float* out) {
  const int half = rope.head_dim / 2;
  for (int t = 0; t < 16; ++t) {
    int position = listed == nullptr ? first + t : listed[t < count ? t : count - 1];
    if (position >= rope.num_positions) position = rope.num_positions - 1;  // behind the last key
    const float* row = rope.cos_sin + static_cast<int64_t>(position) * rope.head_dim;
    for (int i = 0; i < 2 * half; ++i) out[i * 16 + t] = row[i];
  }
}

struct Rotated {
  F low, high;
};

// As rotate() does.
inline Rotated rotate_pair(F a, F b, const float* angle, int half) {
  const F cos = f_load(angle), sin = f_load(angle + half * 16);
  return {a * cos - b * sin, b * cos + a * sin};
}

// The keys of a sealed cell, of `bias` or none, as f32 [dim][16] rotated by `angles`.
inline void read_sealed(const uint8_t* cell, int dim, const float* bias, const float* angles, float* out) {
  const int half = dim / 2;
  const uint8_t* const scales = cell + int4_scales_at(dim);
  const float unit = load_half(scales + 2 * dim);
  const I mask = i_set1(15);
  const auto read = [&](int d, I code) {
    const float scale = int4_scale(unit, scales[d]);
    float offset = scale * static_cast<float>(static_cast<int8_t>(scales[dim + d]));
    if (bias != nullptr) offset += bias[d];
    return fma(to_float(code), f_set1(scale), f_set1(offset));
  };
  for (int part = 0; part < kParts; ++part) {
    const auto pair = [&](int i, I low, I high) {
      const int at = i * 16 + part * kLanes;
      const Rotated key = rotate_pair(read(i, low & mask), read(half + i, high & mask), angles + at, half);
      f_store(out + at, key.low);
      f_store(out + half * 16 + at, key.high);
    };
    for (int i = 0; i < half; i += 4) {
      const I word = i_load(cell + i * 16 + part * kLanes * 4);
      pair(i, word, shift_right<4>(word));
      if (i + 1 < half) pair(i + 1, shift_right<8>(word), shift_right<12>(word));
      if (i + 2 < half) pair(i + 2, shift_right<16>(word), shift_right<20>(word));
      if (i + 3 < half) pair(i + 3, shift_right<24>(word), shift_right<28>(word));
    }
  }
  uint16_t bad;
  memcpy(&bad, scales + 2 * dim + 2, sizeof(bad));
  for (int t = 0; bad != 0; ++t, bad = static_cast<uint16_t>(bad >> 1)) {
    if ((bad & 1) == 0) continue;
    for (int d = 0; d < dim; ++d) out[d * 16 + t] = __builtin_nanf("");
  }
}

// The same of an open cell.
inline void read_open(const float* cell, int dim, const float* bias, const float* angles, float* out) {
  const int half = dim / 2;
  for (int i = 0; i < half; ++i) {
    for (int at = i * 16; at < i * 16 + 16; at += kLanes) {
      F low = f_load(cell + at), high = f_load(cell + half * 16 + at);
      if (bias != nullptr) low = low + f_set1(bias[i]), high = high + f_set1(bias[half + i]);
      const Rotated key = rotate_pair(low, high, angles + at, half);
      f_store(out + at, key.low);
      f_store(out + half * 16 + at, key.high);
    }
  }
}
