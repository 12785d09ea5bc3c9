// A linear weight packed once, at load, for the backend that will use it.
//
// One LinearWeight is a fused group: one matrix, or q/k/v, or gate/up (interleaved by 32 rows). The model holds it as
// a handle and never looks inside. Packing may run in parallel; a packed weight is immutable.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/threads.h"
#include "ops/kernel_table.h"
#include "tensor/allocator.h"

namespace nb::ops {

/// Raised when packing gives other bytes than before: packed weights outlive a process (model/layer_file.h).
inline constexpr int kPackingVersion = 1;

/// Which column of the input meets each column of a matrix: a permutation of 0 .. cols - 1. Null: the same.
using ColumnOrder = std::shared_ptr<const std::vector<std::int32_t>>;

/// Where one matrix of a group comes from. Rows are asked for in packing order, each once.
struct MatrixSource {
  std::string name;  ///< for messages
  quant::Format format;
  int32_t rows;
  int32_t cols;
  /// Reads rows [row_begin, row_begin + count) in file layout into `out`. May be called from several threads.
  std::function<void(int32_t row_begin, int32_t count, std::byte* out)> read_rows;
  /// Row of the packed matrix -> row of the file; empty means the same.
  std::function<int32_t(int32_t)> file_row;
  ColumnOrder order{};
};

enum class Grouping { stacked, interleaved32 };

struct LinearWeight {
  std::vector<LinearSegment> segments;
  ActType act_type = ActType::f32;  ///< what rows entering this group are prepared as
  int64_t bytes = 0;                ///< packed size
  std::vector<int64_t> offsets;     ///< where each segment begins in the memory
  Buffer memory;                    ///< empty: not packed, or packed into memory that others hold
  std::vector<ColumnOrder> orders;  ///< of each segment; empty where all are null. Equal ones are one object.

  /// Makes the segments those of a packed group at `base`; null for none.
  void place(uint8_t* base);

  /// Columns stand in an order of their own, so rows are rearranged before they are prepared (ops/column_order.h).
  bool is_ordered() const { return !orders.empty(); }
  int32_t cols() const { return segments.front().cols; }
  int32_t rows() const;
};

/// How rows entering a group of these formats are prepared, for a requested type: "auto", "int8", "bf16", "f32".
/// auto: f32 on a backend with rows layout, on a device bf16 unless a matrix is f32 or f16; else int8 where every
/// matrix is quantized, f32 where one is f32, else bf16. int8 with an unquantized matrix falls back to bf16. Throws
/// invalid_argument for other names.
ActType choose_act_type(std::span<const MatrixSource> group, const std::string& requested, WeightLayout layout);

/// What pack_linear would give, without memory: formats, sizes, and segments that are nowhere.
LinearWeight plan_linear(std::span<const MatrixSource> group, Grouping grouping, const std::string& requested_act,
                         WeightLayout layout);

/// What the numbers of a matrix are on a device, if its group is no other: f32, bf16 and f16 stay what they are, signed
/// bytes with scales (q8_0, w8, w8_channel) are q8_0 with the same values, and the rest becomes bf16.
quant::Format device_format(const MatrixSource& source);

/// Bytes of a row in WeightLayout::vectors, scales and padding included.
int64_t device_row_bytes(quant::Format format, int64_t cols);

/// Packs a group. All matrices have the same cols; interleaved32 wants two of equal shape. For WeightLayout::vectors
/// every matrix has its device_format(), and in a group of several all are bf16 or, if one is f32 or f16, f32; columns
/// are put in the order of the input.
/// Throws format naming the matrix if its order is no permutation of its columns.
LinearWeight pack_linear(std::span<const MatrixSource> group, Grouping grouping, const std::string& requested_act,
                         WeightLayout layout, HostArena& arena, ThreadPool& pool);

/// Moves a packed weight into the memory of a device. Throws out_of_memory or device.
void move_to(const DeviceMemory& memory, LinearWeight& weight);

}  // namespace nb::ops
