// Paged attention over runs: one routine for prefill, slices and decode.
//
// Included inside the unnamed namespace of kernels_<isa>.cpp, after attention_int.h. A 'column' is one (row, query
// head) pair; the columns that share a KV head are computed together. Rules that keep a column's bits independent of
// everything else (promise 1): a run is cut into splits at multiples of 256 keys and a split into tiles at multiples of
// 64; each split starts from the empty state; maximum, rescaling and sum are per column; a column folds its splits in
// order. A sliding window moves no cut: a split of which a column sees nothing is the empty state, a tile of which it
// sees nothing changes no state, so both may be skipped where no column of the tile of columns sees them. A policy
// hides keys row by row: it is a sliding window with holes. When there are few columns and many keys, splits are shared
// out between threads and folded after a barrier: the same arithmetic, in the same order. Segments that share leading
// runs or blocks form a bundle; a tile of columns takes rows from all of a bundle, and loads a tile of keys once for
// neighbours whose blocks are the same there, wherever these keys stand for each of them. That changes which columns
// are computed side by side and nothing else. Source of the online softmax: Milakov & Gimelshein 2018, Dao et al. 2022;
// of reading shared prefixes once: Juravsky et al. 2024 (Hydragen).
#pragma once

constexpr int kSplitKeys = kSplitTokens;
constexpr int kMaxColumns = 24;

// Per-thread scratch for one tile of columns.
struct ColumnScratch {
  float* q;              // [kMaxColumns][D] rotated and scaled
  float* scores;         // [kMaxColumns][kTileKeys]
  float* acc;            // [kMaxColumns][D] of the current split
  float* out;            // [kMaxColumns][D] folded
  TileWeights* weights;  // [kMaxColumns][scale_groups], of quantized formats
  SplitState split[kMaxColumns];
  SplitState total[kMaxColumns];
};

inline int64_t column_scratch_floats(const KvLayer& kv) {
  const int weights = scale_groups(kv.format, kv.head_dim) * kTileWeightFloats;
  return static_cast<int64_t>(kMaxColumns) * (3 * kv.head_dim + kTileKeys + weights);
}

inline ColumnScratch column_scratch(const AttentionArgs& a, int index) {
  float* base = reinterpret_cast<float*>(a.scratch) + index * column_scratch_floats(a.kv);
  const int64_t rows = static_cast<int64_t>(kMaxColumns) * a.kv.head_dim;
  ColumnScratch scratch;
  scratch.q = base;
  scratch.acc = base + rows;
  scratch.out = base + 2 * rows;
  scratch.scores = base + 3 * rows;
  scratch.weights = reinterpret_cast<TileWeights*>(scratch.scores + kMaxColumns * kTileKeys);
  return scratch;
}

// Consecutive rows of one segment inside a tile of columns.
struct TileSpan {
  const AttentionSegment* segment;
  int first_column, num_columns;
};

// A tile of columns: `num_rows` rows times query heads [head, head + num_heads) of a KV head. The rows belong to one
// segment or, in a bundle, to neighbouring ones.
struct ColumnTile {
  TileSpan spans[kMaxColumns];
  int rows[kMaxColumns];
  int num_spans, num_rows;
  int kv_head, head, num_heads;
  bool opens;  // the first tile of its bundle for these heads

  int columns() const { return num_rows * num_heads; }
  int row_of(int column) const { return rows[column / num_heads]; }
  int head_of(int column) const { return head + column % num_heads; }
};

// How the columns of a call are cut into tiles.
struct TilePlan {
  int group;  // query heads per KV head
  int heads_per_tile;
  int rows_per_tile;
  int head_tiles;  // per KV head
};

inline TilePlan plan_tiles(const AttentionArgs& a) {
  TilePlan plan;
  plan.group = a.num_heads / a.kv.num_kv_heads;
  plan.heads_per_tile = plan.group < kMaxColumns ? plan.group : kMaxColumns;
  plan.rows_per_tile = kMaxColumns / plan.heads_per_tile;
  plan.head_tiles = (plan.group + plan.heads_per_tile - 1) / plan.heads_per_tile;
  return plan;
}

// Segments [begin, end): each but the first shares keys with the one before it.
struct Bundle {
  int begin, end;
  int num_rows;
};

inline Bundle bundle_at(const AttentionArgs& a, int begin) {
  Bundle bundle = {begin, begin + 1, a.segments[begin].row_count};
  while (bundle.end < a.num_segments && a.segments[bundle.end].shares()) {
    bundle.num_rows += a.segments[bundle.end++].row_count;
  }
  return bundle;
}

// Where the next tile of a bundle begins.
struct RowCursor {
  int segment;
  int row;  // in the segment
};

// Fills the rows of a tile from the cursor on.
inline void take_rows(const AttentionArgs& a, const Bundle& bundle, int rows_per_tile, RowCursor& at,
                      ColumnTile& tile) {
  tile.num_spans = 0;
  tile.num_rows = 0;
  while (at.segment < bundle.end && tile.num_rows < rows_per_tile) {
    const AttentionSegment& segment = a.segments[at.segment];
    const int left = segment.row_count - at.row, room = rows_per_tile - tile.num_rows;
    const int count = left < room ? left : room;
    if (count > 0) {
      tile.spans[tile.num_spans++] = {&segment, tile.num_rows * tile.num_heads, count * tile.num_heads};
    }
    for (int i = 0; i < count; ++i) tile.rows[tile.num_rows++] = segment.row_begin + at.row + i;
    at = count == left ? RowCursor{at.segment + 1, 0} : RowCursor{at.segment, at.row + count};
  }
}

// Calls visit(tile) for every tile of every bundle, in order: heads outside, so that the tiles that read the same
// keys follow each other.
template <class Visit>
inline void for_each_tile(const AttentionArgs& a, const TilePlan& plan, Visit&& visit) {
  Bundle bundle;
  for (int s = 0; s < a.num_segments; s = bundle.end) {
    bundle = bundle_at(a, s);
    const int tiles = (bundle.num_rows + plan.rows_per_tile - 1) / plan.rows_per_tile;
    for (int h = 0; h < a.kv.num_kv_heads * plan.head_tiles; ++h) {
      ColumnTile tile;
      const int begin = h % plan.head_tiles * plan.heads_per_tile;
      tile.kv_head = h / plan.head_tiles;
      tile.head = tile.kv_head * plan.group + begin;
      tile.num_heads = plan.group - begin < plan.heads_per_tile ? plan.group - begin : plan.heads_per_tile;
      RowCursor at = {bundle.begin, 0};
      for (int t = 0; t < tiles; ++t) {
        take_rows(a, bundle, plan.rows_per_tile, at, tile);
        tile.opens = t == 0;
        visit(tile);
      }
    }
  }
}

inline void widen(KeyRange& range, const KeyRange& by) {
  if (by.begin >= by.end) return;
  if (by.begin < range.begin) range.begin = by.begin;
  if (by.end > range.end) range.end = by.end;
}

constexpr KeyRange kNoKeys = {0x7fffffff, 0};

// How many of the ascending positions are below `limit`.
inline int count_below(const int32_t* positions, int count, int limit) {
  int begin = 0;
  while (count > 0) {
    const int half = count / 2;
    const bool below = positions[begin + half] < limit;
    begin = below ? begin + half + 1 : begin;
    count = below ? count - half - 1 : half;
  }
  return begin;
}

inline KeyRange visible_keys(const AttentionArgs& a, const AttentionRun& run, int row) {
  int limit = a.positions[row] - run.position_offset + 1;
  int first = a.window > 0 && limit > a.window ? limit - a.window : 0;
  if (run.positions_begin >= 0) {
    const int32_t* positions = a.key_positions + run.positions_begin;
    first = first == 0 ? 0 : count_below(positions, run.num_keys, first);
    limit = count_below(positions, run.num_keys, limit);
  }
  if (first < run.first_key) first = run.first_key;
  return {first, limit < run.num_keys ? limit : run.num_keys};
}

// The policy that hides keys of run `index` of a segment, or null.
inline const KeyPolicy* policy_of(const AttentionArgs& a, const AttentionSegment& segment, int index) {
  return segment.policy >= 0 && index == segment.run_count - 1 ? a.policies + segment.policy : nullptr;
}

// Which keys of the tile at `key` a policy hides from the row at `position`, key k bit k.
inline uint64_t hidden_in_tile(const KeyPolicy& policy, int position, int key) {
  uint64_t bits = 0;
  for (int b = 0; b < kTileKeys / 16; ++b) {
    bits |= static_cast<uint64_t>(hidden_bits(policy, position, key / 16 + b)) << 16 * b;
  }
  return bits;
}

// Run `index` of a span's segment.
inline const AttentionRun& run_of(const AttentionArgs& a, const TileSpan& span, int index) {
  return a.runs[span.segment->run_begin + index];
}

inline bool has_run(const TileSpan& span, int index) { return index < span.segment->run_count; }

// Leading keys of run `index` that a segment has in common with the one before it.
inline int shared_keys_of(const AttentionSegment& segment, int index) {
  if (index < segment.shared_runs) return 0x7fffffff;
  return index == segment.shared_runs ? segment.shared_keys : 0;
}

// What all columns of a tile see of a run, the columns of each span, and each column; of that, policies hide some.
struct Visibility {
  KeyRange all;
  KeyRange span[kMaxColumns];
  KeyRange column[kMaxColumns];
  bool has_policies;
};

inline Visibility visibility(const AttentionArgs& a, const ColumnTile& tile, int run_index) {
  Visibility seen;
  seen.all = kNoKeys;
  seen.has_policies = false;
  for (int i = 0; i < tile.num_spans; ++i) {
    const TileSpan& span = tile.spans[i];
    seen.span[i] = kNoKeys;
    const int end = span.first_column + span.num_columns;
    for (int c = span.first_column; c < end; c += tile.num_heads) {
      const KeyRange keys =
          has_run(span, run_index) ? visible_keys(a, run_of(a, span, run_index), tile.row_of(c)) : kNoKeys;
      for (int h = 0; h < tile.num_heads; ++h) seen.column[c + h] = keys;
      widen(seen.span[i], keys);
    }
    widen(seen.all, seen.span[i]);
    if (policy_of(a, *span.segment, run_index) != nullptr) seen.has_policies = true;
  }
  return seen;
}

// The first row of a span: under a policy no other one of it sees an earlier key that this one does not.
inline int first_position(const AttentionArgs& a, const ColumnTile& tile, const TileSpan& span) {
  return a.positions[tile.row_of(span.first_column)];
}

// Where the first tile of 64 keys begins, from that at `begin` on, of which a column of spans [first, last) sees
// anything; behind all keys if there is none.
inline int next_tile(const AttentionArgs& a, const ColumnTile& tile, int run_index, int begin, int first, int last,
                     const Visibility& seen) {
  if (!seen.has_policies) return begin;
  int next = 0x7fffffff / kSplitKeys * kSplitKeys;
  for (int i = first; i < last; ++i) {
    const TileSpan& span = tile.spans[i];
    int key = seen.span[i].begin > begin ? seen.span[i].begin : begin;
    if (key >= seen.span[i].end) continue;
    const KeyPolicy* policy = policy_of(a, *span.segment, run_index);
    if (policy != nullptr) {
      const int block = next_seen_block(*policy, first_position(a, tile, span), key / 16);
      if (16 * block > key) key = 16 * block;
    }
    if (key < seen.span[i].end && key < next) next = key;
  }
  return next / kTileKeys * kTileKeys;
}

// The blocks [begin, end) of the tile of keys at `key` outside of which policies show the columns of spans [first,
// last) nothing.
inline KeyRange shown_blocks(const AttentionArgs& a, const ColumnTile& tile, int run_index, int key, int first,
                             int last) {
  KeyRange shown = kNoKeys;
  for (int i = first; i < last; ++i) {
    const KeyPolicy* policy = policy_of(a, *tile.spans[i].segment, run_index);
    const int position = first_position(a, tile, tile.spans[i]);
    for (int b = 0; b < kTileKeys / 16; ++b) {
      if (policy == nullptr || !is_dead(*policy, position, key / 16 + b)) widen(shown, {b, b + 1});
    }
  }
  return shown;
}

inline void rotate_columns(const AttentionArgs& a, const ColumnTile& tile, int run_index, ColumnScratch& s) {
  constexpr float kLog2e = 1.44269504f;
  const int dim = a.kv.head_dim;
  for (int i = 0; i < tile.num_spans; ++i) {
    const TileSpan& span = tile.spans[i];
    if (!has_run(span, run_index)) continue;
    const int offset = run_of(a, span, run_index).position_offset;
    for (int c = span.first_column; c < span.first_column + span.num_columns; ++c) {
      const int position = a.positions[tile.row_of(c)] - offset;
      if (position < 0) continue;  // sees nothing of this run
      rotate(a.q + tile.row_of(c) * a.q_stride + tile.head_of(c) * dim, a.rope, position, a.scale * kLog2e,
             s.q + c * dim);
      if (kBf16Dot && a.kv.format == quant::KvFormat::bf16) pack_bf16(s.q + c * dim, dim, s.q + c * dim);
      if (scale_groups(a.kv.format, dim) > 0) pack_query(s.q + c * dim, dim);
    }
  }
}

// Makes weights of the scores of columns [first, last) against the tile of keys at `begin`, of which each sees its
// part. What one number a column is needed of is computed for many columns at once. The values of the keys are in
// cells [first_block, num_blocks) of `values`. Who sees a token in `not_finite`, a bit for each key, gets NaN.
template <quant::KvFormat kFormat>
inline void soften_columns(const AttentionArgs& a, const ColumnTile& tile, int run_index, int begin,
                           const uint8_t* const* values, int first_block, int num_blocks, int first_span, int last_span,
                           const Visibility& seen, uint64_t not_finite, ColumnScratch& s) {
  constexpr int kSlots = (kMaxColumns + kLanes - 1) / kLanes * kLanes;
  const int dim = a.kv.head_dim;
  [[maybe_unused]] const int groups = scale_groups(kFormat, dim);
  float before[kSlots], next[kSlots], rescale[kSlots];
  uint32_t spoilt = 0;  // columns that see a token which is not finite, a bit each
  const int first = tile.spans[first_span].first_column;
  int last = first;
  for (int i = first_span; i < last_span; ++i) {
    const AttentionRun& run = run_of(a, tile.spans[i], run_index);
    const int end = last + tile.spans[i].num_columns;
    HiddenKeys hidden;
    if (run.hidden_begin >= 0) expand_hidden(a.hidden + run.hidden_begin + begin / 16, num_blocks, hidden);
    // Of a span's rows the last one sees least, so most often there is nothing to hide.
    const KeyPolicy* policy = policy_of(a, *tile.spans[i].segment, run_index);
    if (policy != nullptr && hidden_in_tile(*policy, a.positions[tile.row_of(end - 1)], begin) == 0) policy = nullptr;
    const uint64_t hidden_from_all = run.hidden_begin >= 0 ? hidden.bits : 0;
    for (; last < end; ++last) {
      float* scores = s.scores + last * kTileKeys;
      if (run.score_bias != 0.0f) add_to_scores(run.score_bias, scores);
      KeyRange own = {seen.column[last].begin - begin, seen.column[last].end - begin};
      if (own.begin < 0) own.begin = 0;
      if (own.end > kTileKeys) own.end = kTileKeys;
      if (policy != nullptr && last % tile.num_heads == 0) {
        expand_bits(hidden_from_all | hidden_in_tile(*policy, a.positions[tile.row_of(last)], begin), hidden);
      }
      const bool hides = run.hidden_begin >= 0 || policy != nullptr;
      if (hides && own.begin < own.end) hide_keys(hidden, scores, own);
      if (seen_of_tile(hides ? hidden.bits : 0, own, not_finite)) spoilt |= 1u << (last - first);
      before[last - first] = s.split[last].max;
      next[last - first] = own.begin < own.end ? largest_score(scores, own) : -__builtin_inff();
    }
  }
  const int count = last - first;
  for (int c = count; c < kSlots; ++c) before[c] = next[c] = 0.0f;
  bool sees[kSlots];
  for (int c = 0; c < count; ++c) sees[c] = next[c] != -__builtin_inff();
  for (int c = 0; c < count; c += kLanes) {
    const F old = f_load(before + c), larger = f_max(f_load(next + c), old);
    f_store(next + c, larger);
    f_store(rescale + c, exp2(old - larger));
  }
  for (int c = 0; c < count; ++c) {
    float* scores = s.scores + (first + c) * kTileKeys;
    if (sees[c]) {
      soften_column(scores, next[c], rescale[c], s.split[first + c], s.acc + (first + c) * dim, dim);
      if ((spoilt >> c & 1) != 0) s.split[first + c].sum = __builtin_nanf("");
      if (kPacksPairs<kFormat>) pack_bf16(scores, kTileKeys, scores);
      if constexpr (kIsQuantized<kFormat>) {
        pack_column_weights<kFormat>(scores, values, first_block, num_blocks, dim, s.weights + (first + c) * groups);
      }
    } else if constexpr (kIsQuantized<kFormat>) {
      memset(s.weights + (first + c) * groups, 0, static_cast<size_t>(groups) * sizeof(TileWeights));
    } else {
      for (int k = 0; k < kTileKeys; ++k) scores[k] = 0.0f;
    }
  }
}

// Adds the tile of keys [begin, begin + 64) of a run to the split states of spans [first_span, last_span), which have
// the same blocks there and together see `range` of the keys. `next` is the tile that is likely to follow.
template <quant::KvFormat kFormat>
inline void attend_tile(const AttentionArgs& a, const ColumnTile& tile, int run_index, int begin, int end, int next,
                        int first_span, int last_span, const KeyRange& range, const Visibility& seen,
                        ColumnScratch& s) {
  const int dim = a.kv.head_dim, kv_head = tile.kv_head;
  const int first = tile.spans[first_span].first_column;
  const int last = tile.spans[last_span - 1].first_column + tile.spans[last_span - 1].num_columns;
  const int32_t* blocks = a.blocks + run_of(a, tile.spans[first_span], run_index).block_begin;
  int first_block = range.begin > begin ? (range.begin - begin) / 16 : 0;
  const int keys = range.end - begin < kTileKeys ? range.end - begin : kTileKeys;
  int num_blocks = (keys + 15) / 16;
  if (seen.has_policies) {
    const KeyRange shown = shown_blocks(a, tile, run_index, begin, first_span, last_span);
    if (shown.begin > first_block) first_block = shown.begin;
    if (shown.end < num_blocks) num_blocks = shown.end;
    for (int c = first; c < last; ++c) {
      float* const scores = s.scores + c * kTileKeys;
      for (int k = 0; k < 16 * first_block; ++k) scores[k] = 0.0f;
      for (int k = 16 * num_blocks; k < kTileKeys; ++k) scores[k] = 0.0f;
    }
  }
  const uint8_t* cells[kTileKeys / 16];
  for (int b = first_block; b < num_blocks; ++b) cells[b] = key_cell(a.kv, blocks[begin / 16 + b], kv_head);
  const uint8_t* values[kTileKeys / 16];
  for (int b = first_block; b < num_blocks; ++b) values[b] = value_cell(a.kv, blocks[begin / 16 + b], kv_head);
  // The first columns fetch what is read next: the values of these keys, then the keys of the next tile.
  const int64_t to_values = values[first_block] - cells[first_block];
  with_rest<kColumnGroup>(first, last, [&](auto columns, int c) {
    in_halves<side_by_side(columns.value)>(first_block, num_blocks, [&](auto count, int b) {
      float* const scores = s.scores + c * kTileKeys + 16 * b;
      const int64_t ahead = c == first ? to_values : 0;
      if constexpr (kIsQuantized<kFormat>) {
        score_codes<columns.value, count.value>(cells + b, dim, s.q + c * dim, scores, ahead, a.kv.value_cell_bytes);
      } else {
        score_cells<kFormat, columns.value, count.value>(cells + b, dim, s.q + c * dim, scores, ahead);
      }
    });
  });
  uint64_t not_finite = 0;
  if constexpr (kFormat == quant::KvFormat::f16) {
    for (int b = first_block; b < num_blocks; ++b) {
      not_finite |= static_cast<uint64_t>(tokens_not_finite(cells[b])) << 16 * b;
    }
  }
  soften_columns<kFormat>(a, tile, run_index, begin, values, first_block, num_blocks, first_span, last_span, seen,
                          not_finite, s);
  const int more = (range.end < end ? range.end : end) - next;
  const uint8_t* later[kTileKeys / 16];
  for (int b = first_block; b < num_blocks; ++b) {
    const int ahead = next / 16 + b - first_block;
    later[b] = 16 * (b - first_block) < more ? key_cell(a.kv, blocks[ahead], kv_head) : values[b];
  }
  [[maybe_unused]] const int groups = scale_groups(kFormat, dim);
  // A vector of values has a dimension in every lane, or two of them.
  const int lanes = kFormat == quant::KvFormat::mixed ? dim / 2 : dim;
  with_rest<kColumnGroup>(first, last, [&](auto columns, int c) {
    constexpr int kBeside =
        kFormat == quant::KvFormat::mixed ? nibbles_side_by_side(columns.value) : side_by_side(columns.value);
    in_halves<kBeside>(0, (lanes + kLanes - 1) / kLanes, [&](auto count, int v) {
      float* const acc = s.acc + c * dim;
      const uint8_t* const* const fetched = c == first ? later : nullptr;
      if constexpr (kFormat == quant::KvFormat::int8) {
        value_codes<columns.value, count.value>(values, first_block, num_blocks, dim, v * kLanes, s.weights + c, acc,
                                                fetched);
      } else if constexpr (kFormat == quant::KvFormat::mixed) {
        value_nibbles<columns.value, count.value>(values, first_block, num_blocks, dim, v * kLanes,
                                                  s.weights + c * groups, groups, acc, fetched);
      } else {
        const float* const weights = s.scores + c * kTileKeys + kWeightFloats<kFormat> * first_block;
        value_cells<kFormat, columns.value, count.value>(values, first_block, num_blocks, dim, v * kLanes, weights, acc,
                                                         fetched);
      }
    });
  });
}

// Adds keys [begin, end) of a run to the split states of spans [first, last), which share the keys before `begin`: tile
// by tile as long as all of them have the same blocks, then group by group, each to the end before the next one, so
// that no more streams through memory alternate than there must.
template <quant::KvFormat kFormat>
inline void attend_spans(const AttentionArgs& a, const ColumnTile& tile, int run_index, int first, int last, int begin,
                         int end, const Visibility& seen, ColumnScratch& s) {
  KeyRange range = kNoKeys;
  int shared = 0x7fffffff;
  for (int i = first; i < last; ++i) {
    widen(range, seen.span[i]);
    if (i == first) continue;
    const int own = shared_keys_of(*tile.spans[i].segment, run_index);
    if (own < shared) shared = own;
  }
  if (range.end < end) end = range.end;
  const auto from = [&](int key) { return next_tile(a, tile, run_index, key, first, last, seen); };
  int next_begin;
  for (begin = from(begin); begin < end && begin + kTileKeys <= shared; begin = next_begin) {
    next_begin = from(begin + kTileKeys);
    if (begin + kTileKeys <= range.begin) continue;
    attend_tile<kFormat>(a, tile, run_index, begin, end, next_begin, first, last, range, seen, s);
  }
  if (begin >= end) return;
  int next;
  for (int i = first; i < last; i = next) {
    next = i + 1;
    while (next < last && shared_keys_of(*tile.spans[next].segment, run_index) >= begin + kTileKeys) ++next;
    attend_spans<kFormat>(a, tile, run_index, i, next, begin, end, seen, s);
  }
}

// The same for all columns of a tile; one span is most often all there is, and has a loop of its own.
template <quant::KvFormat kFormat>
inline void attend_keys(const AttentionArgs& a, const ColumnTile& tile, int run_index, int begin, int end,
                        const Visibility& seen, ColumnScratch& s) {
  if (tile.num_spans > 1) {
    attend_spans<kFormat>(a, tile, run_index, 0, tile.num_spans, begin, end, seen, s);
    return;
  }
  const auto from = [&](int key) { return next_tile(a, tile, run_index, key, 0, 1, seen); };
  int next;
  for (begin = from(begin); begin < end && begin < seen.all.end; begin = next) {
    next = from(begin + kTileKeys);
    if (begin + kTileKeys <= seen.all.begin) continue;
    attend_tile<kFormat>(a, tile, run_index, begin, end, next, 0, 1, seen.all, seen, s);
  }
}

// The states of all columns over one split (keys from `begin`) of a run, from empty. s.q holds the run's queries.
inline void attend_split(const AttentionArgs& a, const ColumnTile& tile, int run_index, int begin,
                         const Visibility& seen, ColumnScratch& s) {
  const int dim = a.kv.head_dim;
  for (int c = 0; c < tile.columns(); ++c) {
    s.split[c] = {-__builtin_inff(), 0.0f};
    for (int d = 0; d < dim; ++d) s.acc[c * dim + d] = 0.0f;
  }
  const int end = begin + kSplitKeys;
  switch (a.kv.format) {
    case quant::KvFormat::f32:
      return attend_keys<quant::KvFormat::f32>(a, tile, run_index, begin, end, seen, s);
    case quant::KvFormat::bf16:
      return attend_keys<quant::KvFormat::bf16>(a, tile, run_index, begin, end, seen, s);
    case quant::KvFormat::f16:
      return attend_keys<quant::KvFormat::f16>(a, tile, run_index, begin, end, seen, s);
    case quant::KvFormat::int8:
      return attend_keys<quant::KvFormat::int8>(a, tile, run_index, begin, end, seen, s);
    case quant::KvFormat::mixed:
      return attend_keys<quant::KvFormat::mixed>(a, tile, run_index, begin, end, seen, s);
  }
}

// total <- total folded with split, out <- the same for the weighted values. Empty states change nothing.
inline void fold(SplitState& total, float* out, const SplitState& split, const float* acc, int dim) {
  if (split.sum == 0.0f) return;
  const float next = split.max > total.max ? split.max : total.max;
  float lanes[kLanes];
  f_store(lanes, exp2(f_set1(total.max - next)));
  const float keep = lanes[0];
  f_store(lanes, exp2(f_set1(split.max - next)));
  const float add = lanes[0];
  total.sum = total.sum * keep + split.sum * add;
  total.max = next;
  for (int d = 0; d < dim; d += kLanes) {
    f_store(out + d, muladd(f_load(acc + d), f_set1(add), f_load(out + d) * f_set1(keep)));
  }
}

inline void begin_totals(const ColumnTile& tile, int dim, ColumnScratch& s) {
  for (int c = 0; c < tile.columns(); ++c) {
    s.total[c] = {-__builtin_inff(), 0.0f};
    for (int d = 0; d < dim; ++d) s.out[c * dim + d] = 0.0f;
  }
}

inline void write_column(const AttentionArgs& a, int row, int head, const SplitState& total, const float* acc) {
  const int dim = a.kv.head_dim;
  float* out = a.out + row * a.out_stride + head * dim;
  const F inverse = f_set1(total.sum == 0.0f ? 0.0f : 1.0f / total.sum);
  for (int d = 0; d < dim; d += kLanes) f_store(out + d, f_load(acc + d) * inverse);
}

// Calls visit(run_index, split_begin, number, seen) for every split any column of the tile can see, in order. `number`
// counts the splits of the runs, seen or not, so that the tiles of a bundle agree on it; under policies those seen,
// which may be every other one.
template <class Visit>
inline void for_each_split(const AttentionArgs& a, const ColumnTile& tile, Visit&& visit) {
  int number = 0;  // of the run's first split
  int runs = 0;
  for (int i = 0; i < tile.num_spans; ++i) {
    if (tile.spans[i].segment->run_count > runs) runs = tile.spans[i].segment->run_count;
  }
  for (int r = 0; r < runs; ++r) {
    const Visibility seen = visibility(a, tile, r);
    int turn = number;
    for (int split = seen.all.begin / kSplitKeys; split * kSplitKeys < seen.all.end; ++split) {
      split = next_tile(a, tile, r, split * kSplitKeys, 0, tile.num_spans, seen) / kSplitKeys;
      if (split * kSplitKeys >= seen.all.end) break;
      visit(r, split * kSplitKeys, seen.has_policies ? turn++ : number + split, seen);
    }
    int keys = 0;
    for (int i = 0; i < tile.num_spans; ++i) {
      if (has_run(tile.spans[i], r) && run_of(a, tile.spans[i], r).num_keys > keys) {
        keys = run_of(a, tile.spans[i], r).num_keys;
      }
    }
    number += (keys + kSplitKeys - 1) / kSplitKeys;
  }
}

inline void attend_whole_tile(const AttentionArgs& a, const ColumnTile& tile, ColumnScratch& s) {
  const int dim = a.kv.head_dim;
  begin_totals(tile, dim, s);
  int rotated = -1;
  for_each_split(a, tile, [&](int run, int begin, int, const Visibility& seen) {
    if (rotated != run) rotate_columns(a, tile, run, s);
    rotated = run;
    attend_split(a, tile, run, begin, seen, s);
    for (int c = 0; c < tile.columns(); ++c) fold(s.total[c], s.out + c * dim, s.split[c], s.acc + c * dim, dim);
  });
  for (int c = 0; c < tile.columns(); ++c)
    write_column(a, tile.row_of(c), tile.head_of(c), s.total[c], s.out + c * dim);
}

// ---- sharing splits between threads ----
// Partial states live behind the per-thread scratch, for every split of every tile in order: for each column its max,
// its sum and D values.

inline int64_t partial_floats(const ColumnTile& tile, int head_dim) {
  return static_cast<int64_t>(tile.columns()) * (head_dim + 2);
}

inline int count_tiles(const AttentionArgs& a, const TilePlan& plan) {
  int tiles = 0;
  for (Bundle bundle = {0, 0, 0}; bundle.end < a.num_segments;) {
    bundle = bundle_at(a, bundle.end);
    tiles += (bundle.num_rows + plan.rows_per_tile - 1) / plan.rows_per_tile;
  }
  return tiles * a.kv.num_kv_heads * plan.head_tiles;
}

// The floats of all partial states, or 0 if no splits are shared out. They are where there are few tiles and more than
// one split each: in a decode over a long context. Only then are splits counted, which takes a while for many rows.
inline int64_t shared_floats(const AttentionArgs& a, const TilePlan& plan, int num_threads) {
  const int tiles = count_tiles(a, plan);
  if (num_threads == 1 || tiles >= 8 * num_threads) return 0;
  int splits = 0;
  int64_t floats = 0;
  for_each_tile(a, plan, [&](const ColumnTile& tile) {
    for_each_split(a, tile, [&](int, int, int, const Visibility&) {
      ++splits;
      floats += partial_floats(tile, a.kv.head_dim);
    });
  });
  return splits > tiles ? floats : 0;
}

inline int64_t attention_scratch_bytes(const AttentionArgs& a, int num_threads) {
  return 4 * (num_threads * column_scratch_floats(a.kv) + shared_floats(a, plan_tiles(a), num_threads));
}

// Threads take turns by the number of the split, so that what the tiles of a bundle read in common stays with one.
inline void attend_shared(const AttentionArgs& a, const TilePlan& plan, ColumnScratch& s, const Part& part) {
  const int dim = a.kv.head_dim;
  float* const partials = reinterpret_cast<float*>(a.scratch) + part.count * column_scratch_floats(a.kv);
  float* partial = partials;
  int first = 0, next = 0;  // turn of the first split of the present tiles, and of what follows them
  for_each_tile(a, plan, [&](const ColumnTile& tile) {
    if (tile.opens) first = next;
    int rotated = -1;
    for_each_split(a, tile, [&](int run, int begin, int number, const Visibility& seen) {
      float* out = partial;
      partial += partial_floats(tile, dim);
      if (first + number >= next) next = first + number + 1;
      if ((first + number) % part.count != part.index) return;
      if (rotated != run) rotate_columns(a, tile, run, s);
      rotated = run;
      attend_split(a, tile, run, begin, seen, s);
      for (int c = 0; c < tile.columns(); ++c, out += dim + 2) {
        out[0] = s.split[c].max;
        out[1] = s.split[c].sum;
        for (int d = 0; d < dim; ++d) out[2 + d] = s.acc[c * dim + d];
      }
    });
  });
  part.barrier();
  partial = partials;
  int index = 0;
  for_each_tile(a, plan, [&](const ColumnTile& tile) {
    const bool mine = index++ % part.count == part.index;
    if (mine) begin_totals(tile, dim, s);
    for_each_split(a, tile, [&](int, int, int, const Visibility&) {
      const float* in = partial;
      partial += partial_floats(tile, dim);
      if (!mine) return;
      for (int c = 0; c < tile.columns(); ++c, in += dim + 2) {
        fold(s.total[c], s.out + c * dim, {in[0], in[1]}, in + 2, dim);
      }
    });
    if (!mine) return;
    for (int c = 0; c < tile.columns(); ++c) {
      write_column(a, tile.row_of(c), tile.head_of(c), s.total[c], s.out + c * dim);
    }
  });
}

inline void attention(const AttentionArgs& a, const Part& part) {
  const TilePlan plan = plan_tiles(a);
  ColumnScratch scratch = column_scratch(a, part.index);
  if (shared_floats(a, plan, part.count) > 0) {
    attend_shared(a, plan, scratch, part);
    return;
  }
  int index = 0;
  for_each_tile(a, plan, [&](const ColumnTile& tile) {
    if (index++ % part.count == part.index) attend_whole_tile(a, tile, scratch);
  });
}
