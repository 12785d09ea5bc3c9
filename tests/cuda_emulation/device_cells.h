// Cells of keys and values as the device has them, from those of the reference backend.
//
// For tests only. The two orders are drawn in cuda/kv_cells.cuh and cpp/ops/cpu/reference/reference.cpp; numbers, codes
// and scales are the same, so a test can compare them bit for bit. Shares no code with the kernels.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "base/ids.h"
#include "ops/args.h"
#include "quant/kv_format.h"

namespace nb::cuda {

/// A layer of cells in memory that begins at `base`, in blocks of `stride` bytes.
inline ops::KvLayer layer_of(quant::KvFormat format, int heads, int dim, std::uint8_t* base, std::int64_t stride) {
  const quant::KvFormatInfo& info = quant::kv_format_info(format);
  return {base, stride, info.key_cell_bytes(dim), info.value_cell_bytes(dim), heads, dim, format};
}

/// Bytes of a block that has nothing but this layer.
inline std::int64_t layer_bytes(quant::KvFormat format, int heads, int dim) {
  const quant::KvFormatInfo& info = quant::kv_format_info(format);
  return heads * (info.key_cell_bytes(dim) + info.value_cell_bytes(dim));
}

/// One cell. A token of the reference has its codes (of 8 bits: signed), then scales, each with its minimum behind it.
inline void put_device_cell(const std::uint8_t* from, std::int64_t bytes, int dim, bool has_nibbles, std::uint8_t* to) {
  const std::int64_t token_bytes = bytes / kBlockTokens, codes = has_nibbles ? dim / 2 : dim;
  for (int token = 0; token < kBlockTokens; ++token, from += token_bytes) {
    for (std::int64_t i = 0; i < codes; ++i) {
      to[token * codes + i] = has_nibbles ? from[i] : static_cast<std::uint8_t>(from[i] + 128);
    }
    // A scale of 2 bytes; or one with its minimum, for group after group.
    const std::int64_t factor_bytes = has_nibbles ? 4 : 2;
    for (std::int64_t g = 0; g < (token_bytes - codes) / factor_bytes; ++g) {
      std::memcpy(to + kBlockTokens * codes + (g * kBlockTokens + token) * factor_bytes,
                  from + codes + g * factor_bytes, static_cast<std::size_t>(factor_bytes));
    }
  }
}

/// What the reference has stored in `bytes`, as the device would have; `layer` says where. What is beside the layer
/// stays as it is.
inline std::vector<std::uint8_t> device_cells(const std::vector<std::uint8_t>& bytes, const ops::KvLayer& layer) {
  std::vector<std::uint8_t> out = bytes;
  if (layer.format != quant::KvFormat::int8 && layer.format != quant::KvFormat::mixed) return out;
  const auto num_blocks = static_cast<std::int64_t>(bytes.size()) / layer.block_stride;
  for (std::int64_t block = 0; block < num_blocks; ++block) {
    std::int64_t at = block * layer.block_stride;
    for (int cell = 0; cell < 2 * layer.num_kv_heads; ++cell) {
      const bool is_key = cell < layer.num_kv_heads;
      const std::int64_t size = is_key ? layer.key_cell_bytes : layer.value_cell_bytes;
      put_device_cell(bytes.data() + at, size, layer.head_dim, !is_key && layer.format == quant::KvFormat::mixed,
                      out.data() + at);
      at += size;
    }
  }
  return out;
}

}  // namespace nb::cuda
