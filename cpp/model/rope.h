// Rotary position embedding: how a model's facts become frequencies, and frequencies the table the kernels read.
//
// The one place that knows the scaling methods. What comes out depends on the facts only, never on the length of a
// sequence, so that a stored key stays valid. Computed in double, rounded once. Safe from any thread.
#pragma once

#include <optional>
#include <vector>

#include "tensor/allocator.h"

namespace nb::model {

enum class RopeScaling { none, linear, llama3, yarn };

/// "none", "linear", "llama3", "yarn".
const char* to_string(RopeScaling scaling);

struct RopeFacts {
  double theta = 10000.0;
  RopeScaling scaling = RopeScaling::none;
  double factor = 1.0;                ///< all scalings: how many times longer the context became
  int original_context = 0;           ///< llama3, yarn: positions the model was first trained on
  double low_freq_factor = 1.0;       ///< llama3
  double high_freq_factor = 4.0;      ///< llama3
  double beta_fast = 32.0;            ///< yarn: turns over the original context, above which a pair keeps its frequency
  double beta_slow = 1.0;             ///< yarn: turns, below which a pair is interpolated in full
  bool truncate = true;               ///< yarn: the limits of the ramp are rounded outwards to whole pairs
  std::optional<double> magnitude{};  ///< yarn: factor of cos and sin; absent: 0.1 ln(factor) + 1
  std::vector<float> divisors{};      ///< of each frequency, [head_dim / 2], or empty; only without a scaling
};

/// Throws format naming the fact unless the facts make sense for heads of `head_dim`.
void validate(const RopeFacts& facts, int head_dim);

/// Angle of pair i per position, [head_dim / 2].
/// Sources: none - Su et al., "RoFormer", 2021. linear - Chen et al., "Extending Context Window of Large Language
/// Models via Positional Interpolation", 2023. llama3 - Llama 3.1's published reference model, 2024. yarn - Peng et
/// al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023, with the rounding of transformers'
/// `_compute_yarn_parameters`.
std::vector<double> rope_frequencies(const RopeFacts& facts, int head_dim);

/// What cos and sin are multiplied by: YaRN's attention temperature, 1 for every other method. Both q and k carry it.
double rope_magnitude(const RopeFacts& facts);

/// Row p: m cos(p f_i) for i < head_dim / 2, then m sin(p f_i); f32[num_positions, head_dim].
Buffer make_rope_table(const RopeFacts& facts, int head_dim, int num_positions);

}  // namespace nb::model
