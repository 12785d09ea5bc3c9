// Matrices as checkpoints of AWQ and GPTQ pack them, repacked as rows of our formats without a second quantization.
//
// Such checkpoints pack 8 codes of 4 bits into words, along other axes than a row, and have a scale and a zero point
// for each group of columns. Which tensors hold them, and whether their shapes fit, is io/checkpoint_matrix.h's
// business. Sources: AutoAWQ (GEMM version) and AutoGPTQ (and its successor GPTQModel). Safe from any thread.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "quant/format.h"

namespace nb::quant {

/// How words hold codes. awq: [cols, rows / 8], in a word the rows 0 2 4 6 1 3 5 7, from the lowest bits on. gptq:
/// [cols / 8, rows], the lowest bits first. Zero points are [groups, rows / 8] in either, rows as in the codes' words
/// or, of gptq, in order.
enum class Int4Packing : std::uint8_t { awq, gptq };

/// What a stored zero point means. `next`: one more, and 0 after 15 (GPTQ's first version). `carried`: the same, but
/// one was subtracted from the nibbles of a word with borrows between them, as GPTQModel does.
enum class ZeroRule : std::uint8_t { stored, next, carried };

struct Int4Checkpoint {
  Int4Packing packing;
  ZeroRule zero_rule;
  std::int64_t rows;  ///< a multiple of 8
  std::int64_t cols;  ///< a multiple of `group_size` and of 8
  std::int64_t group_size;
  std::span<const std::uint32_t> codes;
  std::span<const std::uint32_t> zeros;
  std::span<const std::uint16_t> scales;  ///< f16 [cols / group_size, rows]
  std::span<const std::int32_t> order;    ///< column j of the result is column order[j]; empty: the same
};

/// The columns in ascending order of their groups, which must all have `group_size` members; empty if that is the order
/// they have. Throws format for a group outside 0 .. cols / group_size - 1, unsupported for groups of other sizes; the
/// message says what is wrong, not where.
std::vector<std::int32_t> order_of_groups(std::span<const std::int32_t> groups, std::int64_t group_size);

/// Writes rows of `format`, whose blocks have `group_size` columns; rows * row_bytes bytes.
void repack_int4(const Int4Checkpoint& source, Format format, std::uint8_t* out);

}  // namespace nb::quant
