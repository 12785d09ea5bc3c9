// CPU kernels compiled for neon_i8mm; see kernels.h.
#define NB_ISA_NEON
#define NB_ISA_NEON_I8MM
#define NB_KERNELS_NAME "neon_i8mm"
#define NB_KERNELS_FUNCTION nb_kernels_neon_i8mm
#include "ops/cpu/isa/kernels.h"
