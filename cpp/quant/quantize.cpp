// Searches of scales.
//
// A group of w4 is a weighted straight-line fit: for fixed codes the best scale and minimum follow from weighted sums
// (least squares), for a fixed scale and minimum the best codes are the nearest ones. Both are alternated from a number
// of starts, ranges shrunk from either end, and the best result after rounding scale and minimum to fp16 is kept. Idea:
// the "make_qkx" searches of ggml, which do the same for its K formats; importance as in its importance matrices.
#include "quant/quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/dtype.h"
#include "base/error.h"

namespace nb::quant {
namespace {

constexpr int kGroup = 64;
constexpr int kLanes = 8;  // independent sums, so that the compiler may use vectors; their order is fixed
constexpr float kMaxHalf = 65504.0f;

std::uint16_t half_bits(float value) { return f32_to_f16(std::clamp(value, -kMaxHalf, kMaxHalf)); }
float to_half(float value) { return f16_to_f32(half_bits(value)); }

float total(const float* lanes) {
  float sum = 0.0f;
  for (int l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

// ---- w4 ----

struct Line {
  float scale = 0.0f, minimum = 0.0f;  // values that fp16 can hold
};

struct Fit {
  Line line;
  float error = std::numeric_limits<float>::infinity();
};

class W4Search {
 public:
  W4Search(const float* weights, const float* importance) {
    for (int i = 0; i < kGroup; ++i) {
      weight_[i] = weights[i];
      importance_[i] = importance == nullptr ? 1.0f : importance[i];
    }
    float ones[kLanes] = {}, sums[kLanes] = {}, squares[kLanes] = {};
    for (int i = 0; i < kGroup; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        ones[l] += importance_[i + l];
        sums[l] += importance_[i + l] * weight_[i + l];
        squares[l] += importance_[i + l] * weight_[i + l] * weight_[i + l];
      }
    }
    sum_ = total(ones);
    weighted_sum_ = total(sums);
    weighted_squares_ = total(squares);
  }

  Line run() {
    const auto [lowest, highest] = std::minmax_element(weight_, weight_ + kGroup);
    const float low = *lowest, range = *highest - *lowest;
    if (!(range > 0.0f)) return {0.0f, to_half(low)};
    // Each start gets one refit, whose residual ranks it; the best few are followed to the end.
    Fit ranked[kFollowed];
    for (int left = 0; left <= kShrinks; ++left) {
      for (int right = 0; right <= kShrinks; ++right) {
        const float from = low + range * kShrinkStep * static_cast<float>(left);
        const float to = low + range * (1.0f - kShrinkStep * static_cast<float>(right));
        const Line start{(to - from) / 15.0f, from};
        float code[kGroup];
        nearest(start, code);
        Fit fit{start, 0.0f};
        if (!refit(code, fit)) fit = {start, error(start, code)};
        for (Fit& place : ranked) {
          if (fit.error < place.error) std::swap(fit, place);
        }
      }
    }
    for (const Fit& fit : ranked) {
      if (fit.error < std::numeric_limits<float>::infinity()) descend(fit.line);
    }
    return best_.line;
  }

  // Nearest codes of a line.
  void codes(const Line& line, std::uint8_t* out) const {
    float code[kGroup];
    nearest(line, code);
    for (int i = 0; i < kGroup; ++i) out[i] = static_cast<std::uint8_t>(code[i]);
  }

 private:
  static constexpr int kShrinks = 3;
  static constexpr float kShrinkStep = 0.06f;
  static constexpr int kFollowed = 3;
  static constexpr int kMaxRefits = 6;

  void nearest(const Line& line, float* code) const {
    const float inverse = line.scale != 0.0f ? 1.0f / line.scale : 0.0f;
    for (int i = 0; i < kGroup; ++i) {
      const float at = std::min(std::max((weight_[i] - line.minimum) * inverse, 0.0f), 15.0f);
      code[i] = static_cast<float>(static_cast<int>(at + 0.5f));
    }
  }

  float error(const Line& line, const float* code) const {
    float lanes[kLanes] = {};
    for (int i = 0; i < kGroup; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        const float off = weight_[i + l] - (line.scale * code[i + l] + line.minimum);
        lanes[l] += importance_[i + l] * off * off;
      }
    }
    return total(lanes);
  }

  // Least squares for given codes, and what remains; false if the codes do not determine a line.
  bool refit(const float* code, Fit& fit) const {
    float c1[kLanes] = {}, c2[kLanes] = {}, cw[kLanes] = {};
    for (int i = 0; i < kGroup; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        const float weighted = importance_[i + l] * code[i + l];
        c1[l] += weighted;
        c2[l] += weighted * code[i + l];
        cw[l] += weighted * weight_[i + l];
      }
    }
    const float s1 = total(c1), s2 = total(c2), sw = total(cw);
    const float determinant = sum_ * s2 - s1 * s1;
    if (!(determinant > 0.0f)) return false;
    const float scale = (sum_ * sw - s1 * weighted_sum_) / determinant;
    const float minimum = (s2 * weighted_sum_ - s1 * sw) / determinant;
    if (!std::isfinite(scale) || !std::isfinite(minimum) || !(scale > 0.0f)) return false;
    fit = {{scale, minimum}, weighted_squares_ - scale * sw - minimum * weighted_sum_};
    return true;
  }

  void descend(Line start) {
    float code[kGroup];
    Fit fit{start, 0.0f};
    float last = std::numeric_limits<float>::infinity();
    for (int i = 0; i < kMaxRefits; ++i) {
      const Line stored{to_half(fit.line.scale), to_half(fit.line.minimum)};
      nearest(stored, code);
      const float now = error(stored, code);
      if (now < best_.error) best_ = {stored, now};
      if (!(now < last)) return;
      last = now;
      if (!refit(code, fit)) return;
    }
  }

  float weight_[kGroup], importance_[kGroup];
  float sum_ = 0.0f, weighted_sum_ = 0.0f, weighted_squares_ = 0.0f;
  Fit best_;
};

// ---- w8 ----

constexpr int kScales = 32;
constexpr float kScaleStep = 0.0025f;

struct ScaledCodes {
  float scale;
  double error;  // up to the sum of importance * weight^2, which no scale changes
  double refit;  // the best scale for these codes
};

// `count` is a multiple of kLanes.
ScaledCodes try_scale(const float* weights, const float* importance, std::size_t count, float scale) {
  const float inverse = 1.0f / scale;
  double dot = 0.0, square = 0.0;
  for (std::size_t begin = 0; begin < count; begin += kGroup) {
    const std::size_t end = std::min<std::size_t>(begin + kGroup, count);
    float dots[kLanes] = {}, squares[kLanes] = {};
    for (std::size_t i = begin; i < end; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        const float weight = weights[i + static_cast<std::size_t>(l)];
        const float at = std::min(std::max(weight * inverse, -127.0f), 127.0f);
        const float code = static_cast<float>(static_cast<int>(at + std::copysign(0.5f, at)));
        const float weighted = importance[i + static_cast<std::size_t>(l)] * code;
        dots[l] += weighted * weight;
        squares[l] += weighted * code;
      }
    }
    dot += static_cast<double>(total(dots));
    square += static_cast<double>(total(squares));
  }
  const auto d = static_cast<double>(scale);
  return {scale, d * d * square - 2.0 * d * dot, square > 0.0 ? dot / square : d};
}

// ---- rows ----

void pack_w4_row(const float* row, std::int64_t num_cols, const float* importance, std::uint8_t* out) {
  for (std::int64_t i = 0; i < num_cols; i += kGroup, out += 36) {
    pack_w4_group(row + i, importance == nullptr ? nullptr : importance + i, out);
  }
}

void pack_w8_row(const float* row, std::int64_t num_cols, std::int64_t group, const float* importance,
                 std::uint8_t* out) {
  for (std::int64_t i = 0; i < num_cols; i += group, out += 2 + group) {
    const std::uint16_t scale = pack_w8_group(row + i, importance == nullptr ? nullptr : importance + i, group,
                                              reinterpret_cast<std::int8_t*>(out + 2));
    std::memcpy(out, &scale, sizeof(scale));
  }
}

void pack(Format format, const float* row, std::int64_t num_cols, const float* importance, std::uint8_t* out) {
  switch (format) {
    case Format::w4:
      return pack_w4_row(row, num_cols, importance, out);
    case Format::w8:
      return pack_w8_row(row, num_cols, kGroup, importance, out);
    case Format::w8_channel:
      return pack_w8_row(row, num_cols, num_cols, importance, out);
    default:
      return pack_row(format, row, num_cols, out);
  }
}

// Values beyond this would not come back as finite numbers.
float largest_weight(Format format) {
  return format == Format::f16 || format == Format::w4 ? kMaxHalf : std::numeric_limits<float>::max();
}

bool all_within(const float* values, std::int64_t count, float largest) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (!(std::fabs(values[i]) <= largest)) return false;  // NaN too
  }
  return true;
}

bool is_offered(Format format) {
  switch (format) {
    case Format::f32:
    case Format::bf16:
    case Format::f16:
    case Format::w8:
    case Format::w8_channel:
    case Format::w4:
      return true;
    default:
      return false;
  }
}

}  // namespace

void pack_w4_group(const float* weights, const float* importance, std::uint8_t* out) {
  W4Search search(weights, importance);
  const Line line = search.run();
  const std::uint16_t scale = half_bits(line.scale), minimum = half_bits(line.minimum);
  std::memcpy(out, &scale, sizeof(scale));
  std::memcpy(out + 2, &minimum, sizeof(minimum));
  std::uint8_t codes[kGroup];
  search.codes(line, codes);
  for (int i = 0; i < kGroup / 2; ++i) out[4 + i] = static_cast<std::uint8_t>(codes[i] | codes[i + kGroup / 2] << 4);
}

std::uint16_t pack_w8_group(const float* weights, const float* importance, std::int64_t count, std::int8_t* codes) {
  float largest = 0.0f;
  for (std::int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(weights[i]));
  const float start = to_half(largest / 127.0f);
  if (start == 0.0f) {
    std::fill_n(codes, count, std::int8_t{0});
    return 0;
  }
  // Padded with weights of zero, which no scale changes.
  const std::size_t padded = (static_cast<std::size_t>(count) + kLanes - 1) / kLanes * kLanes;
  std::vector<float> values(padded, 0.0f), columns(padded, 1.0f);
  std::copy_n(weights, count, values.begin());
  if (importance != nullptr) std::copy_n(importance, count, columns.begin());
  const auto attempt = [&](float scale) { return try_scale(values.data(), columns.data(), padded, scale); };
  // Cutting the largest weight off rarely pays at 8 bits, but among many scales near the largest some round the columns
  // that matter better than others.
  ScaledCodes best = attempt(start);
  for (int i = 0; i < kScales; ++i) {
    const float scale = to_half(start * (1.0f - kScaleStep * static_cast<float>(i)));
    if (scale == 0.0f) continue;
    const ScaledCodes tried = attempt(scale);
    if (tried.error < best.error) best = tried;
    const float refitted = to_half(static_cast<float>(tried.refit));
    if (!(refitted > 0.0f)) continue;
    const ScaledCodes again = attempt(refitted);
    if (again.error < best.error) best = again;
  }
  const float inverse = 1.0f / best.scale;
  for (std::int64_t i = 0; i < count; ++i) {
    const float at = std::min(std::max(weights[i] * inverse, -127.0f), 127.0f);
    codes[i] = static_cast<std::int8_t>(at + std::copysign(0.5f, at));
  }
  return half_bits(best.scale);
}

void quantize_rows(Format format, const float* rows, std::int64_t num_rows, std::int64_t num_cols,
                   const float* importance, std::uint8_t* out, ThreadPool& pool) {
  NB_CHECK(is_offered(format), unsupported, "packing weights as ", to_string(format), " is not offered");
  const std::int64_t bytes = row_bytes(format, num_cols);
  const float largest = largest_weight(format);
  NB_CHECK(num_rows >= 0 && num_cols > 0, invalid_argument, "cannot pack [", num_rows, ", ", num_cols, "] weights");
  // Scaled to a mean of 1, so that sums of tiny or huge squares lose nothing; a little for every column, so that codes
  // of columns that were never met still follow their weights.
  std::vector<float> scaled;
  if (importance != nullptr) {
    scaled.assign(importance, importance + num_cols);
    double sum = 0.0;
    for (float& value : scaled) {
      if (!std::isfinite(value) || value < 0.0f) value = 0.0f;
      sum += static_cast<double>(value);
    }
    const double mean = sum / static_cast<double>(num_cols);
    for (float& value : scaled) {
      value = mean > 0.0 ? static_cast<float>(static_cast<double>(value) / mean) + 1e-4f : 1.0f;
    }
  }
  std::atomic<std::int64_t> broken{num_rows};
  pool.run([&](const Part& part) {
    const std::int64_t begin = num_rows * part.index / part.count, end = num_rows * (part.index + 1) / part.count;
    for (std::int64_t r = begin; r < end; ++r) {
      const float* row = rows + r * num_cols;
      if (all_within(row, num_cols, largest)) {
        pack(format, row, num_cols, importance == nullptr ? nullptr : scaled.data(), out + r * bytes);
        continue;
      }
      std::int64_t first = broken.load();
      while (r < first && !broken.compare_exchange_weak(first, r)) {
      }
      return;
    }
  });
  NB_CHECK(broken == num_rows, invalid_argument, "row ", broken.load(), " holds a weight that ", to_string(format),
           " cannot hold (not a finite number, or too large)");
}

PackingError packing_error(Format format, const float* rows, const std::uint8_t* packed, std::int64_t num_rows,
                           std::int64_t num_cols, ThreadPool& pool) {
  const std::int64_t bytes = row_bytes(format, num_cols);
  std::vector<PackingError> row_errors(static_cast<std::size_t>(num_rows));  // summed in order: any number of threads
  std::vector<float> unpacked(static_cast<std::size_t>(num_cols * pool.num_threads()));
  pool.run([&](const Part& part) {
    float* const values = unpacked.data() + num_cols * part.index;
    for (std::int64_t r = part.index; r < num_rows; r += part.count) {
      unpack_row(format, packed + r * bytes, num_cols, values);
      PackingError& error = row_errors[static_cast<std::size_t>(r)];
      for (std::int64_t i = 0; i < num_cols; ++i) {
        const auto weight = static_cast<double>(rows[r * num_cols + i]);
        const double off = weight - static_cast<double>(values[i]);
        error.squared_error += off * off;
        error.squared_norm += weight * weight;
      }
    }
  });
  PackingError sum;
  for (const PackingError& error : row_errors) {
    sum.squared_error += error.squared_error;
    sum.squared_norm += error.squared_norm;
  }
  return sum;
}

}  // namespace nb::quant
