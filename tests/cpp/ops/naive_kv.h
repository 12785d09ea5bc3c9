// What quantized formats of keys and values keep of a token, from their definition and nothing else.
//
// For tests only. The definition is in quant/kv_format.h; this shares no code with the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/dtype.h"
#include "quant/kv_format.h"

namespace nb::ops {

/// Rounds to one of the finite halves, nearest even.
inline float nearest_half(double value) {
  const double size = std::min(std::fabs(value), 65504.0);
  const int exponent = std::max(size == 0.0 ? -14 : std::ilogb(size), -14);
  const double step = std::ldexp(1.0, exponent - 10);
  return static_cast<float>(std::copysign(std::min(std::nearbyint(size / step) * step, 65504.0), value));
}

inline std::vector<double> naive_int8(const std::vector<float>& x) {
  float peak = 0.0f;
  for (const float value : x) peak = std::max(peak, std::fabs(value));
  const float scale = nearest_half(peak / 127.0f);
  std::vector<double> kept;
  for (const float value : x) {
    const float code = scale == 0.0f ? 0.0f : std::nearbyint(value / scale);
    kept.push_back(static_cast<double>(std::clamp(code, -127.0f, 127.0f)) * scale);
  }
  return kept;
}

inline std::vector<double> naive_groups(const std::vector<float>& x) {
  std::vector<double> kept;
  for (std::size_t begin = 0; begin < x.size(); begin += 32) {
    const auto first = x.begin() + static_cast<std::ptrdiff_t>(begin);
    const auto last = x.begin() + static_cast<std::ptrdiff_t>(std::min(begin + 32, x.size()));
    const float low = *std::min_element(first, last), high = *std::max_element(first, last);
    const float scale = nearest_half((high - low) / 15.0f), minimum = nearest_half(low);
    for (auto value = first; value != last; ++value) {
      const float code = scale == 0.0f ? 0.0f : std::nearbyint((*value - minimum) / scale);
      kept.push_back(static_cast<double>(std::clamp(code, 0.0f, 15.0f)) * scale + minimum);
    }
  }
  return kept;
}

inline std::vector<double> naive_halves(const std::vector<float>& x) {
  std::vector<double> kept;
  for (const float value : x) kept.push_back(static_cast<double>(nearest_half(value)));
  return kept;
}

/// What the keys of a sealed block of one head are, [tokens][head_dim]: each dimension by itself. All of it is finite.
inline std::vector<std::vector<double>> naive_sealed(const std::vector<std::vector<float>>& keys) {
  const std::size_t dim = keys.front().size();
  std::vector<double> lows(dim), wanted(dim);
  for (std::size_t d = 0; d < dim; ++d) {
    float low = keys[0][d], high = low;
    for (const auto& key : keys) low = std::min(low, key[d]), high = std::max(high, key[d]);
    lows[d] = static_cast<double>(low);
    wanted[d] = static_cast<double>(std::max((high - low) / 15.0f, std::fabs(low) / 127.0f));
  }
  const double most = *std::max_element(wanted.begin(), wanted.end());
  const double unit = static_cast<double>(nearest_half(most * 16 / 31));
  std::vector<std::vector<double>> kept(keys.size(), std::vector<double>(dim, 0.0));
  for (std::size_t d = 0; d < dim && unit > 0.0; ++d) {
    double scale = 0.0;
    for (int e = 0; e < 16 && scale < wanted[d]; ++e) {
      for (int m = 0; m < 16 && scale < wanted[d]; ++m) scale = unit * (16 + m) / 16 * std::ldexp(1.0, e - 15);
    }
    if (scale == 0.0) scale = std::ldexp(unit, -15);
    const double base = std::clamp(std::nearbyint(lows[d] / scale), -128.0, 127.0);
    for (std::size_t t = 0; t < keys.size(); ++t) {
      const double steps = std::nearbyint(static_cast<double>(keys[t][d]) / scale);
      kept[t][d] = (base + std::clamp(steps - base, 0.0, 15.0)) * scale;
    }
  }
  return kept;
}

/// What a token's key (or value) of one head is when it is read again, of formats that store it by itself. All of it is
/// finite.
inline std::vector<double> naive_stored(quant::KvFormat format, bool is_key, const std::vector<float>& x) {
  if (format == quant::KvFormat::int8 || (format == quant::KvFormat::mixed && is_key)) return naive_int8(x);
  if (format == quant::KvFormat::mixed || format == quant::KvFormat::int4) return naive_groups(x);
  if (format == quant::KvFormat::f16) return naive_halves(x);
  std::vector<double> kept;
  for (const float value : x) {
    kept.push_back(static_cast<double>(format == quant::KvFormat::bf16 ? bf16_to_f32(f32_to_bf16(value)) : value));
  }
  return kept;
}

/// The mean of values, each weighted with the exponential of its score; `values` may be more than scores.
inline std::vector<double> naive_attended(const std::vector<double>& scores,
                                          const std::vector<std::vector<double>>& values) {
  const double largest = *std::max_element(scores.begin(), scores.end());
  std::vector<double> sums(values.front().size(), 0.0);
  double total = 0.0;
  for (std::size_t t = 0; t < scores.size(); ++t) {
    const double weight = std::exp(scores[t] - largest);
    total += weight;
    for (std::size_t d = 0; d < sums.size(); ++d) sums[d] += weight * values[t][d];
  }
  for (double& sum : sums) sum /= total;
  return sums;
}

}  // namespace nb::ops
