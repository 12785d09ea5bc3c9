// CPU kernels compiled for neon; see kernels.h.
#define NB_ISA_NEON
#define NB_KERNELS_NAME "neon"
#define NB_KERNELS_FUNCTION nb_kernels_neon
#include "ops/cpu/isa/kernels.h"
