// Cells of keys and values: how tokens are stored, and how far stored keys are from each other.
//
// Included inside the unnamed namespace of kernels_<isa>.cpp, after rows.h. A token owns its bytes: threads store the
// tokens of a cell side by side. How quantized formats round is in quant/kv_format.h.
//
// Keys lie with 16 tokens side by side, so that scores come out 16 at a time without horizontal sums:
//   f32   [head_dim][16 tokens]            bf16, f16  [head_dim / 2][16 tokens][2 dims]
//   int8, mixed  [head_dim / 4][16 tokens][4 dims] of code + 128, then [16 tokens] fp16 scales
// Values lie with dimensions side by side:
//   f32   [16 tokens][head_dim]            bf16, f16  [8 token pairs][head_dim][2 tokens]
//   int8  [4 token quads][head_dim][4 tokens] of code + 128, then [16 tokens] fp16 scales
//   mixed [4 token quads][head_dim / 2][4 tokens] of two codes of 4 bits, then fp16 scales [groups][16 tokens], then
//         minima likewise. A byte has dimension i of the first half of a group below that of its second half.
// int4 has values as mixed, and keys as [head_dim / 8][16 tokens][4 dims] of two codes of 4 bits, dimension i below
// i + head_dim / 2, then [head_dim] scales and [head_dim] bases of a byte, the fp16 unit, and 16 bits.
#pragma once

constexpr float kLargestHalf = 65504.0f;

// Formats whose values are codes, and those whose keys meet queries as codes.
template <quant::KvFormat kFormat>
constexpr bool kIsQuantized =
    kFormat == quant::KvFormat::int8 || kFormat == quant::KvFormat::mixed || kFormat == quant::KvFormat::int4;
template <quant::KvFormat kFormat>
constexpr bool kHasKeyCodes = kIsQuantized<kFormat> && !quant::seals_keys(kFormat);
template <quant::KvFormat kFormat>
constexpr bool kHasNibbles = kFormat == quant::KvFormat::mixed || kFormat == quant::KvFormat::int4;

inline int value_groups(int head_dim) { return (head_dim + quant::kKvGroup - 1) / quant::kKvGroup; }

inline uint8_t* key_cell(const KvLayer& kv, int block, int head) {
  return kv.base + block * kv.block_stride + head * kv.key_cell_bytes;
}

inline uint8_t* value_cell(const KvLayer& kv, int block, int head) {
  return kv.base + block * kv.block_stride + kv.num_kv_heads * kv.key_cell_bytes + head * kv.value_cell_bytes;
}

inline uint16_t to_bf16(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

constexpr uint16_t kHalfNan = 0x7e00;

/// Rounds to fp16, nearest even; |value| <= kLargestHalf.
inline uint16_t to_half(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value), sign = bits >> 16 & 0x8000u,
                 magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x38800000u) {
    return static_cast<uint16_t>(sign | (((magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10)));
  }
  // A subnormal half is a multiple of 2^-24, which is the last place of numbers in [0.5, 1).
  const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
  return static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, shifted) - 0x3f000000u));
}

inline void store_half(uint8_t* p, uint16_t half) { memcpy(p, &half, sizeof(half)); }
inline float load_half(const uint8_t* p) { return half_to_float(p); }

// The smallest and largest of `count` (a multiple of kLanes) values; `finite` says whether all of them are that.
struct Extent {
  float smallest, largest;
  bool finite;
};

inline Extent extent_of(const float* x, int count) {
  F low = f_load(x), high = low, zeros = f_zero();
  for (int i = 0; i < count; i += kLanes) {
    const F value = f_load(x + i);
    low = f_min(low, value);
    high = f_max(high, value);
    zeros = zeros + value * f_zero();  // NaN if the value is infinite or NaN
  }
  return {-max_lanes(f_zero() - low), max_lanes(high), sum_lanes(zeros) == 0.0f};
}

// Quantizes a token's key or value of a head; put(d, codes) stores the biased codes of kLanes dimensions from d on.
// Returns the scale.
template <class Put>
inline uint16_t quantize_int8(const float* x, int dim, Put&& put) {
  const Extent extent = extent_of(x, dim);
  const float peak = extent.largest > -extent.smallest ? extent.largest : -extent.smallest;
  const float wanted = peak / 127.0f;
  const uint16_t scale = extent.finite ? to_half(wanted < kLargestHalf ? wanted : kLargestHalf) : kHalfNan;
  uint8_t stored[2];
  store_half(stored, scale);
  const float step = extent.finite ? load_half(stored) : 0.0f;
  for (int d = 0; d < dim; d += kLanes) {
    uint8_t codes[kLanes];
    if (step > 0.0f) {
      const F code = f_max(f_min(f_load(x + d) / f_set1(step), f_set1(127.0f)), f_set1(-127.0f));
      store_low_bytes(reinterpret_cast<int8_t*>(codes), round_to_int(code) + i_set1(128));
    } else {
      memset(codes, 128, sizeof(codes));
    }
    put(d, codes);
  }
  return scale;
}

inline void store_key_int8(uint8_t* cell, int dim, int token, const float* key) {
  const uint16_t scale = quantize_int8(key, dim, [&](int d, const uint8_t* codes) {
    for (int i = 0; i < kLanes; i += 4) memcpy(cell + (d + i) * 16 + token * 4, codes + i, 4);
  });
  store_half(cell + dim * 16 + token * 2, scale);
}

inline void store_value_int8(uint8_t* cell, int dim, int token, const float* value) {
  uint8_t* const quad = cell + token / 4 * dim * 4 + token % 4;
  const uint16_t scale = quantize_int8(value, dim, [&](int d, const uint8_t* codes) {
    for (int i = 0; i < kLanes; ++i) quad[(d + i) * 4] = codes[i];
  });
  store_half(cell + dim * 16 + token * 2, scale);
}

inline void store_value_mixed(uint8_t* cell, int dim, int token, const float* value) {
  uint8_t* const quad = cell + token / 4 * dim * 2 + token % 4;
  uint8_t* const scales = cell + dim * 8;
  uint8_t* const minima = scales + value_groups(dim) * 32;
  for (int begin = 0; begin < dim; begin += quant::kKvGroup) {
    const int count = dim - begin < quant::kKvGroup ? dim - begin : quant::kKvGroup, half = count / 2;
    const int at = begin / quant::kKvGroup * 32 + token * 2;
    const Extent extent = extent_of(value + begin, count);
    const float wanted = (extent.largest - extent.smallest) / 15.0f;
    const float low = extent.smallest > -kLargestHalf ? extent.smallest : -kLargestHalf;
    store_half(scales + at, extent.finite ? to_half(wanted < kLargestHalf ? wanted : kLargestHalf) : 0);
    store_half(minima + at, extent.finite ? to_half(low < kLargestHalf ? low : kLargestHalf) : kHalfNan);
    const float step = load_half(scales + at);
    uint8_t codes[quant::kKvGroup] = {};
    if (step > 0.0f) {
      const F minimum = f_set1(load_half(minima + at));
      for (int d = 0; d < count; d += kLanes) {
        const F code = f_max(f_min((f_load(value + begin + d) - minimum) / f_set1(step), f_set1(15.0f)), f_zero());
        store_low_bytes(reinterpret_cast<int8_t*>(codes) + d, round_to_int(code));
      }
    }
    for (int i = 0; i < half; ++i) {
      quad[(begin / 2 + i) * 4] = static_cast<uint8_t>(codes[i] | codes[half + i] << 4);
    }
  }
}

// Whether bf16 and f16 lie side by side in pairs.
inline bool has_pairs(quant::KvFormat format) {
  return format == quant::KvFormat::bf16 || format == quant::KvFormat::f16;
}

/// Rounds to fp16 within its finite numbers.
inline uint16_t to_near_half(float value) {
  const float most = value < kLargestHalf ? value : kLargestHalf;
  return to_half(most > -kLargestHalf ? most : -kLargestHalf);
}

inline bool all_finite(const float* x, int count) {
  float zeros = 0.0f;
  for (int i = 0; i < count; ++i) zeros += x[i] * 0.0f;
  return zeros == 0.0f;
}

// Of a token and head, both: a NaN in one of them is kept in the key alone; see quant/kv_format.h.
inline void store_halves(uint8_t* keys, uint8_t* values, int dim, int token, const float* key, const float* value) {
  uint16_t* const k = reinterpret_cast<uint16_t*>(keys) + token * 2;
  uint16_t* const v = reinterpret_cast<uint16_t*>(values) + token / 2 * dim * 2 + token % 2;
  const bool finite = all_finite(key, dim) && all_finite(value, dim);
  for (int d = 0; d < dim; ++d) {
    k[d / 2 * 32 + d % 2] = finite ? to_near_half(key[d]) : kHalfNan;
    v[d * 2] = finite ? to_near_half(value[d]) : uint16_t{0};
  }
}

inline void store_key(const KvLayer& kv, uint8_t* cell, int token, const float* key) {
  if (kv.format == quant::KvFormat::f32) {
    float* out = reinterpret_cast<float*>(cell);
    for (int d = 0; d < kv.head_dim; ++d) out[d * 16 + token] = key[d];
  } else if (kv.format == quant::KvFormat::bf16) {
    uint16_t* out = reinterpret_cast<uint16_t*>(cell);
    for (int d = 0; d < kv.head_dim; ++d) out[(d / 2 * 16 + token) * 2 + d % 2] = to_bf16(key[d]);
  } else {
    store_key_int8(cell, kv.head_dim, token, key);
  }
}

inline void store_value(const KvLayer& kv, uint8_t* cell, int token, const float* value) {
  if (kv.format == quant::KvFormat::f32) {
    float* out = reinterpret_cast<float*>(cell);
    for (int d = 0; d < kv.head_dim; ++d) out[token * kv.head_dim + d] = value[d];
  } else if (kv.format == quant::KvFormat::bf16) {
    uint16_t* out = reinterpret_cast<uint16_t*>(cell);
    for (int d = 0; d < kv.head_dim; ++d) out[(token / 2 * kv.head_dim + d) * 2 + token % 2] = to_bf16(value[d]);
  } else if (kv.format == quant::KvFormat::int8) {
    store_value_int8(cell, kv.head_dim, token, value);
  } else {
    store_value_mixed(cell, kv.head_dim, token, value);
  }
}

inline float* open_cell(const KvLayer& kv, const OpenKeys& open, int cell, int head) {
  const int64_t head_floats = kv.head_dim * 16;
  if (cell < 0) return open.step_cells + (static_cast<int64_t>(~cell) * kv.num_kv_heads + head) * head_floats;
  return open.cells + cell * open.cell_stride + head * head_floats;
}

// The key and value of row `row` for one head.
inline void store_kv_head(const KvLayer& kv, const OpenKeys& open, int row, int slot, int head, const float* key,
                          const float* value) {
  if (kv.format == quant::KvFormat::f16) {
    uint8_t *const keys = key_cell(kv, slot / 16, head), *const values = value_cell(kv, slot / 16, head);
    return store_halves(keys, values, kv.head_dim, slot % 16, key, value);
  }
  if (quant::seals_keys(kv.format)) {
    float* out = open_cell(kv, open, open.row_cells[row], head) + slot % 16;
    for (int d = 0; d < kv.head_dim; ++d) out[d * 16] = key[d];
  } else {
    store_key(kv, key_cell(kv, slot / 16, head), slot % 16, key);
  }
  store_value(kv, value_cell(kv, slot / 16, head), slot % 16, value);
}

inline void kv_write(const KvWriteArgs& a, const Part& part) {
  const Range rows = share(a.rows, part);
  for (int t = rows.begin; t < rows.end; ++t) {
    for (int h = 0; h < a.kv.num_kv_heads; ++h) {
      const int offset = h * a.kv.head_dim;
      store_kv_head(a.kv, a.open, t, a.slots[t], h, a.k + t * a.k_stride + offset, a.v + t * a.v_stride + offset);
    }
  }
}

// Scale of a dimension of int4 keys: see quant/kv_format.h.
inline float int4_scale(float unit, uint8_t code) {
  return unit * __builtin_bit_cast(float, (static_cast<uint32_t>(code) + (112u << 4)) << 19);
}

// Behind the codes of int4 keys: scales and bases of dimensions, the unit, and the bits of tokens that are not finite.
inline int int4_scales_at(int head_dim) { return (head_dim / 2 + 3) / 4 * 64; }

inline float load_key_int4(const uint8_t* cell, int dim, int token, int d) {
  const int half = dim / 2, i = d < half ? d : d - half;
  const uint8_t* const scales = cell + int4_scales_at(dim);
  uint16_t bad;
  memcpy(&bad, scales + 2 * dim + 2, sizeof(bad));
  if ((bad >> token & 1) != 0) return __builtin_nanf("");
  const int code = cell[i / 4 * 64 + token * 4 + i % 4] >> (d < half ? 0 : 4) & 15;
  return int4_scale(load_half(scales + 2 * dim), scales[d]) *
         static_cast<float>(code + static_cast<int8_t>(scales[dim + d]));
}

inline float load_key(const KvLayer& kv, const uint8_t* cell, int token, int d) {
  if (kv.format == quant::KvFormat::int4) return load_key_int4(cell, kv.head_dim, token, d);
  if (kv.format == quant::KvFormat::f32) return reinterpret_cast<const float*>(cell)[d * 16 + token];
  if (has_pairs(kv.format)) {
    const uint8_t* const at = cell + ((d / 2 * 16 + token) * 2 + d % 2) * 2;
    if (kv.format == quant::KvFormat::f16) return load_half(at);
    uint16_t bits;
    memcpy(&bits, at, sizeof(bits));
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  }
  const int code = cell[(d / 4 * 16 + token) * 4 + d % 4] - 128;
  return static_cast<float>(code) * load_half(cell + kv.head_dim * 16 + token * 2);
}

inline float load_value(const KvLayer& kv, const uint8_t* cell, int token, int d) {
  const int dim = kv.head_dim;
  if (kv.format == quant::KvFormat::f32) return reinterpret_cast<const float*>(cell)[token * dim + d];
  if (has_pairs(kv.format)) {
    const uint8_t* const at = cell + ((token / 2 * dim + d) * 2 + token % 2) * 2;
    if (kv.format == quant::KvFormat::f16) return load_half(at);
    uint16_t bits;
    memcpy(&bits, at, sizeof(bits));
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  }
  if (kv.format == quant::KvFormat::int8) {
    const int code = cell[(token / 4 * dim + d) * 4 + token % 4] - 128;
    return static_cast<float>(code) * load_half(cell + dim * 16 + token * 2);
  }
  const int group = d / quant::kKvGroup, begin = group * quant::kKvGroup, within = d - begin;
  const int half = (dim - begin < quant::kKvGroup ? dim - begin : quant::kKvGroup) / 2;
  const int byte = cell[(token / 4 * (dim / 2) + begin / 2 + within % half) * 4 + token % 4];
  const uint8_t* scale = cell + dim * 8 + group * 32 + token * 2;
  const int code = within < half ? byte & 15 : byte >> 4;
  return static_cast<float>(code) * load_half(scale) + load_half(scale + value_groups(dim) * 32);
}

// A row reads as many bytes as one key of attention does, and rows are few: no vectors.
inline void key_deviation(const KeyDeviationArgs& a, const Part& part) {
  const Range rows = share(a.rows, part);
  for (int t = rows.begin; t < rows.end; ++t) {
    const int slot_a = a.slots_a[t], slot_b = a.slots_b[t];
    float sum = 0.0f;
    for (int h = 0; h < a.a.num_kv_heads; ++h) {
      const uint8_t* x = key_cell(a.a, slot_a / 16, h);
      const uint8_t* y = key_cell(a.b, slot_b / 16, h);
      for (int d = 0; d < a.a.head_dim; ++d) {
        const float key = quant::seals_keys(a.a.format)
                              ? open_cell(a.a, a.open, a.open.row_cells[t], h)[d * 16 + slot_a % 16]
                              : load_key(a.a, x, slot_a % 16, d);
        const float difference = key - load_key(a.b, y, slot_b % 16, d);
        sum += difference * difference;
      }
    }
    a.out[t] = sum;
  }
}
