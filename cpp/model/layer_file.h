// The file of a model's packed layers, one blob each, in the layout of a backend's kernels: made once, then read.
//
// It stands in a cache directory under a name that follows from the content of the model's files, from the layout and
// from the version of packing, so that a stale one is never found, and is made again if it is damaged. Not for
// embeddings, head and norms. Safe from several processes.
#pragma once

#include <functional>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <utility>

#include "io/blob_cache.h"
#include "model/layer_weights.h"
#include "model/stream_plan.h"
#include "ops/kernel_table.h"

namespace nb::model {

/// Packs the matrices of a layer at `out`, which is zero, of the size of its blob.
using PackLayer = std::function<void(int layer, std::span<std::byte> out)>;

/// Opens the file, or makes it first with one layer in memory at a time. `layers` are planned, not packed; `name` is
/// for people. Throws io, also if there is no room for the file; invalid_argument naming cache_bytes if that is too
/// little; or what `pack` throws.
std::shared_ptr<const io::BlobFile> open_layer_file(const StreamingOptions& options, const std::string& name,
                                                    ops::WeightLayout layout, std::span<const LayerWeights> layers,
                                                    const PackLayer& pack);

/// Reads the layers of a file. One that cannot be read, or is damaged, is packed again, once, and put back into the
/// file if it has the checksum of what was there. For one thread at a time.
class LayerReader {
 public:
  /// `pack` gives the bytes that the file was made of, or throws; called by read().
  LayerReader(std::shared_ptr<const io::BlobFile> file, PackLayer pack)
      : file_(std::move(file)), pack_(std::move(pack)) {}

  /// See BlobFile::read. Throws what it throws for a layer that was packed again before, or cannot be: then the file is
  /// removed, and the message says what to do.
  void read(int layer, std::span<std::byte> out);

 private:
  bool pack_again(int layer, std::span<std::byte> blob, const std::string& damage, std::string& why_not);

  std::shared_ptr<const io::BlobFile> file_;
  PackLayer pack_;
  std::set<int> packed_again_;
};

}  // namespace nb::model
