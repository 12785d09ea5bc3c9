#include "io/tensor_rows.h"

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "text/unicode.h"

namespace nb::io {

std::int64_t row_length(const TensorInfo& tensor) { return tensor.shape.back(); }

std::int64_t num_rows(const TensorInfo& tensor) {
  std::int64_t rows = 1;
  for (std::size_t i = 0; i + 1 < tensor.shape.size(); ++i) rows *= tensor.shape[i];
  return rows;
}

void read_rows(const ModelSource& source, const TensorInfo& tensor, std::int64_t begin, std::int64_t count,
               float* out) {
  const std::string name = text::in_quotes(tensor.name);
  NB_CHECK(tensor.format.has_value(), unsupported, source.path(), ": tensor ", name, " has format ", tensor.format_name,
           ", which is not offered");
  const std::int64_t rows = num_rows(tensor), length = row_length(tensor);
  NB_CHECK(begin >= 0 && begin <= rows && count >= 0 && count <= rows - begin, invalid_argument, source.path(),
           ": rows ", begin, " to ", begin, " + ", count, " are outside tensor ", name, ", which has ", rows);
  constexpr std::int64_t kPieceBytes = 1 << 20;
  const std::int64_t row_bytes = quant::row_bytes(*tensor.format, length);
  const std::int64_t rows_at_once =
      std::clamp<std::int64_t>(kPieceBytes / row_bytes, 1, std::max<std::int64_t>(count, 1));
  std::vector<std::byte> packed;
  for (std::int64_t done = 0; done < count; done += rows_at_once) {
    const std::int64_t some = std::min(rows_at_once, count - done);
    packed.resize(static_cast<std::size_t>(some * row_bytes));
    source.read(tensor, static_cast<std::uint64_t>((begin + done) * row_bytes), packed);
    for (std::int64_t i = 0; i < some; ++i) {
      quant::unpack_row(*tensor.format, reinterpret_cast<const std::uint8_t*>(packed.data()) + i * row_bytes, length,
                        out + (done + i) * length);
    }
  }
}

}  // namespace nb::io
