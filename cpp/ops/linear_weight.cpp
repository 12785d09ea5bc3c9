#include "ops/linear_weight.h"

#include <algorithm>

#include "base/align.h"
#include "base/error.h"
#include "ops/column_order.h"
#include "ops/pack_queue.h"
#include "quant/format.h"
#include "quant/tile16.h"
#include "tensor/device_memory.h"

namespace nb::ops {
namespace {

// What the numbers of a group are on a device: the same for all of its matrices.
quant::Format device_format(std::span<const MatrixSource> group) {
  const auto all_are = [&](const auto& is) {
    return std::all_of(group.begin(), group.end(), [&](const auto& source) { return is(device_format(source)); });
  };
  const quant::Format format = device_format(group.front());
  if (all_are([&](quant::Format other) { return other == format; })) return format;
  const bool half =
      all_are([](quant::Format other) { return other == quant::Format::bf16 || other == quant::Format::q8_0; });
  return half ? quant::Format::bf16 : quant::Format::f32;
}

// The orders of a group's columns, for layouts that keep them.
std::vector<ColumnOrder> orders_of(std::span<const MatrixSource> group) {
  std::vector<ColumnOrder> orders;
  bool any = false;
  for (const MatrixSource& source : group) {
    const auto same = std::find_if(orders.begin(), orders.end(), [&](const ColumnOrder& other) {
      return other != nullptr && source.order != nullptr && *other == *source.order;
    });
    orders.push_back(same == orders.end() ? source.order : *same);
    any = any || source.order != nullptr;
  }
  return any ? orders : std::vector<ColumnOrder>{};
}

void check_group(std::span<const MatrixSource> group, Grouping grouping) {
  NB_ASSERT(!group.empty() && group.size() <= 3);
  for (const MatrixSource& source : group) {
    NB_CHECK(source.rows > 0 && source.cols > 0 && source.cols == group[0].cols, format, "tensor ", source.name, " is ",
             source.rows, " x ", source.cols, ", expected ", group[0].cols, " columns");
    quant::row_bytes(source.format, source.cols);  // throws unless rows hold whole blocks
    if (source.order != nullptr) check_order(source.name, *source.order, source.cols);
  }
  if (grouping == Grouping::interleaved32) {
    NB_CHECK(group.size() == 2 && group[0].rows == group[1].rows, format, "tensors ", group[0].name, " and ",
             group[1].name, " must have as many rows");
  }
}

// The same for WeightLayout::vectors.
std::int64_t lay_out_vectors(std::span<const MatrixSource> group, Grouping grouping,
                             std::vector<LinearSegment>& segments, std::vector<std::int64_t>& offsets) {
  std::int64_t total = 0;
  const bool in_turn = grouping == Grouping::interleaved32;
  const quant::Format format = device_format(group);
  for (const MatrixSource& source : group) {
    const std::int64_t pair_bytes = 2 * device_row_bytes(format, source.cols);
    offsets.push_back(in_turn ? static_cast<std::int64_t>(offsets.size()) * kDeviceVectorBytes : total);
    segments.push_back({format, source.rows, source.cols, nullptr, in_turn ? 0 : kDeviceVectorBytes, pair_bytes});
    if (!in_turn || segments.size() == 1) total += ceil_div(source.rows, in_turn ? 1 : 2) * pair_bytes;
  }
  return total;
}

// The share of each matrix in its group's memory, as segments with null data; returns the total.
std::int64_t lay_out(std::span<const MatrixSource> group, Grouping grouping, WeightLayout layout,
                     std::vector<LinearSegment>& segments, std::vector<std::int64_t>& offsets) {
  if (layout == WeightLayout::vectors) return lay_out_vectors(group, grouping, segments, offsets);
  std::int64_t pair_total = 0, total = 0;
  for (const MatrixSource& source : group) {
    const std::int64_t bytes = layout == WeightLayout::rows ? quant::row_bytes(source.format, source.cols)
                                                            : quant::strip_bytes(source.format, source.cols);
    segments.push_back({source.format, source.rows, source.cols, nullptr, bytes, 2 * bytes});
    pair_total += 2 * bytes;
  }
  for (std::size_t i = 0; i < group.size(); ++i) {
    LinearSegment& segment = segments[i];
    offsets.push_back(total);
    if (layout == WeightLayout::rows) {
      total += round_up<std::int64_t>(segment.rows * segment.strip_bytes, kBufferAlignment);
    } else if (grouping == Grouping::interleaved32) {
      total += segment.pair_stride;
      segment.pair_stride = pair_total;
    } else {
      total += ceil_div(segment.rows, kPairRows) * segment.pair_stride;
    }
  }
  if (layout == WeightLayout::tile16 && grouping == Grouping::interleaved32) {
    total = ceil_div(group[0].rows, kPairRows) * pair_total;
  }
  return total;
}

}  // namespace

std::int32_t LinearWeight::rows() const {
  std::int32_t total = 0;
  for (const LinearSegment& segment : segments) total += segment.rows;
  return total;
}

quant::Format device_format(const MatrixSource& source) {
  if (quant::format_info(source.format).is_plain()) return source.format;
  const bool is_bytes = source.format == quant::Format::q8_0 || source.format == quant::Format::w8 ||
                        source.format == quant::Format::w8_channel;
  return is_bytes && source.order == nullptr ? quant::Format::q8_0 : quant::Format::bf16;
}

std::int64_t device_row_bytes(quant::Format format, std::int64_t cols) {
  const std::int64_t padded = round_up<std::int64_t>(cols, quant::kGroupCols);
  if (format != quant::Format::q8_0) return quant::row_bytes(format, padded);
  const auto scale_bytes = static_cast<std::int64_t>(sizeof(std::uint16_t)) * (padded / quant::kGroupCols);
  return padded + round_up(scale_bytes, kDeviceVectorBytes);
}

void LinearWeight::place(std::uint8_t* base) {
  for (std::size_t i = 0; i < segments.size(); ++i) segments[i].data = base == nullptr ? nullptr : base + offsets[i];
}

ActType choose_act_type(std::span<const MatrixSource> group, const std::string& requested, WeightLayout layout) {
  bool all_quantized = true, any_f32 = false, any_f16 = false;
  for (const MatrixSource& source : group) {
    all_quantized = all_quantized && quant::format_info(source.format).is_quantized();
    any_f32 = any_f32 || source.format == quant::Format::f32;
    any_f16 = any_f16 || source.format == quant::Format::f16;
  }
  if (layout == WeightLayout::vectors) {
    NB_CHECK(requested == "auto" || requested == "bf16" || requested == "f32", unsupported, "dtype ", requested,
             " on a device: auto, bf16 or f32");
    return requested == "f32" || (requested == "auto" && (any_f32 || any_f16)) ? ActType::f32 : ActType::bf16;
  }
  const ActType unquantized = any_f32 ? ActType::f32 : ActType::bf16;
  if (requested == "f32") return ActType::f32;
  if (requested == "bf16") return ActType::bf16;
  if (requested == "int8") return all_quantized ? ActType::int8 : unquantized;
  NB_CHECK(requested == "auto", invalid_argument, "dtype must be auto, int8, bf16 or f32, got '", requested, "'");
  if (layout == WeightLayout::rows) return ActType::f32;
  return all_quantized ? ActType::int8 : unquantized;
}

LinearWeight plan_linear(std::span<const MatrixSource> group, Grouping grouping, const std::string& requested_act,
                         WeightLayout layout) {
  check_group(group, grouping);
  LinearWeight weight;
  weight.act_type = choose_act_type(group, requested_act, layout);
  weight.bytes = lay_out(group, grouping, layout, weight.segments, weight.offsets);
  if (layout != WeightLayout::vectors) weight.orders = orders_of(group);
  return weight;
}

LinearWeight PackQueue::add(std::span<const MatrixSource> group, Grouping grouping, const std::string& requested_act,
                            HostArena& arena) {
  LinearWeight weight = plan_linear(group, grouping, requested_act, layout_);
  weight.memory = arena.allocate(static_cast<std::size_t>(weight.bytes));
  add(group, weight, weight.memory.as<std::uint8_t>());
  return weight;
}

void PackQueue::add(std::span<const MatrixSource> group, LinearWeight& weight, std::uint8_t* base) {
  weight.place(base);
  for (std::size_t m = 0; m < group.size(); ++m) {
    matrices_.push_back({group[m], weight.segments[m], base + weight.offsets[m]});
  }
}

LinearWeight pack_linear(std::span<const MatrixSource> group, Grouping grouping, const std::string& requested_act,
                         WeightLayout layout, HostArena& arena, ThreadPool& pool) {
  PackQueue queue(layout);
  LinearWeight weight = queue.add(group, grouping, requested_act, arena);
  queue.run(pool);
  return weight;
}

void move_to(const DeviceMemory& memory, LinearWeight& weight) {
  Buffer copy = copy_to(memory, weight.memory.data(), static_cast<std::size_t>(weight.bytes));
  weight.place(copy.as<std::uint8_t>());
  weight.memory = std::move(copy);
}

}  // namespace nb::ops
