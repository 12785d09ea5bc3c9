// The fused operators of the decoder: normalise, prepare and multiply in one parallel phase.
//
// Included inside the unnamed namespace of kernels_<isa>.cpp, after attention.h. Same arithmetic as the small
// operators in sequence. For up to kPrivateRows rows every thread prepares all rows for itself, which saves a barrier;
// above, rows are split and a barrier follows.
#pragma once

/// Prepares rows for this part and returns where they are. `row_ids` null means rows 0, 1, ...
inline const Activation& prepare_rows(const float* x, int64_t x_stride, const int32_t* row_ids, int rows, int cols,
                                      const float* norm_weight, float eps, Activation* scratch, const Part& part) {
  const bool is_private = rows <= kPrivateRows;
  const Activation& act = is_private ? scratch[part.index] : scratch[0];
  const Range mine = is_private ? Range{0, rows} : share(rows, part);
  for (int t = mine.begin; t < mine.end; ++t) {
    const int64_t source = row_ids != nullptr ? row_ids[t] : t;
    prepare_row(x + source * x_stride, cols, norm_weight, eps, act, t);
  }
  if (!is_private) part.barrier();
  return act;
}

inline void norm_qkv(const NormQkvArgs& a, const Part& part) {
  const Activation& act =
      prepare_rows(a.x, a.x_stride, nullptr, a.rows, a.q.cols, a.norm_weight, a.eps, a.scratch_act, part);
  linear_share(a.q, act, a.q_bias, false, a.q_out, a.q_stride, part);
  linear_share(a.k, act, a.k_bias, false, a.scratch_k, a.k.rows, part);
  linear_share(a.v, act, a.v_bias, false, a.scratch_v, a.v.rows, part);
  part.barrier();
  const int dim = a.kv.head_dim;
  const int num_q_heads = a.q.rows / dim;
  const Range items = share(a.rows * a.kv.num_kv_heads, part);
  for (int item = items.begin; item < items.end; ++item) {
    const int t = item / a.kv.num_kv_heads, h = item % a.kv.num_kv_heads;
    float* key = a.scratch_k + static_cast<int64_t>(t) * a.k.rows + h * dim;
    if (a.k_norm != nullptr) rms_norm_row(key, a.k_norm, a.eps, dim, key);
    if (!quant::seals_keys(a.kv.format)) rotate(key, a.rope, a.key_positions[t], 1.0f, key);
    store_kv_head(a.kv, a.open, t, a.slots[t], h, key, a.scratch_v + static_cast<int64_t>(t) * a.v.rows + h * dim);
  }
  if (a.q_norm == nullptr) return;
  const Range heads = share(a.rows * num_q_heads, part);
  for (int item = heads.begin; item < heads.end; ++item) {
    float* query = a.q_out + item / num_q_heads * a.q_stride + item % num_q_heads * dim;
    rms_norm_row(query, a.q_norm, a.eps, dim, query);
  }
}

inline void linear_residual(const LinearResidualArgs& a, const Part& part) {
  const Activation& act =
      prepare_rows(a.x, a.x_stride, nullptr, a.rows, a.weight.cols, nullptr, 0.0f, a.scratch_act, part);
  linear_share(a.weight, act, a.bias, true, a.residual, a.residual_stride, part);
}

// A pair of gate strips and the pair of up strips beside it give one group of 32 columns, prepared at once.
inline void norm_gate_up(const NormGateUpArgs& a, const Part& part) {
  const Activation& act =
      prepare_rows(a.x, a.x_stride, nullptr, a.rows, a.gate.cols, a.norm_weight, a.eps, a.scratch_act, part);
  const PairKernels gate_kernels = find_kernels(a.gate, act), up_kernels = find_kernels(a.up, act);
  const Range groups = share(a.out.cols / 32, part);
  float gate[kRowBlock * 32], up[kRowBlock * 32];
  for (int row = 0; row < a.rows; row += kRowBlock) {
    const int count = a.rows - row < kRowBlock ? a.rows - row : kRowBlock;
    for (int group = groups.begin; group < groups.end; ++group) {
      compute_pair(gate_kernels, a.gate, group, act, row, count, gate, 32);
      compute_pair(up_kernels, a.up, group, act, row, count, up, 32);
      for (int t = 0; t < count; ++t) {
        F v[kGroupVectors];
        for (int j = 0; j < kGroupVectors; ++j) {
          v[j] = silu_mul(f_load(gate + t * 32 + j * kLanes), f_load(up + t * 32 + j * kLanes));
        }
        store_group(v, a.out, row + t, group);
      }
    }
  }
}

inline void head(const HeadArgs& a, const Part& part) {
  const Activation& act =
      prepare_rows(a.x, a.x_stride, a.row_ids, a.rows, a.weight.cols, a.norm_weight, a.eps, a.scratch_act, part);
  const PairKernels kernels = find_kernels(a.weight, act);
  const Range pairs = share((a.weight.rows + 31) / 32, part);
  float* best_value = a.scratch_best + part.index * a.rows;
  int32_t* best_id = a.scratch_best_id + part.index * a.rows;
  float block[kRowBlock * 32];
  for (int row = 0; row < a.rows; row += kRowBlock) {
    const int count = a.rows - row < kRowBlock ? a.rows - row : kRowBlock;
    for (int t = row; t < row + count; ++t) best_value[t] = -__builtin_inff(), best_id[t] = 0;
    for (int pair = pairs.begin; pair < pairs.end; ++pair) {
      compute_pair(kernels, a.weight, pair, act, row, count, block, 32);
      const int outputs = a.weight.rows - 32 * pair < 32 ? a.weight.rows - 32 * pair : 32;
      for (int t = 0; t < count; ++t) {
        Best best = {best_value[row + t], best_id[row + t]};
        update_best(best, block + t * 32, outputs, 32 * pair);
        best_value[row + t] = best.value;
        best_id[row + t] = best.id;
        if (a.logits == nullptr) continue;
        float* logits = a.logits + (row + t) * a.logits_stride + 32 * pair;
        for (int r = 0; r < outputs; ++r) logits[r] = block[t * 32 + r];
      }
    }
  }
  part.barrier();
  if (part.index != 0) return;
  for (int t = 0; t < a.rows; ++t) {
    Best best = {-__builtin_inff(), 0};
    for (int p = 0; p < part.count; ++p) {
      if (a.scratch_best[p * a.rows + t] > best.value) {
        best = {a.scratch_best[p * a.rows + t], a.scratch_best_id[p * a.rows + t]};
      }
    }
    a.argmax[t] = best.id;
  }
}
