#include "io/weight_check.h"

#include <algorithm>
#include <cmath>

#include "io/tensor_rows.h"

namespace nb::io {
namespace {

constexpr std::int64_t kPieceValues = 1 << 18;

NonfiniteTensor count_nonfinite(const ModelSource& source, const TensorInfo& tensor, std::vector<float>& values) {
  NonfiniteTensor found{.name = tensor.name};
  const std::int64_t rows = num_rows(tensor), length = row_length(tensor);
  const std::int64_t rows_at_once = std::max<std::int64_t>(kPieceValues / length, 1);
  for (std::int64_t row = 0; row < rows; row += rows_at_once) {
    const std::int64_t some = std::min(rows_at_once, rows - row);
    values.resize(static_cast<std::size_t>(some * length));
    read_rows(source, tensor, row, some, values.data());
    for (const float value : values) {
      found.num_nan += std::isnan(value) ? 1 : 0;
      found.num_infinite += std::isinf(value) ? 1 : 0;
    }
  }
  return found;
}

}  // namespace

WeightCheck check_weights(const ModelSource& source, const ProgressFunction& progress) {
  WeightCheck check;
  std::vector<float> values;
  std::uint64_t all = 0, done = 0;
  for (const TensorInfo& tensor : source.tensors()) all += tensor.bytes;
  for (const TensorInfo& tensor : source.tensors()) {
    if (tensor.format) {
      NonfiniteTensor found = count_nonfinite(source, tensor, values);
      if (found.num_nan > 0 || found.num_infinite > 0) check.nonfinite.push_back(std::move(found));
    } else {
      check.skipped.push_back(tensor);
    }
    done += tensor.bytes;
    if (progress) progress(done, all);
  }
  return check;
}

}  // namespace nb::io
