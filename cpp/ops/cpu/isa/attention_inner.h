// The inner kernels of attention: scores of some columns against some keys, softmax of a tile of keys, weighted values.
//
// Included inside the unnamed namespace of kernels_<isa>.cpp, before attention.h, which has the words and the rules.
// How many columns, cells or vectors are computed side by side changes no bit: every score is a sum over dimensions in
// order, every output a sum over keys in order. Where the machine multiplies pairs of bf16 numbers, queries and weights
// are rounded to bf16 like keys and values; sums stay f32, and so does the sum of weights.
#pragma once

constexpr int kTileKeys = 64;
constexpr int kColumnGroup = kLanes == 16 ? 6 : 3;  // columns per inner kernel: accumulators fit the registers

struct SplitState {
  float max;  // of scores in base 2; -infinity when empty
  float sum;
};

// Keys [begin, end) of a run that a column sees, or several columns together; empty if begin >= end.
struct KeyRange {
  int begin, end;
};

// A number that is known when compiling, as an argument.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls visit(Constant<n>, i) for stretches of n from `i` on that cover [begin, end): of kMost as long as there are
// that many, then of half of that, and so on.
template <int kMost, class Visit>
inline void in_halves(int begin, int end, Visit&& visit) {
  for (; begin + kMost <= end; begin += kMost) visit(Constant<kMost>{}, begin);
  if constexpr (kMost > 1) {
    if (begin < end) in_halves<kMost / 2>(begin, end, visit);
  }
}

// The same with one stretch of what is left at the end.
template <int kMost, class Visit>
inline void with_rest(int begin, int end, Visit&& visit) {
  for (; begin + kMost <= end; begin += kMost) visit(Constant<kMost>{}, begin);
  if constexpr (kMost > 1) {
    if (begin < end) with_rest<kMost - 1>(begin, end, visit);
  }
}

// What goes on side by side in the inner kernels: enough to cover the latency of a multiply-add, and not more than fits
// the registers. Which cells or vectors are neighbours changes no sum.
constexpr int side_by_side(int columns) {
  if (kLanes == 16) return columns <= 3 ? 4 : 2;
  return columns == 1 ? 4 : 2;
}

// Whether queries and weights are packed as pairs of bf16 numbers, at the beginning of their rows of floats.
template <quant::KvFormat kFormat>
constexpr bool kPacksPairs = kFormat == quant::KvFormat::bf16&& kBf16Dot;

// Floats that the weights of the 16 keys of a cell take.
template <quant::KvFormat kFormat>
constexpr int kWeightFloats = kPacksPairs<kFormat> ? 8 : 16;

template <quant::KvFormat kFormat>
constexpr bool kHasPairs = kFormat == quant::KvFormat::bf16 || kFormat == quant::KvFormat::f16;

// The fp16 number in the upper half of every lane, in which there are no others. The exponent moves from bias 15 to 127
// by a product, which is exact for subnormal numbers too; NaN becomes a number, so that it can weigh nothing.
inline F upper_half(I halves) {
  const I moved = shift_right_signed<3>(halves) & i_set1(static_cast<int32_t>(0x8fffe000u));
  return bits_to_float(moved) * f_set1(0x1p112f);
}

// The two numbers of every lane of a pair as they are stored.
struct TwoNumbers {
  F first, second;
};

template <quant::KvFormat kFormat>
inline TwoNumbers two_numbers(I pair) {
  const I first = shift_left<16>(pair), second = pair & i_set1(static_cast<int32_t>(0xffff0000u));
  if constexpr (kFormat == quant::KvFormat::f16) return {upper_half(first), upper_half(second)};
  return {bits_to_float(first), bits_to_float(second)};
}

// Which of the 16 tokens of a cell of fp16 keys are not finite, a bit each: their keys are NaN.
inline uint32_t tokens_not_finite(const uint8_t* cell) {
  int8_t flags[16];
  for (int part = 0; part < kParts; ++part) {
    const I magnitude = i_load(cell + part * kLanes * 4) & i_set1(0x7fff);
    store_low_bytes(flags + part * kLanes, shift_right<15>(magnitude + i_set1(0x3ff)));  // 1 above 0x7c00
  }
  uint64_t halves[2];
  memcpy(halves, flags, sizeof(halves));
  if ((halves[0] | halves[1]) == 0) return 0;
  uint32_t bits = 0;
  for (int t = 0; t < 16; ++t) bits |= static_cast<uint32_t>(flags[t]) << t;
  return bits;
}

// Scores of kColumns columns against the 16 keys of each of kCells cells. Fetches what lies `ahead` of each line as it
// is used: blocks lie too far apart for the processor to guess, and to ask for whole cells at once would wait.
template <quant::KvFormat kFormat, int kColumns, int kCells>
inline void score_cells(const uint8_t* const* cells, int dim, const float* q, float* scores, int64_t ahead) {
  for (int part = 0; part < kParts; ++part) {
    F acc[kCells][kColumns];
    const uint8_t* keys[kCells];
    for (int i = 0; i < kCells; ++i) {
      keys[i] = cells[i] + part * kLanes * 4;
      for (int c = 0; c < kColumns; ++c) acc[i][c] = f_zero();
    }
    if constexpr (kPacksPairs<kFormat>) {
      const uint8_t* pairs = reinterpret_cast<const uint8_t*>(q);
      for (int d = 0; d < dim; d += 2) {
        I key[kCells];
        for (int i = 0; i < kCells; ++i) {
          fetch_line(keys[i] + d * 32, ahead);
          key[i] = i_load(keys[i] + d * 32);
        }
        for (int c = 0; c < kColumns; ++c) {
          const I query = i_broadcast4(pairs + c * dim * 4 + d * 2);
          for (int i = 0; i < kCells; ++i) acc[i][c] = dot_bf16(acc[i][c], key[i], query);
        }
      }
    } else if constexpr (kHasPairs<kFormat>) {
      for (int d = 0; d < dim; d += 2) {
        F first[kCells], second[kCells];
        for (int i = 0; i < kCells; ++i) {
          fetch_line(keys[i] + d * 32, ahead);
          const TwoNumbers both = two_numbers<kFormat>(i_load(keys[i] + d * 32));
          first[i] = both.first;
          second[i] = both.second;
        }
        for (int c = 0; c < kColumns; ++c) {
          const F query = f_set1(q[c * dim + d]);
          for (int i = 0; i < kCells; ++i) acc[i][c] = muladd(first[i], query, acc[i][c]);
        }
        for (int c = 0; c < kColumns; ++c) {
          const F query = f_set1(q[c * dim + d + 1]);
          for (int i = 0; i < kCells; ++i) acc[i][c] = muladd(second[i], query, acc[i][c]);
        }
      }
    } else {
      for (int d = 0; d < dim; ++d) {
        F key[kCells];
        for (int i = 0; i < kCells; ++i) {
          fetch_line(keys[i] + d * 64, ahead);
          key[i] = bits_to_float(i_load(keys[i] + d * 64));
        }
        for (int c = 0; c < kColumns; ++c) {
          const F query = f_set1(q[c * dim + d]);
          for (int i = 0; i < kCells; ++i) acc[i][c] = muladd(key[i], query, acc[i][c]);
        }
      }
    }
    for (int i = 0; i < kCells; ++i) {
      for (int c = 0; c < kColumns; ++c) f_store(scores + c * kTileKeys + i * 16 + part * kLanes, acc[i][c]);
    }
  }
}

// acc += p V over the 16 keys of each of cells [begin, end) of a tile, for kColumns columns and kVectors * kLanes
// dimensions from `first_dim` on; p is the weight of the first of these keys. Fetches the same part of the cells in
// `later`, unless that is null.
template <quant::KvFormat kFormat, int kColumns, int kVectors>
inline void value_cells(const uint8_t* const* cells, int begin, int end, int dim, int first_dim, const float* p,
                        float* acc, const uint8_t* const* later) {
  F sums[kVectors][kColumns];
  for (int v = 0; v < kVectors; ++v) {
    for (int c = 0; c < kColumns; ++c) sums[v][c] = f_load(acc + c * dim + first_dim + v * kLanes);
  }
  for (int i = begin; i < end; ++i, p += kWeightFloats<kFormat>) {
    const uint8_t* values = cells[i] + first_dim * 4;
    const int64_t ahead = later != nullptr ? later[i] - cells[i] : 0;
    if constexpr (kPacksPairs<kFormat>) {
      const uint8_t* pairs = reinterpret_cast<const uint8_t*>(p);
      for (int pair = 0; pair < 8; ++pair, values += dim * 4) {
        I value[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          fetch_line(values + v * kLanes * 4, ahead);
          value[v] = i_load(values + v * kLanes * 4);
        }
        for (int c = 0; c < kColumns; ++c) {
          const I weights = i_broadcast4(pairs + c * kTileKeys * 4 + pair * 4);
          for (int v = 0; v < kVectors; ++v) sums[v][c] = dot_bf16(sums[v][c], value[v], weights);
        }
      }
    } else if constexpr (kHasPairs<kFormat>) {
      for (int pair = 0; pair < 8; ++pair, values += dim * 4) {
        F first[kVectors], second[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          fetch_line(values + v * kLanes * 4, ahead);
          const TwoNumbers both = two_numbers<kFormat>(i_load(values + v * kLanes * 4));
          first[v] = both.first;
          second[v] = both.second;
        }
        for (int c = 0; c < kColumns; ++c) {
          const F weight = f_set1(p[c * kTileKeys + 2 * pair]);
          for (int v = 0; v < kVectors; ++v) sums[v][c] = muladd(first[v], weight, sums[v][c]);
        }
        for (int c = 0; c < kColumns; ++c) {
          const F weight = f_set1(p[c * kTileKeys + 2 * pair + 1]);
          for (int v = 0; v < kVectors; ++v) sums[v][c] = muladd(second[v], weight, sums[v][c]);
        }
      }
    } else {
      for (int key = 0; key < 16; ++key, values += dim * 4) {
        F value[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          fetch_line(values + v * kLanes * 4, ahead);
          value[v] = bits_to_float(i_load(values + v * kLanes * 4));
        }
        for (int c = 0; c < kColumns; ++c) {
          const F weight = f_set1(p[c * kTileKeys + key]);
          for (int v = 0; v < kVectors; ++v) sums[v][c] = muladd(value[v], weight, sums[v][c]);
        }
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    for (int c = 0; c < kColumns; ++c) f_store(acc + c * dim + first_dim + v * kLanes, sums[v][c]);
  }
}

// Hides what a column does not see of its 64 raw scores, and returns the largest of the others.
inline float largest_score(float* scores, KeyRange seen) {
  for (int k = 0; k < seen.begin; ++k) scores[k] = -__builtin_inff();
  for (int k = seen.end; k < kTileKeys; ++k) scores[k] = -__builtin_inff();
  F largest = f_load(scores);
  for (int k = kLanes; k < kTileKeys; k += kLanes) largest = f_max(largest, f_load(scores + k));
  return max_lanes(largest);
}

// Turns the 64 scores of a column into weights below their new maximum and adds these to its state, which is rescaled
// (from the maximum before; exactly 0 for a state that was empty) with its weighted values.
inline void soften_column(float* scores, float next, float rescale, SplitState& state, float* acc, int dim) {
  F sum = f_zero();
  for (int k = 0; k < kTileKeys; k += kLanes) {
    const F weight = exp2(f_load(scores + k) - f_set1(next));
    f_store(scores + k, weight);
    sum = sum + weight;
  }
  state.sum = state.sum * rescale + sum_lanes(sum);
  state.max = next;
  if (rescale != 1.0f) {
    for (int d = 0; d < dim; d += kLanes) f_store(acc + d, f_load(acc + d) * f_set1(rescale));
  }
}

// Which of the 64 keys of a tile nobody sees.
struct HiddenKeys {
  uint64_t bits;           // key k is bit k
  float added[kTileKeys];  // to its score: -infinity or 0
};

inline void expand_bits(uint64_t bits, HiddenKeys& keys) {
  keys.bits = bits;
  for (int k = 0; k < kTileKeys; ++k) keys.added[k] = (bits >> k & 1) != 0 ? -__builtin_inff() : 0.0f;
}

inline void expand_hidden(const uint16_t* hidden, int num_blocks, HiddenKeys& keys) {
  uint64_t bits = 0;
  for (int b = 0; b < num_blocks; ++b) bits |= static_cast<uint64_t>(hidden[b]) << 16 * b;
  expand_bits(bits, keys);
}

// Adds the bias of a run, a natural logarithm, to the scores of a column.
inline void add_to_scores(float bias, float* scores) {
  constexpr float kLog2e = 1.44269504f;
  for (int k = 0; k < kTileKeys; k += kLanes) f_store(scores + k, f_load(scores + k) + f_set1(bias * kLog2e));
}

// Whether a column that sees `seen` but for the `hidden` keys of a tile sees one of `keys`, a bit each.
inline bool seen_of_tile(uint64_t hidden, KeyRange seen, uint64_t keys) {
  if (keys == 0 || seen.begin >= seen.end) return false;
  const int count = seen.end - seen.begin;
  const uint64_t in_range = (count == kTileKeys ? ~uint64_t{0} : (uint64_t{1} << count) - 1) << seen.begin;
  return (keys & in_range & ~hidden) != 0;
}

// Makes hidden keys weigh nothing in a column that sees `seen`, which becomes empty if no key of it is left.
inline void hide_keys(const HiddenKeys& keys, float* scores, KeyRange& seen) {
  const int count = seen.end - seen.begin;  // at least 1
  const uint64_t in_range = (count == kTileKeys ? ~uint64_t{0} : (uint64_t{1} << count) - 1) << seen.begin;
  const uint64_t hidden = keys.bits & in_range;
  if (hidden == in_range) {
    seen.end = seen.begin;
  } else if (hidden != 0) {
    for (int k = 0; k < kTileKeys; k += kLanes) f_store(scores + k, f_load(scores + k) + f_load(keys.added + k));
  }
}
