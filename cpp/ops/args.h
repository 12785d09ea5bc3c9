// Plain-data arguments of every kernel. The only header that kernels, ops.cpp and other backends share.
//
// Pointers are never null unless a comment says so; shapes have been checked by ops.cpp. Row strides are in elements.
// C headers only: this file is compiled for every instruction set. T rows of tokens, D head_dim.
#pragma once

#include <stdint.h>

#include "ops/key_policy.h"
#include "quant/format_id.h"

namespace nb::ops {

/// What enters a matrix product. bf16 values are stored as f32 rounded to bf16 on the CPU, as bf16 on a device.
enum class ActType : uint8_t { f32, bf16, int8 };

/// Rows of a panel, see Activation.
inline constexpr int kPanelRows = 4;

/// Rows ready for a matrix product, made by the `prepare` kernel of the same backend.
/// int8: per 32 columns, value = code * scale, code in [-127, 127]; sum is the sum of the 32 codes.
/// The order of elements is the backend's. Reference and devices: row after row. Tiled tables: panels of kPanelRows
/// (the last has what is left), in them for each 32 columns what row after row of the panel has there.
struct Activation {
  ActType type;
  int32_t rows;
  int32_t cols;              ///< rounded up to a multiple of 32; the padding is zero
  float* values;             ///< [rows, cols], f32 and bf16 types only; on a device bf16 rows hold 2 bytes a value
  int8_t* codes;             ///< [rows, cols], int8 only
  float* scales;             ///< [rows, cols / 32], int8 only
  float* shifts;             ///< [rows, cols / 32]; int8: scale * sum; with `packed`: sum of the values of each 32
  int32_t* minus_sums;       ///< [rows, cols / 32], int8 only: -sum
  int32_t* minus_half_sums;  ///< [rows, cols / 32], int8 only: minus the sum of the first 16 codes of each 32
  uint16_t* packed;          ///< [rows, cols], the values as bf16; bf16 only, for backends with KernelTable::packs_bf16
};

/// One matrix [rows, cols] inside a packed linear weight. The order of bytes belongs to the backend that packed it.
/// Tiled backends: strip s of 16 rows begins at data + (s / 2) * pair_stride + (s % 2) * strip_bytes.
/// Reference: row r begins at data + r * strip_bytes, in file layout.
/// Devices (WeightLayout::vectors; f32, bf16, f16 and q8_0 only): vector v (16 bytes: columns [16 v / size, 16 (v + 1)
/// / size) for numbers of `size` bytes) of row r lies at data + r / 2 * pair_stride + (r % 2) * strip_bytes + 32 v,
/// with strip_bytes = 16; where the rows of two matrices take turns (gate, up), a row r of either lies at data + r *
/// pair_stride + 32 v, with strip_bytes = 0. Columns are padded with zeros to a multiple of 32, rows to an even number.
/// q8_0 has the codes of a row in such vectors, as signed bytes, and behind them vectors of 8 scales (f16), of 32
/// columns each.
struct LinearSegment {
  quant::Format format;
  int32_t rows;
  int32_t cols;
  const uint8_t* data;
  int64_t strip_bytes;
  int64_t pair_stride;
};

/// The K/V cells of one layer: in a block, at base + block * block_stride, the keys of head after head and then the
/// values of head after head.
struct KvLayer {
  uint8_t* base;
  int64_t block_stride;
  int64_t key_cell_bytes;
  int64_t value_cell_bytes;
  int32_t num_kv_heads;
  int32_t head_dim;
  quant::KvFormat format;
};

/// Where keys are that no block has yet, of formats that seal (quant::seals_keys); all null of others. Cell c >= 0 has
/// the keys of up to 16 tokens of head h at cells + c * cell_stride + h * head_dim * 16, as [head_dim][16], before
/// rotation; cell c < 0 likewise at step_cells + ~c * num_kv_heads * head_dim * 16: those do not outlive a step. A
/// row's key is number slot % 16 of its cell. A row sees the keys of block `row_groups` of the last run of its segment
/// in its cell, where its own key is, and all others in their blocks; with -1 all.
struct OpenKeys {
  float* cells = nullptr;
  int64_t cell_stride = 0;
  float* step_cells = nullptr;
  const float* bias = nullptr;          ///< [num_kv_heads * head_dim] or null: keys are stored less it
  const int32_t* row_cells = nullptr;   ///< [T]
  const int32_t* row_groups = nullptr;  ///< [T]
};

/// The keys of the first `num_tokens` tokens of an open cell that become those of a block.
struct SealItem {
  int32_t block;
  int32_t cell;
  int32_t num_tokens;
};

/// Rotation table: row p holds cos(p * f_i) for i < D/2, then sin(p * f_i).
struct RopeTable {
  const float* cos_sin;
  int32_t head_dim;
  int32_t num_positions;
};

/// A range of keys at one position offset: key i (first_key <= i < num_keys) stands at sequence position
/// position_offset + i and lives in blocks[block_begin + i / 16].
///
/// Keys that are not contiguous have a position each: with positions_begin >= 0 key i stands at
/// key_positions[positions_begin + i], ascending, to which it was rotated too, and position_offset is 0. With
/// hidden_begin >= 0 nobody sees key i if bit i % 16 of hidden[hidden_begin + i / 16] is set.
///
/// `score_bias` is added to the scores of all keys: with the natural logarithm of n each weighs as much as n of its
/// kind.
struct AttentionRun {
  int32_t block_begin;
  int32_t num_keys;
  int32_t position_offset;
  int32_t first_key = 0;
  int32_t hidden_begin = -1;
  int32_t positions_begin = -1;
  float score_bias = 0.0f;
};

/// Consecutive rows of one sequence and the runs they attend to, in order. A row at position p sees the key at
/// position s of a run if s <= p, with a window W > 0 also s > p - W, and the key is not hidden.
///
/// `shared_runs` says that so many leading runs lie in the same blocks as those of the segment before it and have as
/// many keys; `shared_keys` (a multiple of 16) that so many leading keys of the run after them do. Neither is said of
/// runs with positions of their own. Offsets, first keys and hidden keys may differ: they concern the rows. A backend
/// may read such keys once for the rows of both; no row's result depends on it. In trie order (blocks compared from the
/// first on) segments i < j have in common the least of what segments i + 1 .. j share.
///
/// With `policy` >= 0 the rows' positions ascend, and of the keys of the last run, which begins at position 0, a row
/// sees those that policies[policy] shows it. What it shows to no row of the segment may lie anywhere: blocks are then
/// valid ones with finite content, which counts for nothing.
struct AttentionSegment {
  int32_t row_begin;
  int32_t row_count;
  int32_t run_begin;
  int32_t run_count;
  int32_t shared_keys = 0;
  int32_t shared_runs = 0;
  int32_t policy = -1;

  bool shares() const { return shared_runs > 0 || shared_keys > 0; }
};

struct EmbedArgs {
  LinearSegment table;
  const int32_t* ids;  ///< [T], each in [0, table.rows)
  int32_t rows;
  float* out;
  int64_t out_stride;
};

struct RmsNormArgs {
  const float* x;
  int64_t x_stride;
  const float* weight;
  float eps;
  int32_t rows;
  int32_t cols;
  float* out;  ///< may be x
  int64_t out_stride;
};

/// Rounds or quantizes rows into `out` (out.rows rows of `cols` real columns).
struct PrepareArgs {
  const float* x;
  int64_t x_stride;
  int32_t cols;
  Activation out;
};

/// out = x W^T (+ bias), or out += x W^T (+ bias).
struct LinearArgs {
  LinearSegment weight;
  Activation x;
  const float* bias;  ///< [weight.rows] or null
  bool accumulate;
  float* out;
  int64_t out_stride;
};

/// Rotates each head of each row by its position (half-split pairs).
struct RopeArgs {
  float* x;
  int64_t x_stride;
  int32_t rows;
  int32_t num_heads;
  const int32_t* positions;  ///< [rows]
  RopeTable table;
};

/// Stores keys and values of each row at slot = block * 16 + index in block.
struct KvWriteArgs {
  const float* k;
  int64_t k_stride;
  const float* v;
  int64_t v_stride;
  int32_t rows;
  const int32_t* slots;  ///< [rows]
  KvLayer kv;
  OpenKeys open;  ///< where keys go instead, if the format seals
};

/// Quantizes keys into their blocks.
struct KvSealArgs {
  KvLayer kv;
  OpenKeys open;
  const SealItem* items;
  int32_t num_items;
};

/// out[t] = sum over heads and dimensions of (key of slots_a[t] in a - key of slots_b[t] in b)^2. Both layers have one
/// shape and format; keys count as they are stored. If the format seals, those of a are in the open cells of the rows.
struct KeyDeviationArgs {
  KvLayer a;
  KvLayer b;
  const int32_t* slots_a;  ///< [rows]
  const int32_t* slots_b;  ///< [rows]
  int32_t rows;
  float* out;  ///< [rows]
  OpenKeys open;
};

/// A group of tokens of one sequence that is to be seen as one. Token i is key first_key + i of the blocks from
/// blocks[block_begin] on, rotated to position + i.
struct KvSummary {
  int32_t block_begin;
  int32_t first_key;
  int32_t num_tokens;
  int32_t position;
  int32_t slot;           ///< where the summary goes, none of the group's
  int32_t slot_position;  ///< to which its key is rotated
};

/// Stores the mean of each group's values, and of its keys as they are before rotation, rotated again; in all KV heads.
struct SummarizeKvArgs {
  KvLayer kv;
  const KvSummary* summaries;
  int32_t num_summaries;
  const int32_t* blocks;
  RopeTable rope;
  float* scratch;  ///< [threads, 2 * D]; null on a device
};

/// Segments of up to this many rows count as decoding where a device has kernels of its own for that.
inline constexpr int kDecodeRows = 8;

struct AttentionArgs {
  const float* q;  ///< [T, num_heads * D], not rotated
  int64_t q_stride;
  float* out;  ///< [T, num_heads * D]
  int64_t out_stride;
  int32_t num_heads;
  float scale;
  int32_t window;  ///< keys a row sees at most, its own included; 0 = all
  RopeTable rope;
  KvLayer kv;
  OpenKeys open;
  const int32_t* positions;  ///< [T]
  const AttentionSegment* segments;
  int32_t num_segments;
  const AttentionRun* runs;
  const int32_t* blocks;
  const int32_t* key_positions;  ///< of runs with positions of their own; null if there is none
  const uint16_t* hidden;        ///< of runs with hidden keys; null if there is none
  const KeyPolicy* policies;     ///< [num_policies], of segments that have one
  int32_t num_policies;
  // What devices need to know before they start a kernel, and how a row finds its segment.
  int32_t rows;               ///< T
  int32_t max_segment_rows;   ///< rows of the longest segment
  int32_t max_decode_splits;  ///< splits of 256 keys of all runs, of the segment of at most kDecodeRows rows with most
  int32_t max_splits;         ///< the same of all segments
  const int32_t* row_segments;  ///< [T]; null on the CPU
  uint8_t* scratch;             ///< as many bytes as the kernel's scratch function asks for
  int64_t scratch_bytes;
  bool has_policies;  ///< a segment has a policy, or a run a bias
};

/// out = silu(gate) * up.
struct SiluMulArgs {
  const float* gate;
  int64_t gate_stride;
  const float* up;
  int64_t up_stride;
  int32_t rows;
  int32_t cols;
  float* out;
  int64_t out_stride;
};

/// The smallest index of the largest value of each row; a NaN never wins.
struct ArgmaxArgs {
  const float* x;
  int64_t x_stride;
  int32_t rows;
  int32_t cols;
  int32_t* out;
};

/// A token of a text and how often the output has it (0: only the prompt does).
struct TokenCount {
  int32_t token;
  int32_t in_output;
};

struct TokenBias {
  int32_t token;
  double bias;
};

/// How to draw the token of one row: sampling/params.h in the form of a kernel. All pointers may be null if there is
/// nothing of their kind; all tokens are in [0, vocab).
struct SampleRow {
  uint64_t seed;
  uint64_t position;  ///< of the new token: the number of tokens before it
  uint32_t choice;
  int32_t top_k;              ///< <= 0 keeps all
  double temperature;         ///< 0 takes the most likely token
  double top_p;               ///< 1 keeps all
  double log_min_p;           ///< log(min_p); -infinity keeps all
  double repetition_penalty;  ///< 1 for none
  double presence_penalty;
  double frequency_penalty;
  const TokenBias* biases;  ///< sorted by token, several of one token in the order in which they are to be added
  int32_t num_biases;
  const TokenCount* history;  ///< distinct tokens of prompt and output, in any order
  int32_t num_history;
  const int32_t* masked;  ///< tokens that must not be drawn
  int32_t num_masked;
  const uint32_t* allowed_bits;  ///< only these: token t is bit t % 32 of word t / 32; missing words are 0; null: all
  int32_t num_allowed_words;
};

/// Draws a token from each row of logits, with the stages and rules of sampling/stages.h.
struct SampleArgs {
  const float* logits;  ///< [rows, vocab], not changed
  int64_t logits_stride;
  int32_t rows;
  int32_t vocab;
  const SampleRow* params;  ///< [rows]
  float* scratch_logits;    ///< [rows, vocab]
  int32_t* scratch_ids;     ///< [rows, vocab]
  int32_t* out;             ///< [rows]; -1 where no token can be drawn
};

// Fused operators. `act_type` is what rows entering the product are prepared as. `scratch_act` holds such rows: one
// shared set, or one per thread when T <= kPrivateRows; null on a device, where the kernel has room of its own.

/// Up to this many rows every thread prepares all rows for itself; above, rows are split and a barrier follows.
inline constexpr int kPrivateRows = 16;

/// Blocks of `head` on a device at most, each with a best of its own for every row.
inline constexpr int kHeadBlocks = 528;

/// q = x' Wq^T + bq (not rotated); k, v likewise, k rotated by key_positions, both stored at slots; x' = rmsnorm(x).
/// On a device q, k and v have one format (see pack_linear).
struct NormQkvArgs {
  const float* x;
  int64_t x_stride;
  int32_t rows;
  const float* norm_weight;
  float eps;
  LinearSegment q, k, v;
  const float* q_bias;  ///< null, or with k_bias and v_bias
  const float* k_bias;
  const float* v_bias;
  const float* q_norm;  ///< [D] or null: rmsnorm of each q head before rotation (with k_norm)
  const float* k_norm;
  const int32_t* key_positions;  ///< [rows], position inside the run the key is stored for
  const int32_t* slots;          ///< [rows]
  RopeTable rope;
  KvLayer kv;
  OpenKeys open;  ///< where keys go, not rotated, if the format seals
  ActType act_type;
  Activation* scratch_act;
  float* scratch_k;  ///< [rows, k.rows]
  float* scratch_v;  ///< [rows, v.rows]
  float* q_out;
  int64_t q_stride;
};

/// residual += x W^T + bias. `x` is f32, or already prepared (then x is null and `prepared` is used).
struct LinearResidualArgs {
  const float* x;
  int64_t x_stride;
  int32_t rows;
  LinearSegment weight;
  const float* bias;  ///< or null
  const Activation* prepared;
  ActType act_type;
  Activation* scratch_act;
  float* residual;
  int64_t residual_stride;
};

/// out = prepare(silu(x' Wg^T) * (x' Wu^T)), x' = rmsnorm(x).
struct NormGateUpArgs {
  const float* x;
  int64_t x_stride;
  int32_t rows;
  const float* norm_weight;
  float eps;
  LinearSegment gate, up;
  ActType act_type;
  Activation* scratch_act;
  Activation out;
};

/// logits = rmsnorm(x[row_ids]) W^T, and the argmax of each row.
struct HeadArgs {
  const float* x;
  int64_t x_stride;
  const int32_t* row_ids;  ///< [rows] rows of x
  int32_t rows;
  const float* norm_weight;
  float eps;
  LinearSegment weight;
  ActType act_type;
  Activation* scratch_act;
  float* scratch_best;       ///< [threads, rows]; on a device [kHeadBlocks, rows]
  int32_t* scratch_best_id;  ///< likewise
  float* logits;             ///< [rows, V] or null
  int64_t logits_stride;
  int32_t* argmax;  ///< [rows]
};

}  // namespace nb::ops
