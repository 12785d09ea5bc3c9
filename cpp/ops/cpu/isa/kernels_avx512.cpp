// CPU kernels compiled for avx512; see kernels.h.
#define NB_ISA_AVX512
#define NB_KERNELS_NAME "avx512"
#define NB_KERNELS_FUNCTION nb_kernels_avx512
#include "ops/cpu/isa/kernels.h"
