// Matrix products over 16-row tiles: one template for one row (decode) and many (prefill).
//
// Included inside the unnamed namespace of kernels_<isa>.cpp. A result is one accumulator chain per (output, row),
// column groups ascending, so it does not depend on how many rows are computed together (promise 1).
#pragma once

using quant::Format;
using quant::tile_shape;
using quant::TileShape;

/// Rows of x computed together in floats: a multiple of kPanelRows, an accumulator each.
constexpr int kMaxRows = kLanes == 16 ? 12 : 4;
/// Strips computed together, so that a value of x is loaded once for both; only where registers are plenty.
constexpr int kMaxStrips = kLanes == 16 ? 2 : 1;
/// Steps of 4 or 8 columns are written out, but not without vectors, where it is loops of loops that would be.
constexpr int kUnrollSteps = kHasVectors ? 8 : 1;

/// Where group g of row t lies in the arrays of x that have one element per row and group; those with one per row and
/// column have it at 32 times that.
inline int64_t group_index(const Activation& x, int t, int g) {
  const int first = t / kPanelRows * kPanelRows;
  const int count = x.rows - first < kPanelRows ? x.rows - first : kPanelRows;
  return static_cast<int64_t>(first) * (x.cols / 32) + static_cast<int64_t>(g) * count + (t - first);
}

/// Whether the two groups of a tile share a minimum: it is added once, after the second.
constexpr bool shares_minimum(Format format) { return format == Format::w4; }

constexpr bool is_quantized(Format format) { return tile_shape(format).code_bits <= 8 && format != Format::fp8_e4m3; }

// 8-bit floats in lanes of 32 bits, exactly: the exponent's bias is corrected by a product, as f_load_f16 does.
inline F from_e4m3(I code) {
  const I bits = shift_left<24>(code & i_set1(0x80)) | shift_left<20>(code & i_set1(0x7f));
  return bits_to_float(bits) * f_set1(0x1p120f);
}

// The tile that holds columns [32g, 32g + 32).
template <Format kFormat>
inline const uint8_t* tile_address(const uint8_t* strip, int g) {
  constexpr TileShape kShape = tile_shape(kFormat);
  return strip + kShape.header_bytes + static_cast<int64_t>(g / kShape.groups) * kShape.tile_bytes;
}

// The scales of one tile, for one part of its rows.
template <Format kFormat>
struct TileScales {
  static constexpr TileShape kShape = tile_shape(kFormat);
  static constexpr bool kIsK = kFormat == Format::q4_k || kFormat == Format::q5_k;
  const uint8_t* bytes;  // one per row and group, of the formats that have them
  F d, m;
  F zero;  // of the formats that have zero points

  void load(const uint8_t* strip, const uint8_t* tile, int part) {
    const uint8_t* scales = tile + kShape.groups * kShape.group_bytes;
    bytes = scales + part * kLanes;
    if constexpr (kFormat == Format::fp8_e4m3) {
      float lanes[kLanes];
      memcpy(lanes, strip + part * kLanes * 4, sizeof(lanes));
      d = f_load(lanes);
      return;
    }
    const uint8_t* halves = (kFormat == Format::w8_channel ? strip : scales) + part * kLanes * 2;
    if (kIsK || kFormat == Format::q6_k) halves += 256;
    d = f_load_f16(halves);
    if constexpr (kShape.has_minimum) m = f_load_f16(halves + 32);
    if constexpr (kIsK) m = m * f_set1(-1.0f);  // these subtract their minimum
    if constexpr (kShape.has_zeros) zero = to_float(i_load_u8(bytes + 32));
  }

  // Scale of columns [0, 16) or [16, 32) of group g.
  F scale(int g, int half) const {
    if constexpr (kIsK) return d * to_float(i_load_u8(bytes + 16 * g));
    if constexpr (kFormat == Format::q6_k) return d * to_float(i_load_s8(bytes + 16 * (2 * g + half)));
    return d;
  }
  F minimum(int g) const {
    if constexpr (kIsK) return m * to_float(i_load_u8(bytes + 16 * (8 + g)));
    return m;
  }
  // What to add to a code so that it counts from zero.
  I minus_zero() const {
    if constexpr (kShape.has_zeros) return round_to_int(f_zero() - zero);
    return i_set1(-kShape.zero);
  }
};

// Walks the codes of 32 columns, 4 to 6 bits each: step j gives those of columns 4j .. 4j+3 and 16+4j .. 16+4j+3.
template <Format kFormat>
struct CodeWalk {
  static constexpr int kExtra = tile_shape(kFormat).code_bits - 4;
  const uint8_t* lanes;
  I low, high;
  I low_plane, high_plane;

  void step(int j) {
    const I nibbles = i_set1(0x0f0f0f0f);
    const I w = i_load(lanes + 64 * j);
    low = w & nibbles;
    high = shift_right<4>(w) & nibbles;
    if constexpr (kExtra > 0) {
      constexpr int kStepsPerPlane = 4 / kExtra;
      const I mask = i_set1(kExtra == 1 ? 0x10101010 : 0x30303030);
      if (j % kStepsPerPlane == 0) {
        low_plane = i_load(lanes + 256 + 64 * (j / kStepsPerPlane));
        high_plane = shift_left<4>(low_plane);
      } else {
        low_plane = shift_right<kExtra>(low_plane);
        high_plane = shift_right<kExtra>(high_plane);
      }
      low = low | (low_plane & mask);
      high = high | (high_plane & mask);
    }
  }
};

// dots[s][t] += the products of one group of 32 columns, or of its first or second half only. `lanes` is the piece of
// the first strip, the others follow at `strip_bytes`; row t of x has its 32 codes at codes + 32 * t.
enum class Half { both, first, second };

#if defined(NB_PAIR_DOTS)
// The same for one strip and an even number of rows, two by two: the same integers, in another order.
template <Format kFormat, int kRows, Half kHalf>
inline void dot_group_pairs(const uint8_t* lanes, const int8_t* codes, I* dots) {
  PairSums sums[kRows / 2];
  for (int t = 0; t < kRows; t += 2) sums[t / 2] = join_rows(dots[t], dots[t + 1]);
  const auto add = [&](I four, I next, int column) {
    const PairCodes w = join_columns(four, next);
    for (int t = 0; t < kRows; t += 2) {
      const int8_t* x = codes + 32 * t + column;
      dot_pairs(sums[t / 2], w, x, x + 32);
    }
  };
  if constexpr (tile_shape(kFormat).code_bits == 8) {
    for (int j = 0; j < 8; j += 2) add(i_load(lanes + 64 * j), i_load(lanes + 64 * (j + 1)), 4 * j);
  } else {
    CodeWalk<kFormat> walk;
    walk.lanes = lanes;
    for (int j = 0; j < 4; j += 2) {
      walk.step(j);
      const I low = walk.low, high = walk.high;
      walk.step(j + 1);
      if constexpr (kHalf != Half::second) add(low, walk.low, 4 * j);
      if constexpr (kHalf != Half::first) add(high, walk.high, 16 + 4 * j);
    }
  }
  for (int t = 0; t < kRows; t += 2) split_rows(sums[t / 2], dots[t], dots[t + 1]);
}
#endif

template <Format kFormat, int kStrips, int kRows, Half kHalf>
inline void dot_group(const uint8_t* lanes, int64_t strip_bytes, const int8_t* codes, I (&dots)[kStrips][kRows]) {
#if defined(NB_PAIR_DOTS)
  if constexpr (kRows % 2 == 0) return dot_group_pairs<kFormat, kRows, kHalf>(lanes, codes, dots[0]);
#endif
  if constexpr (tile_shape(kFormat).code_bits == 8) {
#pragma GCC unroll kUnrollSteps
    for (int j = 0; j < 8; ++j) {
      I w[kStrips];
      for (int s = 0; s < kStrips; ++s) w[s] = i_load(lanes + s * strip_bytes + 64 * j);
      for (int t = 0; t < kRows; ++t) {
        const I x = i_broadcast4(codes + 32 * t + 4 * j);
        for (int s = 0; s < kStrips; ++s) dots[s][t] = dot_biased8(dots[s][t], w[s], x);
      }
    }
  } else {
    CodeWalk<kFormat> walk[kStrips];
    for (int s = 0; s < kStrips; ++s) walk[s].lanes = lanes + s * strip_bytes;
#pragma GCC unroll kUnrollSteps
    for (int j = 0; j < 4; ++j) {
      for (int s = 0; s < kStrips; ++s) walk[s].step(j);
      for (int t = 0; t < kRows; ++t) {
        const int8_t* x = codes + 32 * t + 4 * j;
        if constexpr (kHalf == Half::both) {
          const I low = i_broadcast4(x), high = i_broadcast4(x + 16);
          for (int s = 0; s < kStrips; ++s) dots[s][t] = dot_u6(dots[s][t], walk[s].low, low, walk[s].high, high);
        } else {
          const I half = i_broadcast4(kHalf == Half::first ? x : x + 16);
          for (int s = 0; s < kStrips; ++s) {
            dots[s][t] = dot_u6(dots[s][t], kHalf == Half::first ? walk[s].low : walk[s].high, half);
          }
        }
      }
    }
  }
}

/// How far ahead of use a strip alone is fetched: more than the processor looks ahead by itself.
constexpr int64_t kStreamAhead = 4096;

// Asks for the line `ahead` bytes behind p, unless that is 0: for what the processor does not guess in time. A line
// that lies beyond what is there does no harm. Always inline: to GCC 12 a function that only fetches has no effect, and
// it leaves calls of it out. tools/check_isa_instructions.py looks.
[[gnu::always_inline]] inline void fetch_line(const uint8_t* p, int64_t ahead) {
  if (ahead != 0) __builtin_prefetch(p + ahead, 0, 3);
}

// The same for the lines of the next kBytes.
template <int kBytes>
[[gnu::always_inline]] inline void fetch_lines(const uint8_t* p, int64_t ahead) {
  if (ahead == 0) return;
#pragma GCC unroll 16
  for (int i = 0; i < kBytes; i += 64) fetch_line(p + i, ahead);
}

// Sixteen outputs of each of kStrips strips for the kRows rows of the panel that begins at `row`; strip s writes those
// of row t at out + t * out_stride + 16 s. Fetches what lies `ahead` bytes behind what it reads, unless that is 0.
template <Format kFormat, int kStrips, int kRows>
inline void strip_int8(const uint8_t* strips, int64_t strip_bytes, int64_t ahead, const Activation& x, int row,
                       float* out, int64_t out_stride) {
  constexpr TileShape kShape = tile_shape(kFormat);
  constexpr int32_t kZero = kShape.code_bits == 8 && !kBiasedDot ? 0 : kShape.zero;
  constexpr int kZeroBits = __builtin_ctz(kZero | 1 << 30);  // of a power of two
  const int groups = x.cols / 32;
  for (int part = 0; part < kParts; ++part) {
    const int64_t begin = static_cast<int64_t>(row) * groups;
    const int8_t* codes = x.codes + 32 * begin;
    const float* scales = x.scales + begin;
    const float* shifts = x.shifts + begin;
    const int32_t* minus_sums = x.minus_sums + begin;
    const int32_t* minus_half_sums = x.minus_half_sums + begin;
    F acc[kStrips][kRows];
    for (int s = 0; s < kStrips; ++s) {
      for (int t = 0; t < kRows; ++t) acc[s][t] = f_zero();
    }
    const uint8_t* tile = strips + kShape.header_bytes;
    for (int first = 0; first < groups; first += kShape.groups, tile += kShape.tile_bytes) {
      TileScales<kFormat> tile_scales[kStrips];
      for (int s = 0; s < kStrips; ++s) {
        tile_scales[s].load(strips + s * strip_bytes, tile + s * strip_bytes, part);
      }
      for (int i = 0; i < kShape.groups; ++i) {
        const uint8_t* lanes = tile + i * kShape.group_bytes + part * kLanes * 4;
        for (int s = 0; s < kStrips; ++s) {
          fetch_lines<kShape.tile_bytes / kShape.groups>(lanes + s * strip_bytes, ahead);
        }
        I dots[kStrips][kRows];
        const auto start = [&](const int32_t* sums) {
          for (int t = 0; t < kRows; ++t) {
            const I bias = kZero == 0 ? i_set1(0) : shift_left<kZeroBits>(i_set1(sums[t]));
            for (int s = 0; s < kStrips; ++s) dots[s][t] = bias;
          }
        };
        const auto fold = [&](int half) {
          F w_scales[kStrips];
          for (int s = 0; s < kStrips; ++s) w_scales[s] = tile_scales[s].scale(i, half);
          for (int t = 0; t < kRows; ++t) {
            const F scale = f_set1(scales[t]);
            for (int s = 0; s < kStrips; ++s) {
              F sum = to_float(dots[s][t]);
              if constexpr (kShape.has_zeros) {  // integers below 2^24: exact
                sum = fma(tile_scales[s].zero, f_set1(static_cast<float>(minus_sums[t])), sum);
              }
              acc[s][t] = fma(sum, w_scales[s] * scale, acc[s][t]);
            }
          }
        };
        if constexpr (kFormat == Format::q6_k) {
          // Two scales a group, so two sums, folded in order.
          int32_t rest[kRows];
          for (int t = 0; t < kRows; ++t) rest[t] = minus_sums[t] - minus_half_sums[t];
          start(minus_half_sums);
          dot_group<kFormat, kStrips, kRows, Half::first>(lanes, strip_bytes, codes, dots);
          fold(0);
          start(rest);
          dot_group<kFormat, kStrips, kRows, Half::second>(lanes, strip_bytes, codes, dots);
          fold(1);
        } else {
          start(minus_sums);
          dot_group<kFormat, kStrips, kRows, Half::both>(lanes, strip_bytes, codes, dots);
          fold(1);
        }
        if constexpr (kShape.has_minimum && !shares_minimum(kFormat)) {
          F minimum[kStrips];
          for (int s = 0; s < kStrips; ++s) minimum[s] = tile_scales[s].minimum(i);
          for (int t = 0; t < kRows; ++t) {
            const F shift = f_set1(shifts[t]);
            for (int s = 0; s < kStrips; ++s) acc[s][t] = fma(minimum[s], shift, acc[s][t]);
          }
        }
        codes += 32 * kRows;
        scales += kRows, shifts += kRows, minus_sums += kRows, minus_half_sums += kRows;
      }
      if constexpr (shares_minimum(kFormat)) {
        for (int t = 0; t < kRows; ++t) {
          const F shift = f_set1(shifts[t - 2 * kRows]) + f_set1(shifts[t - kRows]);
          for (int s = 0; s < kStrips; ++s) acc[s][t] = fma(tile_scales[s].m, shift, acc[s][t]);
        }
      }
    }
    for (int s = 0; s < kStrips; ++s) {
      for (int t = 0; t < kRows; ++t) f_store(out + t * out_stride + 16 * s + part * kLanes, acc[s][t]);
    }
  }
}

// The 32 columns of group g of a strip as vectors of rows, dequantized to f32.
template <Format kFormat>
inline void unpack_group(const uint8_t* strip, int g, int part, F* w) {
  constexpr TileShape kShape = tile_shape(kFormat);
  const uint8_t* tile = tile_address<kFormat>(strip, g);
  const int index = g % kShape.groups;
  const uint8_t* lanes = tile + index * kShape.group_bytes + part * kLanes * 4;
  if constexpr (kFormat == Format::f32) {
    for (int k = 0; k < 32; ++k) w[k] = bits_to_float(i_load(lanes + 64 * k));
  } else if constexpr (kFormat == Format::bf16) {
    for (int k = 0; k < 32; k += 2) {
      const I pair = i_load(lanes + 32 * k);
      w[k] = bits_to_float(shift_left<16>(pair));
      w[k + 1] = bits_to_float(pair & i_set1(static_cast<int32_t>(0xffff0000u)));
    }
  } else if constexpr (kFormat == Format::f16) {
    for (int k = 0; k < 32; ++k) w[k] = f_load_f16(tile + 32 * k + part * kLanes * 2);
  } else if constexpr (kFormat == Format::fp8_e4m3) {
    TileScales<kFormat> scales;
    scales.load(strip, tile, part);
    for (int k = 0; k < 32; k += 4) {
      const I codes = i_load(lanes + 16 * k);
      w[k] = from_e4m3(codes) * scales.d;
      w[k + 1] = from_e4m3(shift_right<8>(codes)) * scales.d;
      w[k + 2] = from_e4m3(shift_right<16>(codes)) * scales.d;
      w[k + 3] = from_e4m3(shift_right<24>(codes)) * scales.d;
    }
  } else {
    TileScales<kFormat> scales;
    scales.load(strip, tile, part);
    const F scale[2] = {scales.scale(index, 0), scales.scale(index, 1)};
    constexpr bool kFromZero = kShape.zero == 0 && !kShape.has_zeros;
    const I zero = scales.minus_zero();
    // The four codes in the bytes of each lane, columns k .. k+3.
    const auto store_four = [&](I codes, int k) {
      const I byte = i_set1(255);
      const I four[4] = {codes & byte, shift_right<8>(codes) & byte, shift_right<16>(codes) & byte,
                         shift_right<24>(codes)};
      for (int b = 0; b < 4; ++b) {
        w[k + b] = scale[k / 16] * to_float(kFromZero ? four[b] : four[b] + zero);
        if constexpr (kShape.has_minimum) w[k + b] = w[k + b] + scales.minimum(index);
      }
    };
    if constexpr (kShape.code_bits == 8) {
      for (int j = 0; j < 8; ++j) store_four(i_load(lanes + 64 * j), 4 * j);
    } else {
      CodeWalk<kFormat> walk;
      walk.lanes = lanes;
      for (int j = 0; j < 4; ++j) {
        walk.step(j);
        store_four(walk.low, 4 * j);
        store_four(walk.high, 16 + 4 * j);
      }
    }
  }
}

// Offset of group 0 of row t, of kRows that begin with a panel, in an array of one element per row and column; group g
// follows at 32 * g * (rows of a panel).
template <int kRows>
inline int64_t panel_offset(const Activation& x, int t) {
  return static_cast<int64_t>(t / kPanelRows * kPanelRows) * x.cols + t % kPanelRows * 32;
}

// As strip_int8 for one strip and f32 (or bf16-rounded) rows: those of one panel, or of kMaxRows / kPanelRows.
template <Format kFormat, int kRows>
inline void strip_float(const uint8_t* strip, int64_t, int64_t, const Activation& x, int row, float* out,
                        int64_t out_stride) {
  constexpr int kStep = 32 * (kRows < kPanelRows ? kRows : kPanelRows);
  for (int part = 0; part < kParts; ++part) {
    const float* values = x.values + static_cast<int64_t>(row) * x.cols;
    F acc[kRows];
    for (int t = 0; t < kRows; ++t) acc[t] = f_zero();
    for (int g = 0; g < x.cols / 32; ++g, values += kStep) {
      F w[32];
      unpack_group<kFormat>(strip, g, part, w);
      for (int k = 0; k < 32; ++k) {
        for (int t = 0; t < kRows; ++t) {
          acc[t] = muladd(w[k], f_set1(values[panel_offset<kRows>(x, t) + k]), acc[t]);
        }
      }
    }
    for (int t = 0; t < kRows; ++t) f_store(out + t * out_stride + part * kLanes, acc[t]);
  }
}

// As strip_float for kStrips strips, two columns a step, for packed rows of bf16 numbers and weights that are bf16.
template <int kStrips, int kRows>
inline void strip_bf16(const uint8_t* strips, int64_t strip_bytes, int64_t ahead, const Activation& x, int row,
                       float* out, int64_t out_stride) {
  constexpr int kStep = 32 * (kRows < kPanelRows ? kRows : kPanelRows);
  for (int part = 0; part < kParts; ++part) {
    const uint16_t* packed = x.packed + static_cast<int64_t>(row) * x.cols;
    F acc[kStrips][kRows];
    for (int s = 0; s < kStrips; ++s) {
      for (int t = 0; t < kRows; ++t) acc[s][t] = f_zero();
    }
    for (int g = 0; g < x.cols / 32; ++g, packed += kStep) {
      const uint8_t* lanes = tile_address<Format::bf16>(strips, g) + part * kLanes * 4;
      for (int pair = 0; pair < 16; ++pair) {
        I w[kStrips];
        for (int s = 0; s < kStrips; ++s) {
          const uint8_t* both = lanes + s * strip_bytes + 64 * pair;
          fetch_line(both, ahead);
          w[s] = i_load(both);
        }
        for (int t = 0; t < kRows; ++t) {
          const I both = i_broadcast4(packed + panel_offset<kRows>(x, t) + 2 * pair);
          for (int s = 0; s < kStrips; ++s) acc[s][t] = dot_bf16(acc[s][t], w[s], both);
        }
      }
    }
    for (int s = 0; s < kStrips; ++s) {
      for (int t = 0; t < kRows; ++t) f_store(out + t * out_stride + 16 * s + part * kLanes, acc[s][t]);
    }
  }
}

// The codes of the 32 columns of a group as pairs of bf16 numbers, without the scale: exact, for they are small or have
// few digits. Pair i holds columns 2i and 2i + 1. `zero` as TileScales::minus_zero.
template <Format kFormat>
inline void unpack_pairs(const uint8_t* lanes, I zero, I* pairs) {
  constexpr TileShape kShape = tile_shape(kFormat);
  constexpr bool kFromZero = kShape.zero == 0 && !kShape.has_zeros;
  const I byte = i_set1(255), high_half = i_set1(static_cast<int32_t>(0xffff0000u));
  const auto bits_of = [&](I code) {
    if constexpr (kFormat == Format::fp8_e4m3) return float_to_bits(from_e4m3(code));
    return float_to_bits(to_float(kFromZero ? code : code + zero));
  };
  // From the codes in the bytes of each lane, columns 4j .. 4j+3.
  const auto store_two = [&](I codes, int j) {
    pairs[2 * j] = (bits_of(shift_right<8>(codes) & byte) & high_half) | shift_right<16>(bits_of(codes & byte));
    pairs[2 * j + 1] =
        (bits_of(shift_right<24>(codes)) & high_half) | shift_right<16>(bits_of(shift_right<16>(codes) & byte));
  };
  if constexpr (kShape.code_bits == 8) {
    for (int j = 0; j < 8; ++j) store_two(i_load(lanes + 64 * j), j);
  } else {
    CodeWalk<kFormat> walk;
    walk.lanes = lanes;
    for (int j = 0; j < 4; ++j) {
      walk.step(j);
      store_two(walk.low, j);
      store_two(walk.high, 4 + j);
    }
  }
}

// As strip_float for weights in codes of up to 8 bits and packed rows of bf16 numbers: products of codes, which lose
// nothing, summed per scale and folded as integer sums are.
template <Format kFormat, int kRows>
inline void strip_codes(const uint8_t* strip, int64_t, int64_t ahead, const Activation& x, int row, float* out,
                        int64_t out_stride) {
  constexpr TileShape kShape = tile_shape(kFormat);
  constexpr int kPanel = kRows < kPanelRows ? kRows : kPanelRows;
  const int groups = x.cols / 32;
  for (int part = 0; part < kParts; ++part) {
    const uint16_t* packed = x.packed + static_cast<int64_t>(row) * x.cols;
    const float* sums = x.shifts + static_cast<int64_t>(row) * groups;
    F acc[kRows];
    for (int t = 0; t < kRows; ++t) acc[t] = f_zero();
    const uint8_t* tile = strip + kShape.header_bytes;
    for (int first = 0; first < groups; first += kShape.groups, tile += kShape.tile_bytes) {
      TileScales<kFormat> scales;
      scales.load(strip, tile, part);
      for (int i = 0; i < kShape.groups; ++i, packed += 32 * kPanel, sums += kPanel) {
        const uint8_t* lanes = tile + i * kShape.group_bytes + part * kLanes * 4;
        fetch_lines<kShape.tile_bytes / kShape.groups>(lanes, ahead);
        I pairs[16];
        unpack_pairs<kFormat>(lanes, scales.minus_zero(), pairs);
        F dots[kRows];
        const auto add = [&](int begin, int end) {
          for (int t = 0; t < kRows; ++t) dots[t] = f_zero();
          for (int pair = begin; pair < end; ++pair) {
            for (int t = 0; t < kRows; ++t) {
              dots[t] = dot_bf16(dots[t], pairs[pair], i_broadcast4(packed + panel_offset<kRows>(x, t) + 2 * pair));
            }
          }
          const F scale = scales.scale(i, begin / 8);
          for (int t = 0; t < kRows; ++t) acc[t] = fma(dots[t], scale, acc[t]);
        };
        if constexpr (kFormat == Format::q6_k) {
          add(0, 8);
          add(8, 16);
        } else {
          add(0, 16);
        }
        if constexpr (kShape.has_minimum && !shares_minimum(kFormat)) {
          const F minimum = scales.minimum(i);
          for (int t = 0; t < kRows; ++t) {
            const float sum = sums[static_cast<int64_t>(t / kPanelRows * kPanelRows) * groups + t % kPanelRows];
            acc[t] = fma(minimum, f_set1(sum), acc[t]);
          }
        }
      }
      if constexpr (shares_minimum(kFormat)) {
        for (int t = 0; t < kRows; ++t) {
          const float* end = sums + static_cast<int64_t>(t / kPanelRows * kPanelRows) * groups + t % kPanelRows;
          acc[t] = fma(scales.m, f_set1(end[-2 * kPanel]) + f_set1(end[-kPanel]), acc[t]);
        }
      }
    }
    for (int t = 0; t < kRows; ++t) f_store(out + t * out_stride + part * kLanes, acc[t]);
  }
}

/// Calls function.operator()<format>() with the format as a constant.
template <class Function>
inline auto with_format(Format format, const Function& function) {
  switch (format) {
    case Format::f32:
      return function.template operator()<Format::f32>();
    case Format::bf16:
      return function.template operator()<Format::bf16>();
    case Format::f16:
      return function.template operator()<Format::f16>();
    case Format::q4_0:
      return function.template operator()<Format::q4_0>();
    case Format::q4_1:
      return function.template operator()<Format::q4_1>();
    case Format::q5_0:
      return function.template operator()<Format::q5_0>();
    case Format::q5_1:
      return function.template operator()<Format::q5_1>();
    case Format::q4_k:
      return function.template operator()<Format::q4_k>();
    case Format::q5_k:
      return function.template operator()<Format::q5_k>();
    case Format::q6_k:
      return function.template operator()<Format::q6_k>();
    case Format::w8:
      return function.template operator()<Format::w8>();
    case Format::w8_channel:
      return function.template operator()<Format::w8_channel>();
    case Format::w4:
      return function.template operator()<Format::w4>();
    case Format::awq_int4:
    case Format::gptq_int4:
      return function.template operator()<Format::awq_int4>();
    case Format::awq_int4_g64:
    case Format::gptq_int4_g64:
      return function.template operator()<Format::awq_int4_g64>();
    case Format::awq_int4_g32:
    case Format::gptq_int4_g32:
      return function.template operator()<Format::awq_int4_g32>();
    case Format::fp8_e4m3:
      return function.template operator()<Format::fp8_e4m3>();
    case Format::q8_0:
      break;
  }
  return function.template operator()<Format::q8_0>();
}

using StripKernel = void (*)(const uint8_t* strips, int64_t strip_bytes, int64_t ahead, const Activation& x, int row,
                             float* out, int64_t out_stride);

/// The kernels of one format for every row count, null where there is none.
struct StripKernels {
  StripKernel many;             // kMaxRows rows; null where a panel is the most
  StripKernel few[kPanelRows];  // 1 .. kPanelRows rows
};

// Of strips together there are kernels for whole panels only: few rows are left over, and each takes long to compile.
template <int kStrips>
inline StripKernels find_strip_kernels(Format format, ActType type) {
  return with_format(format, [type]<Format kFormat>() -> StripKernels {
    if constexpr (kStrips > 1) {
      if constexpr (is_quantized(kFormat)) {
        if (type == ActType::int8) return {nullptr, {nullptr, nullptr, nullptr, strip_int8<kFormat, kStrips, 4>}};
      }
      if constexpr (kFormat == Format::bf16 && kBf16Dot) {
        if (type == ActType::bf16) {
          return {strip_bf16<kStrips, kMaxRows>, {nullptr, nullptr, nullptr, strip_bf16<kStrips, 4>}};
        }
      }
      return {};
    }
    if constexpr (is_quantized(kFormat)) {
      if (type == ActType::int8) {
        return {nullptr,
                {strip_int8<kFormat, kStrips, 1>, strip_int8<kFormat, kStrips, 2>, strip_int8<kFormat, kStrips, 3>,
                 strip_int8<kFormat, kStrips, 4>}};
      }
    }
    if constexpr (kFormat == Format::bf16 && kBf16Dot) {
      if (type == ActType::bf16) {
        return {strip_bf16<kStrips, kMaxRows>,
                {strip_bf16<kStrips, 1>, strip_bf16<kStrips, 2>, strip_bf16<kStrips, 3>, strip_bf16<kStrips, 4>}};
      }
    }
    if constexpr ((is_quantized(kFormat) || kFormat == Format::fp8_e4m3) && kBf16Dot) {
      if (type == ActType::bf16) {
        return {strip_codes<kFormat, kMaxRows>,
                {strip_codes<kFormat, 1>, strip_codes<kFormat, 2>, strip_codes<kFormat, 3>, strip_codes<kFormat, 4>}};
      }
    }
    return {strip_float<kFormat, kMaxRows>,
            {strip_float<kFormat, 1>, strip_float<kFormat, 2>, strip_float<kFormat, 3>, strip_float<kFormat, 4>}};
  });
}

/// What computes the outputs of a matrix, looked up once per operator. Strips come in pairs: the last one has a second
/// strip of zeros where the rows of the matrix do not fill it.
struct PairKernels {
  StripKernels single, both;
};

inline PairKernels find_kernels(const LinearSegment& w, const Activation& x) {
  PairKernels kernels = {find_strip_kernels<1>(w.format, x.type), {}};
  if constexpr (kMaxStrips == 2) kernels.both = find_strip_kernels<2>(w.format, x.type);
  return kernels;
}

inline const uint8_t* strip_address(const LinearSegment& w, int strip) {
  return w.data + strip / 2 * w.pair_stride + strip % 2 * w.strip_bytes;
}

// The first rows fetch what lies `ahead` bytes behind, the others find it fetched.
inline void run_strips(const StripKernels& kernels, const uint8_t* strips, int64_t strip_bytes, int64_t ahead,
                       const Activation& x, int row, int count, float* out, int64_t out_stride) {
  while (count > 0) {
    int rows = count < kPanelRows ? count : kPanelRows;
    StripKernel kernel = kernels.few[rows - 1];
    if (count >= kMaxRows && kernels.many != nullptr) rows = kMaxRows, kernel = kernels.many;
    kernel(strips, strip_bytes, ahead, x, row, out, out_stride);
    ahead = 0;
    row += rows, count -= rows, out += rows * out_stride;
  }
}

/// Computes the 32 outputs of a pair of strips for `count` rows from `row`, which begins a panel; those of a row lie
/// `out_stride` behind those of the row before. A panel alone waits for memory: one strip after the other is one
/// stream. So are the rows that whole panels leave over, which find their strips fetched.
inline void compute_pair(const PairKernels& kernels, const LinearSegment& w, int pair, const Activation& x, int row,
                         int count, float* out, int64_t out_stride) {
  const uint8_t* strips = w.data + pair * w.pair_stride;
  const int64_t bytes = w.strip_bytes;
  int64_t ahead = kStreamAhead;
  if (count > kPanelRows && kernels.both.few[kPanelRows - 1] != nullptr) {
    const int whole = count / kPanelRows * kPanelRows;
    run_strips(kernels.both, strips, bytes, w.pair_stride, x, row, whole, out, out_stride);
    row += whole, count -= whole, out += whole * out_stride;
    ahead = 0;
  }
  run_strips(kernels.single, strips, bytes, ahead, x, row, count, out, out_stride);
  run_strips(kernels.single, strips + bytes, bytes, ahead, x, row, count, out + 16, out_stride);
}

struct Range {
  int begin, end;
};

/// The share of [0, size) that belongs to a part, in whole units.
inline Range share(int size, const Part& part, int unit = 1) {
  const int units = (size + unit - 1) / unit;
  const auto at = [&](int index) {
    const int edge = static_cast<int>(static_cast<int64_t>(units) * index / part.count) * unit;
    return edge < size ? edge : size;
  };
  return {at(part.index), at(part.index + 1)};
}

/// Rows handled per pass over a pair of strips: their outputs stay in the first-level cache. Whole panels.
constexpr int kRowBlock = 96;

/// This part's share of out (+)= x W^T + bias.
inline void linear_share(const LinearSegment& w, const Activation& x, const float* bias, bool accumulate, float* out,
                         int64_t out_stride, const Part& part) {
  const PairKernels kernels = find_kernels(w, x);
  const Range pairs = share((w.rows + 31) / 32, part);
  float block[kRowBlock * 32];
  for (int row = 0; row < x.rows; row += kRowBlock) {
    const int count = x.rows - row < kRowBlock ? x.rows - row : kRowBlock;
    for (int pair = pairs.begin; pair < pairs.end; ++pair) {
      float* target = out + row * out_stride + 32 * pair;
      const int outputs = w.rows - 32 * pair < 32 ? w.rows - 32 * pair : 32;
      if (outputs == 32 && bias == nullptr && !accumulate) {
        compute_pair(kernels, w, pair, x, row, count, target, out_stride);
        continue;
      }
      compute_pair(kernels, w, pair, x, row, count, block, 32);
      for (int t = 0; t < count; ++t, target += out_stride) {
        float* const value = block + 32 * t;
        if (bias != nullptr) {
          for (int r = 0; r < outputs; ++r) value[r] += bias[32 * pair + r];
        }
        if (accumulate && outputs == 32) {
          for (int r = 0; r < 32; r += kLanes) f_store(target + r, f_load(target + r) + f_load(value + r));
        } else {
          for (int r = 0; r < outputs; ++r) target[r] = accumulate ? target[r] + value[r] : value[r];
        }
      }
    }
  }
}

inline void linear(const LinearArgs& a, const Part& part) {
  linear_share(a.weight, a.x, a.bias, a.accumulate, a.out, a.out_stride, part);
}
