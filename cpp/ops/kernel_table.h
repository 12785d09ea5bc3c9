// A backend's kernels as a struct of function pointers. A null pointer means the backend has no such kernel.
//
// On the CPU each kernel is called once per member of the thread team with its Part and does its share; kernels that
// need a barrier call part.barrier(). Shared with code compiled per instruction set: C headers only.
#pragma once

#include "base/part.h"
#include "ops/args.h"

namespace nb {
struct DeviceMemory;  // tensor/device_memory.h
}

namespace nb::ops {

/// How a backend lays out linear weights. `vectors` is the layout of devices: rows in pairs, each pair as vectors of 16
/// bytes along the columns, the two rows in turn; see LinearSegment.
enum class WeightLayout : uint8_t { rows, tile16, vectors };

/// A set of KV formats has one bit for each.
inline constexpr uint32_t kv_bit(quant::KvFormat format) { return 1u << static_cast<uint32_t>(format); }
inline constexpr uint32_t kPlainKvFormats = kv_bit(quant::KvFormat::f32) | kv_bit(quant::KvFormat::bf16);
inline constexpr uint32_t kAllKvFormats = (1u << quant::kNumKvFormats) - 1;

struct KernelTable {
  const char* name;
  WeightLayout layout;

  // Small operators: every backend has these.
  void (*embed)(const EmbedArgs&, const Part&);
  void (*rms_norm)(const RmsNormArgs&, const Part&);
  void (*prepare)(const PrepareArgs&, const Part&);
  void (*linear)(const LinearArgs&, const Part&);
  void (*rope)(const RopeArgs&, const Part&);
  void (*kv_write)(const KvWriteArgs&, const Part&);
  void (*attention)(const AttentionArgs&, const Part&);
  int64_t (*attention_scratch_bytes)(const AttentionArgs&, int num_threads);
  void (*silu_mul)(const SiluMulArgs&, const Part&);
  void (*argmax)(const ArgmaxArgs&, const Part&);

  // Fused operators: where null, or given more rows than they take, ops.cpp composes them from the small ones.
  void (*norm_qkv)(const NormQkvArgs&, const Part&);
  void (*linear_residual)(const LinearResidualArgs&, const Part&);
  void (*norm_gate_up)(const NormGateUpArgs&, const Part&);
  void (*head)(const HeadArgs&, const Part&);

  bool packs_bf16 = false;     ///< bf16 rows are wanted as 2-byte numbers too (Activation::packed)
  int32_t max_fused_rows = 0;  ///< rows that the fused operators take; 0 = any number

  /// The fused operators give the bits of their parts for every model, as tests of this table hold: there is nothing
  /// that would have to be measured when a model is loaded (model/fusion.h).
  bool fused_exact = false;

  // Draws tokens where the logits lie; null: the logits go to sampling/ on the host.
  void (*sample)(const SampleArgs&, const Part&) = nullptr;

  // Where the tensors of this backend lie; null: in host memory. With a device, every pointer in the arguments of a
  // kernel is one of the device, and a kernel is called once, with the whole as its Part.
  const DeviceMemory* memory = nullptr;

  void (*key_deviation)(const KeyDeviationArgs&, const Part&) = nullptr;
  void (*summarize_kv)(const SummarizeKvArgs&, const Part&) = nullptr;

  void (*kv_seal)(const KvSealArgs&, const Part&) = nullptr;  ///< of backends with a format that seals

  uint32_t kv_formats = kPlainKvFormats;  ///< formats of keys and values that the kernels store and read
  bool key_policies = false;              ///< attention knows AttentionSegment::policy and AttentionRun::score_bias
};

}  // namespace nb::ops
