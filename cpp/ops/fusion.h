// Which operators a backend may compute in one kernel, and how often it did: what ops.cpp asks and counts.
//
// Not for whether a fused kernel is sound for a model (model/fusion.h). Counters belong to who runs the operators, one
// thread at a time.
#pragma once

#include <array>
#include <cstdint>

#include "ops/kernel_table.h"

namespace nb::ops {

struct ExecContext;
struct LinearWeight;

/// The operators that have both forms: one kernel, or a composition of the small ones. (The down projection of rows
/// that `norm_gate_up` prepared is one small operator in either case.)
enum class FusedOp : std::uint8_t { norm_qkv, linear_residual, norm_gate_up, head };
inline constexpr std::array kFusedOps = {FusedOp::norm_qkv, FusedOp::linear_residual, FusedOp::norm_gate_up,
                                         FusedOp::head};

const char* to_string(FusedOp op);

/// One value for each of these operators.
template <class T>
struct PerFusedOp {
  std::array<T, kFusedOps.size()> values{};

  T& operator[](FusedOp op) { return values[static_cast<std::size_t>(op)]; }
  const T& operator[](FusedOp op) const { return values[static_cast<std::size_t>(op)]; }
};

/// Calls of the operators by the form they took.
struct FusionCounts {
  PerFusedOp<std::int64_t> fused;
  PerFusedOp<std::int64_t> composed;
};

bool has_kernel(const KernelTable& table, FusedOp op);

/// The table with the fused kernels of `kept` only: the other operators are composed whoever calls them.
KernelTable with_fused(const KernelTable& table, const PerFusedOp<bool>& kept);

/// Whether the operator is one kernel for these weights and so many rows; counts the call, if ctx counts. Weights that
/// are ordered meet rows in orders of their own, which only the composed operators give them.
bool takes_fused(FusedOp op, std::int64_t rows, const LinearWeight& weight, const ExecContext& ctx);

}  // namespace nb::ops
