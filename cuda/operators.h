// The operators of this library as host functions that start kernels: what its kernel table points at.
//
// All pointers inside the arguments are device pointers, arrays of the step included (cpp/ops/ops.cpp has them copied).
// `Part` is always the whole. An operator only starts kernels, on the stream of the library; nothing here waits.
#pragma once

#include "base/part.h"
#include "ops/kernel_table.h"

namespace nb::cuda {

// elementwise.cu
void embed(const ops::EmbedArgs&, const Part&);
void rms_norm(const ops::RmsNormArgs&, const Part&);
void prepare(const ops::PrepareArgs&, const Part&);
void rope(const ops::RopeArgs&, const Part&);
void kv_write(const ops::KvWriteArgs&, const Part&);
void key_deviation(const ops::KeyDeviationArgs&, const Part&);
void silu_mul(const ops::SiluMulArgs&, const Part&);
void argmax(const ops::ArgmaxArgs&, const Part&);

// matrix.cu
void linear(const ops::LinearArgs&, const Part&);
void linear_deterministic(const ops::LinearArgs&, const Part&);
void norm_qkv(const ops::NormQkvArgs&, const Part&);
void linear_residual(const ops::LinearResidualArgs&, const Part&);
void norm_gate_up(const ops::NormGateUpArgs&, const Part&);
void head(const ops::HeadArgs&, const Part&);

// sampling.cu
void sample(const ops::SampleArgs&, const Part&);

// seal.cu
void kv_seal(const ops::KvSealArgs&, const Part&);

// summarize.cu
void summarize_kv(const ops::SummarizeKvArgs&, const Part&);

// attention.cu
void attention(const ops::AttentionArgs&, const Part&);
void attention_deterministic(const ops::AttentionArgs&, const Part&);
int64_t attention_scratch_bytes(const ops::AttentionArgs&, int num_threads);

}  // namespace nb::cuda
