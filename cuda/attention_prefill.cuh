// Attention of long segments on tensor cores: 64 columns of one KV head against tiles of 64 keys, in every format of 16
// bits or less.
//
// A column is one (row, query head) pair; the heads that share a KV head stand side by side, so short segments fill a
// tile too. Four warps have 16 columns each. Keys and values come from the paged blocks by asynchronous copies, one
// tile ahead. Queries are rotated for each run and rounded to bf16, weights are rounded to bf16; scores, sums and
// weighted values are f32. Tiles begin at multiples of 64 keys of a run; a tile of which a column sees nothing changes
// no bit of it, so it does not matter which columns are neighbours. After Dao 2023 (FlashAttention-2).
//
// fp16 is multiplied as fp16. Codes are fetched as they are and become bf16 in shared memory: those of keys exactly,
// their scales meet the scores; values with their scales, rounded. A token that is not finite gets NaN scores, and
// zeros for its value, so that columns which do not see it stay as they are.
//
// Of a policy, the first row of a tile of columns sees most: tiles and blocks that are hidden from it are not read. A
// lane works out what one block hides from its two columns, and the four lanes of a column share it. Kernels with
// policies are instances of their own: the others stay what they are.
//
// Sealed keys are rotated when they become bf16. A column sees the keys of its row's own group in an open cell, so the
// last run is gone through twice: for all columns up to their own groups, sealed, and then for what is left, which has
// splits of its own. What a column adds up, and in which order, depends on no other column.
#pragma once

#include <type_traits>

#include "cuda/attention.cuh"
#include "cuda/ptx.cuh"
#include "cuda/sealed_keys.cuh"

namespace nb::cuda {

inline constexpr int kPrefillThreads = 128;
inline constexpr int kTileKeys = 64;
inline constexpr int kTileColumns = 64;

/// Numbers of a tile's row in shared memory: 16 bytes more than needed, so that 8 rows lie in different banks.
template <int kDim>
inline constexpr int kTileStride = kDim + 8;

inline constexpr int kTileCells = kTileKeys / kBlockTokens;
inline constexpr int kSplitTiles = kSplitTokens / kTileKeys;
inline constexpr int kNoCell = 0x7fffffff;

/// What the tensor cores multiply.
template <class Number>
using Factor = std::conditional_t<kIsCode<Number>, Bf16, Number>;

/// Vectors of 16 bytes of a cell of codes.
template <class Number, int kDim>
inline constexpr int kCellVectors = std::is_same_v<Number, Code8> ? kDim + 2
                                    : kIsSealed<Number>
                                        ? (10 * kDim + 16) / 16
                                        : kDim / 2 + 4 * ((kDim + quant::kKvGroup - 1) / quant::kKvGroup);

/// A tile of queries, two of keys and two of values. Of codes: one of each, and the cells of the next ones.
template <class Key, class Value, int kDim>
constexpr std::size_t prefill_shared_bytes() {
  constexpr std::size_t kTile = sizeof(Bf16) * 64 * kTileStride<kDim>;
  if (!kIsCode<Key>) return 5 * kTile;
  return 3 * kTile + 16 * kTileCells * (kCellVectors<Key, kDim> + kCellVectors<Value, kDim>);
}

/// Tiles of columns of a segment.
NB_DEVICE int prefill_tiles(const ops::AttentionArgs& a, const ops::AttentionSegment& segment) {
  if (segment.row_count <= ops::kDecodeRows) return 0;
  return (segment.row_count * (a.num_heads / a.kv.num_kv_heads) + kTileColumns - 1) / kTileColumns;
}

/// The smallest range that holds those of lanes that differ in the bits up to `most`.
NB_DEVICE KeyRange range_of_lanes(KeyRange range, int most) {
  for (int step = most; step > 0; step /= 2) {
    const int begin = shuffle_xor(range.begin, step), end = shuffle_xor(range.end, step);
    range.begin = begin < range.begin ? begin : range.begin;
    range.end = end > range.end ? end : range.end;
  }
  return range;
}

NB_DEVICE void store_factor(SharedPtr<Bf16> out, int at, float value) { out[at] = to_bf16(value); }
NB_DEVICE void store_factor(SharedPtr<Fp16> out, int at, float value) { out[at] = near_fp16(value); }

template <class Number>
NB_DEVICE void multiply_tile(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  if constexpr (std::is_same_v<Number, Bf16>) {
    mma_bf16(d, a, b);
  } else {
    mma_fp16(d, a, b);
  }
}

/// The columns of a block: number c of the tile is row c / group and head c % group, counted from the first.
struct ColumnTile {
  int row_begin, first, count;  // count: of the whole segment
  int head_begin, group;

  NB_DEVICE bool exists(int c) const { return first + c < count; }
  NB_DEVICE int row(int c) const { return row_begin + (first + c) / group; }
  NB_DEVICE int head(int c) const { return head_begin + (first + c) % group; }
};

/// Bit i: the policy hides all of block i of a tile from rows at `position` and later.
NB_DEVICE unsigned dead_blocks(const ops::KeyPolicy& policy, int position, int tile) {
  const int block = tile * kTileCells + lane_id() % kTileCells;
  return ballot(ops::is_dead(policy, position, block)) & ((1u << kTileCells) - 1);
}

/// Starts to copy keys [base, base + 64) of a run and their values; what nobody sees becomes zeros. `dead`: blocks that
/// nobody sees, a bit each.
template <class Number, int kDim>
NB_DEVICE void copy_tile(const ops::AttentionArgs& a, const ops::AttentionRun& run, int kv_head, int base,
                         const KeyRange& seen, unsigned dead, SharedPtr<Number> keys, SharedPtr<Number> values) {
  constexpr int kVectors = kDim / 8;
  for (int i = static_cast<int>(threadIdx.x); i < kTileKeys * kVectors; i += kPrefillThreads) {
    const int key = i / kVectors, d = i % kVectors * 8;
    const bool is_dead = (dead >> key / kBlockTokens & 1u) != 0;
    const bool valid = base + key >= seen.begin && base + key < seen.end && !is_dead;
    const int block = valid ? a.blocks[run.block_begin + (base + key) / kBlockTokens] : 0;
    const int to = key * kTileStride<kDim> + d;
    const int from = key % kBlockTokens * kDim + d;
    cp_async16(keys + to, reinterpret_cast<const Number*>(kv_cell(a.kv, block, 0, kv_head)) + from, valid);
    cp_async16(values + to, reinterpret_cast<const Number*>(kv_cell(a.kv, block, 1, kv_head)) + from, valid);
  }
  cp_async_commit();
}

/// Starts to copy the cells of these keys and values, which are codes: those of which anybody sees a token.
template <class Number, int kDim>
NB_DEVICE void copy_cells(const ops::AttentionArgs& a, const ops::AttentionRun& run, int kv_head, int base, int which,
                          const KeyRange& seen, unsigned dead, SharedPtr<uint4> cells) {
  constexpr int kVectors = kCellVectors<Number, kDim>;
  for (int i = static_cast<int>(threadIdx.x); i < kTileCells * kVectors; i += kPrefillThreads) {
    const int first = base + i / kVectors * kBlockTokens;
    const bool is_dead = (dead >> i / kVectors & 1u) != 0;
    const bool valid = first + kBlockTokens > seen.begin && first < seen.end && !is_dead;
    const int block = valid ? a.blocks[run.block_begin + first / kBlockTokens] : 0;
    const std::uint8_t* cell = kv_cell(a.kv, block, which, kv_head);
    cp_async16(cells + i, reinterpret_cast<const uint4*>(cell) + i % kVectors, valid);
  }
}

/// load_eight() from a tile of cells in shared memory: number `eighth` of the eights of a key.
template <class Number, int kDim>
NB_DEVICE Eight<Number> eight_of_tile(SharedPtr<uint4> cells, int key, int eighth) {
  const SharedPtr<uint4> cell = cells + key / kBlockTokens * kCellVectors<Number, kDim>;
  const int token = key % kBlockTokens, at = token * kDim / 8 + eighth;
  Eight<Number> eight;
  if constexpr (std::is_same_v<Number, Code8>) {
    eight.codes = shared_cast<uint2>(cell)[at];
    eight.scale = shared_cast<Fp16>(cell + kDim)[token];
  } else {
    eight.codes = shared_cast<unsigned>(cell)[at];
    eight.factors = shared_cast<unsigned>(cell + kDim / 2)[eighth / (quant::kKvGroup / 8) * kBlockTokens + token];
  }
  return eight;
}

/// Writes a tile of codes that have arrived as bf16: keys without their scales, values with them, but zeros for those
/// with a scale of NaN.
template <bool kWithScales, class Number, int kDim>
NB_DEVICE void convert_tile(SharedPtr<uint4> cells, SharedPtr<Bf16> tile) {
  constexpr int kEights = kDim / 8;
  for (int i = static_cast<int>(threadIdx.x); i < kTileKeys * kEights; i += kPrefillThreads) {
    const int key = i / kEights, eighth = i % kEights;
    Eight<Number> eight = eight_of_tile<Number, kDim>(cells, key, eighth);
    if constexpr (kWithScales) {
      if (eight.is_spoilt()) eight.forget();
    }
    unsigned words[4];
    NB_UNROLL
    for (int w = 0; w < 4; ++w) {
      if constexpr (kWithScales) {
        words[w] = pack_pair<Bf16>(eight.at(2 * w), eight.at(2 * w + 1));
      } else {
        words[w] = pack_pair<Bf16>(eight.code(2 * w), eight.code(2 * w + 1));
      }
    }
    shared_cast<uint4>(tile + key * kTileStride<kDim>)[eighth] = uint4{words[0], words[1], words[2], words[3]};
  }
}

/// Writes a tile of sealed keys, rotated to their positions, as bf16. With kIsOpen block b of the tile is in the open
/// cell cells_of_blocks[b]; kNoCell makes zeros.
template <int kDim, bool kIsOpen>
NB_DEVICE void rotate_tile(const ops::AttentionArgs& a, const ops::AttentionRun& run, int kv_head, int base,
                           SharedPtr<uint4> cells, SharedPtr<int> cells_of_blocks, SharedPtr<Bf16> tile) {
  constexpr int kEights = kDim / 8;
  NB_UNROLL_BY(1)  // side by side they need too many registers
  for (int i = static_cast<int>(threadIdx.x); i < kTileKeys * kEights; i += kPrefillThreads) {
    // Neighbours have eighths of one key, or tokens of an open cell.
    const int key = kIsOpen ? i % kTileKeys : i / kEights, eighth = kIsOpen ? i / kTileKeys : i % kEights;
    const int block = key / kBlockTokens, token = key % kBlockTokens;
    Eight<Sealed> eight;
    bool exists = true;
    if constexpr (kIsOpen) {
      const int cell = cells_of_blocks[block];
      exists = cell != kNoCell;
      if (exists) take_open(open_cell(a.kv, a.open, cell, kv_head), kDim, token, eighth, eight);
    } else {
      const SharedPtr<uint4> cell = cells + block * kCellVectors<Sealed, kDim>;
      take_sealed(shared_cast<unsigned>(cell), cell, kDim, token, eighth, eight);
    }
    unsigned words[4] = {0, 0, 0, 0};
    if (exists) {
      const Angles angles = take_angles(a.rope, key_position(a, run, base + key), eighth);
      float bias[8];
      NB_UNROLL
      for (int j = 0; j < 8; ++j) {
        const int d = kv_head * kDim + j / 4 * (kDim / 2) + 4 * eighth + j % 4;
        bias[j] = a.open.bias == nullptr ? 0.0f : a.open.bias[d];
      }
      const float4 low = {bias[0], bias[1], bias[2], bias[3]}, high = {bias[4], bias[5], bias[6], bias[7]};
      const RotatedEight numbers = rotated(eight, angles, low, high);
      NB_UNROLL
      for (int w = 0; w < 4; ++w) words[w] = pack_pair<Bf16>(numbers.values[2 * w], numbers.values[2 * w + 1]);
    }
    const SharedPtr<uint2> out = shared_cast<uint2>(tile + key * kTileStride<kDim>);
    out[eighth] = uint2{words[0], words[1]};
    out[kDim / 8 + eighth] = uint2{words[2], words[3]};
  }
}

/// Writes what scores are to be multiplied with: the scale of each key, or NaN if the value is not finite either.
template <class Key, class Value, int kDim>
NB_DEVICE void write_scales(SharedPtr<uint4> key_cells, SharedPtr<uint4> value_cells, SharedPtr<float> scales) {
  const int key = static_cast<int>(threadIdx.x);
  if (key >= kTileKeys) return;
  float scale = 1.0f;
  if constexpr (!kIsSealed<Key>) scale = eight_of_tile<Key, kDim>(key_cells, key, 0).factor();
  constexpr int kStep = std::is_same_v<Value, Code8> ? kDim / 8 : quant::kKvGroup / 8;
  NB_UNROLL
  for (int eighth = 0; eighth < kDim / 8; eighth += kStep) {
    if (eight_of_tile<Value, kDim>(value_cells, key, eighth).is_spoilt()) scale = to_float(kFp16Nan);
  }
  scales[key] = scale;
}

/// Writes the columns' queries, rotated for a run. Columns that do not exist or stand before it are zeros.
template <int kDim, class Number>
NB_DEVICE void write_queries(const ops::AttentionArgs& a, const ColumnTile& tile, int offset,
                             SharedPtr<Number> queries) {
  for (int i = static_cast<int>(threadIdx.x); i < kTileColumns * kDim / 2; i += kPrefillThreads) {
    const int c = i / (kDim / 2), pair = i % (kDim / 2);
    const int position = tile.exists(c) ? a.positions[tile.row(c)] - offset : -1;
    float2 q = {0.0f, 0.0f};
    if (position >= 0) q = rotated_pair(a, tile.row(c), tile.head(c), position, pair);
    store_factor(queries, c * kTileStride<kDim> + pair, q.x);
    store_factor(queries, c * kTileStride<kDim> + pair + kDim / 2, q.y);
  }
}

/// What a thread knows of its two columns, c = lane / 4 and c + 8 of its warp: for every 8 dimensions numbers 2 (lane %
/// 4) and the next one of the first column, then of the second. `sum` is that of the thread's own keys.
template <int kDim>
struct ColumnPair {
  SplitState state[2];
  float values[kDim / 8][4];

  NB_DEVICE void clear() {
    state[0] = state[1] = empty_state();
    NB_UNROLL
    for (int n = 0; n < kDim / 8; ++n) {
      NB_UNROLL
      for (int e = 0; e < 4; ++e) values[n][e] = 0.0f;
    }
  }
};

/// Makes the hidden ones among the 64 keys of a run from `base` on weigh nothing. `scores` are those of a thread.
NB_DEVICE void hide_keys(const ops::AttentionArgs& a, const ops::AttentionRun& run, int base,
                         float (&scores)[kTileKeys / 8][4]) {
  const int key = 2 * (lane_id() % 4);  // of every 8
  NB_UNROLL
  for (int j = 0; j < kTileKeys / 8; ++j) {
    const int first = base + 8 * j;
    const unsigned bits =
        first < run.num_keys ? a.hidden[run.hidden_begin + first / kBlockTokens] >> (first % kBlockTokens + key) : 0u;
    NB_UNROLL
    for (int e = 0; e < 4; ++e) {
      if ((bits >> e % 2 & 1u) != 0) scores[j][e] = -INFINITY;
    }
  }
}

/// What the policy hides of a thread's two columns in block lane % 4 of a tile: 16 bits of the first, above them those
/// of the second. `positions` of their rows, -1 where there is none.
NB_DEVICE unsigned hidden_of_columns(const ops::KeyPolicy& policy, const int (&positions)[2], int tile) {
  const int block = tile * kTileCells + lane_id() % kTileCells;
  unsigned bits = 0;
  NB_UNROLL
  for (int half = 0; half < 2; ++half) {
    const unsigned own = positions[half] < 0 ? 0xffffu : ops::hidden_bits(policy, positions[half], block);
    bits |= own << 16 * half;
  }
  return bits;
}

/// Makes what hidden_of_columns() says weigh nothing.
NB_DEVICE void hide_from_columns(unsigned hidden, float (&scores)[kTileKeys / 8][4]) {
  const int lane = lane_id();
  NB_UNROLL
  for (int block = 0; block < kTileCells; ++block) {
    const unsigned bits = shuffle(hidden, lane / 4 * 4 + block) >> 2 * (lane % 4);
    NB_UNROLL
    for (int i = 0; i < 8; ++i) {  // of every 8 keys, numbers 2 (lane % 4) and the next one of both columns
      const int column = i % 4 / 2, key = i / 4 * 8 + i % 2;
      if ((bits >> (16 * column + key) & 1u) != 0) scores[2 * block + i / 4][i % 4] = -INFINITY;
    }
  }
}

/// Adds a run's tile of keys from `base` on to the split's states of a warp's columns, of which the thread's see `seen`
/// but for the hidden ones: those of the run, and `hidden` by hidden_of_columns(). `scales`, of keys, if these are
/// codes.
template <class Key, int kDim, bool kPolicies, class Seen>
NB_DEVICE void attend_tile(const ops::AttentionArgs& a, const ops::AttentionRun& run, SharedPtr<Factor<Key>> queries,
                           SharedPtr<Factor<Key>> keys, SharedPtr<Factor<Key>> values, SharedPtr<float> scales,
                           int base, const Seen& seen, unsigned hidden, ColumnPair<kDim>& split) {
  using Number = Factor<Key>;
  constexpr int kStride = kTileStride<kDim>;
  const int lane = lane_id();
  float scores[kTileKeys / 8][4];
  NB_UNROLL
  for (int j = 0; j < kTileKeys / 8; ++j) {
    NB_UNROLL
    for (int e = 0; e < 4; ++e) scores[j][e] = 0.0f;
  }
  // All of it unrolled, fp16 and sealed keys of 128 dimensions spill registers on sm_80; codes spill if it is not.
  [[maybe_unused]] constexpr int kTimes = std::is_same_v<Key, Fp16> || kIsSealed<Key> ? 4 : kDim / 16;
  NB_UNROLL_BY(kTimes)
  for (int k = 0; k < kDim / 16; ++k) {
    unsigned q[4];
    ldmatrix_x4(q, queries + (lane % 16 * kStride + 16 * k + lane / 16 * 8));
    NB_UNROLL
    for (int j = 0; j < kTileKeys / 16; ++j) {
      unsigned matrices[4];
      ldmatrix_x4(matrices, keys + ((16 * j + lane / 16 * 8 + lane % 8) * kStride + 16 * k + lane / 8 % 2 * 8));
      const unsigned first[2] = {matrices[0], matrices[1]}, second[2] = {matrices[2], matrices[3]};
      multiply_tile<Number>(scores[2 * j], q, first);
      multiply_tile<Number>(scores[2 * j + 1], q, second);
    }
  }
  if constexpr (kIsCode<Key>) {
    NB_UNROLL
    for (int j = 0; j < kTileKeys / 8; ++j) {
      const float2 both = shared_cast<float2>(scales)[4 * j + lane % 4];
      NB_UNROLL
      for (int e = 0; e < 4; ++e) scores[j][e] *= e % 2 == 0 ? both.x : both.y;
    }
  }

  if (run.hidden_begin >= 0) hide_keys(a, run, base, scores);
  if constexpr (kPolicies) {
    if (ballot(hidden != 0) != 0) hide_from_columns(hidden, scores);
  }
  NB_UNROLL
  for (int half = 0; half < 2; ++half) {
    SplitState& state = split.state[half];
    const KeyRange range = seen(half);
    float largest = -INFINITY;
    NB_UNROLL
    for (int j = 0; j < kTileKeys / 8; ++j) {
      NB_UNROLL
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        const int key = base + 8 * j + 2 * (lane % 4) + e % 2;
        if (key < range.begin || key >= range.end) scores[j][e] = -INFINITY;
        largest = fmaxf(largest, scores[j][e]);
      }
    }
    largest = fmaxf(largest, shuffle_xor(largest, 1));
    largest = fmaxf(largest, shuffle_xor(largest, 2));
    const float next = fmaxf(state.max, largest);
    const float zero = next == -INFINITY ? 0.0f : next;  // of a column that has seen nothing yet
    const float keep = exp2f(state.max - zero);
    state.max = next;
    state.sum *= keep;
    NB_UNROLL
    for (int j = 0; j < kTileKeys / 8; ++j) {
      NB_UNROLL
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        scores[j][e] = exp2f(scores[j][e] - zero);
        state.sum += scores[j][e];
      }
    }
    NB_UNROLL
    for (int n = 0; n < kDim / 8; ++n) {
      split.values[n][2 * half] *= keep;
      split.values[n][2 * half + 1] *= keep;
    }
  }

  NB_UNROLL
  for (int k = 0; k < kTileKeys / 16; ++k) {
    const unsigned weights[4] = {pack_pair<Number>(scores[2 * k][0], scores[2 * k][1]),
                                 pack_pair<Number>(scores[2 * k][2], scores[2 * k][3]),
                                 pack_pair<Number>(scores[2 * k + 1][0], scores[2 * k + 1][1]),
                                 pack_pair<Number>(scores[2 * k + 1][2], scores[2 * k + 1][3])};
    NB_UNROLL
    for (int n = 0; n < kDim / 16; ++n) {
      unsigned matrices[4];
      ldmatrix_x4_transposed(matrices, values + ((16 * k + lane % 16) * kStride + 16 * n + lane / 16 * 8));
      const unsigned first[2] = {matrices[0], matrices[1]}, second[2] = {matrices[2], matrices[3]};
      multiply_tile<Number>(split.values[2 * n], weights, first);
      multiply_tile<Number>(split.values[2 * n + 1], weights, second);
    }
  }
}

/// total <- total folded with split, split <- empty. The split is of `run`.
template <bool kPolicies, int kDim>
NB_DEVICE void fold_split(const ops::AttentionRun& run, ColumnPair<kDim>& total, ColumnPair<kDim>& split) {
  NB_UNROLL
  for (int half = 0; half < 2; ++half) {
    SplitState state = split.state[half];
    state.max = biased<kPolicies>(state.max, run);
    state.sum += shuffle_xor(state.sum, 1);
    state.sum += shuffle_xor(state.sum, 2);
    const FoldScale scale = fold(total.state[half], state);
    NB_UNROLL
    for (int n = 0; n < kDim / 8; ++n) {
      NB_UNROLL
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        total.values[n][e] = fold_value(scale, total.values[n][e], split.values[n][e]);
      }
    }
  }
  split.clear();
}

/// grid: (tiles of all long segments or more, KV heads). `kPolicies`: for plans with policies or biases.
template <class Key, class Value, int kDim, bool kPolicies>
__global__ void __launch_bounds__(kPrefillThreads, 2) attention_prefill_kernel(ops::AttentionArgs a) {
  using Number = Factor<Key>;
  constexpr int kTile = 64 * kTileStride<kDim>;
  // Where policies or sealed keys need registers, ranges of columns are read when they are needed.
  constexpr bool kReadsRanges = kPolicies || kIsSealed<Key>;
  const SharedPtr<Number> queries = dynamic_shared<Number>();
  const SharedPtr<Number> buffers = queries + kTile;  // keys, values, keys, values; of codes: keys, values, cells
  const SharedPtr<uint4> key_cells = shared_cast<uint4>(buffers + 2 * kTile);
  const SharedPtr<uint4> value_cells = key_cells + (kIsCode<Key> ? kTileCells * kCellVectors<Key, kDim> : 0);
  NB_SHARED(float, scales, kIsCode<Key> ? kTileKeys : 1);
  NB_SHARED(int, first_seen, kTileColumns);
  NB_SHARED(int, end_seen, kTileColumns);
  NB_SHARED(int, own_groups, kIsSealed<Key> ? kTileColumns : 1);  // of the columns' rows; -1: none
  NB_SHARED(int, cells_of_blocks, kIsSealed<Key> ? kTileCells : 1);
  NB_SHARED(int, row_positions, kPolicies ? kTileColumns : 1);  // of columns; -1 where there is none

  grid_trigger();
  grid_wait();
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const int kv_head = static_cast<int>(blockIdx.y);
  const SegmentItem item = find_item(a, static_cast<int>(blockIdx.x), [&](const ops::AttentionSegment& candidate) {
    return prefill_tiles(a, candidate);
  });
  if (item.segment < 0) return;
  const ops::AttentionSegment segment = a.segments[item.segment];
  const int group = a.num_heads / a.kv.num_kv_heads;
  // The last rows see most keys and begin first.
  const int tile_index = prefill_tiles(a, segment) - 1 - item.index;
  const ColumnTile tile = {segment.row_begin, tile_index * kTileColumns, segment.row_count * group, kv_head * group,
                           group};
  const int warp_column = thread / 32 * 16;

  ColumnPair<kDim> total, split;
  total.clear();
  split.clear();
  const int run_end = segment.run_begin + segment.run_count;
  bool is_open = false;  // the last run once more, for keys that rows see in open cells
  for (int r = segment.run_begin; r < run_end;) {
    const ops::AttentionRun run = a.runs[r];
    // By number: an address would take a register more.
    [[maybe_unused]] const int policy = kPolicies ? policy_of(segment, r) : -1;
    if (thread < kTileColumns) {
      KeyRange range = {0, 0};
      if (tile.exists(thread)) range = visible_keys(a, run, tile.row(thread));
      if constexpr (kIsSealed<Key>) {
        const bool has_own = r + 1 == run_end && tile.exists(thread);
        const int own_group = has_own ? a.open.row_groups[tile.row(thread)] : -1;
        own_groups[thread] = own_group;
        const int own = own_group < 0 ? run.num_keys : own_group * kBlockTokens;
        if (is_open) {
          range.begin = range.begin > own ? range.begin : own;
        } else {
          range.end = range.end < own ? range.end : own;
        }
      }
      const bool is_empty = range.begin >= range.end;
      first_seen[thread] = is_empty ? run.num_keys : range.begin;
      end_seen[thread] = is_empty ? 0 : range.end;
      if constexpr (kPolicies) row_positions[thread] = tile.exists(thread) ? a.positions[tile.row(thread)] : -1;
    }
    sync_block();
    const auto seen_by = [&](int c) { return KeyRange{first_seen[c], end_seen[c]}; };
    [[maybe_unused]] const KeyRange of_columns[2] = {seen_by(warp_column + lane / 4),
                                                     seen_by(warp_column + lane / 4 + 8)};
    const auto seen = [&](int half) {
      return kReadsRanges ? seen_by(warp_column + lane / 4 + 8 * half) : of_columns[half];
    };
    const KeyRange seen_by_warp = range_of_lanes(seen_by(warp_column + lane % 16), 8);
    KeyRange seen_by_all = seen_by(lane);
    const KeyRange others = seen_by(lane + 32);
    seen_by_all.begin = others.begin < seen_by_all.begin ? others.begin : seen_by_all.begin;
    seen_by_all.end = others.end > seen_by_all.end ? others.end : seen_by_all.end;
    seen_by_all = range_of_lanes(seen_by_all, 16);

    const int first = seen_by_all.begin / kTileKeys, last = (seen_by_all.end + kTileKeys - 1) / kTileKeys;
    // The first tile from t on of which a policy shows the first row, and so any row, a key.
    const auto next_seen = [&](int t) {
      if constexpr (kPolicies) {
        if (policy >= 0 && t < last) {
          const int block = t * kTileCells, begin = seen_by_all.begin / kBlockTokens;
          t = ops::next_seen_block(a.policies[policy], row_positions[0], block > begin ? block : begin) / kTileCells;
        }
      }
      return t;
    };
    int turn = 0;  // of two buffers: tiles with policies follow each other in turns
    const auto buffer_of = [&](int t, bool is_next) {
      const int place = kPolicies ? turn ^ (is_next ? 1 : 0) : t % 2;
      return kIsCode<Key> ? buffers : buffers + place * 2 * kTile;
    };
    const auto copy = [&](int t, bool is_next) {
      unsigned dead = 0;
      if constexpr (kPolicies) {
        if (policy >= 0) dead = dead_blocks(a.policies[policy], row_positions[0], t);
      }
      if constexpr (kIsCode<Key>) {
        if (!is_open) copy_cells<Key, kDim>(a, run, kv_head, t * kTileKeys, 0, seen_by_all, dead, key_cells);
        copy_cells<Value, kDim>(a, run, kv_head, t * kTileKeys, 1, seen_by_all, dead, value_cells);
        cp_async_commit();
      } else {
        const SharedPtr<Number> buffer = buffer_of(t, is_next);
        copy_tile<Number, kDim>(a, run, kv_head, t * kTileKeys, seen_by_all, dead, buffer, buffer + kTile);
      }
    };
    const int begin = next_seen(first);
    if (begin < last) {
      copy(begin, false);
      write_queries<kDim>(a, tile, run.position_offset, queries);
    }
    for (int t = begin, next; t < last; t = next) {
      cp_async_wait<0>();
      sync_block();  // the tile is here, and everybody is done with the one before
      if constexpr (kIsSealed<Key>) {
        if (is_open) {
          if (thread < kTileCells) {
            int cell = kNoCell;
            for (int c = 0; c < kTileColumns; ++c) {
              if (own_groups[c] == t * kTileCells + thread) cell = a.open.row_cells[tile.row(c)];
            }
            cells_of_blocks[thread] = cell;
          }
          sync_block();
          rotate_tile<kDim, true>(a, run, kv_head, t * kTileKeys, key_cells, cells_of_blocks, buffers);
        } else {
          rotate_tile<kDim, false>(a, run, kv_head, t * kTileKeys, key_cells, cells_of_blocks, buffers);
        }
      } else if constexpr (kIsCode<Key>) {
        convert_tile<false, Key, kDim>(key_cells, buffers);
      }
      if constexpr (kIsCode<Key>) {
        convert_tile<true, Value, kDim>(value_cells, buffers + kTile);
        write_scales<Key, Value, kDim>(key_cells, value_cells, scales);
        sync_block();
      }
      next = next_seen(t + 1);
      if (next < last) copy(next, true);
      const int base = t * kTileKeys;
      bool sees = base < seen_by_warp.end && base + kTileKeys > seen_by_warp.begin;
      unsigned hidden = 0;
      if constexpr (kPolicies) {
        if (policy >= 0) {
          const int column = warp_column + lane / 4, positions[2] = {row_positions[column], row_positions[column + 8]};
          hidden = hidden_of_columns(a.policies[policy], positions, t);
          sees = sees && ballot(hidden != kFullWarp) != 0;
        }
      }
      if (sees) {
        const SharedPtr<Number> buffer = buffer_of(t, false);
        attend_tile<Key, kDim, kPolicies>(a, run, queries + warp_column * kTileStride<kDim>, buffer, buffer + kTile,
                                          scales, base, seen, hidden, split);
      }
      const bool ends_split =
          kPolicies ? next / kSplitTiles != t / kSplitTiles : (base + kTileKeys) % kSplitTokens == 0;
      if (ends_split || next >= last) fold_split<kPolicies>(run, total, split);
      turn ^= 1;
    }
    sync_block();  // the next run overwrites queries and ranges
    if (kIsSealed<Key> && !is_open && r + 1 == run_end) {
      is_open = true;
    } else {
      ++r;
    }
  }

  NB_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int c = warp_column + lane / 4 + 8 * half;
    if (!tile.exists(c)) continue;
    float* out = a.out + tile.row(c) * a.out_stride + tile.head(c) * kDim + 2 * (lane % 4);
    const float inverse = inverse_of(total.state[half]);
    NB_UNROLL
    for (int n = 0; n < kDim / 8; ++n) {
      out[8 * n] = total.values[n][2 * half] * inverse;
      out[8 * n + 1] = total.values[n][2 * half + 1] * inverse;
    }
  }
}

}  // namespace nb::cuda
