#include "quant/kv_format.h"

#include <iterator>

#include "base/align.h"
#include "base/error.h"
#include "base/ids.h"

namespace nb::quant {
namespace {

template <int kBytes>
std::int64_t plain_cell(int head_dim) {
  return std::int64_t{kBlockTokens} * head_dim * kBytes;
}

std::int64_t int8_cell(int head_dim) { return std::int64_t{kBlockTokens} * (head_dim + 2); }

std::int64_t nibble_cell(int head_dim) {
  const int groups = (head_dim + kKvGroup - 1) / kKvGroup;
  return std::int64_t{kBlockTokens} * ((head_dim + 1) / 2 + 4 * groups);
}

std::int64_t sealed_cell(int head_dim) {
  const int words = (head_dim / 2 + 3) / 4;
  return round_up<std::int64_t>(std::int64_t{kBlockTokens} * 4 * words + std::int64_t{2} * head_dim + 4, 16);
}

constexpr const char* kPlainLayout = "[block][layer][K|V][head][token][dim]";

// Limits of most_kl: four times what the format costs a healthy model of 135M parameters, where the figures of
// ARCHITECTURE.md come from (0.0015, 0.009 and 0.020 at most). Larger models lose less, and another text
// changes a figure by less than a factor of two. What the limit is for costs far more: scales of another token or
// block, keys quantized along the wrong axis (0.09 to 0.24 for 4 bits), or keys whose biases are larger than all that
// varies in them, as Qwen2.5's under 4 bits a token (whole nats: the model answers nothing any more). Even the widest
// of them, 0.08, is what shuffling the documents of a prompt costs.
constexpr KvFormatInfo kFormats[] = {
    {KvFormat::f32, "f32", kPlainLayout, plain_cell<4>, plain_cell<4>},
    {KvFormat::bf16, "bf16", kPlainLayout, plain_cell<2>, plain_cell<2>},
    {KvFormat::f16, "f16", kPlainLayout, plain_cell<2>, plain_cell<2>},
    {KvFormat::int8, "int8", "[block][layer][K|V][head]: codes, fp16 scales", int8_cell, int8_cell, 0.006},
    {KvFormat::mixed, "mixed", "[block][layer][K|V][head]: codes of 8|4 bits, fp16 scales, V: fp16 minima of 32",
     int8_cell, nibble_cell, 0.036},
    {KvFormat::int4, "int4",
     "[block][layer][K|V][head]: K: codes of 4 bits before rotation, scale and base of each dimension as bytes, fp16 "
     "unit, bits of tokens that are not finite, to 16 bytes; V: codes of 4 bits, fp16 scales, fp16 minima of 32",
     sealed_cell, nibble_cell, 0.08},
};
static_assert(std::size(kFormats) == kNumKvFormats);

std::string offered() {
  std::string names;
  for (int i = 0; i < kNumKvFormats; ++i) {
    names += i == 0 ? "" : i + 1 < kNumKvFormats ? ", " : " or ";
    names += kFormats[i].name;
  }
  return names;
}

}  // namespace

double KvFormatInfo::bits_per_element(int head_dim) const {
  return 8.0 * static_cast<double>(key_cell_bytes(head_dim) + value_cell_bytes(head_dim)) /
         (2.0 * kBlockTokens * head_dim);
}

const KvFormatInfo& kv_format_info(KvFormat format) { return kFormats[static_cast<std::size_t>(format)]; }

KvFormat parse_kv_format(const std::string& name) {
  for (const KvFormatInfo& info : kFormats) {
    if (name == info.name) return info.format;
  }
  fail(ErrorCode::unsupported, "KV format '", name, "' is not offered: use ", offered());
}

}  // namespace nb::quant
