// The kernel tables compiled per instruction set, one function each.
//
// Calling one only returns a pointer; running its kernels needs the instruction set (backends.cpp checks).
#pragma once

#include "ops/kernel_table.h"

extern "C" {
const nb::ops::KernelTable* nb_kernels_scalar(void);
const nb::ops::KernelTable* nb_kernels_avx2(void);
const nb::ops::KernelTable* nb_kernels_avx512(void);
}

namespace nb::ops {

inline const KernelTable* scalar_kernels() { return nb_kernels_scalar(); }
inline const KernelTable* avx2_kernels() { return nb_kernels_avx2(); }
inline const KernelTable* avx512_kernels() { return nb_kernels_avx512(); }

}  // namespace nb::ops
