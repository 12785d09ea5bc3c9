// The list of kernel tables compiled into this library, and which of them this machine can run.
//
// NANOBRAID_BACKEND forces one or throws. Not for choosing per operator. Safe from any thread.
#pragma once

#include <string>
#include <vector>

#include "ops/kernel_table.h"
#include "tensor/device.h"

namespace nb::ops {

struct Backend {
  const KernelTable* kernels;
  Device device;
  const char* requires_features;  ///< what the machine must have, for messages
  bool (*usable)();               ///< does this machine have it
  /// Kernels that keep one path for every number of rows; null where the usual ones do.
  const KernelTable* deterministic = nullptr;
};

/// Every compiled backend, slowest first, whether usable here or not.
const std::vector<Backend>& compiled_backends();

/// Names of the backends this machine can run, slowest first.
std::vector<std::string> available_backends();

/// The named backend; "" or "auto" means NANOBRAID_BACKEND if set, else the fastest usable one. Throws unsupported
/// with the reason when it is unknown or cannot run here.
const Backend& find_backend(const std::string& name);

/// Instruction set extensions of this processor (and enabled by the system) that kernels may use.
std::vector<std::string> cpu_features();

}  // namespace nb::ops
