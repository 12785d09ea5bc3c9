// The naive twin of every kernel: the oracle of all other backends.
//
// Not for speed. Kernels are pure functions of their arguments; any thread team may run them.
#pragma once

#include "ops/kernel_table.h"

namespace nb::ops {

const KernelTable& reference_kernels();

}  // namespace nb::ops
