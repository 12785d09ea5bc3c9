// Where tensors come from: a directory by name, and positioned reads of their bytes.
//
// The loader sees this, not a file format. Not for metadata. Safe to read from several threads at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/gguf_file.h"
#include "quant/format.h"

namespace nb::io {

struct TensorInfo {
  std::string name;
  quant::Format format;
  std::vector<std::int64_t> shape;  ///< outermost first: [rows, cols] or [n]
  std::uint64_t bytes;
  std::uint64_t offset;  ///< where the source finds it
};

class WeightSource {
 public:
  virtual ~WeightSource() = default;

  /// The tensor, alive as long as the source; null if there is none. Throws unsupported, naming tensor and type, if its
  /// format has no kernel.
  virtual const TensorInfo* find(std::string_view name) const = 0;

  /// Fills `out` with bytes [offset, offset + out.size()) of the tensor. Throws invalid_argument if the tensor has
  /// fewer, io if the file cannot be read.
  virtual void read(const TensorInfo& tensor, std::uint64_t offset, std::span<std::byte> out) const = 0;
};

/// Tensors of a GGUF file. Throws unsupported for one part of a model that is split over several files.
std::unique_ptr<WeightSource> open_gguf_weights(std::shared_ptr<const GgufFile> file);

/// The weight format of a GGUF tensor type; throws unsupported naming `tensor` and the type.
quant::Format format_of_gguf_type(std::uint32_t type, std::string_view tensor);

}  // namespace nb::io
