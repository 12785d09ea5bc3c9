#include "io/tensor_rows.h"

#include <algorithm>
#include <cmath>
#include <span>
#include <string_view>
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

std::string order_name(const std::string& matrix_name) {
  constexpr std::string_view kSuffix = ".weight";
  const std::size_t cut = matrix_name.ends_with(kSuffix) ? matrix_name.size() - kSuffix.size() : matrix_name.size();
  return matrix_name.substr(0, cut) + ".order";
}

std::vector<std::int32_t> read_order(const ModelSource& source, const std::string& matrix_name, std::int64_t cols) {
  const std::string name = order_name(matrix_name);
  const TensorInfo* tensor = source.find(name);
  if (tensor == nullptr) return {};
  NB_CHECK(tensor->format == quant::Format::f32 && tensor->shape == std::vector<std::int64_t>{cols}, format,
           source.path(), ": tensor ", text::in_quotes(name), " is not ", cols, " values of f32");
  std::vector<float> values(static_cast<std::size_t>(cols));
  source.read(*tensor, 0, std::as_writable_bytes(std::span(values)));
  std::vector<std::int32_t> order;
  std::vector<bool> seen(values.size());
  for (const float value : values) {
    const bool is_column = value >= 0.0f && value < static_cast<float>(cols) && value == std::floor(value);
    const auto column = static_cast<std::size_t>(is_column ? value : 0.0f);
    NB_CHECK(is_column && !seen[column], format, source.path(), ": tensor ", text::in_quotes(name),
             " is no permutation of ", cols, " columns: it holds ", value, is_column ? " twice" : "");
    seen[column] = true;
    order.push_back(static_cast<std::int32_t>(column));
  }
  return order;
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
  const std::vector<std::int32_t> order =
      tensor.shape.size() == 2 ? read_order(source, tensor.name, length) : std::vector<std::int32_t>{};
  std::vector<float> sorted(order.size());
  for (std::int64_t done = 0; done < count; done += rows_at_once) {
    const std::int64_t some = std::min(rows_at_once, count - done);
    packed.resize(static_cast<std::size_t>(some * row_bytes));
    source.read(tensor, static_cast<std::uint64_t>((begin + done) * row_bytes), packed);
    for (std::int64_t i = 0; i < some; ++i) {
      float* const row = out + (done + i) * length;
      quant::unpack_row(*tensor.format, reinterpret_cast<const std::uint8_t*>(packed.data()) + i * row_bytes, length,
                        order.empty() ? row : sorted.data());
      for (std::size_t k = 0; k < order.size(); ++k) row[order[k]] = sorted[k];
    }
  }
}

}  // namespace nb::io
