// The list of kernel tables compiled into this library or beside it, and which of them this machine can run.
//
// NANOBRAID_BACKEND forces one or throws. Not for choosing per operator. Safe from any thread.
#pragma once

#include <string>
#include <vector>

#include "ops/kernel_table.h"
#include "tensor/device.h"

namespace nb::ops {

struct Backend {
  std::string name;                            ///< of the kernels, or of the device: "avx2", "cuda:0"
  const KernelTable* kernels = nullptr;        ///< null for a device that is not usable
  const KernelTable* deterministic = nullptr;  ///< one path for every number of rows; on the CPU the same table
  Device device;
  std::string hardware;  ///< "NVIDIA H200, 139.8 GiB"; empty for the CPU and without a device
  std::string why_not;   ///< what this machine lacks to run it; empty if nothing

  bool usable() const { return why_not.empty(); }
};

/// Every backend, slowest first, whether usable here or not. The first call looks for a GPU.
const std::vector<Backend>& compiled_backends();

/// Names of the backends this machine can run, slowest first.
std::vector<std::string> available_backends();

/// The named backend; "" or "auto" means NANOBRAID_BACKEND if set, else the fastest usable one, which is a GPU before
/// the CPU; "cpu" the same without GPUs; "cuda" the first GPU. Throws unsupported with the reason when it is unknown or
/// cannot run here.
const Backend& find_backend(const std::string& name);

/// Instruction set extensions of this processor (and enabled by the system) that kernels may use.
std::vector<std::string> cpu_features();

}  // namespace nb::ops
