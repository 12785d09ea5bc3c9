// Whether a format of keys and values is sound for a model: its predictions for one text, with the format and with f32.
//
// A quantized format is harmless for most models and ruinous for some (keys with large biases under 4 bits), and
// nothing in a file's metadata tells which. So whoever loads a model lets it read a text of its own before the format
// is used. Knows tokens, not text (text/selftest_text.h has that). The model must not be run by anybody else meanwhile.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "base/ids.h"
#include "model/model.h"
#include "quant/format_id.h"

namespace nb::engine {

/// What was measured.
struct KvSelftest {
  quant::KvFormat format;
  int num_tokens = 0;     ///< of the text that were read
  int num_positions = 0;  ///< whose predictions were compared; 0: context or text are too short to measure
  double mean_kl = 0.0;   ///< KL(f32 || format) in nats, mean over positions; infinite if a prediction is not a number
  /// KL(f32 || bf16) where activations are int8, which are rounded anew wherever a key differs at all; else 0.
  double floor_kl = 0.0;
  double worst_kl = 0.0;   ///< at the worst position
  double agreement = 1.0;  ///< share of positions with the same most likely token
  double seconds = 0.0;    ///< that measuring took

  /// What the format itself costs, which counts against its limit. Errors that do not depend on each other add up, and
  /// KL grows with their squares.
  double cost() const { return mean_kl > floor_kl ? mean_kl - floor_kl : 0.0; }
};

/// Tokens of the text that are read, and the first position whose prediction counts: before it there are too few keys
/// for a format to harm. A model with a shorter context reads what it has room for, and its last three quarters count.
inline constexpr int kSelftestTokens = 512;
inline constexpr int kSelftestFirst = 128;
inline constexpr int kSelftestLeastTokens = 64;

/// Runs the first kSelftestTokens of `text` through engines of their own side by side: one with f32 keys and values,
/// one with `format` and, where activations are int8, one with bf16. That takes as long as prompts of as many tokens
/// with logits for most of them, and the memory of 64 rows of logits, never of all. Throws what engines throw.
KvSelftest measure_kv_format(const model::Model& model, std::span<const TokenId> text, quant::KvFormat format);

/// Whether the limit of the format's row in quant/kv_format.h allows what was measured.
bool is_within_limit(quant::KvFormat format, double cost);

/// Why a format with this cost is refused for a model; `force` is how the user can have it all the same.
std::string kv_refusal(quant::KvFormat format, double cost, std::string_view model, std::string_view force);

}  // namespace nb::engine
