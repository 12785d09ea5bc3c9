// A view of a dense array: pointer, element type, up to four dimensions, and the distance between rows.
//
// Owns nothing (Buffer does). The last dimension is contiguous. Safe to copy; as thread-safe as the memory it views.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "base/dtype.h"
#include "base/error.h"

namespace nb {

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  int rank = 0;
  std::array<std::int64_t, 4> shape{};
  std::int64_t row_stride = 0;  ///< elements from one row (next-to-last index) to the next

  Tensor() = default;
  /// A contiguous view.
  Tensor(void* pointer, DType type, std::initializer_list<std::int64_t> dims) : data(pointer), dtype(type) {
    NB_ASSERT(dims.size() >= 1 && dims.size() <= 4);
    for (std::int64_t dim : dims) shape[static_cast<std::size_t>(rank++)] = dim;
    row_stride = dim(-1);
  }

  /// Size of a dimension; negative counts from the last.
  std::int64_t dim(int index) const { return shape[static_cast<std::size_t>(index < 0 ? rank + index : index)]; }

  /// Typed pointer; the caller has checked `dtype`.
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

  explicit operator bool() const { return data != nullptr; }
};

/// "f32[3, 576]".
inline std::string to_string(const Tensor& tensor) {
  std::string text = std::string(to_string(tensor.dtype)) + "[";
  for (int i = 0; i < tensor.rank; ++i) text += (i ? ", " : "") + std::to_string(tensor.dim(i));
  return text + "]";
}

/// Throws invalid_argument naming `what` unless the tensor has this type and shape (-1 matches any size).
inline void check_tensor(const Tensor& tensor, const char* what, DType dtype,
                         std::initializer_list<std::int64_t> shape) {
  bool matches = tensor.data != nullptr && tensor.dtype == dtype && tensor.rank == static_cast<int>(shape.size());
  int index = 0;
  std::string wanted;
  for (std::int64_t dim : shape) {
    matches = matches && (dim < 0 || tensor.dim(index) == dim);
    wanted += (index++ ? ", " : "") + std::to_string(dim);
  }
  NB_CHECK(matches, invalid_argument, what, ": expected ", to_string(dtype), "[", wanted, "], got ",
           tensor.data == nullptr ? "nothing" : to_string(tensor));
}

}  // namespace nb
