// Starting the kernels of attention: which instance serves a format and a head size.
//
// attention.cu has the instances without policies, attention_policies.cu those with: each is compiled by itself, since
// that takes most of the time that this library takes.
#pragma once

#include <algorithm>

#include "cuda/attention_decode.cuh"
#include "cuda/attention_prefill.cuh"
#include "cuda/launch.cuh"

namespace nb::cuda {

template <class Key, class Value, int kLanes, int kHeads, bool kPolicies>
void launch_decode(const DecodeArgs& args, int rows) {
  launch({.name = "attention_decode_kernel",
          .grid_x = static_cast<unsigned>(rows),
          .grid_y = static_cast<unsigned>(args.a.kv.num_kv_heads * args.head_tiles),
          .grid_z = static_cast<unsigned>(args.partials == nullptr ? 1 : args.splits),
          .threads = kDecodeThreads<kHeads>},
         attention_decode_kernel<Key, Value, kLanes, kHeads, kPolicies>, args);
}

template <class Key, class Value, bool kPolicies>
void launch_decode(const DecodeArgs& args, int heads, int rows) {
  if (args.a.kv.head_dim > 128) return launch_decode<Key, Value, 32, 4, kPolicies>(args, rows);
  if (args.a.kv.head_dim > 64) {
    return heads == 4 ? launch_decode<Key, Value, 16, 4, kPolicies>(args, rows)
                      : launch_decode<Key, Value, 16, 8, kPolicies>(args, rows);
  }
  return heads == 4 ? launch_decode<Key, Value, 8, 4, kPolicies>(args, rows)
                    : launch_decode<Key, Value, 8, 8, kPolicies>(args, rows);
}

/// The kernel of single rows for `rows` of them, in blocks of 4 or 8 heads.
template <bool kPolicies>
void start_decode(const DecodeArgs& args, int heads, int rows) {
  with_kv_numbers(args.a.kv.format, [&](auto key, auto value) {
    launch_decode<decltype(key), decltype(value), kPolicies>(args, heads, rows);
  });
}

template <class Key, class Value, int kDim, bool kPolicies>
void launch_prefill(const ops::AttentionArgs& a) {
  // Every long segment may have one tile that is not full.
  const int full = a.rows * (a.num_heads / a.kv.num_kv_heads) / kTileColumns;
  const int rest = std::min(a.num_segments, a.rows / (ops::kDecodeRows + 1));
  launch({.name = "attention_prefill_kernel",
          .grid_x = static_cast<unsigned>(full + rest),
          .grid_y = static_cast<unsigned>(a.kv.num_kv_heads),
          .threads = kPrefillThreads,
          .dynamic_shared_bytes = prefill_shared_bytes<Key, Value, kDim>()},
         attention_prefill_kernel<Key, Value, kDim, kPolicies>, a);
}

/// The kernel on tensor cores; there must be one for the format and the head size.
template <bool kPolicies>
void start_prefill(const ops::AttentionArgs& a) {
  with_kv_numbers(a.kv.format, [&](auto key, auto value) {
    using Key = decltype(key);
    using Value = decltype(value);
    if constexpr (!std::is_same_v<Key, float>) {
      if (a.kv.head_dim == 64) {
        launch_prefill<Key, Value, 64, kPolicies>(a);
      } else if (a.kv.head_dim == 96) {
        launch_prefill<Key, Value, 96, kPolicies>(a);
      } else {
        launch_prefill<Key, Value, 128, kPolicies>(a);
      }
    }
  });
}

extern template void start_decode<true>(const DecodeArgs&, int heads, int rows);
extern template void start_prefill<true>(const ops::AttentionArgs&);

}  // namespace nb::cuda
