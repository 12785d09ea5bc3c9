// CPU kernels compiled for avx512bf16; see kernels.h.
#define NB_ISA_AVX512
#define NB_ISA_AVX512BF16
#define NB_KERNELS_NAME "avx512bf16"
#define NB_KERNELS_FUNCTION nb_kernels_avx512bf16
#include "ops/cpu/isa/kernels.h"
