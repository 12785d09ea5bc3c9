#include "ops/linear_weight.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

#include "base/align.h"
#include "base/error.h"
#include "quant/format.h"
#include "quant/tile16.h"
#include "tensor/device_memory.h"

namespace nb::ops {
namespace {

constexpr int kPairRows = 2 * quant::kTileRows;
constexpr std::int64_t kVectorBytes = 16;

// Reads rows [row_begin, row_begin + count) of the packed matrix into `out`, following the file's row order. Rows
// that lie close together in the file are read at once.
void read_packed_rows(const MatrixSource& source, std::int64_t row_bytes, int row_begin, int count,
                      std::vector<std::byte>& staging, std::byte* out) {
  if (!source.file_row) {
    source.read_rows(row_begin, count, out);
    return;
  }
  int lowest = source.rows, highest = 0;
  for (int i = 0; i < count; ++i) {
    lowest = std::min(lowest, source.file_row(row_begin + i));
    highest = std::max(highest, source.file_row(row_begin + i));
  }
  const int span = highest - lowest + 1;
  if (span <= 8 * kPairRows) {
    staging.resize(static_cast<std::size_t>(span * row_bytes));
    source.read_rows(lowest, span, staging.data());
    for (int i = 0; i < count; ++i) {
      const std::byte* row = staging.data() + (source.file_row(row_begin + i) - lowest) * row_bytes;
      std::copy_n(row, row_bytes, out + i * row_bytes);
    }
  } else {
    for (int i = 0; i < count; ++i) source.read_rows(source.file_row(row_begin + i), 1, out + i * row_bytes);
  }
}

// What the numbers of a group are on a device that knows f32, bf16 and f16 only: the same for all of its matrices.
quant::Format device_format(std::span<const MatrixSource> group) {
  const auto one = [](const MatrixSource& source) {
    return quant::format_info(source.format).is_quantized() ? quant::Format::bf16 : source.format;
  };
  const quant::Format format = one(group.front());
  const bool same = std::all_of(group.begin(), group.end(), [&](const auto& source) { return one(source) == format; });
  return same ? format : quant::Format::f32;
}

// Writes rows into the layout of devices, see LinearSegment. The memory is zero before.
void pack_vectors(const MatrixSource& source, const LinearSegment& segment, int row_begin, int count,
                  const std::uint8_t* rows, std::uint8_t* base) {
  const std::int64_t row_bytes = quant::row_bytes(source.format, source.cols);
  const std::int64_t out_bytes = quant::row_bytes(segment.format, source.cols);
  std::vector<float> values(static_cast<std::size_t>(source.cols));
  std::vector<std::uint8_t> converted(static_cast<std::size_t>(out_bytes));
  const int per_pair = segment.strip_bytes == 0 ? 1 : 2;
  for (int i = 0; i < count; ++i) {
    const std::uint8_t* row = rows + i * row_bytes;
    if (segment.format != source.format) {
      quant::unpack_row(source.format, row, source.cols, values.data());
      quant::pack_row(segment.format, values.data(), source.cols, converted.data());
      row = converted.data();
    }
    const int r = row_begin + i;
    std::uint8_t* out = base + r / per_pair * segment.pair_stride + r % per_pair * segment.strip_bytes;
    for (std::int64_t at = 0; at < out_bytes; at += kVectorBytes) {
      std::copy_n(row + at, std::min(kVectorBytes, out_bytes - at), out + 2 * at);
    }
  }
}

// Packs rows [row_begin, row_begin + 32) of one matrix: into two strips, or as they are.
void pack_pair(const MatrixSource& source, const LinearSegment& segment, WeightLayout layout, int row_begin,
               std::vector<std::byte>& rows, std::vector<std::byte>& staging, std::uint8_t* base) {
  const std::int64_t row_bytes = quant::row_bytes(source.format, source.cols);
  const int count = std::min(kPairRows, source.rows - row_begin);
  if (layout == WeightLayout::rows) {
    read_packed_rows(source, row_bytes, row_begin, count, staging,
                     reinterpret_cast<std::byte*>(base + row_begin * row_bytes));
    return;
  }
  rows.resize(static_cast<std::size_t>(kPairRows * row_bytes));
  read_packed_rows(source, row_bytes, row_begin, count, staging, rows.data());
  if (layout == WeightLayout::vectors) {
    pack_vectors(source, segment, row_begin, count, reinterpret_cast<const std::uint8_t*>(rows.data()), base);
    return;
  }
  for (int strip = 0; strip < 2; ++strip) {
    const std::uint8_t* pointers[quant::kTileRows];
    for (int r = 0; r < quant::kTileRows; ++r) {
      const int row = strip * quant::kTileRows + r;
      pointers[r] = row < count ? reinterpret_cast<const std::uint8_t*>(rows.data()) + row * row_bytes : nullptr;
    }
    quant::pack_strip(source.format, pointers, source.cols,
                      base + row_begin / kPairRows * segment.pair_stride + strip * segment.strip_bytes);
  }
}

// Runs `function(item)` for every item on the team, in turn; the first exception stops the rest and is rethrown.
template <class Function>
void for_each_on_team(ThreadPool& pool, int num_items, const Function& function) {
  std::mutex mutex;
  std::exception_ptr error;
  std::atomic<int> next{0};
  pool.run([&](const Part&) {
    try {
      for (int item = next.fetch_add(1); item < num_items; item = next.fetch_add(1)) function(item);
    } catch (...) {
      next.store(num_items);
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

void check_group(std::span<const MatrixSource> group, Grouping grouping) {
  NB_ASSERT(!group.empty() && group.size() <= 3);
  for (const MatrixSource& source : group) {
    NB_CHECK(source.rows > 0 && source.cols > 0 && source.cols == group[0].cols, format, "tensor ", source.name, " is ",
             source.rows, " x ", source.cols, ", expected ", group[0].cols, " columns");
    quant::row_bytes(source.format, source.cols);  // throws unless rows hold whole blocks
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
    const std::int64_t pair_bytes = 2 * quant::row_bytes(format, round_up(source.cols, 32));
    offsets.push_back(in_turn ? static_cast<std::int64_t>(offsets.size()) * kVectorBytes : total);
    segments.push_back({format, source.rows, source.cols, nullptr, in_turn ? 0 : kVectorBytes, pair_bytes});
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

LinearWeight pack_linear(std::span<const MatrixSource> group, Grouping grouping, const std::string& requested_act,
                         WeightLayout layout, HostArena& arena, ThreadPool& pool) {
  check_group(group, grouping);
  LinearWeight weight;
  std::vector<std::int64_t> offsets;
  weight.act_type = choose_act_type(group, requested_act, layout);
  weight.bytes = lay_out(group, grouping, layout, weight.segments, offsets);
  weight.memory = arena.allocate(static_cast<std::size_t>(weight.bytes));
  for (std::size_t m = 0; m < group.size(); ++m) {
    LinearSegment& segment = weight.segments[m];
    std::uint8_t* base = weight.memory.as<std::uint8_t>() + offsets[m];
    segment.data = base;
    // A thread packs a run of pairs, so that its reads are long.
    constexpr int kPairsPerItem = 8;
    const int num_pairs = ceil_div(segment.rows, kPairRows);
    for_each_on_team(pool, ceil_div(num_pairs, kPairsPerItem), [&](int item) {
      std::vector<std::byte> rows, staging;
      const int end = std::min(num_pairs, (item + 1) * kPairsPerItem);
      for (int pair = item * kPairsPerItem; pair < end; ++pair) {
        pack_pair(group[m], segment, layout, pair * kPairRows, rows, staging, base);
      }
    });
  }
  return weight;
}

void move_to(const DeviceMemory& memory, LinearWeight& weight) {
  Buffer copy = copy_to(memory, weight.memory.data(), static_cast<std::size_t>(weight.bytes));
  for (LinearSegment& segment : weight.segments) {
    segment.data = copy.as<std::uint8_t>() + (segment.data - weight.memory.as<std::uint8_t>());
  }
  weight.memory = std::move(copy);
}

}  // namespace nb::ops
