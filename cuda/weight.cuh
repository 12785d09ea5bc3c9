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

/// Vectors of a row, without those of scales.
template <class Number>
NB_DEVICE int vectors_of(int cols) {
  return (cols + 31) / 32 * 32 / kPerVector<Number>;
}

/// The scale of a vector of codes. `row` from weight_row(); scales follow a row's `num_vectors` vectors, 8 of 32
/// columns each to a vector.
NB_DEVICE Fp16 scale_of(const uint4* row, int num_vectors, int vector) {
  constexpr int kVectorsPerScale = 32 / kPerVector<SignedByte>;
  const int group = vector / kVectorsPerScale;
  return reinterpret_cast<const Fp16*>(row + 2 * (num_vectors + group / 8))[group % 8];
}

/// Number (row, col) of a weight.
template <class Number>
NB_DEVICE float weight_at(const ops::LinearSegment& weight, int row, int col) {
  const uint4* const vectors = weight_row(weight, row);
  const int vector = col / kPerVector<Number>;
  const float number = element<Number>(vectors[2 * vector], col % kPerVector<Number>);
  if constexpr (kIsScaled<Number>) {
    return number * to_float(scale_of(vectors, vectors_of<Number>(weight.cols), vector));
  } else {
    return number;
  }
}

/// Calls visit(Number{}) with the type of a weight's numbers.
template <class Visit>
void with_number(quant::Format format, Visit&& visit) {
  if (format == quant::Format::f32) {
    visit(float{});
  } else if (format == quant::Format::bf16) {
    visit(Bf16{});
  } else if (format == quant::Format::f16) {
    visit(Fp16{});
  } else {
    visit(SignedByte{});  // the only quantized format of devices, see quant::Format::q8_0 in args.h
  }
}

}  // namespace nb::cuda
