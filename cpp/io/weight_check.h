// Looks for weights that are not finite: NaN and infinity spread through every later value.
//
// Reads every tensor once, by the reference unpacking. Not for loading, which looks at scales and vectors only
// (quant/finite.h). Safe from any thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "io/model_source.h"

namespace nb::io {

struct NonfiniteTensor {
  std::string name;
  std::uint64_t num_nan = 0;
  std::uint64_t num_infinite = 0;
};

struct WeightCheck {
  std::vector<NonfiniteTensor> nonfinite;  ///< in file order
  std::vector<TensorInfo> skipped;         ///< of formats that nothing here unpacks
};

/// Throws io if the file cannot be read.
WeightCheck check_weights(const ModelSource& source, const ProgressFunction& progress = {});

}  // namespace nb::io
