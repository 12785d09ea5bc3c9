// The kernel tables of this library: an operator that is not here is composed of small ones by ops.cpp.
#include "cuda/table.h"

#include "cuda/operators.h"

namespace nb::cuda {
namespace {

// What both tables have.
ops::KernelTable make_table(const DeviceMemory& memory) {
  ops::KernelTable table{};
  table.name = memory.name;
  table.layout = ops::WeightLayout::vectors;
  table.embed = embed;
  table.rms_norm = rms_norm;
  table.prepare = prepare;
  table.rope = rope;
  table.kv_write = kv_write;
  table.kv_formats = ops::kAllKvFormats;
  table.kv_seal = kv_seal;
  table.key_policies = true;
  table.key_deviation = key_deviation;
  table.summarize_kv = summarize_kv;
  table.attention = attention;
  table.attention_scratch_bytes = attention_scratch_bytes;
  table.silu_mul = silu_mul;
  table.argmax = argmax;
  table.linear = linear;
  table.norm_qkv = norm_qkv;
  table.linear_residual = linear_residual;
  table.norm_gate_up = norm_gate_up;
  table.head = head;
  table.max_fused_rows = 8;
  table.sample = sample;
  table.memory = &memory;
  return table;
}

}  // namespace

const ops::KernelTable& kernels(const DeviceMemory& memory) {
  static const ops::KernelTable table = make_table(memory);
  return table;
}

const ops::KernelTable& deterministic_kernels(const DeviceMemory& memory) {
  static const ops::KernelTable table = [&] {
    ops::KernelTable copy = make_table(memory);
    copy.linear = linear_deterministic;
    copy.attention = attention_deterministic;
    return copy;
  }();
  return table;
}

}  // namespace nb::cuda
