// CPU kernels compiled for avxvnni; see kernels.h.
#define NB_ISA_AVX2
#define NB_ISA_AVXVNNI
#define NB_KERNELS_NAME "avxvnni"
#define NB_KERNELS_FUNCTION nb_kernels_avxvnni
#include "ops/cpu/isa/kernels.h"
