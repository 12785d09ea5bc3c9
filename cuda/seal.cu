// Sealing: the keys of a full block of int4 become codes, one dimension by itself.
//
// A block of threads seals one head; a thread has a dimension, or two. quant/kv_format.h says how numbers are rounded.
#include "base/error.h"
#include "cuda/launch.cuh"
#include "cuda/operators.h"
#include "cuda/ptx.cuh"
#include "cuda/sealed_keys.cuh"

namespace nb::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxHeadDim = 256;

struct Extent {
  float low, high;

  /// What a scale should be, at least.
  NB_DEVICE float wanted() const { return fmaxf((high - low) / 15.0f, fabsf(low) / 127.0f); }
};

/// Of the tokens in `good`, a bit each; there is one.
NB_DEVICE Extent extent_of(const float* keys, unsigned good) {
  Extent extent = {INFINITY, -INFINITY};
  for (int t = 0; t < kBlockTokens; ++t) {
    if ((good >> t & 1u) == 0) continue;
    extent.low = fminf(extent.low, keys[t]);
    extent.high = fmaxf(extent.high, keys[t]);
  }
  return extent;
}

/// The byte of the least scale that is no less than `wanted`, or of the largest: rounds up to 4 bits behind the first.
NB_DEVICE unsigned scale_code(float wanted, float unit) {
  const int code = static_cast<int>((float_to_bits(wanted / unit) + 0x7ffffu) >> 19) - (112 << 4);
  return static_cast<unsigned>(code < 0 ? 0 : code > 255 ? 255 : code);
}

/// grid: (items, KV heads).
__global__ void __launch_bounds__(kThreads) kv_seal_kernel(ops::KvSealArgs a) {
  NB_SHARED(unsigned, bits_of_warps, kWarps);
  NB_SHARED(float, most_of_warps, kWarps);
  NB_SHARED(std::uint8_t, codes, kBlockTokens * kMaxHeadDim);  // [token][dim]
  grid_trigger();
  grid_wait();
  const ops::SealItem item = a.items[blockIdx.x];
  const int head = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const int dim = a.kv.head_dim, half = dim / 2;
  const float* const keys = open_cell(a.kv, a.open, item.cell, head);
  std::uint8_t* const cell = kv_cell(a.kv, item.block, 0, head);

  unsigned bad = 0;
  for (int d = thread; d < dim; d += kThreads) {
    for (int t = 0; t < item.num_tokens; ++t) {
      if ((float_to_bits(keys[d * kBlockTokens + t]) & 0x7f800000u) == 0x7f800000u) bad |= 1u << t;
    }
  }
  for (int step = 16; step > 0; step /= 2) bad |= shuffle_xor(bad, step);
  if (lane_id() == 0) bits_of_warps[thread / 32] = bad;
  sync_block();
  for (int w = 0; w < kWarps; ++w) bad |= bits_of_warps[w];
  const unsigned good = ~bad & ((1u << item.num_tokens) - 1);

  float most = 0.0f;
  if (good != 0) {
    for (int d = thread; d < dim; d += kThreads) {
      most = fmaxf(most, extent_of(keys + d * kBlockTokens, good).wanted());
    }
  }
  most = warp_max(most);
  if (lane_id() == 0) most_of_warps[thread / 32] = most;
  sync_block();
  for (int w = 0; w < kWarps; ++w) most = fmaxf(most, most_of_warps[w]);
  const Fp16 stored_unit = near_fp16(most / 31.0f * 16.0f);
  const float unit = to_float(stored_unit);

  for (int d = thread; d < dim; d += kThreads) {
    const float* const own = keys + d * kBlockTokens;
    unsigned code_of_scale = 0;
    float scale = 0.0f, base = 0.0f;
    if (unit > 0.0f) {
      const Extent extent = extent_of(own, good);
      code_of_scale = scale_code(extent.wanted(), unit);
      scale = sealed_scale(unit, code_of_scale);
      base = fminf(fmaxf(rintf(extent.low / scale), -128.0f), 127.0f);
    }
    NB_UNROLL_BY(1)  // divisions side by side take too many registers
    for (int t = 0; t < kBlockTokens; ++t) {
      float code = 0.0f;
      if (unit > 0.0f && (good >> t & 1u) != 0) code = fminf(fmaxf(rintf(own[t] / scale) - base, 0.0f), 15.0f);
      codes[t * dim + d] = static_cast<std::uint8_t>(code);
    }
    std::uint8_t* const scales = cell + sealed_scales_at(dim) + d % half / 4 * 16 + d / half * 4 + d % 4;
    scales[0] = static_cast<std::uint8_t>(code_of_scale);
    scales[8] = static_cast<std::uint8_t>(static_cast<int>(base) + 128);
  }
  sync_block();
  for (int i = thread; i < kBlockTokens * dim / 8; i += kThreads) {
    const int token = i / (dim / 8), d = i % (dim / 8) * 4;
    unsigned word = 0;
    NB_UNROLL
    for (int j = 0; j < 4; ++j) {
      const unsigned low = codes[token * dim + d + j], high = codes[token * dim + half + d + j];
      word |= low << 4 * j | high << (16 + 4 * j);
    }
    reinterpret_cast<unsigned*>(cell)[i] = word;
  }
  if (thread == 0) {
    reinterpret_cast<unsigned*>(cell + sealed_unit_at(dim))[0] = stored_unit.bits | bad << 16;
  }
}

}  // namespace

void kv_seal(const ops::KvSealArgs& a, const Part&) {
  NB_CHECK(a.kv.head_dim % 8 == 0 && a.kv.head_dim <= kMaxHeadDim, unsupported, "sealing keys on a GPU with head_dim ",
           a.kv.head_dim, ": it must be a multiple of 8 up to ", kMaxHeadDim);
  launch({.name = "kv_seal_kernel",
          .grid_x = static_cast<unsigned>(a.num_items),
          .grid_y = static_cast<unsigned>(a.kv.num_kv_heads),
          .threads = kThreads},
         kv_seal_kernel, a);
}

}  // namespace nb::cuda
