#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <complex>
#include <numbers>

#include "base/error.h"

namespace nb::model {
namespace {

constexpr double kTwoPi = 2.0 * std::numbers::pi;

void check_positive(double value, const char* fact) {
  NB_CHECK(std::isfinite(value) && value > 0.0, format, "model fact ", fact, " is ", value, ", must be above 0");
}

// Frequencies whose wave fits into the original context many times stay, those that hardly fit once are divided by
// `factor`, and in between both are mixed.
double llama3_frequency(double frequency, const RopeFacts& facts) {
  const double wave = kTwoPi / frequency;
  if (wave < facts.original_context / facts.high_freq_factor) return frequency;
  if (wave > facts.original_context / facts.low_freq_factor) return frequency / facts.factor;
  const double keep =
      (facts.original_context / wave - facts.low_freq_factor) / (facts.high_freq_factor - facts.low_freq_factor);
  return (1.0 - keep) * frequency / facts.factor + keep * frequency;
}

// The pair (as a real number) that makes `turns` turns over the original context.
double pair_with_turns(double turns, const RopeFacts& facts, int head_dim) {
  return head_dim * std::log(facts.original_context / (turns * kTwoPi)) / (2.0 * std::log(facts.theta));
}

// 0 for pairs that keep their frequency, 1 for those that are interpolated, a ramp in between.
std::vector<double> yarn_ramp(const RopeFacts& facts, int head_dim) {
  double low = pair_with_turns(facts.beta_fast, facts, head_dim);
  double high = pair_with_turns(facts.beta_slow, facts, head_dim);
  if (facts.truncate) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0);
  high = std::min(high, head_dim - 1.0);
  if (low == high) high += 0.001;
  std::vector<double> ramp(static_cast<std::size_t>(head_dim / 2));
  for (std::size_t i = 0; i < ramp.size(); ++i) {
    ramp[i] = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
  }
  return ramp;
}

}  // namespace

const char* to_string(RopeScaling scaling) {
  switch (scaling) {
    case RopeScaling::linear:
      return "linear";
    case RopeScaling::llama3:
      return "llama3";
    case RopeScaling::yarn:
      return "yarn";
    case RopeScaling::none:
      break;
  }
  return "none";
}

void validate(const RopeFacts& facts, int head_dim) {
  NB_CHECK(std::isfinite(facts.theta) && facts.theta > 1.0, format, "model fact rope_theta is ", facts.theta);
  if (facts.scaling != RopeScaling::none) check_positive(facts.factor, "rope scaling factor");
  if (facts.scaling == RopeScaling::llama3 || facts.scaling == RopeScaling::yarn) {
    check_positive(facts.original_context, "rope scaling original_context_length");
  }
  if (facts.scaling == RopeScaling::llama3) {
    check_positive(facts.low_freq_factor, "rope scaling low_freq_factor");
    check_positive(facts.high_freq_factor, "rope scaling high_freq_factor");
    NB_CHECK(facts.low_freq_factor < facts.high_freq_factor, format, "model fact rope scaling low_freq_factor is ",
             facts.low_freq_factor, ", must be below high_freq_factor, ", facts.high_freq_factor);
  }
  if (facts.scaling == RopeScaling::yarn) {
    check_positive(facts.beta_fast, "rope scaling yarn_beta_fast");
    check_positive(facts.beta_slow, "rope scaling yarn_beta_slow");
    check_positive(rope_magnitude(facts), "rope scaling attention factor");
  }
  if (facts.divisors.empty()) return;
  NB_CHECK(facts.divisors.size() == static_cast<std::size_t>(head_dim / 2), format, "the model has ",
           facts.divisors.size(), " frequency divisors for ", head_dim / 2, " pairs of a head");
  NB_CHECK(facts.scaling == RopeScaling::none, unsupported, "frequency divisors together with RoPE scaling '",
           to_string(facts.scaling), "' are not offered");
  for (const float divisor : facts.divisors) check_positive(static_cast<double>(divisor), "frequency divisor");
}

std::vector<double> rope_frequencies(const RopeFacts& facts, int head_dim) {
  std::vector<double> frequencies(static_cast<std::size_t>(head_dim / 2));
  const std::vector<double> ramp =
      facts.scaling == RopeScaling::yarn ? yarn_ramp(facts, head_dim) : std::vector<double>();
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    double& frequency = frequencies[i];
    frequency = std::pow(facts.theta, -2.0 * static_cast<double>(i) / head_dim);
    switch (facts.scaling) {
      case RopeScaling::none:
        if (!facts.divisors.empty()) frequency /= static_cast<double>(facts.divisors[i]);
        break;
      case RopeScaling::linear:
        frequency /= facts.factor;
        break;
      case RopeScaling::llama3:
        frequency = llama3_frequency(frequency, facts);
        break;
      case RopeScaling::yarn:
        frequency = frequency / facts.factor * ramp[i] + frequency * (1.0 - ramp[i]);
        break;
    }
  }
  return frequencies;
}

double rope_magnitude(const RopeFacts& facts) {
  if (facts.scaling != RopeScaling::yarn) return 1.0;
  if (facts.magnitude) return *facts.magnitude;
  return facts.factor <= 1.0 ? 1.0 : 0.1 * std::log(facts.factor) + 1.0;
}

Buffer make_rope_table(const RopeFacts& facts, int head_dim, int num_positions) {
  // A long context has millions of angles. The sine of p = 256 a + b follows from those of 256 a and b by the addition
  // theorem, one complex product in double, whose error is far below the rounding to f32.
  constexpr int kStride = 256;
  using Complex = std::complex<double>;
  const std::vector<double> frequencies = rope_frequencies(facts, head_dim);
  const double magnitude = rope_magnitude(facts);
  const std::size_t half = frequencies.size();
  std::vector<Complex> fine(kStride * half);
  for (std::size_t b = 0; b < kStride; ++b) {
    for (std::size_t i = 0; i < half; ++i)
      fine[b * half + i] = std::polar(1.0, static_cast<double>(b) * frequencies[i]);
  }
  const auto count = static_cast<std::size_t>(num_positions) * static_cast<std::size_t>(head_dim);
  Buffer memory = HostArena::create(1)->allocate(count * sizeof(float));
  std::vector<Complex> coarse(half);
  for (int p = 0; p < num_positions; ++p) {
    if (p % kStride == 0) {
      for (std::size_t i = 0; i < half; ++i) coarse[i] = std::polar(magnitude, p * frequencies[i]);
    }
    float* row = memory.as<float>() + static_cast<std::ptrdiff_t>(p) * head_dim;
    const Complex* offset = fine.data() + static_cast<std::size_t>(p % kStride) * half;
    for (std::size_t i = 0; i < half; ++i) {
      const double a = coarse[i].real(), b = coarse[i].imag(), c = offset[i].real(), d = offset[i].imag();
      row[i] = static_cast<float>(a * c - b * d);
      row[half + i] = static_cast<float>(a * d + b * c);
    }
  }
  return memory;
}

}  // namespace nb::model
