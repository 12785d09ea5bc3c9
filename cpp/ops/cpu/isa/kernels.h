// The body of every kernels_<isa>.cpp: all kernels in one unnamed namespace, and the table that exports them.
//
// Compiled once per instruction set with that set's flags, so nothing here may include a C++ library header: the
// linker could keep this copy of an inline function for everybody. tools/check_isa_symbols.py verifies it.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(NB_ISA_AVX512) || defined(NB_ISA_AVX2)
#include <immintrin.h>
#elif defined(NB_ISA_NEON)
#include <arm_neon.h>
#endif

#include "base/ids.h"
#include "ops/kernel_table.h"
#include "quant/tile_shape.h"

namespace nb::ops {
namespace {

#include "ops/cpu/isa/simd.h"
// simd.h comes first: the others are written over it.
#include "ops/cpu/isa/linear.h"
#include "ops/cpu/isa/rows.h"
// rows.h uses linear.h; what follows uses both.
#include "ops/cpu/isa/kv_cells.h"
// summarize.h uses kv_cells.h and rows.h.
#include "ops/cpu/isa/summarize.h"
// kv_cells.h has what attention reads.
#include "ops/cpu/isa/attention_inner.h"
// attention_int.h has the same for quantized keys and values.
#include "ops/cpu/isa/attention_int.h"
// attention_int4.h has what int4 keys need before the kernels of f32 can read them.
#include "ops/cpu/isa/attention_int4.h"
// attention.h uses all three.
#include "ops/cpu/isa/attention.h"
// fused.h comes last.
#include "ops/cpu/isa/fused.h"

constexpr KernelTable kTable = {
    .name = NB_KERNELS_NAME,
    .layout = WeightLayout::tile16,
    .embed = embed,
    .rms_norm = rms_norm,
    .prepare = prepare,
    .linear = linear,
    .rope = rope,
    .kv_write = kv_write,
    .attention = attention,
    .attention_scratch_bytes = attention_scratch_bytes,
    .silu_mul = silu_mul,
    .argmax = argmax,
    .norm_qkv = norm_qkv,
    .linear_residual = linear_residual,
    .norm_gate_up = norm_gate_up,
    .head = head,
    .packs_bf16 = kBf16Dot,
    .fused_exact = true,
    .key_deviation = key_deviation,
    .summarize_kv = summarize_kv,
    .kv_seal = kv_seal,
    .kv_formats = kAllKvFormats,
    .key_policies = true,
};

}  // namespace
}  // namespace nb::ops

extern "C" const nb::ops::KernelTable* NB_KERNELS_FUNCTION(void) { return &nb::ops::kTable; }
