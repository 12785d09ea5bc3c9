// CPU kernels compiled for the baseline of the platform, without vector intrinsics; see kernels.h.
#define NB_KERNELS_NAME "scalar"
#define NB_KERNELS_FUNCTION nb_kernels_scalar
#include "ops/cpu/isa/kernels.h"
