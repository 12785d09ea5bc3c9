// Keys of int4 for the reference kernels: the definition in quant/kv_format.h, written down one number after the other.
//
// For reference.cpp. A cell has the codes [16 tokens][head_dim] of 4 bits (the even dimension low), and behind them a
// scale and a base of a byte for each dimension, the fp16 unit, and the bits of tokens that are not finite.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/dtype.h"
#include "base/ids.h"
#include "ops/args.h"

namespace nb::ops::reference {

inline float* open_cell(const KvLayer& kv, const OpenKeys& open, int cell, int head) {
  const int64_t head_floats = std::int64_t{kv.head_dim} * kBlockTokens;
  if (cell < 0) return open.step_cells + (std::int64_t{~cell} * kv.num_kv_heads + head) * head_floats;
  return open.cells + cell * open.cell_stride + head * head_floats;
}

/// Where in a cell scales begin.
inline int scales_at(int head_dim) { return (head_dim / 2 + 3) / 4 * 64; }

inline float int4_scale(float unit, int code) {
  return std::ldexp(unit * static_cast<float>(16 + code % 16), code / 16 - 19);
}

inline void seal_cell(const float* keys, int dim, int num_tokens, uint8_t* cell) {
  uint8_t* const scales = cell + scales_at(dim);
  std::memset(cell, 0, static_cast<size_t>(scales_at(dim) + 2 * dim + 4));
  uint16_t bad = 0;
  for (int t = 0; t < num_tokens; ++t) {
    for (int d = 0; d < dim; ++d) {
      if (!std::isfinite(keys[d * kBlockTokens + t])) bad = static_cast<uint16_t>(bad | 1 << t);
    }
  }
  std::memcpy(scales + 2 * dim + 2, &bad, sizeof(bad));
  const auto extent_of = [&](int d) {
    float low = INFINITY, high = -INFINITY;
    for (int t = 0; t < num_tokens; ++t) {
      if ((bad >> t & 1) != 0) continue;
      low = std::min(low, keys[d * kBlockTokens + t]);
      high = std::max(high, keys[d * kBlockTokens + t]);
    }
    return std::pair(low, high);
  };
  const auto wanted_of = [&](int d) {
    const auto [low, high] = extent_of(d);
    return std::max((high - low) / 15.0f, std::fabs(low) / 127.0f);
  };
  if (!std::isfinite(extent_of(0).first)) return;  // nothing counts
  float most = 0.0f;
  for (int d = 0; d < dim; ++d) most = std::max(most, wanted_of(d));
  const uint16_t half = f32_to_f16(std::min(most / 31.0f * 16.0f, 65504.0f));
  std::memcpy(scales + 2 * dim, &half, sizeof(half));
  const float unit = f16_to_f32(half);
  if (unit == 0.0f) return;
  for (int d = 0; d < dim; ++d) {
    int code = 0;
    while (code < 255 && int4_scale(1.0f, code) < wanted_of(d) / unit) ++code;
    const float scale = int4_scale(unit, code);
    const float base = std::clamp(std::nearbyint(extent_of(d).first / scale), -128.0f, 127.0f);
    scales[d] = static_cast<uint8_t>(code);
    scales[dim + d] = static_cast<uint8_t>(static_cast<int8_t>(base));
    for (int t = 0; t < num_tokens; ++t) {
      if ((bad >> t & 1) != 0) continue;
      const float key = std::clamp(std::nearbyint(keys[d * kBlockTokens + t] / scale) - base, 0.0f, 15.0f);
      uint8_t& byte = cell[(t * dim + d) / 2];
      byte = static_cast<uint8_t>(byte | static_cast<int>(key) << d % 2 * 4);
    }
  }
}

/// Before bias and rotation.
inline float sealed_key(const uint8_t* cell, int dim, int token, int d) {
  const uint8_t* const scales = cell + scales_at(dim);
  uint16_t half, bad;
  std::memcpy(&half, scales + 2 * dim, sizeof(half));
  std::memcpy(&bad, scales + 2 * dim + 2, sizeof(bad));
  if ((bad >> token & 1) != 0) return NAN;
  const int code = cell[(token * dim + d) / 2] >> d % 2 * 4 & 15;
  return static_cast<float>(code + static_cast<int8_t>(scales[dim + d])) * int4_scale(f16_to_f32(half), scales[d]);
}

}  // namespace nb::ops::reference
