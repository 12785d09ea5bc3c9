// The kernel tables of this library: an operator that is not here is composed of small ones by ops.cpp.
#include "cuda/table.h"

#include "cuda/operators.h"

namespace nb::cuda {
namespace {

ops::KernelTable make_table(const char* name, const DeviceMemory& memory) {
  ops::KernelTable table{};
  table.name = name;
  table.layout = ops::WeightLayout::vectors;
  table.embed = embed;
  table.rms_norm = rms_norm;
  table.prepare = prepare;
  table.rope = rope;
  table.kv_write = kv_write;
  table.silu_mul = silu_mul;
  table.argmax = argmax;
  table.sample = sample;
  table.memory = &memory;
  return table;
}

}  // namespace

const ops::KernelTable& kernels(const DeviceMemory& memory) {
  static const ops::KernelTable table = make_table("cuda", memory);
  return table;
}

}  // namespace nb::cuda
