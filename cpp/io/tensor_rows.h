// Tensors of a model file as rows of f32 values.
//
// For tools and tests: one row at a time, by the reference unpacking. Not for loading (model/loader.h). Safe from any
// thread.
#pragma once

#include <cstdint>

#include "io/model_source.h"

namespace nb::io {

/// Elements along the last dimension; what a format packs together.
std::int64_t row_length(const TensorInfo& tensor);

/// All other dimensions multiplied; 1 for a vector.
std::int64_t num_rows(const TensorInfo& tensor);

/// Unpacks rows [begin, begin + count) to `out`, count * row_length values. `tensor` as find() gave it. Throws
/// invalid_argument if the tensor has fewer rows, unsupported naming the format if no one can unpack it, io if the file
/// cannot be read.
void read_rows(const ModelSource& source, const TensorInfo& tensor, std::int64_t begin, std::int64_t count, float* out);

}  // namespace nb::io
