// CPU kernels compiled for neon_dotprod; see kernels.h.
#define NB_ISA_NEON
#define NB_ISA_NEON_DOTPROD
#define NB_KERNELS_NAME "neon_dotprod"
#define NB_KERNELS_FUNCTION nb_kernels_neon_dotprod
#include "ops/cpu/isa/kernels.h"
