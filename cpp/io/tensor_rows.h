// Tensors of a model file as rows of f32 values.
//
// For tools and tests: one row at a time, by the reference unpacking. Not for loading (model/loader.h). Safe from any
// thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "io/model_source.h"

namespace nb::io {

/// Elements along the last dimension; what a format packs together.
std::int64_t row_length(const TensorInfo& tensor);

/// All other dimensions multiplied; 1 for a vector.
std::int64_t num_rows(const TensorInfo& tensor);

/// "blk.0.attn_q.order" of "blk.0.attn_q.weight": a tensor f32[cols] that says, if it is there, which column of the
/// input meets each column of the matrix.
std::string order_name(const std::string& matrix_name);

/// What that tensor says; empty if there is none. Throws format naming it unless it is a permutation of 0 .. cols - 1.
std::vector<std::int32_t> read_order(const ModelSource& source, const std::string& matrix_name, std::int64_t cols);

/// Unpacks rows [begin, begin + count) to `out`, count * row_length values, in the order of the input. `tensor` as
/// find() gave it. Throws invalid_argument if the tensor has fewer rows, unsupported naming the format if no one can
/// unpack it, io if the file cannot be read.
void read_rows(const ModelSource& source, const TensorInfo& tensor, std::int64_t begin, std::int64_t count, float* out);

}  // namespace nb::io
