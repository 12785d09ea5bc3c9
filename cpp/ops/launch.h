// What all operators do before and when they start a kernel: for ops.cpp and attention.cpp only.
//
// On the host a kernel runs as one phase of the pool, on a device it is started by the calling thread. Stateless; a
// context belongs to one thread at a time.
#pragma once

#include <span>

#include "base/error.h"
#include "ops/ops.h"
#include "quant/kv_format.h"

namespace nb::ops {

/// Runs one kernel as a parallel phase, or throws naming what is missing.
template <class Args>
void launch(void (*kernel)(const Args&, const Part&), const Args& args, const char* name, ExecContext& ctx) {
  NB_CHECK(kernel != nullptr, unsupported, "operator ", name, " has no kernel in backend ", ctx.kernels->name);
  if (ctx.kernels->memory != nullptr) {
    kernel(args, Part{});
  } else {
    ctx.pool->run([&](const Part& part) { kernel(args, part); });
  }
}

inline int rows_of(const Tensor& tensor) { return static_cast<int>(tensor.dim(0)); }

/// Throws invalid_argument, naming the operator, where a format that seals keys comes without open cells.
inline void check_open(const KvLayer& kv, const OpenKeys& open, const char* what) {
  NB_CHECK(!quant::seals_keys(kv.format) || open.row_cells != nullptr, invalid_argument, what, ": KV format ",
           quant::to_string(kv.format), " needs open cells, and which of them each row has");
}

/// The same where kernels can read it: which cells rows have is said in arrays of the host.
inline OpenKeys on_device(OpenKeys open, std::size_t num_rows, ExecContext& ctx) {
  for (const int32_t** array : {&open.row_cells, &open.row_groups}) {
    if (*array != nullptr) *array = ctx.workspace->on_device(std::span(*array, num_rows));
  }
  return open;
}

}  // namespace nb::ops
