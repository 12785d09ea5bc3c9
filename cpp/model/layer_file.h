// The file of a model's packed layers, one blob each, in the layout of a backend's kernels: made once, then read.
//
// It stands in a cache directory under a name that follows from the content of the model's files, from the layout and
// from the version of packing, so that a stale one is never found, and is made again if it is damaged. Not for
// embeddings, head and norms. Safe from several processes.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "io/blob_file.h"
#include "model/layer_weights.h"
#include "model/stream_plan.h"
#include "ops/kernel_table.h"

namespace nb::model {

/// Packs the matrices of a layer at `out`, which is zero, of the size of its blob.
using PackLayer = std::function<void(int layer, std::span<std::byte> out)>;

/// Opens the file, or makes it first with one layer in memory at a time. `layers` are planned, not packed; `name` is
/// for people. Throws io, also if there is no room for the file, or what `pack` throws.
std::shared_ptr<const io::BlobFile> open_layer_file(const StreamingOptions& options, const std::string& name,
                                                    ops::WeightLayout layout, std::span<const LayerWeights> layers,
                                                    const PackLayer& pack);

}  // namespace nb::model
