// Writes a .braid file: directory first, then tensor after tensor as the caller produces them.
//
// Holds no tensor data. The file appears under its name only when it is complete and on disk: it is written beside it
// under a hidden name and renamed by finish(). The same input gives the same bytes. Not for changing a file. Used by
// one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/sha256.h"
#include "io/metadata_writer.h"
#include "io/new_file.h"
#include "quant/format.h"

namespace nb::io {

struct BraidTensorSpec {
  std::string name;
  quant::Format format;
  std::vector<std::int64_t> shape;  ///< outermost first; the last dimension is a row
};

class BraidWriter {
 public:
  /// `tensors` in order of execution, a layer's together. Takes the disk space at once where the file system can.
  /// Throws invalid_argument naming the tensor for what a reader would refuse; io with the path if the file cannot be
  /// created or there is no room.
  BraidWriter(std::string path, const MetadataWriter& metadata, std::vector<BraidTensorSpec> tensors);
  /// Leaves nothing behind unless finish() has been called.
  ~BraidWriter();
  BraidWriter(const BraidWriter&) = delete;
  BraidWriter& operator=(const BraidWriter&) = delete;

  /// Appends to tensor `index`: tensors in order, each whole before the next. Throws invalid_argument, which changes
  /// nothing, or io.
  void write(std::size_t index, std::span<const std::byte> bytes);

  /// Completes the file, waits until it is on disk and gives it its name, replacing a file that has it. Throws
  /// invalid_argument naming the first incomplete tensor, or io.
  void finish();

  /// Removes what has been written; afterwards write() and finish() throw. Nothing after finish().
  void abandon() noexcept;

  const std::string& path() const { return path_; }
  std::uint64_t file_bytes() const { return file_bytes_; }
  /// The name under which the file is being written.
  const std::string& temporary_path() const { return temporary_path_; }
  bool is_finished() const { return is_finished_; }

 private:
  struct Tensor {
    BraidTensorSpec spec;
    std::uint64_t offset;
    std::uint64_t bytes;
    std::uint64_t written = 0;
    std::uint32_t checksum = 0;
  };

  void add_tensor(BraidTensorSpec spec);
  void check_names() const;
  void place_tensors();
  std::vector<std::byte> tensor_directory() const;
  std::vector<std::byte> head(std::span<const std::byte> directory, const Digest& fingerprint) const;
  void skip_complete();

  std::string path_;
  std::string temporary_path_;
  std::vector<std::byte> metadata_;  // the section
  std::vector<Tensor> tensors_;
  std::uint64_t tensors_offset_ = 0, data_offset_ = 0, file_bytes_ = 0;
  std::size_t current_ = 0;  // the first tensor that is not complete
  Sha256 hash_;
  std::optional<NewFile> file_;
  bool is_finished_ = false;
};

}  // namespace nb::io
