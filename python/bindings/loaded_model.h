// A loaded model and what its file says about ends of answers, shared by the bindings of models and of engines.
//
// Immutable once made; making it reads files and takes no GIL.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "base/ids.h"
#include "base/sha256.h"
#include "model/model.h"

namespace nb::bindings {

/// Bytes of memory for weights (0: the least), layers that stay at the beginning and at the end, layers read ahead,
/// where packed layers are kept.
using StreamingOption = std::tuple<std::int64_t, int, int, int, std::string, std::int64_t>;

struct LoadedModel {
  /// `digest_directory`: where the identity of the files is remembered; nothing: nobody asks for it.
  LoadedModel(const std::string& path, const std::string& backend, const std::string& dtype, int num_threads,
              bool deterministic, const std::optional<std::string>& digest_directory, const std::string& fusion,
              bool measure_fusion, const std::optional<StreamingOption>& streaming);

  std::unique_ptr<model::Model> model;
  std::vector<TokenId> eos_ids;
  std::optional<Digest> content;  ///< identity of the files, if asked for
  double load_seconds = 0.0;
};

}  // namespace nb::bindings
