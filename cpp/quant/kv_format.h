// The table of KV cache formats: element type and bytes of a cell.
//
// A cell holds the keys or the values of 16 tokens of one head of one layer. The order of elements inside a cell
// belongs to the backend. Safe from any thread.
#pragma once

#include <cstdint>
#include <string>

#include "quant/format_id.h"

namespace nb::quant {

struct KvFormatInfo {
  KvFormat format;
  const char* name;
  int element_bytes;
};

const KvFormatInfo& kv_format_info(KvFormat format);

inline const char* to_string(KvFormat format) { return kv_format_info(format).name; }

/// Throws unsupported naming `name` and the formats there are.
KvFormat parse_kv_format(const std::string& name);

/// Bytes of one cell: 16 tokens of `head_dim` elements.
std::int64_t kv_cell_bytes(KvFormat format, int head_dim);

}  // namespace nb::quant
