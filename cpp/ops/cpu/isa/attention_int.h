// The inner kernels of attention over quantized keys and values: sums of integers, so exact in every table.
//
// Included inside the unnamed namespace of kernels_<isa>.cpp, after attention_inner.h, whose rules hold here too. What
// meets the codes, a query or the weights of a tile of 64 keys, becomes whole numbers n in [-32385, 32385] of a unit
// that is the largest magnitude / 32385, and these two digits of base 254, n = 254 high + low, both in [-127, 127]: two
// products of bytes for a precision of 2^-15. A column's digits are made from its own numbers only; keys that it does
// not see weigh exactly 0, whatever is stored for them. Sums stay below 2^24, so they are exact in f32 too.
#pragma once

constexpr float kDigitBase = 254.0f;
constexpr float kMostUnits = 127.0f * kDigitBase + 127.0f;
constexpr float kLeastPeak = 1e-30f;       // below it, all numbers count as 0
constexpr float kLeastWeight = 0x1p-126f;  // exp2 gives this at least, or 0

// A column's query is packed at the beginning of its row of floats: for every kLanes dimensions their high digits, then
// their low ones; behind these 2 * dim bytes this.
struct PackedQuery {
  int32_t minus_high, minus_low;  // -128 times the sums of the digits, where products are biased
  float unit;
};

// The digits of the weights of 64 values, times the scales of these values, of one group of dimensions.
struct TileWeights {
  int8_t high[kTileKeys], low[kTileKeys];
  int32_t minus_high, minus_low;
  float unit;
  float offset;  // sum of weights times minima
};

constexpr int kTileWeightFloats = sizeof(TileWeights) / sizeof(float);

// Groups of dimensions that have scales of their own in the values of a format; 0 if it is not quantized.
inline int scale_groups(quant::KvFormat format, int head_dim) {
  if (format == quant::KvFormat::int8) return 1;
  const bool has_nibbles = format == quant::KvFormat::mixed || format == quant::KvFormat::int4;
  return has_nibbles ? value_groups(head_dim) : 0;
}

struct Digits {
  F high, low;
};

inline Digits digits_of(F units) {
  // What is not finite becomes digits too, of a unit that is not.
  const F whole = f_max(f_min(to_float(round_to_int(units)), f_set1(kMostUnits)), f_set1(-kMostUnits));
  const F quotient = f_max(f_min(whole * f_set1(1.0f / kDigitBase), f_set1(127.0f)), f_set1(-127.0f));
  const F high = to_float(round_to_int(quotient));
  return {high, fma(high, f_set1(-kDigitBase), whole)};
}

// Takes numbers to units of their peak. If one of them is not finite, neither is the unit.
struct Units {
  float inverse, unit;
};

inline Units units_of(F largest, F zeros) {
  const float peak = max_lanes(largest);
  const bool counts = peak >= kLeastPeak;
  return {counts ? kMostUnits / peak : 0.0f, (counts ? peak / kMostUnits : 0.0f) + sum_lanes(zeros)};
}

inline int32_t minus_bias(F digits) { return kBiasedDot ? -128 * static_cast<int32_t>(sum_lanes(digits)) : 0; }

// Packs a rotated and scaled query in its place.
inline void pack_query(float* q, int dim) {
  F largest = f_zero(), zeros = f_zero();
  for (int d = 0; d < dim; d += kLanes) {
    const F value = f_load(q + d);
    largest = f_max(largest, f_abs(value));
    zeros = zeros + value * f_zero();
  }
  const Units units = units_of(largest, zeros);
  int8_t* out = reinterpret_cast<int8_t*>(q);
  F high = f_zero(), low = f_zero();
  for (int d = 0; d < dim; d += kLanes, out += 2 * kLanes) {  // behind what it reads
    const Digits digits = digits_of(f_load(q + d) * f_set1(units.inverse));
    store_low_bytes(out, round_to_int(digits.high));
    store_low_bytes(out + kLanes, round_to_int(digits.low));
    high = high + digits.high;
    low = low + digits.low;
  }
  const PackedQuery packed = {minus_bias(high), minus_bias(low), units.unit};
  memcpy(out, &packed, sizeof(packed));
}

inline F join_digits(I high, I low) { return fma(to_float(high), f_set1(kDigitBase), to_float(low)); }

// Scores like score_cells. Fetches `ahead_bytes` from `ahead` behind each cell on.
template <int kColumns, int kCells>
inline void score_codes(const uint8_t* const* cells, int dim, const float* q, float* scores, int64_t ahead,
                        int64_t ahead_bytes) {
  PackedQuery packed[kColumns];
  for (int c = 0; c < kColumns; ++c) {
    memcpy(&packed[c], reinterpret_cast<const uint8_t*>(q + c * dim) + 2 * dim, sizeof(PackedQuery));
  }
  for (int part = 0; part < kParts; ++part) {
    I high[kCells][kColumns], low[kCells][kColumns];
    const uint8_t* keys[kCells];
    for (int i = 0; i < kCells; ++i) {
      keys[i] = cells[i] + part * kLanes * 4;
      for (int c = 0; c < kColumns; ++c) {
        high[i][c] = i_set1(packed[c].minus_high);
        low[i][c] = i_set1(packed[c].minus_low);
      }
    }
    const uint8_t* digits = reinterpret_cast<const uint8_t*>(q);
    for (int d = 0; d < dim; d += kLanes, digits += 2 * kLanes) {
      const int64_t near = d * 16 < ahead_bytes ? ahead : 0;
      for (int j = 0; j < kLanes; j += 4) {
        I key[kCells];
        for (int i = 0; i < kCells; ++i) {
          __builtin_prefetch(keys[i] + (d + j) * 16 + near, 0, 3);  // with nothing to fetch, of what is here
          key[i] = i_load(keys[i] + (d + j) * 16);
        }
        for (int c = 0; c < kColumns; ++c) {
          const I query = i_broadcast4(digits + c * dim * 4 + j);
          for (int i = 0; i < kCells; ++i) high[i][c] = dot_biased8(high[i][c], key[i], query);
        }
        for (int c = 0; c < kColumns; ++c) {
          const I query = i_broadcast4(digits + c * dim * 4 + kLanes + j);
          for (int i = 0; i < kCells; ++i) low[i][c] = dot_biased8(low[i][c], key[i], query);
        }
      }
    }
    for (int i = 0; i < kCells; ++i) {
      const uint8_t* scales = cells[i] + dim * 16;
      if (part == 0 && dim * 16 < ahead_bytes) fetch_line(scales, ahead);
      const F scale = f_load_f16(scales + part * kLanes * 2);
      for (int c = 0; c < kColumns; ++c) {
        const F score = join_digits(high[i][c], low[i][c]) * f_set1(packed[c].unit) * scale;
        f_store(scores + c * kTileKeys + i * 16 + part * kLanes, score);
      }
    }
  }
}

// Makes digits of the weights of a tile of keys for one group of dimensions. Cells [first, last) have the scales of 16
// values each at `scales`, and at `minima` what is added to their codes times scales, unless that is negative.
inline void pack_weights(const float* p, const uint8_t* const* cells, int first, int last, int scales, int minima,
                         TileWeights& out) {
  constexpr int kVectors = kTileKeys / kLanes;
  const F least = f_set1(kLeastWeight);
  F weights[kVectors], largest = f_zero(), zeros = f_zero(), offset = f_zero();
  for (int i = 0; i < kVectors; ++i) {
    const int b = i / kParts, at = i % kParts * kLanes * 2;
    weights[i] = f_zero();
    if (b < first || b >= last) continue;
    const F weight = f_load(p + i * kLanes);
    weights[i] = keep_if_ge(weight * f_load_f16(cells[b] + scales + at), weight, least);
    largest = f_max(largest, weights[i]);
    zeros = zeros + weights[i] * f_zero();
    if (minima >= 0) offset = offset + keep_if_ge(weight * f_load_f16(cells[b] + minima + at), weight, least);
  }
  const Units units = units_of(largest, zeros);
  F high = f_zero(), low = f_zero();
  for (int i = 0; i < kVectors; ++i) {
    const Digits digits = digits_of(weights[i] * f_set1(units.inverse));
    store_low_bytes(out.high + i * kLanes, round_to_int(digits.high));
    store_low_bytes(out.low + i * kLanes, round_to_int(digits.low));
    high = high + digits.high;
    low = low + digits.low;
  }
  out.minus_high = minus_bias(high);
  out.minus_low = minus_bias(low);
  out.unit = units.unit;
  out.offset = sum_lanes(offset);
}

// The weights of one column for all groups of dimensions.
template <quant::KvFormat kFormat>
inline void pack_column_weights(const float* p, const uint8_t* const* cells, int first, int last, int dim,
                                TileWeights* out) {
  if constexpr (kFormat == quant::KvFormat::int8) {
    pack_weights(p, cells, first, last, dim * 16, -1, *out);
  } else {
    const int groups = value_groups(dim), scales = dim * 8, minima = scales + groups * 32;
    for (int g = 0; g < groups; ++g) pack_weights(p, cells, first, last, scales + g * 32, minima + g * 32, out[g]);
  }
}

// Like value_cells, over codes of 8 bits in cells [first, last) of a tile. `weights` has one entry a column.
template <int kColumns, int kVectors>
inline void value_codes(const uint8_t* const* cells, int first, int last, int dim, int first_dim,
                        const TileWeights* weights, float* acc, const uint8_t* const* later) {
  I high[kVectors][kColumns], low[kVectors][kColumns];
  for (int v = 0; v < kVectors; ++v) {
    for (int c = 0; c < kColumns; ++c) {
      high[v][c] = i_set1(weights[c].minus_high);
      low[v][c] = i_set1(weights[c].minus_low);
    }
  }
  for (int b = first; b < last; ++b) {
    const uint8_t* values = cells[b] + first_dim * 4;
    const int64_t ahead = later != nullptr ? later[b] - cells[b] : 0;
    if (first_dim == 0) fetch_line(cells[b] + dim * 16, ahead);
    for (int quad = 0; quad < 4; ++quad, values += dim * 4) {
      I value[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        fetch_line(values + v * kLanes * 4, ahead);
        value[v] = i_load(values + v * kLanes * 4);
      }
      for (int c = 0; c < kColumns; ++c) {
        const I high_digits = i_broadcast4(weights[c].high + b * 16 + quad * 4);
        for (int v = 0; v < kVectors; ++v) high[v][c] = dot_biased8(high[v][c], value[v], high_digits);
        const I low_digits = i_broadcast4(weights[c].low + b * 16 + quad * 4);
        for (int v = 0; v < kVectors; ++v) low[v][c] = dot_biased8(low[v][c], value[v], low_digits);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    for (int c = 0; c < kColumns; ++c) {
      float* sums = acc + c * dim + first_dim + v * kLanes;
      f_store(sums, fma(join_digits(high[v][c], low[v][c]), f_set1(weights[c].unit), f_load(sums)));
    }
  }
}

// Like side_by_side: a vector of two codes a byte has four accumulators a column.
constexpr int nibbles_side_by_side(int columns) { return kLanes == 16 && columns <= 2 ? 2 : 1; }

// The same over codes of 4 bits, for the dimensions of kVectors * kLanes bytes a token from `first_lane` on; a vector
// holds dimensions of one group. `weights` has an entry for each of `groups`, column after column.
template <int kColumns, int kVectors>
inline void value_nibbles(const uint8_t* const* cells, int first, int last, int dim, int first_lane,
                          const TileWeights* weights, int groups, float* acc, const uint8_t* const* later) {
  constexpr int kGroupLanes = quant::kKvGroup / 2;
  const I mask = i_set1(0x0f0f0f0f);
  I high[kVectors][2][kColumns], low[kVectors][2][kColumns];
  const TileWeights* own[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    own[v] = weights + (first_lane + v * kLanes) / kGroupLanes;
    for (int c = 0; c < kColumns; ++c) {
      high[v][0][c] = high[v][1][c] = low[v][0][c] = low[v][1][c] = i_set1(0);
    }
  }
  for (int b = first; b < last; ++b) {
    const uint8_t* values = cells[b] + first_lane * 4;
    // The keys that come later take twice as many bytes, and a line of scales.
    if (later != nullptr && first_lane == 0) fetch_line(cells[b], later[b] + dim * 16 - cells[b]);
    for (int quad = 0; quad < 4; quad += 2, values += dim * 4) {
      for (int v = 0; v < kVectors; ++v) {
        const uint8_t* at = values + v * kLanes * 4;
        if (later != nullptr) {
          const uint8_t* from = later[b] + 2 * (at - cells[b]);
          for (int byte = 0; byte < kLanes * 8; byte += 64) {
            __builtin_prefetch(from + byte, 0, 3);
            __builtin_prefetch(from + dim * 4 + byte, 0, 3);
          }
        }
        const I one = i_load(at), next = i_load(at + dim * 2);
        const I codes[2] = {one & mask, shift_right<4>(one) & mask};
        const I next_codes[2] = {next & mask, shift_right<4>(next) & mask};
        for (int c = 0; c < kColumns; ++c) {
          const TileWeights& w = own[v][c * groups];
          const int8_t* digits = w.high + b * 16 + quad * 4;
          const I x = i_broadcast4(digits), next_x = i_broadcast4(digits + 4);
          for (int n = 0; n < 2; ++n) high[v][n][c] = dot_u6(high[v][n][c], codes[n], x, next_codes[n], next_x);
          digits = w.low + b * 16 + quad * 4;
          const I y = i_broadcast4(digits), next_y = i_broadcast4(digits + 4);
          for (int n = 0; n < 2; ++n) low[v][n][c] = dot_u6(low[v][n][c], codes[n], y, next_codes[n], next_y);
        }
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const int lane = first_lane + v * kLanes, begin = lane / kGroupLanes * quant::kKvGroup, within = lane % kGroupLanes;
    const int half = (dim - begin < quant::kKvGroup ? dim - begin : quant::kKvGroup) / 2;
    for (int c = 0; c < kColumns; ++c) {
      const TileWeights& w = own[v][c * groups];
      float* sums = acc + c * dim + begin;
      F totals[2];
      for (int n = 0; n < 2; ++n) totals[n] = join_digits(high[v][n][c], low[v][n][c]);
      const auto add = [&](float* at, F total) {
        f_store(at, fma(total, f_set1(w.unit), f_load(at)) + f_set1(w.offset));
      };
      if (kLanes > half) {  // the last group has half a vector of bytes: what is behind them is not its own
        float joined[2 * kLanes];
        f_store(joined, totals[0]);
        f_store(joined + half, totals[1]);
        add(sums, f_load(joined));
        continue;
      }
      for (int n = 0; n < 2; ++n) add(sums + n * half + within, totals[n]);
    }
  }
}
