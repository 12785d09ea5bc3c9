// Finds and opens the library with kernels for a GPU (device_plugin.h), and says why there is none.
//
// The library lies beside the shared object or the program that this code is linked into, or where
// NANOBRAID_CUDA_LIBRARY says; without it, or without a GPU, everything else works. Safe from any thread.
#pragma once

#include <string>

#include "ops/device_plugin.h"

namespace nb::ops {

struct LoadedPlugin {
  const DevicePlugin* plugin = nullptr;  ///< stays loaded until the process ends; null if none could be opened
  std::string why_not;                   ///< what is missing, in a few words; empty if its kernels can run here
};

/// Opens one library: wrong ones (another version, no such symbol, operators missing) are told in `why_not`.
LoadedPlugin load_device_plugin(const std::string& path);

/// The library of this installation, opened once.
const LoadedPlugin& device_plugin();

/// Names of the operators that every backend must have and `table` lacks, separated by commas.
std::string missing_operators(const KernelTable& table);

}  // namespace nb::ops
