// Summaries: one key and value for a group of tokens, the means of theirs.
//
// A block makes one summary of one head. Sums are over tokens in order, in f32. A rotation table may have a magnitude
// beside its angles, so what undoes a rotation divides by its square.
#include "base/error.h"
#include "cuda/formulas.cuh"
#include "cuda/kv_cells.cuh"
#include "cuda/launch.cuh"
#include "cuda/operators.h"
#include "cuda/ptx.cuh"

namespace nb::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxHeadDim = 256;

/// grid: (summaries, KV heads). A thread has a pair of dimensions of the key, or a dimension of the value.
template <class Key, class Value>
__global__ void __launch_bounds__(kThreads) summarize_kv_kernel(ops::SummarizeKvArgs a) {
  NB_SHARED(float, key, kMaxHeadDim);
  NB_SHARED(float, value, kMaxHeadDim);
  grid_trigger();
  grid_wait();
  const ops::KvSummary summary = a.summaries[blockIdx.x];
  const int head = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const int dim = a.kv.head_dim, half = dim / 2;
  const float count = static_cast<float>(summary.num_tokens);
  const std::int32_t* blocks = a.blocks + summary.block_begin;
  for (int i = thread; i < half + dim; i += kThreads) {
    float first = 0.0f, second = 0.0f;
    if (i < half) {
      const float* angle = a.rope.cos_sin + static_cast<std::int64_t>(summary.position) * dim + i;
      for (int t = 0; t < summary.num_tokens; ++t, angle += dim) {
        const int at = summary.first_key + t;
        const std::uint8_t* cell = kv_cell(a.kv, blocks[at / kBlockTokens], 0, head);
        const float x = number_at<Key>(cell, dim, at % kBlockTokens, i);
        const float y = number_at<Key>(cell, dim, at % kBlockTokens, i + half);
        const float cos = angle[0], sin = angle[half], square = fmaf(cos, cos, sin * sin);
        first += fmaf(x, cos, y * sin) / square;
        second += fmaf(y, cos, -(x * sin)) / square;
      }
      first /= count;
      second /= count;
      rotate(first, second, a.rope.cos_sin + static_cast<std::int64_t>(summary.slot_position) * dim + i, half);
      key[i] = first;
      key[i + half] = second;
    } else {
      const int d = i - half;
      for (int t = 0; t < summary.num_tokens; ++t) {
        const int at = summary.first_key + t;
        first += number_at<Value>(kv_cell(a.kv, blocks[at / kBlockTokens], 1, head), dim, at % kBlockTokens, d);
      }
      value[d] = first / count;
    }
  }
  sync_block();
  if constexpr (std::is_same_v<Key, float> || std::is_same_v<Key, Bf16>) {
    for (int d = thread; d < dim; d += kThreads) {
      store_kv(a.kv, summary.slot, 0, head, d, key[d]);
      store_kv(a.kv, summary.slot, 1, head, d, value[d]);
    }
  } else {
    if (thread < 32) store_token(a.kv, ops::OpenKeys{}, 0, summary.slot, head, key, value);
  }
}

}  // namespace

void summarize_kv(const ops::SummarizeKvArgs& a, const Part&) {
  NB_CHECK(a.kv.head_dim % 8 == 0 && a.kv.head_dim <= kMaxHeadDim, unsupported, "summaries on a GPU with head_dim ",
           a.kv.head_dim, ": it must be a multiple of 8 up to ", kMaxHeadDim);
  with_kv_numbers(a.kv.format, [&](auto key, auto value) {
    if constexpr (!std::is_same_v<decltype(key), Sealed>) {  // refused by ops.cpp
      launch({.name = "summarize_kv_kernel",
              .grid_x = static_cast<unsigned>(a.num_summaries),
              .grid_y = static_cast<unsigned>(a.kv.num_kv_heads),
              .threads = kThreads},
             summarize_kv_kernel<decltype(key), decltype(value)>, a);
    }
  });
}

}  // namespace nb::cuda
