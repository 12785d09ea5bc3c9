#!/usr/bin/env python3
"""Breaks the CUDA kernels and the recording of steps, one defect at a time, and wants a test to fail for each.

Every row of MUTATIONS replaces a text that stands exactly once in its file. The tree is copied; only the emulated tests
are built there, incrementally from one defect to the next, so a row costs the build of the files that include it and
one run of the tests: seconds to a minute, after a first build of everything (quick where ccache knows the core).

Usage: mutations.py [--only PATTERN] [--jobs N] [--no-baseline]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("CMakeLists.txt", "cpp", "cuda", "tests")
TARGET = "cuda_emulation_tests"
# Tests of one kind of kernel, which are tried first where a file that begins so is broken, and those of whole engines,
# which take long and are tried last.
OWN = {
    "cpp/engine/": "*StepGraphs*:Recording*",
    "attention": "CudaAttention.*:CudaPolicies.*:SealedAttention.*",
    "gemm": "Gemm.*:ManyRows.*",
    "gemv": "Gemv.*",
    "matrix": "Gemv.*:ManyRows.*",
    "norm_matrix": "Gemv.*",
    "sampling": "DeviceSampling.*",
    "seal": "SealedKeys.*:SealedAttention.*",
    "summarize": "CudaPolicies.*",
    "": "Elementwise.*:KvCells.*:Reduce.*",
}
ENGINES = "*StepGraphs*:Emulated.*:*Composed*:ReferenceOnDevice.*"


class Mutation(NamedTuple):
    """A defect: `old` in cuda/<file>, or in <file> where that begins with cpp/, becomes `new`."""

    file: str
    old: str
    new: str
    why: str


MUTATIONS = (
    # ---- argmax.cuh ----
    Mutation(
        "argmax.cuh",
        "(other == value && other_id < id && id != kNone)",
        "(other == value && other_id > id && id != kNone)",
        "argmax: ties go to the higher id",
    ),
    Mutation("argmax.cuh", "other > value ||", "!(other <= value) ||", "argmax: NaN wins"),
    # ---- attention.cu ----
    Mutation(
        "attention_start.cuh",
        "a.rows / (ops::kDecodeRows + 1));",
        "a.rows / (ops::kDecodeRows + 1)) - 1;",
        "prefill: one tile of columns short",
    ),
    Mutation("attention.cu", "split < splits; ++split", "split + 1 < splits; ++split", "merge: one split short"),
    Mutation("attention.cu", "row < plan.rows; row += step", "row < plan.rows; row += step + 1", "passes skip rows"),
    # ---- attention.cuh ----
    Mutation(
        "attention.cuh",
        "limit > a.window ? limit - a.window : 0",
        "limit > a.window ? limit - a.window + 1 : 0",
        "window one short",
    ),
    Mutation("attention.cuh", "exp2f(split.max - next)};", "exp2f(total.max - next)};", "fold: wrong merge scale"),
    Mutation(
        "attention.cuh",
        "fmaf(split.sum, scale.add, total.sum * scale.keep)",
        "fmaf(split.sum, scale.add, total.sum)",
        "fold: sum not rescaled",
    ),
    Mutation("attention.cuh", "    number -= all;\n", "", "only the first 32 segments are found"),
    Mutation(
        "attention.cuh",
        "scale = a.scale * kLog2e",
        "scale = a.scale * (kLog2e - 0.44269504f)",
        "scores in the wrong base",
    ),
    Mutation(
        "attention.cuh",
        "  if (first < run.first_key) first = run.first_key;\n",
        "",
        "composed runs: first key ignored",
    ),
    Mutation(
        "attention.cuh",
        "  if (run.positions_begin >= 0) {",
        "  if (run.positions_begin > 1000000) {",
        "composed runs: positions of their own ignored",
    ),
    Mutation(
        "attention.cuh",
        "const bool below = positions[begin + half] < limit;",
        "const bool below = positions[begin + half] <= limit;",
        "composed runs: the search finds one key more",
    ),
    Mutation(
        "attention.cuh",
        "positions[count - 1] < limit) return count;",
        "positions[count - 1] <= limit) return count;",
        "composed runs: the last key is seen from the position before",
    ),
    Mutation(
        "attention.cuh",
        "if (first > 0) first = count_below(positions, run.num_keys, first);",
        "if (first > 0) first = count_below(positions, run.num_keys, first + 1);",
        "composed runs: window one short",
    ),
    # ---- attention_decode.cuh ----
    Mutation(
        "attention_decode.cuh",
        "if ((bits >> key % kBlockTokens & 1u) != 0) x[i]",
        "if ((bits >> key % kBlockTokens & 1u) > 1) x[i]",
        "decode: hidden keys seen",
    ),
    Mutation(
        "attention_decode.cuh",
        "hidden[place] = a.hidden[run.hidden_begin + block];",
        "hidden[place] = a.hidden[run.hidden_begin + block % kSplitBlocks];",
        "decode: hidden keys of the first split in all splits",
    ),
    Mutation(
        "attention_decode.cuh",
        "largest == -INFINITY ? 0.0f : largest",
        "largest",
        "decode: not a number where all keys of a split are hidden",
    ),
    Mutation(
        "attention_decode.cuh",
        "next_values[u] = load_value(first_step, u);\n      sync_block();",
        "next_values[u] = load_value(first_step, u);",
        "decode: barrier after scores dropped",
    ),
    Mutation(
        "attention_decode.cuh",
        "    }\n    sync_block();\n\n    for (int split = first,",
        "    }\n\n    for (int split = first,",
        "decode: barrier after rotation dropped",
    ),
    Mutation(
        "attention_decode.cuh",
        "key >= begin && key < end ?",
        "key >= begin && key < end - 1 ?",
        "decode: last key masked",
    ),
    Mutation(
        "attention_decode.cuh",
        "shuffle_xor(give, kFrom)",
        "shuffle_xor(give, kFrom / 2)",
        "decode: sums from the wrong lane",
    ),
    Mutation(
        "attention_decode.cuh",
        "const int position = a.positions[row] - run.position_offset;",
        "const int position = a.positions[row];",
        "decode: offset of a run forgotten",
    ),
    Mutation(
        "attention_decode.cuh",
        "blocks[place + key",
        "blocks[(place ^ kSplitBlocks) + key",
        "decode: block ids of the wrong split",
    ),
    # ---- attention_prefill.cuh ----
    Mutation(
        "attention_prefill.cuh",
        "if (run.hidden_begin >= 0) hide_keys(a, run, base, scores);",
        "if (run.hidden_begin >= 1 << 30) hide_keys(a, run, base, scores);",
        "prefill: hidden keys seen",
    ),
    Mutation(
        "attention_prefill.cuh",
        "if ((bits >> e % 2 & 1u) != 0)",
        "if ((bits >> 1 & 1u) != 0)",
        "prefill: hidden keys by the bit of their neighbour",
    ),
    Mutation(
        "attention_prefill.cuh",
        "next == -INFINITY ? 0.0f : next;",
        "next;",
        "prefill: not a number where all keys of a tile are hidden",
    ),
    Mutation(
        "attention_prefill.cuh",
        "a.positions[tile.row(c)] - offset : -1",
        "a.positions[tile.row(c)] + 0 * offset : -1",
        "prefill: offset of a run forgotten",
    ),
    Mutation(
        "attention_prefill.cuh",
        "      sync_block();  // the tile is here, and everybody is done with the one before\n",
        "",
        "prefill: barrier at a tile dropped",
    ),
    Mutation(
        "attention_prefill.cuh",
        "      cp_async_wait<0>();\n",
        "      cp_async_wait<1>();\n",
        "prefill: copies not waited for",
    ),
    Mutation(
        "attention_prefill.cuh",
        "key >= range.end) scores",
        "key > range.end) scores",
        "prefill: one key beyond the diagonal",
    ),
    Mutation(
        "attention_prefill.cuh",
        "state.sum += shuffle_xor(state.sum, 2);",
        "state.sum += shuffle_xor(state.sum, 4);",
        "prefill: sum over the wrong lane",
    ),
    Mutation(
        "attention_prefill.cuh",
        "split.values[n][2 * half + 1] *= keep;",
        "split.values[n][1] *= keep;",
        "prefill: second column not rescaled",
    ),
    Mutation(
        "attention_prefill.cuh",
        "(base + kTileKeys) % kSplitTokens == 0",
        "(t + 1 - first) % 4 == 0",
        "prefill: splits relative to the tile",
    ),
    Mutation(
        "attention_prefill.cuh",
        "base < seen_by_warp.end &&",
        "base + kTileKeys < seen_by_warp.end &&",
        "prefill: a warp skips a tile",
    ),
    # ---- device.cuh ----
    Mutation(
        "device.cuh",
        "step > 0; step /= 2) value += shuffle_xor(value, step)",
        "step > 1; step /= 2) value += shuffle_xor(value, step)",
        "half of a warp's sum",
    ),
    # ---- elementwise.cu ----
    Mutation("elementwise.cu", "if (col < a.table.cols) a.out", "if (col + 1 < a.table.cols) a.out", "embedding: tail"),
    Mutation(
        "elementwise.cu",
        "weight_at<Number>(a.table, a.ids[row], col)",
        "weight_at<Number>(a.table, row, col)",
        "embedding: row",
    ),
    Mutation(
        "elementwise.cu", "out[i] = x[i] * scale * a.weight[i]", "out[i] = x[i] * scale * a.weight[0]", "norm: gain"
    ),
    Mutation(
        "elementwise.cu", "if (col >= a.out.cols) return;", "if (col >= a.cols) return;", "padding keeps what was there"
    ),
    Mutation(
        "elementwise.cu",
        "if (pair >= a.num_heads * half) return;",
        "if (pair >= half) return;",
        "only the first head is rotated",
    ),
    Mutation("elementwise.cu", "if (row >= a.rows) return;", "if (row + 1 >= a.rows) return;", "deviation: last row"),
    Mutation(
        "elementwise.cu",
        "y(a.b, slot_b, head)",
        "y(a.b, slot_a, head)",
        "deviation: slots mixed up",
    ),
    Mutation("elementwise.cu", "y(a.b, slot_b", "y(a.a, slot_b", "deviation: one layer with itself"),
    Mutation(
        "elementwise.cu",
        "dim < head_dim; dim += 32",
        "dim < head_dim / 32 * 32; dim += 32",
        "deviation: tail of a head",
    ),
    Mutation("elementwise.cu", "  sum = warp_sum(sum);\n", "", "deviation: one lane's part"),
    Mutation(
        "attention_decode.cuh",
        "if (values.is_spoilt() && is_hidden(key_at(step, u))) values.forget();",
        "static_cast<void>(is_hidden);",
        "decode: a hidden value that is not finite shows",
    ),
    Mutation(
        "attention_decode.cuh", "score *= keys[u].factor();", "score *= keys[0].factor();", "decode: scales of keys"
    ),
    Mutation(
        "attention_prefill.cuh",
        "is_spoilt()) scale = to_float(kFp16Nan);",
        "is_spoilt()) scale = 0.0f;",
        "prefill: a value that is not finite counts as zeros",
    ),
    Mutation("attention_prefill.cuh", "e % 2 == 0 ? both.x : both.y", "both.x", "prefill: scales of every other key"),
    # ---- kv_cells.cuh ----
    Mutation(
        "kv_cells.cuh",
        "kv_cell(kv, slot / kBlockTokens, which, head)",
        "kv_cell(kv, slot / 15, which, head)",
        "keys in the wrong block",
    ),
    Mutation("kv_cells.cuh", "rintf(x.values[4 * w + i] / step)", "floorf(x.values[4 * w + i] / step)", "codes: down"),
    Mutation(
        "kv_cells.cuh",
        "[from / quant::kKvGroup * kBlockTokens + token]",
        "[token]",
        "decode: scales of the first group in all groups",
    ),
    Mutation("kv_cells.cuh", "low = fminf(low, shuffle_xor(low, step));\n", "", "minimum of 8 dimensions, not of 32"),
    Mutation("kv_cells.cuh", "words[i] = finite ? low", "words[i] = true ? low", "fp16: NaN in the value"),
    # ---- formulas.cuh ----
    Mutation("formulas.cuh", "-(y * angle[half])", "(y * angle[half])", "rotation: sign"),
    # ---- gemm.cuh ----
    Mutation("gemm.cuh", "    sync_block();  // this tile", "    // this tile", "gemm: no barrier in the main loop"),
    Mutation(
        "gemm.cuh",
        "cp_async_wait<Tile::kStages - 2>",
        "cp_async_wait<Tile::kStages - 1>",
        "gemm: waits for one stage less",
    ),
    Mutation("gemm.cuh", "b_half = lane / 8 % 2", "b_half = lane / 16", "gemm: wrong half of B"),
    Mutation(
        "gemm.cuh",
        "const bool both = col + 1 < a.weight.rows",
        "const bool both = col < a.weight.rows",
        "gemm: column tail of the output",
    ),
    Mutation("gemm.cuh", "if (row >= a.x.rows || ", "if (row > a.x.rows || ", "gemm: row tail of the output"),
    Mutation(
        "gemm.cuh",
        "    sync_block();  // before the tiles",
        "    // before the tiles",
        "gemm, f32: no barrier before tiles are overwritten",
    ),
    Mutation(
        "gemm.cuh",
        "    sync_block();\n    if (tile + 1 < num_tiles) {",
        "    if (tile + 1 < num_tiles) {",
        "gemm, f32: no barrier after tiles are spread",
    ),
    Mutation("gemm.cuh", "second += a.bias[col + 1]", "second += a.bias[col]", "gemm: bias of the other column"),
    Mutation("gemm.cuh", "scales[i] = scale_of(from,", "scales[i] = scale_of(from + 2,", "gemm: scales of other codes"),
    Mutation(
        "gemm.cuh",
        "const int place = 8 * ((2 * vector(i) + half)",
        "const int place = 8 * ((2 * vector(i) + 1 - half)",
        "gemm: halves of a vector of codes change places",
    ),
    Mutation(
        "gemm.cuh",
        "codes.fetch(a.weight, col_begin, tile + 1)",
        "codes.fetch(a.weight, col_begin, tile)",
        "gemm: codes of the tile before",
    ),
    Mutation("gemm.cuh", "number *= to_float(held.scales[i])", "number *= 1.0f", "gemm, f32: codes without scales"),
    # ---- number.cuh, weight.cuh ----
    Mutation("number.cuh", "word ^ 0x80808080u", "word ^ 0x00808080u", "the sign of every fourth code"),
    Mutation("weight.cuh", "[group % 8]", "[group % 4]", "the scale of another 32 columns"),
    # ---- gemv.cuh ----
    Mutation("gemv.cuh", "scales[step][i / M]", "scales[step][0]", "the scale of another row"),
    Mutation(
        "gemv.cuh",
        "    sync_block();\n    job.finish",
        "    job.finish",
        "sums of other warps are read without a barrier",
    ),
    Mutation(
        "gemv.cuh", "  sync_block();\n  return staged;", "  return staged;", "rows are read before they are staged"
    ),
    Mutation(
        "gemv.cuh",
        "const bool upper = (lane_id() & step) != 0;",
        "const bool upper = (lane_id() & step) == 0;",
        "sums of the wrong half of the lanes",
    ),
    Mutation("gemv.cuh", "step >= 2; step /= 2", "step >= 4; step /= 2", "half of the lanes of a row are left out"),
    Mutation(
        "gemv.cuh", "sums + turn * kGemvWarps * kCount * 2", "sums + 0 * turn", "one buffer of sums for two units"
    ),
    Mutation(
        "gemv.cuh",
        "const int coming = is_last ? first + step * kVectorStep : vector + kSteps * kVectorStep;",
        "const int coming = vector + kSteps * kVectorStep;",
        "the next unit starts in the middle",
    ),
    Mutation("gemv.cuh", "value = value * scales[m] * gain", "value = value * scales[0] * gain", "norm of another row"),
    Mutation(
        "gemv.cuh",
        "value = value * scales[m] * gain",
        "value = value * (scales[m] * gain)",
        "rounding unlike that of the parts",
    ),
    Mutation(
        "gemv.cuh",
        "const int num_vectors = vectors_of<Number>(cols)",
        "const int num_vectors = cols / kWidth",
        "the tail of the columns",
    ),
    # ---- matrix.cu ----
    Mutation("matrix.cu", "row >= weight.rows) return;", "row > weight.rows) return;", "a product past the last row"),
    Mutation("matrix.cu", "if (m >= rows || m >= M", "if (m >= M", "rows that are not there are written"),
    Mutation(
        "matrix.cu",
        "std::int64_t{begin} * a.x.cols",
        "std::int64_t{begin} * a.weight.cols",
        "groups of rows begin too early",
    ),
    Mutation(
        "matrix.cu",
        "*place = accumulate ? *place + total : total",
        "*place = *place + total",
        "adds where it should set",
    ),
    # ---- norm_matrix.cu ----
    Mutation("norm_matrix.cu", "pair * half + parity;", "pair * 2 + parity;", "rotation joins the wrong rows"),
    Mutation(
        "norm_matrix.cu", "second += args.k_bias[row + half];", "second += args.k_bias[row];", "bias of the other half"
    ),
    Mutation("norm_matrix.cu", "at < args.gate.rows ? silu_times", "true ? silu_times", "padding is not zero"),
    Mutation(
        "norm_matrix.cu",
        "step = kUnitRows / 2; step > 0",
        "step = kUnitRows / 4; step > 0",
        "best of a block: half of its rows",
    ),
    Mutation("norm_matrix.cu", "a.row_ids[m] * a.x_stride", "m * a.x_stride", "head: rows in the wrong order"),
    Mutation(
        "norm_matrix.cu",
        "block < blocks; block += kGemvThreads",
        "block < blocks - 1; block += kGemvThreads",
        "the last block of the vocabulary",
    ),
    # ---- number.cuh ----
    Mutation(
        "number.cuh",
        "(bits + 0x7fffu + (bits >> 16 & 1u)) >> 16",
        "(bits + 0x8000u) >> 16",
        "ties go up instead of to even",
    ),
    # ---- reduce.cuh ----
    Mutation(
        "reduce.cuh",
        "scratch[threadIdx.x / 32] = value;\n  sync_block();\n",
        "scratch[threadIdx.x / 32] = value;\n",
        "sums of other warps are read without a barrier",
    ),
    Mutation(
        "reduce.cuh",
        "sum += scratch[warp];\n  sync_block();\n",
        "sum += scratch[warp];\n",
        "the next sum overwrites what a slow warp still reads",
    ),
    Mutation("reduce.cuh", "warp < kThreads / 32", "warp < kThreads / 32 - 1", "the last warp's sum is left out"),
    Mutation(
        "reduce.cuh",
        "  if (lane_id() == 0) scratch[threadIdx.x / 32] = value;\n",
        "  scratch[threadIdx.x / 32] = value;\n",
        "all lanes write one place",
    ),
    Mutation(
        "reduce.cuh",
        "scratch[warp * M + m] = scales[m]",
        "scratch[warp * M] = scales[m]",
        "norms of several rows in one place",
    ),
    # ---- policies, summaries and sealed keys ----
    Mutation(
        "attention.cu",
        "a.has_policies ? start_decode<true>",
        "!a.has_policies ? start_decode<true>",
        "decode: policies ignored",
    ),
    Mutation(
        "attention.cu",
        "a.has_policies ? start_prefill<true>",
        "!a.has_policies ? start_prefill<true>",
        "prefill: policies ignored",
    ),
    Mutation(
        "attention.cuh",
        "return is_last ? segment.policy : -1;",
        "return segment.policy;",
        "policies: by the keys of the summaries too",
    ),
    Mutation(
        "attention.cuh",
        "max += run.score_bias * kLog2e;",
        "max += 0.0f * run.score_bias;",
        "biased runs: the bias dropped",
    ),
    Mutation(
        "attention.cuh",
        "max += run.score_bias * kLog2e;",
        "max += run.score_bias;",
        "biased runs: the bias in the wrong base",
    ),
    Mutation(
        "attention_decode.cuh",
        "maxima[h] = biased<kPolicies>(largest, run);",
        "maxima[h] = largest;",
        "decode: the bias of a run dropped",
    ),
    Mutation(
        "attention_decode.cuh",
        "bits |= ops::hidden_bits(a.policies[policy], position, block);",
        "bits |= 0u;",
        "decode: keys seen that a policy hides",
    ),
    Mutation(
        "attention_decode.cuh",
        "ops::hidden_bits(a.policies[policy], position, block)",
        "ops::hidden_bits(a.policies[policy], position + 1, block)",
        "decode: by the policy of the next row",
    ),
    Mutation(
        "attention_decode.cuh",
        "== 0xffffu) return begin;",
        "== 0x10000u) return begin;",
        "decode: blocks read that a policy hides",
    ),
    Mutation(
        "attention_decode.cuh",
        "turn ^ (is_next ? 1 : 0) : split % 2;",
        "turn : split % 2;",
        "decode: blocks of the next split over those of this one",
    ),
    Mutation("attention_decode.cuh", "      turn ^= 1;\n", "", "decode: the next split by the blocks of this one"),
    Mutation(
        "attention_prefill.cuh",
        "if (ballot(hidden != 0) != 0) hide_from_columns(hidden, scores);",
        "if (ballot(hidden != 0) > 99) hide_from_columns(0u, scores);",
        "prefill: keys seen that a policy hides",
    ),
    Mutation(
        "attention_prefill.cuh",
        "bits |= own << 16 * half;",
        "bits |= own * 0x10001u;",
        "prefill: what a policy hides from either of two columns",
    ),
    Mutation(
        "attention_prefill.cuh",
        "shuffle(hidden, lane / 4 * 4 + block)",
        "shuffle(hidden, lane / 4 * 4)",
        "prefill: what a policy hides of the first block",
    ),
    Mutation(
        "attention_prefill.cuh",
        "t = ops::next_seen_block(a.policies[policy], row_positions[0],",
        "t = ops::next_seen_block(a.policies[policy], row_positions[0] + 64,",
        "prefill: tiles skipped that the first rows see",
    ),
    Mutation(
        "attention_prefill.cuh",
        "state.max = biased<kPolicies>(state.max, run);\n",
        "",
        "prefill: the bias of a run dropped",
    ),
    Mutation(
        "attention_prefill.cuh",
        "(dead >> key / kBlockTokens & 1u) != 0;",
        "dead > 15u;",
        "prefill: blocks read that a policy hides",
    ),
    Mutation(
        "attention_prefill.cuh",
        "(dead >> i / kVectors & 1u) != 0;",
        "dead > 15u;",
        "prefill: cells read that a policy hides",
    ),
    Mutation(
        "attention_prefill.cuh",
        "kPolicies ? turn ^ (is_next ? 1 : 0) : t % 2;",
        "kPolicies ? turn : t % 2;",
        "prefill: the next tile over the one at hand",
    ),
    Mutation(
        "summarize.cu",
        "first += fmaf(x, cos, y * sin) / square;",
        "first += fmaf(x, cos, y * sin);",
        "summaries: magnitude of rotations left in",
    ),
    Mutation("summarize.cu", "fmaf(y, cos, -(x * sin))", "fmaf(y, cos, x * sin)", "summaries: keys rotated on"),
    Mutation(
        "summarize.cu",
        "summary.slot_position) * dim",
        "summary.position) * dim",
        "summaries: rotated to the first token",
    ),
    Mutation("summarize.cu", "value[d] = first / count;", "value[d] = first;", "summaries: a sum for a mean"),
    Mutation(
        "summarize.cu",
        "blocks[at / kBlockTokens], 1, head), dim, at % kBlockTokens",
        "blocks[0], 1, head), dim, at % kBlockTokens",
        "summaries: values of the first block only",
    ),
    Mutation(
        "attention_decode.cuh",
        "(base + key) / kBlockTokens == own_group",
        "(base + key) / kBlockTokens > own_group + (1 << 20)",
        "decode: own group read sealed",
    ),
    Mutation(
        "attention_decode.cuh",
        "(base + key) / kBlockTokens == own_group",
        "own_group >= 0",
        "decode: every group read open",
    ),
    Mutation(
        "attention_decode.cuh",
        "key_position(a, run, base + key_at",
        "key_position(a, run, key_at",
        "decode: sealed keys rotated within their split",
    ),
    Mutation(
        "attention_decode.cuh", "a.open.bias[kv_head * dim + d]", "a.open.bias[d]", "decode: bias of the first head"
    ),
    Mutation(
        "attention_prefill.cuh",
        "range.end = range.end < own ? range.end : own;",
        "range.end = range.end + 0 * own;",
        "prefill: own group read sealed, too",
    ),
    Mutation(
        "attention_prefill.cuh",
        "range.begin = range.begin > own ? range.begin : own;",
        "range.begin = range.begin + 0 * own;",
        "prefill: all groups read open, too",
    ),
    Mutation(
        "attention_prefill.cuh",
        "if (own_groups[c] == t * kTileCells + thread)",
        "if (own_groups[c] >= 0)",
        "prefill: one open cell for all groups",
    ),
    Mutation(
        "attention_prefill.cuh",
        "key_position(a, run, base + key)",
        "key_position(a, run, key)",
        "prefill: sealed keys rotated within their tile",
    ),
    Mutation(
        "attention_prefill.cuh",
        "kv_head * kDim + j / 4 * (kDim / 2)",
        "j / 4 * (kDim / 2)",
        "prefill: bias of the first head",
    ),
    Mutation(
        "kv_cells.cuh",
        "cell[(first + i) * kBlockTokens + token] = x.values[i];",
        "cell[token * dim + first + i] = x.values[i];",
        "open cells: axes swapped",
    ),
    Mutation(
        "sealed_keys.cuh",
        "(code << 19) + (112u << 23)",
        "(code << 19) + (113u << 23)",
        "sealed keys: scales twice as large",
    ),
    Mutation(
        "sealed_keys.cuh",
        "marked ? to_float(kFp16Nan) : first;",
        "first;",
        "sealed keys: a token that is not finite read as a number",
    ),
    Mutation(
        "sealed_keys.cuh",
        "rotate(first, second, angle, 1);",
        "rotate(second, first, angle, 1);",
        "sealed keys: rotated the other way",
    ),
    Mutation(
        "sealed_keys.cuh",
        "byte_of(eight.words[1 + i / 4], i % 4)",
        "byte_of(eight.words[1], i % 4)",
        "sealed keys: scales of the first half",
    ),
    Mutation(
        "sealed_keys.cuh",
        "const int d = i / 4 * (dim / 2) + 4 * eighth + i % 4;",
        "const int d = 8 * eighth + i;",
        "open keys: dimensions that rotation does not pair",
    ),
    Mutation(
        "seal.cu",
        "~bad & ((1u << item.num_tokens) - 1)",
        "(1u << item.num_tokens) - 1",
        "sealing: tokens that are not finite count",
    ),
    Mutation(
        "seal.cu", "~bad & ((1u << item.num_tokens) - 1)", "~bad & 0xffffu", "sealing: tokens behind the last count"
    ),
    Mutation(
        "seal.cu",
        "most = fmaxf(most, extent_of(keys + d * kBlockTokens, good)",
        "most = fmaxf(most, extent_of(keys + d, good)",
        "sealing: unit along the wrong axis",
    ),
    Mutation("seal.cu", "+ 0x7ffffu) >> 19", "+ 0u) >> 19", "sealing: scales rounded down"),
    Mutation("seal.cu", "rintf(own[t] / scale) - base", "rintf(own[t] / unit) - base", "sealing: codes by the unit"),
    Mutation(
        "seal.cu",
        "word |= low << 4 * j | high << (16 + 4 * j);",
        "word |= high << 4 * j | low << (16 + 4 * j);",
        "sealing: halves of a head swapped",
    ),
    Mutation(
        "norm_matrix.cu",
        "!kTokens || a.kv.format != quant::KvFormat::int4",
        "true",
        "keys rotated before they are sealed",
    ),
    Mutation(
        "elementwise.cu",
        "slot_b % kBlockTokens};",
        "slot_b % kBlockTokens / 2};",
        "deviation: a sealed key of another token",
    ),
    # ---- sampling.cu ----
    Mutation(
        "sampling.cu", "if (in_output > 0 && (", "if (in_output >= 0 && (", "sampler: presence penalty of prompt tokens"
    ),
    Mutation(
        "sampling.cu",
        "value > 0.0 ? value / p.repetition_penalty : value * p.repetition_penalty",
        "value / p.repetition_penalty",
        "sampler: repetition penalty of negative logits",
    ),
    Mutation(
        "sampling.cu",
        "if (i > 0 && p.biases[i - 1].token == token) continue;",
        "",
        "sampler: biases of one token added once",
    ),
    Mutation(
        "sampling.cu",
        "lanes & ((1u << lane_id()) - 1)",
        "lanes & ((2u << lane_id()) - 1)",
        "sampler: prefix over the wrong lanes",
    ),
    Mutation("sampling.cu", "+ p.temperature * p.log_min_p", "+ p.log_min_p", "sampler: min-p without the temperature"),
    Mutation(
        "sampling.cu",
        "uniform_at(p.seed, p.choice, p.position)",
        "uniform_at(p.seed, p.choice, 0)",
        "sampler: the draw does not know its position",
    ),
    Mutation("sampling.cu", "row * a.logits_stride", "row * a.vocab", "sampler: rows by the wrong stride"),
    # ---- sampling.cuh ----
    Mutation(
        "sampling.cuh",
        "(0xffffffffu - static_cast<unsigned>(id))",
        "static_cast<unsigned>(id)",
        "sampler: ties go to the higher id",
    ),
    Mutation("sampling.cuh", ": logit == 0.0f ? 0.0f : logit", ": logit", "sampler: minus zero apart from zero"),
    Mutation("sampling.cuh", "    turn ^= 1;", "    turn = 0;", "sampler: one set of sums for two turns"),
    Mutation("sampling.cuh", "round < 10", "round < 9", "sampler: rounds of the random numbers"),
    Mutation("sampling.cuh", "0x1.ebfbe0p-3f", "0x1.ebfbe0p-4f", "sampler: a weight's polynomial"),
    Mutation(
        "sampling.cuh",
        "const float value = logit > FLT_MAX ? FLT_MAX :",
        "const float value =",
        "sampler: infinity above the greatest finite value",
    ),
    # ---- steps that are recorded ----
    Mutation(
        "cpp/engine/step_graphs.cpp",
        ".splits = ops::count_splits(model::plan_of(in)).of_all};",
        ".splits = 0};",
        "graphs: one for all contexts",
    ),
    Mutation(
        "cpp/engine/step_graphs.cpp", "e.shape == shape;", "e.shape.rows == shape.rows;", "graphs: rows alone choose"
    ),
    Mutation(
        "cpp/engine/step_graphs.cpp", "  counts = sum(counts, entry->counts, 1);\n", "", "graphs: operators not counted"
    ),
    Mutation("cpp/engine/step_graphs.cpp", "!in.policies.empty() ||", "", "graphs: policies forgotten"),
    Mutation("cpp/engine/step_graphs.cpp", "  entries_.clear();\n", "", "graphs: used after they were given back"),
    Mutation(
        "cpp/engine/step_arrays.cpp",
        "put(layout.blocks, inputs.blocks)",
        "buffer_.data() + layout.blocks",
        "arrays: blocks of an earlier step",
    ),
    Mutation(
        "cpp/engine/engine.cpp",
        "if (workspace_.has_overflowed() || arrays_.would_move(batch_.inputs)) graphs_.drop();",
        "",
        "graphs: kept when the memory moves that they use",
    ),
    Mutation(
        "cpp/engine/engine.cpp",
        "    shape.has_logits = static_cast<bool>(logits);\n",
        "",
        "graphs: one with and without logits",
    ),
)


def place_of(row: Mutation) -> Path:
    """The file of a row in the tree."""
    return Path(row.file) if row.file.startswith("cpp/") else Path("cuda", row.file)


def check_texts() -> list[str]:
    """Rows whose text does not stand exactly once in its file."""
    wrong = []
    for row in MUTATIONS:
        count = (ROOT / place_of(row)).read_text(encoding="utf-8").count(row.old)
        if count != 1:
            wrong.append(f"{row.file}: {count} times, expected once: {row.old!r}")
    return wrong


def build(folder: Path, jobs: int) -> str | None:
    """Builds the tests; returns what the compiler said if it failed."""
    command = ["cmake", "--build", str(folder / "build"), "--target", TARGET, "-j", str(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]


def filters_for(file: str) -> tuple[str, ...]:
    """All tests in three parts, the most likely to find a defect in this file first."""
    own = next(tests for begin, tests in OWN.items() if file.startswith(begin))
    return own, f"-{own}:{ENGINES}", ENGINES


def failed_test(folder: Path, filters: tuple[str, ...], limit: float) -> str | None:
    """The first test that fails, or None. A crash or a hang of more than `limit` seconds counts as a failure."""
    for tests in filters:
        program = folder / "build" / TARGET
        command = [str(program), "--gtest_brief=1", "--gtest_fail_fast", f"--gtest_filter={tests}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
        except subprocess.TimeoutExpired:
            return "timeout"
        if done.returncode != 0:
            found = re.search(r"^\[  FAILED  \] (\S+)", done.stdout, re.MULTILINE)
            return found.group(1).rstrip(",") if found else f"exit status {done.returncode}"
    return None


def prepare(folder: Path, jobs: int, runs: bool) -> float:
    """Copies the tree, builds the tests and, if it `runs` them, sees them pass; returns the seconds that took."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    # The flags of tests/run.sh, so that the compiler cache has the core.
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DNANOBRAID_PYTHON=OFF", "-DNANOBRAID_DEMOS=OFF", "-DNANOBRAID_CUDA=OFF"]
    if shutil.which("ninja"):
        options += ["-G", "Ninja"]
    if shutil.which("ccache"):
        options.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
        os.environ.update(CCACHE_BASEDIR=str(folder), CCACHE_NOHASHDIR="1")
    subprocess.run(["cmake", "-S", folder, "-B", folder / "build", *options], stdout=subprocess.DEVNULL, check=True)
    errors = build(folder, jobs)
    if errors is not None:
        sys.exit(f"the tests do not build:\n{errors}")
    begin = time.monotonic()
    failed = failed_test(folder, ("*",), 3600) if runs else None
    if failed is not None:
        sys.exit(f"the tests fail without a defect: {failed}")
    return time.monotonic() - begin


def try_mutation(row: Mutation, folder: Path, jobs: int, limit: float) -> bool:
    """Whether a test fails with this defect; prints the outcome."""
    path = folder / place_of(row)
    whole = path.read_text(encoding="utf-8")
    begin = time.monotonic()
    path.write_text(whole.replace(row.old, row.new), encoding="utf-8")
    try:
        errors = build(folder, jobs)
        failed = None if errors is not None else failed_test(folder, filters_for(row.file), limit)
    finally:
        path.write_text(whole, encoding="utf-8")
    outcome = f"killed by {failed}" if failed else "SURVIVES"
    if errors is not None:
        outcome = f"DOES NOT BUILD\n{errors}"
    print(f"{time.monotonic() - begin:4.0f} s  {row.file}: {row.why}: {outcome}", flush=True)
    return failed is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression for file or reason")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-baseline", action="store_true", help="the tests are known to pass without a defect")
    options = parser.parse_args()
    wrong = check_texts()
    if wrong:
        print("\n".join(wrong))
        return 1
    rows = [row for row in MUTATIONS if re.search(options.only, f"{row.file}: {row.why}")]
    if not rows:
        sys.exit(f"no row matches {options.only!r}")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        folder = Path(name)
        limit = max(600.0, 4 * prepare(folder, options.jobs, not options.no_baseline))
        passed = "" if options.no_baseline else " and passed without a defect"
        print(f"{time.monotonic() - begin:4.0f} s  built{passed}", flush=True)
        killed = sum(try_mutation(row, folder, options.jobs, limit) for row in rows)
    print(f"{killed} of {len(rows)} defects found in {time.monotonic() - begin:.0f} s")
    return 0 if killed == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
