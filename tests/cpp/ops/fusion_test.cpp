// Which form an operator takes, for how many rows, and that it is counted.
#include "ops/fusion.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

#include "ops/ops.h"

namespace nb::ops {
namespace {

KernelTable table_with_all() {
  KernelTable table{};
  table.norm_qkv = [](const NormQkvArgs&, const Part&) {};
  table.linear_residual = [](const LinearResidualArgs&, const Part&) {};
  table.norm_gate_up = [](const NormGateUpArgs&, const Part&) {};
  table.head = [](const HeadArgs&, const Part&) {};
  return table;
}

TEST(Fusion, EveryOperatorHasANameOfItsOwn) {
  std::set<std::string> names;
  for (const FusedOp op : kFusedOps) names.insert(to_string(op));
  EXPECT_EQ(names, (std::set<std::string>{"norm_qkv", "linear_residual", "norm_gate_up", "head"}));
}

TEST(Fusion, KeepsTheKernelsThatAreNamedAndNoOther) {
  const KernelTable all = table_with_all();
  for (const FusedOp kept : kFusedOps) {
    PerFusedOp<bool> one{};
    one[kept] = true;
    const KernelTable table = with_fused(all, one);
    for (const FusedOp op : kFusedOps) EXPECT_EQ(has_kernel(table, op), op == kept) << to_string(op);
    EXPECT_TRUE(has_kernel(all, kept)) << "the table itself stays as it is";
  }
}

TEST(Fusion, IsForSoManyRowsAndCounted) {
  KernelTable table = table_with_all();
  FusionCounts counts;
  const ExecContext ctx{.kernels = &table, .pool = nullptr, .workspace = nullptr, .counts = &counts};
  const LinearWeight natural;
  EXPECT_TRUE(takes_fused(FusedOp::head, 1000, natural, ctx)) << "any number";
  table.max_fused_rows = 8;
  EXPECT_TRUE(takes_fused(FusedOp::head, 8, natural, ctx));
  EXPECT_FALSE(takes_fused(FusedOp::head, 9, natural, ctx));
  table.norm_qkv = nullptr;
  EXPECT_FALSE(takes_fused(FusedOp::norm_qkv, 1, natural, ctx));
  EXPECT_EQ(counts.fused[FusedOp::head], 2);
  EXPECT_EQ(counts.composed[FusedOp::head], 1);
  EXPECT_EQ(counts.composed[FusedOp::norm_qkv], 1);
  EXPECT_EQ(counts.fused[FusedOp::norm_qkv], 0);
  const ExecContext silent{.kernels = &table, .pool = nullptr, .workspace = nullptr};
  EXPECT_TRUE(takes_fused(FusedOp::norm_gate_up, 1, natural, silent));
  EXPECT_EQ(counts.fused[FusedOp::norm_gate_up], 0);
  LinearWeight ordered;
  ordered.orders.resize(1);
  EXPECT_FALSE(takes_fused(FusedOp::norm_gate_up, 1, ordered, silent)) << "rows in an order of their own";
}

}  // namespace
}  // namespace nb::ops
