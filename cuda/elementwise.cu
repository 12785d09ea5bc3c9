// The small operators: what the fused ones are checked against, and what serves where there is no fused one.
#include "base/error.h"
#include "cuda/argmax.cuh"
#include "cuda/formulas.cuh"
#include "cuda/kv_cells.cuh"
#include "cuda/launch.cuh"
#include "cuda/operators.h"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/sealed_keys.cuh"
#include "cuda/weight.cuh"

namespace nb::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kArgmaxThreads = 256;

unsigned blocks_for(int count) { return static_cast<unsigned>((count + kThreads - 1) / kThreads); }

/// grid: (columns, rows).
template <class Number>
__global__ void __launch_bounds__(kThreads) embed_kernel(ops::EmbedArgs a) {
  grid_trigger();
  grid_wait();
  const int col = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const int row = static_cast<int>(blockIdx.y);
  if (col < a.table.cols) a.out[row * a.out_stride + col] = weight_at<Number>(a.table, a.ids[row], col);
}

/// grid: rows.
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(ops::RmsNormArgs a) {
  NB_SHARED(float, scratch, kThreads / 32);
  grid_trigger();
  grid_wait();
  const float* x = a.x + static_cast<std::int64_t>(blockIdx.x) * a.x_stride;
  float* out = a.out + static_cast<std::int64_t>(blockIdx.x) * a.out_stride;
  const float scale = rms_scale<kThreads>(x, a.cols, a.eps, scratch);
  for (int i = static_cast<int>(threadIdx.x); i < a.cols; i += kThreads) out[i] = x[i] * scale * a.weight[i];
}

/// grid: (columns, rows).
__global__ void __launch_bounds__(kThreads) prepare_kernel(ops::PrepareArgs a) {
  grid_trigger();
  grid_wait();
  const int col = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (col >= a.out.cols) return;
  const float value = col < a.cols ? a.x[blockIdx.y * a.x_stride + col] : 0.0f;
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.y) * a.out.cols + col;
  if (a.out.type == ops::ActType::bf16) {
    reinterpret_cast<Bf16*>(a.out.values)[at] = to_bf16(value);
  } else {
    a.out.values[at] = value;
  }
}

/// grid: (pairs of all heads, rows).
__global__ void __launch_bounds__(kThreads) rope_kernel(ops::RopeArgs a) {
  grid_trigger();
  grid_wait();
  const int half = a.table.head_dim / 2;
  const int pair = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const int row = static_cast<int>(blockIdx.y);
  if (pair >= a.num_heads * half) return;
  float* x = a.x + row * a.x_stride + pair / half * a.table.head_dim + pair % half;
  const float* angle = a.table.cos_sin + static_cast<std::int64_t>(a.positions[row]) * a.table.head_dim + pair % half;
  rotate(x[0], x[half], angle, half);
}

/// grid: (values of all heads, rows).
__global__ void __launch_bounds__(kThreads) kv_write_kernel(ops::KvWriteArgs a) {
  grid_trigger();
  grid_wait();
  const int at = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const int row = static_cast<int>(blockIdx.y);
  if (at >= a.kv.num_kv_heads * a.kv.head_dim) return;
  const int head = at / a.kv.head_dim, dim = at % a.kv.head_dim;
  store_kv(a.kv, a.slots[row], 0, head, dim, a.k[row * a.k_stride + at]);
  store_kv(a.kv, a.slots[row], 1, head, dim, a.v[row * a.v_stride + at]);
}

/// grid: groups of (row, head) pairs; a warp for each.
__global__ void __launch_bounds__(kThreads) kv_write_tokens_kernel(ops::KvWriteArgs a) {
  grid_trigger();
  grid_wait();
  const int item = static_cast<int>((blockIdx.x * kThreads + threadIdx.x) / 32);
  if (item >= a.rows * a.kv.num_kv_heads) return;
  const int row = item / a.kv.num_kv_heads, head = item % a.kv.num_kv_heads, at = head * a.kv.head_dim;
  store_token(a.kv, a.open, row, a.slots[row], head, a.k + row * a.k_stride + at, a.v + row * a.v_stride + at);
}

/// sum + the squared distance of two keys, of which a lane adds up every 32nd dimension.
template <class Numbers, class Others>
NB_DEVICE float add_distance(float sum, const Numbers& x, const Others& y, int head_dim) {
  for (int dim = lane_id(); dim < head_dim; dim += 32) {
    const float difference = x.at(dim) - y.at(dim);
    sum = fmaf(difference, difference, sum);
  }
  return sum;
}

/// grid: (groups of rows); a warp per row. A lane adds up every 32nd dimension of one head after the other.
template <class Key>
__global__ void __launch_bounds__(kThreads) key_deviation_kernel(ops::KeyDeviationArgs a) {
  grid_trigger();
  grid_wait();
  const int row = static_cast<int>((blockIdx.x * kThreads + threadIdx.x) / 32);
  if (row >= a.rows) return;
  const int slot_a = a.slots_a[row], slot_b = a.slots_b[row];
  float sum = 0.0f;
  for (int head = 0; head < a.a.num_kv_heads; ++head) {
    if constexpr (kIsSealed<Key>) {  // before rotation, one of them in the open cell of its row
      const OpenKey x{open_cell(a.a, a.open, a.open.row_cells[row], head) + slot_a % kBlockTokens};
      const SealedKey y{kv_cell(a.b, slot_b / kBlockTokens, 0, head), a.b.head_dim, slot_b % kBlockTokens};
      sum = add_distance(sum, x, y, a.a.head_dim);
    } else {
      const KeyNumbers<Key> x(a.a, slot_a, head), y(a.b, slot_b, head);
      sum = add_distance(sum, x, y, a.a.head_dim);
    }
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) a.out[row] = sum;
}

/// grid: (columns, rows).
__global__ void __launch_bounds__(kThreads) silu_mul_kernel(ops::SiluMulArgs a) {
  grid_trigger();
  grid_wait();
  const int col = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (col >= a.cols) return;
  a.out[blockIdx.y * a.out_stride + col] =
      silu_times(a.gate[blockIdx.y * a.gate_stride + col], a.up[blockIdx.y * a.up_stride + col]);
}

/// grid: rows.
__global__ void __launch_bounds__(kArgmaxThreads) argmax_kernel(ops::ArgmaxArgs a) {
  NB_SHARED(float, values, kArgmaxThreads / 32);
  NB_SHARED(int, ids, kArgmaxThreads / 32);
  grid_trigger();
  grid_wait();
  const float* x = a.x + static_cast<std::int64_t>(blockIdx.x) * a.x_stride;
  Best best;
  for (int i = static_cast<int>(threadIdx.x); i < a.cols; i += kArgmaxThreads) best.take(x[i], i);
  best.take_from_block<kArgmaxThreads>(values, ids);
  if (threadIdx.x == 0) a.out[blockIdx.x] = best.found();
}

}  // namespace

void embed(const ops::EmbedArgs& a, const Part&) {
  with_number(a.table.format, [&](auto number) {
    launch({.name = "embed_kernel", .grid_x = blocks_for(a.table.cols), .grid_y = static_cast<unsigned>(a.rows)},
           embed_kernel<decltype(number)>, a);
  });
}

void rms_norm(const ops::RmsNormArgs& a, const Part&) {
  launch({.name = "rms_norm_kernel", .grid_x = static_cast<unsigned>(a.rows)}, rms_norm_kernel, a);
}

void prepare(const ops::PrepareArgs& a, const Part&) {
  launch({.name = "prepare_kernel", .grid_x = blocks_for(a.out.cols), .grid_y = static_cast<unsigned>(a.out.rows)},
         prepare_kernel, a);
}

void rope(const ops::RopeArgs& a, const Part&) {
  launch({.name = "rope_kernel",
          .grid_x = blocks_for(a.num_heads * a.table.head_dim / 2),
          .grid_y = static_cast<unsigned>(a.rows)},
         rope_kernel, a);
}

void kv_write(const ops::KvWriteArgs& a, const Part&) {
  if (stores_tokens(a.kv.format)) {
    NB_CHECK(a.kv.head_dim % 8 == 0 && a.kv.head_dim <= 256, unsupported,
             "KV formats other than f32 and bf16 on a GPU with head_dim ", a.kv.head_dim,
             ": it must be a multiple of 8 up to 256");
    launch({.name = "kv_write_tokens_kernel", .grid_x = blocks_for(32 * a.rows * a.kv.num_kv_heads)},
           kv_write_tokens_kernel, a);
    return;
  }
  launch({.name = "kv_write_kernel",
          .grid_x = blocks_for(a.kv.num_kv_heads * a.kv.head_dim),
          .grid_y = static_cast<unsigned>(a.rows)},
         kv_write_kernel, a);
}

void key_deviation(const ops::KeyDeviationArgs& a, const Part&) {
  const auto start = [&](auto key) {
    launch({.name = "key_deviation_kernel", .grid_x = blocks_for(32 * a.rows)}, key_deviation_kernel<decltype(key)>, a);
  };
  with_key_number(a.a.format, start);
}

void silu_mul(const ops::SiluMulArgs& a, const Part&) {
  launch({.name = "silu_mul_kernel", .grid_x = blocks_for(a.cols), .grid_y = static_cast<unsigned>(a.rows)},
         silu_mul_kernel, a);
}

void argmax(const ops::ArgmaxArgs& a, const Part&) {
  launch({.name = "argmax_kernel", .grid_x = static_cast<unsigned>(a.rows), .threads = kArgmaxThreads}, argmax_kernel,
         a);
}

}  // namespace nb::cuda
