// What a library with kernels for a device tells the core: the only thing the two share, besides the arguments.
//
// The library exports `nb_device_plugin`; the core opens it at run time (device_loader.cpp), so that neither needs the
// other to be built or started. Plain data.
#pragma once

#include "ops/kernel_table.h"
#include "tensor/device_memory.h"

namespace nb::ops {

struct DevicePlugin {
  static constexpr int kVersion = 9;  ///< changes with anything in this header or the arguments of kernels

  int version;                       ///< kVersion of the sources it was built from
  const char* device_name;           ///< "NVIDIA H200", or "" where there is none
  std::size_t device_bytes;          ///< of its memory, in all
  const char* why_unusable;          ///< null if it can run here, else what is missing, in a few words
  const KernelTable* kernels;        ///< null if it cannot run here
  const KernelTable* deterministic;  ///< one matrix path and one attention path for every number of rows
};

using DevicePluginEntry = const DevicePlugin* (*)();
inline constexpr const char* kDevicePluginSymbol = "nb_device_plugin";

}  // namespace nb::ops
