// The kernel tables compiled per instruction set, one function each.
//
// Calling one only returns a pointer; running its kernels needs the instruction set (backends.cpp checks).
#pragma once

#include "ops/kernel_table.h"

extern "C" {
const nb::ops::KernelTable* nb_kernels_scalar(void);
const nb::ops::KernelTable* nb_kernels_avx2(void);
const nb::ops::KernelTable* nb_kernels_avxvnni(void);
const nb::ops::KernelTable* nb_kernels_avx512(void);
const nb::ops::KernelTable* nb_kernels_avx512bf16(void);
const nb::ops::KernelTable* nb_kernels_neon(void);
const nb::ops::KernelTable* nb_kernels_neon_dotprod(void);
const nb::ops::KernelTable* nb_kernels_neon_i8mm(void);
}

namespace nb::ops {

inline const KernelTable* scalar_kernels() { return nb_kernels_scalar(); }
inline const KernelTable* avx2_kernels() { return nb_kernels_avx2(); }
inline const KernelTable* avxvnni_kernels() { return nb_kernels_avxvnni(); }
inline const KernelTable* avx512_kernels() { return nb_kernels_avx512(); }
inline const KernelTable* avx512bf16_kernels() { return nb_kernels_avx512bf16(); }
inline const KernelTable* neon_kernels() { return nb_kernels_neon(); }
inline const KernelTable* neon_dotprod_kernels() { return nb_kernels_neon_dotprod(); }
inline const KernelTable* neon_i8mm_kernels() { return nb_kernels_neon_i8mm(); }

}  // namespace nb::ops
