#include "quant/kv_format.h"

#include "base/error.h"
#include "base/ids.h"

namespace nb::quant {
namespace {

constexpr KvFormatInfo kFormats[] = {
    {KvFormat::f32, "f32", 4},
    {KvFormat::bf16, "bf16", 2},
};

}  // namespace

const KvFormatInfo& kv_format_info(KvFormat format) { return kFormats[static_cast<std::size_t>(format)]; }

KvFormat parse_kv_format(const std::string& name) {
  for (const KvFormatInfo& info : kFormats) {
    if (name == info.name) return info.format;
  }
  fail(ErrorCode::unsupported, "KV format '", name, "' is not offered: use f32 or bf16");
}

std::int64_t kv_cell_bytes(KvFormat format, int head_dim) {
  return std::int64_t{kBlockTokens} * head_dim * kv_format_info(format).element_bytes;
}

}  // namespace nb::quant
