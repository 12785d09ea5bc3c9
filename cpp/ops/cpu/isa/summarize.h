// Summaries: one key and value for a group of tokens, the means of theirs.
//
// Included inside the unnamed namespace of kernels_<isa>.cpp, after kv_cells.h. Sums are over tokens in order, in f32.
// A rotation table may have a magnitude beside its angles, so what undoes a rotation divides by its square.
#pragma once

// sum += the key of a token as it was before its rotation to `position`.
inline void add_unrotated(const KvLayer& kv, const uint8_t* cell, int token, const RopeTable& table, int position,
                          float* sum) {
  const int half = kv.head_dim / 2;
  const float* cos = table.cos_sin + static_cast<int64_t>(position) * table.head_dim;
  const float* sin = cos + half;
  for (int i = 0; i < half; ++i) {
    const float a = load_key(kv, cell, token, i), b = load_key(kv, cell, token, i + half);
    const float square = cos[i] * cos[i] + sin[i] * sin[i];
    sum[i] += (a * cos[i] + b * sin[i]) / square;
    sum[i + half] += (b * cos[i] - a * sin[i]) / square;
  }
}

inline void summarize_head(const SummarizeKvArgs& a, const KvSummary& summary, int head, float* key, float* value) {
  const int dim = a.kv.head_dim;
  for (int d = 0; d < dim; ++d) key[d] = value[d] = 0.0f;
  for (int i = 0; i < summary.num_tokens; ++i) {
    const int at = summary.first_key + i, block = a.blocks[summary.block_begin + at / 16];
    add_unrotated(a.kv, key_cell(a.kv, block, head), at % 16, a.rope, summary.position + i, key);
    const uint8_t* values = value_cell(a.kv, block, head);
    for (int d = 0; d < dim; ++d) value[d] += load_value(a.kv, values, at % 16, d);
  }
  const float count = static_cast<float>(summary.num_tokens);
  for (int d = 0; d < dim; ++d) {
    key[d] /= count;
    value[d] /= count;
  }
  rotate(key, a.rope, summary.slot_position, 1.0f, key);
  store_kv_head(a.kv, OpenKeys{}, 0, summary.slot, head, key, value);
}

inline void summarize_kv(const SummarizeKvArgs& a, const Part& part) {
  float* const scratch = a.scratch + part.index * 2 * a.kv.head_dim;
  const Range items = share(a.num_summaries * a.kv.num_kv_heads, part);
  for (int item = items.begin; item < items.end; ++item) {
    summarize_head(a, a.summaries[item / a.kv.num_kv_heads], item % a.kv.num_kv_heads, scratch,
                   scratch + a.kv.head_dim);
  }
}
