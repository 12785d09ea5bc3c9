// Where the numbers of a packed weight stand on the device; drawn in cpp/ops/args.h (WeightLayout::vectors).
#pragma once

#include "cuda/number.cuh"
#include "ops/args.h"

namespace nb::cuda {

/// The first vector of a row; vector v is 2 v further.
NB_DEVICE const uint4* weight_row(const ops::LinearSegment& weight, int row) {
  const int shift = weight.strip_bytes == 0 ? 0 : 1;  // rows in turn with another matrix, or in pairs
  return reinterpret_cast<const uint4*>(weight.data + (row >> shift) * weight.pair_stride +
                                        (row & shift) * weight.strip_bytes);
}

/// Number (row, col) of a weight.
template <class Number>
NB_DEVICE float weight_at(const ops::LinearSegment& weight, int row, int col) {
  return element<Number>(weight_row(weight, row)[2 * (col / kPerVector<Number>)], col % kPerVector<Number>);
}

/// Calls visit(Number{}) with the type of a weight's numbers.
template <class Visit>
void with_number(quant::Format format, Visit&& visit) {
  if (format == quant::Format::f32) {
    visit(float{});
  } else if (format == quant::Format::bf16) {
    visit(Bf16{});
  } else {
    visit(Fp16{});
  }
}

}  // namespace nb::cuda
