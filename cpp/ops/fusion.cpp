#include "ops/fusion.h"

#include "ops/ops.h"

namespace nb::ops {

const char* to_string(FusedOp op) {
  switch (op) {
    case FusedOp::norm_qkv:
      return "norm_qkv";
    case FusedOp::linear_residual:
      return "linear_residual";
    case FusedOp::norm_gate_up:
      return "norm_gate_up";
    case FusedOp::head:
      return "head";
  }
  return "?";
}

bool has_kernel(const KernelTable& table, FusedOp op) {
  switch (op) {
    case FusedOp::norm_qkv:
      return table.norm_qkv != nullptr;
    case FusedOp::linear_residual:
      return table.linear_residual != nullptr;
    case FusedOp::norm_gate_up:
      return table.norm_gate_up != nullptr;
    case FusedOp::head:
      return table.head != nullptr;
  }
  return false;
}

KernelTable with_fused(const KernelTable& table, const PerFusedOp<bool>& kept) {
  KernelTable copy = table;
  if (!kept[FusedOp::norm_qkv]) copy.norm_qkv = nullptr;
  if (!kept[FusedOp::linear_residual]) copy.linear_residual = nullptr;
  if (!kept[FusedOp::norm_gate_up]) copy.norm_gate_up = nullptr;
  if (!kept[FusedOp::head]) copy.head = nullptr;
  return copy;
}

bool takes_fused(FusedOp op, std::int64_t rows, const LinearWeight& weight, const ExecContext& ctx) {
  const std::int32_t most = ctx.kernels->max_fused_rows;
  const bool fused = has_kernel(*ctx.kernels, op) && (most == 0 || rows <= most) && !weight.is_ordered();
  if (ctx.counts != nullptr) ++(fused ? ctx.counts->fused : ctx.counts->composed)[op];
  return fused;
}

}  // namespace nb::ops
