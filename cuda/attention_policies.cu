// Attention in plans with key policies or biased runs: instances of the kernels for attention.cu to start.
//
// They are apart so that the kernels of all other plans take neither their registers nor their branches.
#include "cuda/attention_start.cuh"

namespace nb::cuda {

template void start_decode<true>(const DecodeArgs&, int heads, int rows);
template void start_prefill<true>(const ops::AttentionArgs&);

}  // namespace nb::cuda
