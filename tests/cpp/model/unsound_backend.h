// A backend whose fused norm_qkv rounds normalised queries and keys to bf16 before the weights of their norms, as a
// kernel might that keeps them in 16 bits: harmless where these weights are about 1, ruinous where they are 96.
//
// The small operators are the reference, which has no fused ones, and the fused linear_residual has their bits. Counts
// the calls of its fused kernels. For models on one thread. For tests only.
#pragma once

#include <vector>

#include "base/dtype.h"
#include "ops/backends.h"
#include "ops/cpu/reference/reference.h"

namespace nb::model {

/// Times that each fused kernel of the backend ran.
struct FusedCalls {
  std::int64_t norm_qkv = 0;
  std::int64_t linear_residual = 0;
};

inline FusedCalls& fused_calls() {
  static FusedCalls calls;
  return calls;
}

inline void normalise_and_round(float* heads, std::int64_t count, int head_dim, float eps, const float* gain) {
  const std::vector<float> ones(static_cast<std::size_t>(head_dim), 1.0f);
  ops::reference_kernels().rms_norm(
      {heads, head_dim, ones.data(), eps, static_cast<std::int32_t>(count), head_dim, heads, head_dim}, Part{});
  for (std::int64_t i = 0; i < count * head_dim; ++i)
    heads[i] = bf16_to_f32(f32_to_bf16(heads[i])) * gain[i % head_dim];
}

inline void unsound_norm_qkv(const ops::NormQkvArgs& a, const Part&) {
  const ops::KernelTable& small = ops::reference_kernels();
  ++fused_calls().norm_qkv;
  const ops::Activation& act = *a.scratch_act;
  std::vector<float> normed(static_cast<std::size_t>(a.rows * a.q.cols));
  small.rms_norm({a.x, a.x_stride, a.norm_weight, a.eps, a.rows, a.q.cols, normed.data(), a.q.cols}, Part{});
  small.prepare({normed.data(), a.q.cols, a.q.cols, act}, Part{});
  small.linear({a.q, act, a.q_bias, false, a.q_out, a.q_stride}, Part{});
  small.linear({a.k, act, a.k_bias, false, a.scratch_k, a.k.rows}, Part{});
  small.linear({a.v, act, a.v_bias, false, a.scratch_v, a.v.rows}, Part{});
  const int dim = a.kv.head_dim;
  if (a.q_norm != nullptr) {
    normalise_and_round(a.q_out, std::int64_t{a.rows} * a.q.rows / dim, dim, a.eps, a.q_norm);
    normalise_and_round(a.scratch_k, std::int64_t{a.rows} * a.k.rows / dim, dim, a.eps, a.k_norm);
  }
  small.rope({a.scratch_k, a.k.rows, a.rows, a.k.rows / dim, a.key_positions, a.rope}, Part{});
  small.kv_write({a.scratch_k, a.k.rows, a.scratch_v, a.v.rows, a.rows, a.slots, a.kv, a.open}, Part{});
}

inline void sound_linear_residual(const ops::LinearResidualArgs& a, const Part&) {
  ++fused_calls().linear_residual;
  ops::reference_kernels().prepare({a.x, a.x_stride, a.weight.cols, *a.scratch_act}, Part{});
  ops::reference_kernels().linear({a.weight, *a.scratch_act, a.bias, true, a.residual, a.residual_stride}, Part{});
}

inline const ops::Backend& unsound_backend() {
  static const ops::KernelTable table = [] {
    ops::KernelTable copy = ops::reference_kernels();
    copy.name = "unsound";
    copy.norm_qkv = unsound_norm_qkv;
    copy.linear_residual = sound_linear_residual;
    return copy;
  }();
  static const ops::Backend backend{
      .name = table.name, .kernels = &table, .deterministic = &table, .device = {}, .hardware = "", .why_not = ""};
  return backend;
}

}  // namespace nb::model
