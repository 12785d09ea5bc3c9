// A model file of either format: metadata, a directory of tensors, and positioned reads of their bytes.
//
// The loader and the families see this, not a file format. Safe to read from several threads at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/metadata.h"
#include "io/progress.h"
#include "quant/format.h"

namespace nb::io {

/// How a file is laid out; what follows from it for the model is the families' business.
enum class FileKind { gguf, braid, safetensors };

/// "GGUF", "braid", "safetensors".
const char* to_string(FileKind kind);

struct TensorInfo {
  std::string name;
  std::optional<quant::Format> format;  ///< nothing if no kernel reads it
  std::string format_name;              ///< as the file's own format spells it, e.g. "Q4_K"
  std::vector<std::int64_t> shape;      ///< outermost first: [rows, cols] or [n]
  std::uint64_t bytes = 0;              ///< 0 if the format is unknown
  std::uint64_t offset = 0;             ///< where the source finds it
  std::uint32_t part = 0;               ///< which file of a split model
};

/// A range of a file, for people.
struct SectionInfo {
  std::string name;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
};

class ModelSource {
 public:
  virtual ~ModelSource() = default;

  virtual FileKind kind() const = 0;
  /// Of the format, as the file says.
  virtual std::uint32_t version() const = 0;
  /// Of all parts.
  virtual std::uint64_t file_bytes() const = 0;
  /// The files of a split model, in order; otherwise the one.
  virtual std::vector<std::string> parts() const { return {path()}; }
  virtual const Metadata& metadata() const = 0;
  /// In file order, those without a kernel too.
  virtual const std::vector<TensorInfo>& tensors() const = 0;

  /// The tensor, alive as long as the source; null if there is none. Throws unsupported, naming tensor and format, if
  /// no kernel reads it: `format` of what it gives is never empty.
  virtual const TensorInfo* find(std::string_view name) const = 0;

  /// Fills `out` with bytes [offset, offset + out.size()) of the tensor. Throws invalid_argument if the tensor has
  /// fewer, io if the file cannot be read.
  virtual void read(const TensorInfo& tensor, std::uint64_t offset, std::span<std::byte> out) const = 0;

  /// SHA-256 of the contents in hexadecimal, as the file says; empty for kinds that have none.
  virtual std::string fingerprint() const { return {}; }
  /// Empty for kinds that have no directory of sections.
  virtual std::vector<SectionInfo> sections() const { return {}; }

  /// Reads everything and compares it with the file's checksums; throws format naming what differs. False, at once, for
  /// kinds that have no checksums.
  virtual bool verify(const ProgressFunction& progress = {}) const {
    static_cast<void>(progress);
    return false;
  }

  /// Lets the system take the memory of what was read so far; it is read again when needed.
  virtual void release_pages() const {}

  const std::string& path() const { return metadata().path(); }

 protected:
  /// Throws invalid_argument unless `size` bytes from `offset` on are inside the tensor.
  void check_inside(const TensorInfo& tensor, std::uint64_t offset, std::size_t size) const;
};

/// Opens a model file, whichever format its first bytes say. Reads no tensor. Throws io, format or unsupported, naming
/// file and offset.
std::shared_ptr<const ModelSource> open_model(const std::string& path);

}  // namespace nb::io
