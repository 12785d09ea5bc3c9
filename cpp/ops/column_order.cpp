#include "ops/column_order.h"

#include <algorithm>

#include "base/error.h"

namespace nb::ops {
namespace {

// Column i of what it returns is column order[i] of x.
Tensor rearranged(Tensor x, const std::vector<std::int32_t>& order, ExecContext& ctx) {
  NB_ASSERT(ctx.kernels->memory == nullptr && x.dim(1) == static_cast<std::int64_t>(order.size()));
  const std::int64_t rows = x.dim(0), cols = x.dim(1);
  Tensor out(ctx.workspace->allocate_array<float>(static_cast<std::size_t>(rows * cols)), DType::f32, {rows, cols});
  ctx.pool->run([&](const Part& part) {
    const std::int64_t end = rows * (part.index + 1) / part.count;
    for (std::int64_t t = rows * part.index / part.count; t < end; ++t) {
      const float* const from = x.as<const float>() + t * x.row_stride;
      float* const to = out.as<float>() + t * out.row_stride;
      std::transform(order.begin(), order.end(), to, [&](std::int32_t column) { return from[column]; });
    }
  });
  return out;
}

}  // namespace

void check_order(const std::string& name, const std::vector<std::int32_t>& order, std::int32_t cols) {
  NB_CHECK(order.size() == static_cast<std::size_t>(cols), format, "tensor ", name, ": the order of its columns has ",
           order.size(), " entries, it has ", cols, " columns");
  std::vector<bool> seen(order.size());
  for (const std::int32_t column : order) {
    NB_CHECK(column >= 0 && column < cols && !seen[static_cast<std::size_t>(column)], format, "tensor ", name,
             ": the order of its columns names column ", column, column >= 0 && column < cols ? " twice" : ", of ",
             column >= 0 && column < cols ? std::string() : std::to_string(cols));
    seen[static_cast<std::size_t>(column)] = true;
  }
}

void restore_order(const std::vector<std::int32_t>& order, std::vector<float>& row) {
  NB_ASSERT(order.size() == row.size());
  const std::vector<float> sorted = row;
  for (std::size_t i = 0; i < order.size(); ++i) row[static_cast<std::size_t>(order[i])] = sorted[i];
}

std::array<Activation, 3> prepare_each(Tensor x, const LinearWeight& weight, ExecContext& ctx) {
  std::array<Activation, 3> out{};
  const std::size_t count = weight.segments.size();
  NB_ASSERT(count <= out.size());
  const auto order = [&](std::size_t i) { return weight.is_ordered() ? weight.orders[i] : nullptr; };
  for (std::size_t i = 0; i < count; ++i) {
    std::size_t same = 0;
    while (order(same) != order(i)) ++same;
    if (same < i) {
      out[i] = out[same];
    } else {
      out[i] = prepare(order(i) == nullptr ? x : rearranged(x, *order(i), ctx), weight.act_type, ctx);
    }
  }
  return out;
}

}  // namespace nb::ops
