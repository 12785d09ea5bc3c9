// Matrix products over 16-row tiles: one template for one row (decode) and many (prefill).
//
// Included inside the unnamed namespace of kernels_<isa>.cpp. A result is one accumulator chain per (output, row),
// column groups ascending, so it does not depend on how many rows are computed together (promise 1).
#pragma once

using quant::Format;

constexpr int tile_bytes(Format format) {
  switch (format) {
    case Format::f32:
      return 2048;
    case Format::bf16:
      return 1024;
    case Format::f16:
      return 1024;
    case Format::q4_0:
      return 288;
    case Format::q4_1:
      return 320;
    case Format::q8_0:
      return 544;
  }
  return 0;
}

/// Rows of x computed together: as many accumulators as the registers hold.
constexpr int kMaxRows = kLanes == 16 ? 12 : 4;

// Sixteen outputs of kRows rows of x, in memory order [row][16].
template <Format kFormat, int kRows>
inline void strip_int8(const uint8_t* strip, const Activation& x, int row, float* out) {
  const int groups = x.cols / 32;
  const int8_t* codes = x.codes + static_cast<int64_t>(row) * x.cols;
  const float* scales = x.scales + static_cast<int64_t>(row) * groups;
  const int32_t* sums = x.sums + static_cast<int64_t>(row) * groups;
  constexpr int32_t kZero = kFormat == Format::q4_0 ? 8 : kFormat == Format::q8_0 && kBiasedDot ? 128 : 0;
  constexpr int kCodeBytes = kFormat == Format::q8_0 ? 512 : 256;
  const I low_nibbles = i_set1(0x0f0f0f0f);
  for (int part = 0; part < kParts; ++part) {
    F acc[kRows];
    for (int t = 0; t < kRows; ++t) acc[t] = f_zero();
    const uint8_t* tile = strip + part * kLanes * 4;
    const uint8_t* scale_bytes = strip + kCodeBytes + part * kLanes * 2;
    for (int g = 0; g < groups; ++g, tile += tile_bytes(kFormat), scale_bytes += tile_bytes(kFormat)) {
      I dots[kRows];
      for (int t = 0; t < kRows; ++t) dots[t] = i_set1(kZero == 0 ? 0 : -kZero * sums[t * groups + g]);
      if constexpr (kFormat == Format::q8_0) {
        for (int j = 0; j < 8; ++j) {
          const I w = i_load(tile + 64 * j);
          for (int t = 0; t < kRows; ++t) {
            dots[t] = dot_biased8(dots[t], w, i_broadcast4(codes + t * x.cols + 32 * g + 4 * j));
          }
        }
      } else {
        for (int j = 0; j < 4; ++j) {
          const I w = i_load(tile + 64 * j);
          const I low = w & low_nibbles, high = shift_right<4>(w) & low_nibbles;
          for (int t = 0; t < kRows; ++t) {
            const int8_t* group = codes + t * x.cols + 32 * g + 4 * j;
            dots[t] = dot_u4(dots[t], low, i_broadcast4(group), high, i_broadcast4(group + 16));
          }
        }
      }
      const F scale = f_load_f16(scale_bytes);
      for (int t = 0; t < kRows; ++t) {
        acc[t] = fma(to_float(dots[t]), scale * f_set1(scales[t * groups + g]), acc[t]);
      }
      if constexpr (kFormat == Format::q4_1) {
        const F minimum = f_load_f16(scale_bytes + 32);
        for (int t = 0; t < kRows; ++t) {
          const float shift = scales[t * groups + g] * static_cast<float>(sums[t * groups + g]);
          acc[t] = fma(minimum, f_set1(shift), acc[t]);
        }
      }
    }
    for (int t = 0; t < kRows; ++t) f_store(out + t * 16 + part * kLanes, acc[t]);
  }
}

// The 32 columns of one tile as vectors of rows, dequantized to f32.
template <Format kFormat>
inline void unpack_tile(const uint8_t* tile, int part, F* w) {
  const uint8_t* lanes = tile + part * kLanes * 4;
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
  } else if constexpr (kFormat == Format::q8_0) {
    const F scale = f_load_f16(tile + 512 + part * kLanes * 2);
    for (int k = 0; k < 32; ++k) {
      const I byte = shift_right<24>(shift_left<24>(k % 4 == 0   ? i_load(lanes + 16 * k)
                                                    : k % 4 == 1 ? shift_right<8>(i_load(lanes + 16 * (k - 1)))
                                                    : k % 4 == 2 ? shift_right<16>(i_load(lanes + 16 * (k - 2)))
                                                                 : shift_right<24>(i_load(lanes + 16 * (k - 3)))));
      w[k] = scale * to_float(byte + i_set1(-128));
    }
  } else {
    const F scale = f_load_f16(tile + 256 + part * kLanes * 2);
    const F minimum = kFormat == Format::q4_1 ? f_load_f16(tile + 288 + part * kLanes * 2) : f_zero();
    const I low_nibble = i_set1(15);
    const auto value = [&](I code) {
      if constexpr (kFormat == Format::q4_1) return scale * to_float(code) + minimum;
      return scale * to_float(code + i_set1(-8));
    };
    for (int j = 0; j < 4; ++j) {
      const I codes = i_load(lanes + 64 * j);
      w[4 * j] = value(codes & low_nibble);
      w[4 * j + 1] = value(shift_right<8>(codes) & low_nibble);
      w[4 * j + 2] = value(shift_right<16>(codes) & low_nibble);
      w[4 * j + 3] = value(shift_right<24>(codes) & low_nibble);
      w[16 + 4 * j] = value(shift_right<4>(codes) & low_nibble);
      w[16 + 4 * j + 1] = value(shift_right<12>(codes) & low_nibble);
      w[16 + 4 * j + 2] = value(shift_right<20>(codes) & low_nibble);
      w[16 + 4 * j + 3] = value(shift_right<28>(codes) & low_nibble);
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
    const uint8_t* tile = strip;
    for (int begin = 0; begin < x.cols; begin += 32, tile += tile_bytes(kFormat)) {
      F w[32];
      unpack_tile<kFormat>(tile, part, w);
      for (int k = 0; k < 32; ++k) {
        for (int t = 0; t < kRows; ++t) acc[t] = muladd(w[k], f_set1(values[t * x.cols + begin + k]), acc[t]);
      }
    }
    for (int t = 0; t < kRows; ++t) f_store(out + t * 16 + part * kLanes, acc[t]);
  }
}

using StripKernel = void (*)(const uint8_t*, const Activation&, int, float*);

template <Format kFormat, int kRows>
constexpr StripKernel strip_kernel(bool is_int8) {
  if constexpr (kFormat == Format::q4_0 || kFormat == Format::q4_1 || kFormat == Format::q8_0) {
    return is_int8 ? strip_int8<kFormat, kRows> : strip_float<kFormat, kRows>;
  } else {
    return strip_float<kFormat, kRows>;
  }
}

template <int kRows>
inline StripKernel find_strip_kernel(Format format, bool is_int8) {
  switch (format) {
    case Format::f32:
      return strip_kernel<Format::f32, kRows>(is_int8);
    case Format::bf16:
      return strip_kernel<Format::bf16, kRows>(is_int8);
    case Format::f16:
      return strip_kernel<Format::f16, kRows>(is_int8);
    case Format::q4_0:
      return strip_kernel<Format::q4_0, kRows>(is_int8);
    case Format::q4_1:
      return strip_kernel<Format::q4_1, kRows>(is_int8);
    case Format::q8_0:
      return strip_kernel<Format::q8_0, kRows>(is_int8);
  }
  return nullptr;
}

// The kernels of one format for every row count, looked up once per operator.
struct StripKernels {
  StripKernel many;  // kMaxRows rows
  StripKernel four;
  StripKernel two;
  StripKernel one;
};

inline StripKernels find_strip_kernels(const LinearSegment& w, const Activation& x) {
  const bool is_int8 = x.type == ActType::int8;
  return {find_strip_kernel<kMaxRows>(w.format, is_int8), find_strip_kernel<4>(w.format, is_int8),
          find_strip_kernel<2>(w.format, is_int8), find_strip_kernel<1>(w.format, is_int8)};
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
