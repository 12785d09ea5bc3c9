// One matrix of a quantized checkpoint: several tensors of safetensors files that together are rows of one of our
// formats.
//
// Shapes and types are checked when it is opened; the parts are read, and repacked, when rows are wanted: all at once.
// Schemes: AWQ (GEMM version), GPTQ (both versions of zero points, act-order), 8-bit floats with a scale for the tensor
// or for each row. What a checkpoint's configuration says is the exporter's business. Safe from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "io/safetensors.h"

namespace nb::io {

/// A tensor in one of the files; no name: there is none.
struct CheckpointPart {
  std::size_t file = 0;  ///< index into the list of files
  std::string stored_name;
};

struct CheckpointMatrixName {
  std::string name;              ///< of the matrix in the model
  std::string scheme;            ///< "awq", "gptq", "gptq_carried", "gptq_v2" or "fp8"
  std::int64_t group_size = 0;   ///< columns that share a scale; fp8: 0
  CheckpointPart codes, scales;  ///< qweight or weight; scales or weight_scale
  CheckpointPart zeros, groups;  ///< qzeros; g_idx, if there is one
};

class CheckpointMatrix {
 public:
  /// `files` must outlive it. Throws format naming a tensor that is missing or has another shape or type than the
  /// others want, and what order_of_groups throws with the tensor's name; invalid_argument for an unknown scheme.
  CheckpointMatrix(const std::vector<std::unique_ptr<const SafetensorsFile>>& files, CheckpointMatrixName names);

  quant::Format format() const { return format_; }
  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  /// Which column of the input meets each column of the rows; empty: the same.
  const std::vector<std::int32_t>& order() const { return order_; }

  /// All rows. Throws io; format naming the tensor of a scale that is not finite or that fp16 does not hold exactly
  /// where the format has fp16 scales, or of weights that are NaN.
  std::vector<std::byte> read() const;

 private:
  const SafetensorsTensor* find(const CheckpointPart& part, const char* what) const;
  std::vector<std::byte> read_part(const CheckpointPart& part) const;
  std::vector<float> read_scales() const;
  [[noreturn]] void refuse(const CheckpointPart& part, const std::string& why) const;
  void expect(const CheckpointPart& part, const char* what, const std::string& dtype,
              const std::vector<std::int64_t>& shape) const;
  void open_int4();
  void open_fp8();
  std::vector<std::byte> read_int4() const;
  std::vector<std::byte> read_fp8() const;

  const std::vector<std::unique_ptr<const SafetensorsFile>>& files_;
  CheckpointMatrixName names_;
  quant::Format format_ = quant::Format::f32;
  std::int64_t rows_ = 0, cols_ = 0;
  std::vector<std::int32_t> order_;
};

}  // namespace nb::io
