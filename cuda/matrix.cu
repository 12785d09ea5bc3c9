// Products of prepared rows, and the one that ends attention: out (+)= x W^T + bias.
#include "cuda/gemm.h"
#include "cuda/gemv.cuh"
#include "cuda/launch.cuh"
#include "cuda/operators.h"

namespace nb::cuda {
namespace {

/// Sums go to `out`, with a bias and on top of what is there where asked for.
template <int M>
struct LinearJob {
  int units;
  const ops::LinearSegment& weight;
  const float* bias;
  bool accumulate;
  int rows;  ///< of x
  float* out;
  std::int64_t out_stride;

  NB_DEVICE const uint4* row(int unit, int pair, int parity) const {
    return weight_row(weight, existing_row(weight, unit * kUnitRows + pair * 2 + parity));
  }

  NB_DEVICE void finish(int unit, const Totals<M>& totals, int thread) const {
    const int at = thread % kUnitRows, m = thread / kUnitRows;
    const int row = unit * kUnitRows + at;
    if (m >= rows || m >= M || row >= weight.rows) return;
    float total = totals(at / 2, m, at % 2);
    if (bias != nullptr) total += bias[row];
    float* place = out + m * out_stride + row;
    *place = accumulate ? *place + total : total;
  }
};

/// grid: units.
template <class Number, class Act, int M>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks<M>) linear_kernel(ops::LinearArgs a) {
  grid_trigger();
  LinearJob<M> job{
      (a.weight.rows + kUnitRows - 1) / kUnitRows, a.weight, a.bias, a.accumulate, a.x.rows, a.out, a.out_stride};
  multiply<Number, Act, M>(job, a.weight.cols, [&] {
    return GlobalRows<Act>{reinterpret_cast<const Act*>(a.x.values), a.x.rows, a.x.cols};
  });
}

/// grid: blocks_for_units().
template <class Number, class Act, int M>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks<M>) linear_residual_kernel(ops::LinearResidualArgs a) {
  grid_trigger();
  LinearJob<M> job{
      (a.weight.rows + kUnitRows - 1) / kUnitRows, a.weight, a.bias, true, a.rows, a.residual, a.residual_stride};
  multiply<Number, Act, M>(job, a.weight.cols, [&] {
    const auto row_of = [&](int m) { return a.x + m * a.x_stride; };
    return stage_rows<Act, M, false>(row_of, a.rows, a.weight.cols, nullptr, 0.0f);
  });
}

template <class Act>
void linear_of(const ops::LinearArgs& a) {
  with_number(a.weight.format, [&](auto number) {
    for (int begin = 0; begin < a.x.rows; begin += kMaxColumns) {
      ops::LinearArgs group = a;
      group.x.rows = a.x.rows - begin < kMaxColumns ? a.x.rows - begin : kMaxColumns;
      group.x.values = reinterpret_cast<float*>(reinterpret_cast<Act*>(a.x.values) + std::int64_t{begin} * a.x.cols);
      group.out = a.out + begin * a.out_stride;
      with_columns(group.x.rows, [&](auto columns) {
        launch({.name = "linear_kernel", .grid_x = static_cast<unsigned>(units_of(a.weight))},
               linear_kernel<decltype(number), Act, columns.value>, group);
      });
    }
  });
}

}  // namespace

void linear_deterministic(const ops::LinearArgs& a, const Part&) {
  if (a.x.type == ops::ActType::bf16) {
    linear_of<Bf16>(a);
  } else {
    linear_of<float>(a);
  }
}

void linear(const ops::LinearArgs& a, const Part& part) {
  if (a.x.rows > kMaxColumns) {
    gemm(a);
  } else {
    linear_deterministic(a, part);
  }
}

void linear_residual(const ops::LinearResidualArgs& a, const Part&) {
  const auto run = [&](auto number, auto act, auto columns, int begin, int count) {
    using Act = decltype(act);
    ops::LinearResidualArgs group = a;
    group.rows = count;
    group.x = a.x + begin * a.x_stride;
    group.residual = a.residual + begin * a.residual_stride;
    launch({.name = "linear_residual_kernel",
            .grid_x = static_cast<unsigned>(blocks_for_units(units_of(a.weight))),
            .dynamic_shared_bytes = staged_bytes<Act>(count, a.weight.cols)},
           linear_residual_kernel<decltype(number), Act, columns.value>, group);
  };
  in_staged_groups(a.weight.format, a.act_type, a.rows, a.weight.cols, run);
}

}  // namespace nb::cuda
