// CPU kernels compiled for avx2; see kernels.h.
#define NB_ISA_AVX2
#define NB_KERNELS_NAME "avx2"
#define NB_KERNELS_FUNCTION nb_kernels_avx2
#include "ops/cpu/isa/kernels.h"
