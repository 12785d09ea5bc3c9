#include "ops/pack_queue.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>

#include "base/align.h"
#include "base/dtype.h"
#include "base/error.h"
#include "ops/column_order.h"
#include "quant/format.h"
#include "quant/tile16.h"

namespace nb::ops {
namespace {

// Read at once: long for a disk, and still in the second cache when it is packed.
constexpr std::int64_t kReadBytes = std::int64_t{256} << 10;

// Runs `function(member, item)` for every item on the team, in turn; the first exception stops the rest and is
// rethrown.
template <class Function>
void for_each_on_team(ThreadPool& pool, int num_items, const Function& function) {
  std::mutex mutex;
  std::exception_ptr error;
  std::atomic<int> next{0};
  pool.run([&](const Part& part) {
    try {
      for (int item = next.fetch_add(1); item < num_items; item = next.fetch_add(1)) function(part.index, item);
    } catch (...) {
      next.store(num_items);
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// A row of codes for a device: signed bytes, then scales.
void make_code_row(const MatrixSource& source, const std::uint8_t* row, std::vector<std::uint8_t>& out) {
  const quant::FormatInfo& info = quant::format_info(source.format);
  const int num_groups = ceil_div(source.cols, quant::kGroupCols);
  out.assign(static_cast<std::size_t>(device_row_bytes(quant::Format::q8_0, source.cols)), 0);
  std::uint8_t* const scales = out.data() + num_groups * quant::kGroupCols;
  for (int g = 0; g < num_groups; ++g) {
    quant::CodeGroup group;
    const int count = std::min(quant::kGroupCols, source.cols - g * quant::kGroupCols);
    info.read_group(row, g, count, group);
    for (int i = 0; i < count; ++i) {
      out[static_cast<std::size_t>(g * quant::kGroupCols + i)] =
          static_cast<std::uint8_t>(group.codes[i] - info.zero_of(group));
    }
    const std::uint16_t scale = f32_to_f16(group.scales[0]);  // as it was
    std::memcpy(scales + g * static_cast<int>(sizeof(scale)), &scale, sizeof(scale));
  }
}

// Writes a row into the layout of devices, see LinearSegment. The memory is zero before.
void pack_vectors(const MatrixSource& source, const LinearSegment& segment, int r, const std::uint8_t* row,
                  std::vector<float>& values, std::vector<std::uint8_t>& converted, std::uint8_t* base) {
  std::int64_t out_bytes = 0;
  if (segment.format == quant::Format::q8_0) {
    make_code_row(source, row, converted);
    row = converted.data();
    out_bytes = static_cast<std::int64_t>(converted.size());
  } else if (out_bytes = quant::row_bytes(segment.format, source.cols);
             segment.format != source.format || source.order != nullptr) {
    values.resize(static_cast<std::size_t>(source.cols));
    converted.resize(static_cast<std::size_t>(out_bytes));
    quant::unpack_row(source.format, row, source.cols, values.data());
    if (source.order != nullptr) restore_order(*source.order, values);
    quant::pack_row(segment.format, values.data(), source.cols, converted.data());
    row = converted.data();
  }
  const int per_pair = segment.strip_bytes == 0 ? 1 : 2;
  std::uint8_t* out = base + r / per_pair * segment.pair_stride + r % per_pair * segment.strip_bytes;
  for (std::int64_t at = 0; at < out_bytes; at += kDeviceVectorBytes) {
    std::copy_n(row + at, std::min(kDeviceVectorBytes, out_bytes - at), out + 2 * at);
  }
}

}  // namespace

// What one member of the team reads into, and where the rows of a piece are in it.
struct PackQueue::Staging {
  std::vector<std::byte> bytes;
  std::vector<const std::uint8_t*> rows;
  std::vector<float> values;
  std::vector<std::uint8_t> converted;

  /// Reads rows [begin, begin + count) of the packed matrix. Where the file has them in another order, what lies close
  /// together is read at once.
  void read(const MatrixSource& source, int begin, int count) {
    const std::int64_t row_bytes = quant::row_bytes(source.format, source.cols);
    const auto file_row = [&](int i) { return source.file_row ? source.file_row(begin + i) : begin + i; };
    int lowest = file_row(0), highest = lowest;
    for (int i = 1; source.file_row && i < count; ++i) {
      lowest = std::min(lowest, file_row(i));
      highest = std::max(highest, file_row(i));
    }
    const int span = source.file_row ? highest - lowest + 1 : count;
    const bool is_close = span <= count + 8 * kPairRows;
    const int num_read = is_close ? span : count;
    const auto wanted = static_cast<std::size_t>(num_read * row_bytes);
    if (bytes.size() < wanted) bytes.resize(wanted);
    if (is_close) source.read_rows(lowest, span, bytes.data());
    rows.resize(static_cast<std::size_t>(count));
    for (int i = 0; i < count; ++i) {
      std::byte* const row = bytes.data() + (is_close ? file_row(i) - lowest : i) * row_bytes;
      if (!is_close) source.read_rows(file_row(i), 1, row);
      rows[static_cast<std::size_t>(i)] = reinterpret_cast<const std::uint8_t*>(row);
    }
  }
};

std::vector<PackQueue::Piece> PackQueue::cut() const {
  std::vector<Piece> pieces;
  for (const Matrix& matrix : matrices_) {
    const LinearSegment& segment = matrix.segment;
    // Of vectors the stride is that of one or two rows.
    const int rows_per_stride = layout_ != WeightLayout::vectors ? kPairRows : segment.strip_bytes == 0 ? 1 : 2;
    const std::int64_t stride = segment.pair_stride * (kPairRows / rows_per_stride);
    const int num_pairs = ceil_div(segment.rows, kPairRows);
    for (int pair = 0; pair < num_pairs; ++pair) {
      const std::uintptr_t page = reinterpret_cast<std::uintptr_t>(matrix.base + pair * stride) / kHugePageBytes;
      if (pair > 0 && pieces.back().page == page) {
        ++pieces.back().end;
      } else {
        pieces.push_back({page, &matrix, pair, pair + 1});
      }
    }
  }
  // Matrices whose rows take turns share pages.
  std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.page < b.page; });
  return pieces;
}

void PackQueue::pack(const Piece& piece, Staging& staging) const {
  const auto& [source, segment, base] = *piece.matrix;
  const std::int64_t row_bytes = quant::row_bytes(source.format, source.cols);
  const int at_once = static_cast<int>(std::clamp<std::int64_t>(kReadBytes / (kPairRows * row_bytes), 1, 1 << 16));
  for (int begin = piece.begin; begin < piece.end; begin += at_once) {
    const int first = begin * kPairRows;
    const int count = std::min(std::min(begin + at_once, piece.end) * kPairRows, segment.rows) - first;
    staging.read(source, first, count);
    const auto row = [&](int i) { return i < count ? staging.rows[static_cast<std::size_t>(i)] : nullptr; };
    if (layout_ == WeightLayout::tile16) {
      for (int i = 0; i < round_up(count, kPairRows); i += quant::kTileRows) {
        const std::uint8_t* pointers[quant::kTileRows];
        for (int r = 0; r < quant::kTileRows; ++r) pointers[r] = row(i + r);
        const int strip = (first + i) / quant::kTileRows;
        quant::pack_strip(source.format, pointers, source.cols,
                          base + strip / 2 * segment.pair_stride + strip % 2 * segment.strip_bytes);
      }
    } else if (layout_ == WeightLayout::vectors) {
      for (int i = 0; i < count; ++i) {
        pack_vectors(source, segment, first + i, row(i), staging.values, staging.converted, base);
      }
    } else {
      for (int i = 0; i < count; ++i) std::copy_n(row(i), row_bytes, base + (first + i) * row_bytes);
    }
  }
}

void PackQueue::run(ThreadPool& pool, const Progress& progress) {
  const std::vector<Piece> pieces = cut();
  std::vector<std::size_t> items;  // the first piece of each page
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    if (i == 0 || pieces[i].page != pieces[i - 1].page) items.push_back(i);
  }
  const int num_items = static_cast<int>(items.size());
  items.push_back(pieces.size());
  const auto bytes_of = [](const Piece& piece) {
    const MatrixSource& source = piece.matrix->source;
    return quant::row_bytes(source.format, source.cols) *
           (std::min(piece.end * kPairRows, source.rows) - piece.begin * kPairRows);
  };
  std::int64_t total = 0;
  for (const Piece& piece : pieces) total += bytes_of(piece);
  std::atomic<std::int64_t> done{0};
  std::vector<Staging> staging(static_cast<std::size_t>(pool.num_threads()));
  for_each_on_team(pool, num_items, [&](int member, int item) {
    const auto at = static_cast<std::size_t>(item);
    for (std::size_t i = items[at]; i < items[at + 1]; ++i) {
      pack(pieces[i], staging[static_cast<std::size_t>(member)]);
      done += bytes_of(pieces[i]);
    }
    if (member == 0 && progress) progress(done, total);
  });
  matrices_.clear();
}

}  // namespace nb::ops
