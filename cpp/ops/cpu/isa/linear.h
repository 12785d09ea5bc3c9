// Matrix products over 16-row tiles: one template for one row (decode) and many (prefill).
//
// Included inside the unnamed namespace of kernels_<isa>.cpp. A result is one accumulator chain per (output, row),
// column groups ascending, so it does not depend on how many rows are computed together (promise 1).
#pragma once

using quant::Format;
using quant::tile_shape;
using quant::TileShape;

/// Rows of x computed together: as many accumulators as the registers hold, or what makes up for joining columns.
#if defined(NB_PAIR_DOTS)
constexpr int kMaxRows = 8;
#else
constexpr int kMaxRows = kLanes == 16 ? 12 : 4;
#endif

constexpr bool is_quantized(Format format) { return tile_shape(format).code_bits <= 8; }

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

  TileScales(const uint8_t* strip, const uint8_t* tile, int part) {
    const uint8_t* scales = tile + kShape.groups * kShape.group_bytes;
    bytes = scales + part * kLanes;
    const uint8_t* halves = (kFormat == Format::w8_channel ? strip : scales) + part * kLanes * 2;
    if (kIsK || kFormat == Format::q6_k) halves += 256;
    d = f_load_f16(halves);
    if constexpr (kShape.has_minimum) m = f_load_f16(halves + 32);
    if constexpr (kIsK) m = m * f_set1(-1.0f);  // these subtract their minimum
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

// dots[t] += the products of one group of 32 columns, or of its first or second half only.
enum class Half { both, first, second };

#if defined(NB_PAIR_DOTS)
// The same for an even number of rows, two by two: the same integers, in another order.
template <Format kFormat, int kRows, Half kHalf>
inline void dot_group_pairs(const uint8_t* lanes, const int8_t* codes, int cols, I* dots) {
  PairSums sums[kRows / 2];
  for (int t = 0; t < kRows; t += 2) sums[t / 2] = join_rows(dots[t], dots[t + 1]);
  const auto add = [&](I four, I next, int column) {
    const PairCodes w = join_columns(four, next);
    for (int t = 0; t < kRows; t += 2) {
      const int8_t* x = codes + t * cols + column;
      dot_pairs(sums[t / 2], w, x, x + cols);
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

template <Format kFormat, int kRows, Half kHalf>
inline void dot_group(const uint8_t* lanes, const int8_t* codes, int cols, I* dots) {
#if defined(NB_PAIR_DOTS)
  if constexpr (kRows % 2 == 0) return dot_group_pairs<kFormat, kRows, kHalf>(lanes, codes, cols, dots);
#endif
  if constexpr (tile_shape(kFormat).code_bits == 8) {
    for (int j = 0; j < 8; ++j) {
      const I w = i_load(lanes + 64 * j);
      for (int t = 0; t < kRows; ++t) dots[t] = dot_biased8(dots[t], w, i_broadcast4(codes + t * cols + 4 * j));
    }
  } else {
    CodeWalk<kFormat> walk;
    walk.lanes = lanes;
    for (int j = 0; j < 4; ++j) {
      walk.step(j);
      for (int t = 0; t < kRows; ++t) {
        const int8_t* x = codes + t * cols + 4 * j;
        if constexpr (kHalf == Half::both) {
          dots[t] = dot_u6(dots[t], walk.low, i_broadcast4(x), walk.high, i_broadcast4(x + 16));
        } else {
          dots[t] = kHalf == Half::first ? dot_u6(dots[t], walk.low, i_broadcast4(x))
                                         : dot_u6(dots[t], walk.high, i_broadcast4(x + 16));
        }
      }
    }
  }
}

// Sixteen outputs of kRows rows of x, in memory order [row][16].
template <Format kFormat, int kRows>
inline void strip_int8(const uint8_t* strip, const Activation& x, int row, float* out) {
  constexpr TileShape kShape = tile_shape(kFormat);
  constexpr int32_t kZero = kShape.code_bits == 8 && !kBiasedDot ? 0 : kShape.zero;
  const int groups = x.cols / 32;
  const int8_t* codes = x.codes + static_cast<int64_t>(row) * x.cols;
  const float* scales = x.scales + static_cast<int64_t>(row) * groups;
  const int32_t* sums = x.sums + static_cast<int64_t>(row) * groups;
  const int32_t* half_sums = x.half_sums + static_cast<int64_t>(row) * groups;
  for (int part = 0; part < kParts; ++part) {
    F acc[kRows];
    for (int t = 0; t < kRows; ++t) acc[t] = f_zero();
    const uint8_t* tile = strip + kShape.header_bytes;
    for (int first = 0; first < groups; first += kShape.groups, tile += kShape.tile_bytes) {
      const TileScales<kFormat> tile_scales(strip, tile, part);
      for (int i = 0; i < kShape.groups; ++i) {
        const int g = first + i;
        const uint8_t* lanes = tile + i * kShape.group_bytes + part * kLanes * 4;
        I dots[kRows];
        if constexpr (kFormat == Format::q6_k) {
          // Two scales a group, so two sums, folded in order.
          for (int t = 0; t < kRows; ++t) dots[t] = i_set1(-kZero * half_sums[t * groups + g]);
          dot_group<kFormat, kRows, Half::first>(lanes, codes + 32 * g, x.cols, dots);
          const F first_scale = tile_scales.scale(i, 0);
          for (int t = 0; t < kRows; ++t) {
            acc[t] = fma(to_float(dots[t]), first_scale * f_set1(scales[t * groups + g]), acc[t]);
            dots[t] = i_set1(-kZero * (sums[t * groups + g] - half_sums[t * groups + g]));
          }
          dot_group<kFormat, kRows, Half::second>(lanes, codes + 32 * g, x.cols, dots);
        } else {
          for (int t = 0; t < kRows; ++t) dots[t] = i_set1(kZero == 0 ? 0 : -kZero * sums[t * groups + g]);
          dot_group<kFormat, kRows, Half::both>(lanes, codes + 32 * g, x.cols, dots);
        }
        const F scale = tile_scales.scale(i, 1);
        for (int t = 0; t < kRows; ++t) {
          acc[t] = fma(to_float(dots[t]), scale * f_set1(scales[t * groups + g]), acc[t]);
        }
        if constexpr (kShape.has_minimum) {
          const F minimum = tile_scales.minimum(i);
          for (int t = 0; t < kRows; ++t) {
            const float shift = scales[t * groups + g] * static_cast<float>(sums[t * groups + g]);
            acc[t] = fma(minimum, f_set1(shift), acc[t]);
          }
        }
      }
    }
    for (int t = 0; t < kRows; ++t) f_store(out + t * 16 + part * kLanes, acc[t]);
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
  } else {
    const TileScales<kFormat> scales(strip, tile, part);
    const F scale[2] = {scales.scale(index, 0), scales.scale(index, 1)};
    const I zero = i_set1(-kShape.zero);
    // The four codes in the bytes of each lane, columns k .. k+3.
    const auto store_four = [&](I codes, int k) {
      const I byte = i_set1(255);
      const I four[4] = {codes & byte, shift_right<8>(codes) & byte, shift_right<16>(codes) & byte,
                         shift_right<24>(codes)};
      for (int b = 0; b < 4; ++b) {
        w[k + b] = scale[k / 16] * to_float(kShape.zero == 0 ? four[b] : four[b] + zero);
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

// As strip_int8, for f32 (or bf16-rounded) rows.
template <Format kFormat, int kRows>
inline void strip_float(const uint8_t* strip, const Activation& x, int row, float* out) {
  const float* values = x.values + static_cast<int64_t>(row) * x.cols;
  for (int part = 0; part < kParts; ++part) {
    F acc[kRows];
    for (int t = 0; t < kRows; ++t) acc[t] = f_zero();
    for (int g = 0; g < x.cols / 32; ++g) {
      F w[32];
      unpack_group<kFormat>(strip, g, part, w);
      for (int k = 0; k < 32; ++k) {
        for (int t = 0; t < kRows; ++t) acc[t] = muladd(w[k], f_set1(values[t * x.cols + 32 * g + k]), acc[t]);
      }
    }
    for (int t = 0; t < kRows; ++t) f_store(out + t * 16 + part * kLanes, acc[t]);
  }
}

// As strip_float, two columns a step, for packed rows of bf16 numbers and weights that are bf16.
template <int kRows>
inline void strip_bf16(const uint8_t* strip, const Activation& x, int row, float* out) {
  const uint16_t* packed = x.packed + static_cast<int64_t>(row) * x.cols;
  for (int part = 0; part < kParts; ++part) {
    F acc[kRows];
    for (int t = 0; t < kRows; ++t) acc[t] = f_zero();
    for (int g = 0; g < x.cols / 32; ++g) {
      const uint8_t* lanes = tile_address<Format::bf16>(strip, g) + part * kLanes * 4;
      for (int pair = 0; pair < 16; ++pair) {
        const I w = i_load(lanes + 64 * pair);
        for (int t = 0; t < kRows; ++t) {
          acc[t] = dot_bf16(acc[t], w, i_broadcast4(packed + t * x.cols + 32 * g + 2 * pair));
        }
      }
    }
    for (int t = 0; t < kRows; ++t) f_store(out + t * 16 + part * kLanes, acc[t]);
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
    case Format::q8_0:
      break;
  }
  return function.template operator()<Format::q8_0>();
}

using StripKernel = void (*)(const uint8_t*, const Activation&, int, float*);

template <int kRows>
inline StripKernel find_strip_kernel(Format format, ActType type) {
  return with_format(format, [type]<Format kFormat>() -> StripKernel {
    if constexpr (is_quantized(kFormat)) {
      if (type == ActType::int8) return strip_int8<kFormat, kRows>;
    }
    if constexpr (kFormat == Format::bf16 && kBf16Dot) {
      if (type == ActType::bf16) return strip_bf16<kRows>;
    }
    return strip_float<kFormat, kRows>;
  });
}

// The kernels of one format for every row count, looked up once per operator.
struct StripKernels {
  StripKernel many;  // kMaxRows rows
  StripKernel four;
  StripKernel two;
  StripKernel one;
};

inline StripKernels find_strip_kernels(const LinearSegment& w, const Activation& x) {
  return {find_strip_kernel<kMaxRows>(w.format, x.type), find_strip_kernel<4>(w.format, x.type),
          find_strip_kernel<2>(w.format, x.type), find_strip_kernel<1>(w.format, x.type)};
}

inline const uint8_t* strip_address(const LinearSegment& w, int strip) {
  return w.data + strip / 2 * w.pair_stride + strip % 2 * w.strip_bytes;
}

/// Computes the 16 outputs of a strip for `count` rows from `row`, into out[count][16]; returns nothing.
inline void compute_strip(const StripKernels& kernels, const LinearSegment& w, int strip, const Activation& x, int row,
                          int count, float* out) {
  const uint8_t* data = strip_address(w, strip);
  while (count >= kMaxRows) {
    kernels.many(data, x, row, out);
    row += kMaxRows, count -= kMaxRows, out += kMaxRows * 16;
  }
  for (; count >= 4; row += 4, count -= 4, out += 4 * 16) kernels.four(data, x, row, out);
  for (; count >= 2; row += 2, count -= 2, out += 2 * 16) kernels.two(data, x, row, out);
  if (count > 0) kernels.one(data, x, row, out);
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

/// Rows handled per pass over a strip: their outputs stay in the first-level cache.
constexpr int kRowBlock = 96;

/// This part's share of out (+)= x W^T + bias.
inline void linear_share(const LinearSegment& w, const Activation& x, const float* bias, bool accumulate, float* out,
                         int64_t out_stride, const Part& part) {
  const StripKernels kernels = find_strip_kernels(w, x);
  const Range strips = share((w.rows + 15) / 16, part, 2);
  float block[kRowBlock * 16];
  for (int row = 0; row < x.rows; row += kRowBlock) {
    const int count = x.rows - row < kRowBlock ? x.rows - row : kRowBlock;
    for (int strip = strips.begin; strip < strips.end; ++strip) {
      compute_strip(kernels, w, strip, x, row, count, block);
      const int outputs = w.rows - 16 * strip < 16 ? w.rows - 16 * strip : 16;
      for (int t = 0; t < count; ++t) {
        float* target = out + (row + t) * out_stride + 16 * strip;
        for (int r = 0; r < outputs; ++r) {
          const float value = bias != nullptr ? block[t * 16 + r] + bias[16 * strip + r] : block[t * 16 + r];
          target[r] = accumulate ? target[r] + value : value;
        }
      }
    }
  }
}

inline void linear(const LinearArgs& a, const Part& part) {
  linear_share(a.weight, a.x, a.bias, a.accumulate, a.out, a.out_stride, part);
}
