// The products behind a norm, for up to 8 rows: QKV, gate and up, and the head. Every block norms the rows for itself.
#include <type_traits>

#include "cuda/argmax.cuh"
#include "cuda/formulas.cuh"
#include "cuda/gemv.cuh"
#include "cuda/kv_cells.cuh"
#include "cuda/launch.cuh"
#include "cuda/operators.h"

namespace nb::cuda {
namespace {

// ---- q, k, v ----

/// Whether keys are rotated and stored by the product itself. A unit then has the two pairs of rows of a head that the
/// rotation pairs up. Where keys or queries are normed first, a head is more rows than one block should read (a
/// product of 128 rows each would keep few multiprocessors busy), and a second, small kernel finishes heads; also where
/// a token's key and value are stored together.
bool stores_keys(const ops::NormQkvArgs& a) {
  return a.q_norm == nullptr && a.k_norm == nullptr && a.kv.head_dim % kUnitRows == 0 && !stores_tokens(a.kv.format);
}

/// The units of q come first, then those of v, then those of k.
template <int M>
struct QkvJob {
  int units;
  const ops::NormQkvArgs& args;
  int q_units, v_units;
  bool keys_are_stored;

  /// A row of the segment at hand, for `unit` counted from its beginning.
  NB_DEVICE int row_of(int unit, int pair, int parity, bool rotated) const {
    if (!rotated) return (unit * kUnitPairs + pair) * 2 + parity;
    const int half = args.kv.head_dim / 2;
    const int head = 2 * unit / half, dim = 2 * unit % half;
    return head * args.kv.head_dim + dim + pair * half + parity;
  }

  NB_DEVICE const uint4* row(int unit, int pair, int parity) const {
    const bool is_q = unit < q_units, is_v = !is_q && unit < q_units + v_units;
    const ops::LinearSegment& segment = is_q ? args.q : is_v ? args.v : args.k;
    unit -= is_q ? 0 : is_v ? q_units : q_units + v_units;
    return weight_row(segment, existing_row(segment, row_of(unit, pair, parity, !is_q && !is_v && keys_are_stored)));
  }

  NB_DEVICE void finish(int unit, const Totals<M>& totals, int thread) const {
    if (unit < q_units) {
      finish_rows(unit, totals, thread, args.q.rows, args.q_bias,
                  [&](int m, int row, float value) { args.q_out[m * args.q_stride + row] = value; });
    } else if (unit < q_units + v_units) {
      finish_rows(unit - q_units, totals, thread, args.v.rows, args.v_bias, [&](int m, int row, float value) {
        if ((kSingleNumbers >> static_cast<unsigned>(args.kv.format) & 1u) != 0) {
          store_kv(args.kv, args.slots[m], 1, row / args.kv.head_dim, row % args.kv.head_dim, value);
        } else {
          args.scratch_v[static_cast<std::int64_t>(m) * args.v.rows + row] = value;
        }
      });
    } else if (!keys_are_stored) {
      finish_rows(unit - q_units - v_units, totals, thread, args.k.rows, args.k_bias, [&](int m, int row, float value) {
        args.scratch_k[static_cast<std::int64_t>(m) * args.k.rows + row] = value;
      });
    } else {
      finish_keys(unit - q_units - v_units, totals, thread);
    }
  }

  template <class Store>
  NB_DEVICE void finish_rows(int unit, const Totals<M>& totals, int thread, int rows, const float* bias,
                             const Store& store) const {
    const int at = thread % kUnitRows, m = thread / kUnitRows;
    const int row = unit * kUnitRows + at;
    if (m >= args.rows || m >= M || row >= rows) return;
    float total = totals(at / 2, m, at % 2);
    if (bias != nullptr) total += bias[row];
    store(m, row, total);
  }

  NB_DEVICE void finish_keys(int unit, const Totals<M>& totals, int thread) const {
    const int parity = thread % 2, m = thread / 2;
    if (m >= args.rows || m >= M) return;
    const int row = row_of(unit, 0, parity, true), half = args.kv.head_dim / 2;
    float first = totals(0, m, parity), second = totals(1, m, parity);
    if (args.k_bias != nullptr) {
      first += args.k_bias[row];
      second += args.k_bias[row + half];
    }
    const int head = row / args.kv.head_dim, dim = row % args.kv.head_dim;
    rotate(first, second,
           args.rope.cos_sin + static_cast<std::int64_t>(args.key_positions[m]) * args.rope.head_dim + dim, half);
    store_kv(args.kv, args.slots[m], 0, head, dim, first);
    store_kv(args.kv, args.slots[m], 0, head, dim + half, second);
  }
};

/// grid: blocks_for_units().
template <class Number, class Act, int M>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks<M>)
    norm_qkv_kernel(ops::NormQkvArgs a, int units, int q_units, int v_units, bool keys_are_stored) {
  grid_trigger();
  QkvJob<M> job{units, a, q_units, v_units, keys_are_stored};
  multiply<Number, Act, M>(job, a.q.cols, [&] {
    const auto row_of = [&](int m) { return a.x + m * a.x_stride; };
    return stage_rows<Act, M, true>(row_of, a.rows, a.q.cols, a.norm_weight, a.eps);
  });
}

/// Norms heads of q in place; norms (or not), rotates and stores heads of k, and with kTokens those of v beside them.
/// Keys that are sealed are not rotated.
/// grid: (heads of k, then of q, rows).
template <bool kTokens>
__global__ void __launch_bounds__(kGemvThreads) finish_heads_kernel(ops::NormQkvArgs a) {
  NB_SHARED(float, scratch, kGemvWarps);
  grid_trigger();
  grid_wait();
  const int dim = a.kv.head_dim, half = dim / 2, row = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x);
  int head = static_cast<int>(blockIdx.x);
  if (head < a.kv.num_kv_heads) {
    float* k = a.scratch_k + static_cast<std::int64_t>(row) * a.k.rows + head * dim;
    const float scale = a.k_norm == nullptr ? 1.0f : rms_scale<kGemvThreads>(k, dim, a.eps, scratch);
    const float* angle = a.rope.cos_sin + static_cast<std::int64_t>(a.key_positions[row]) * dim;
    for (int i = thread; i < half; i += kGemvThreads) {
      float first = k[i], second = k[i + half];
      if (a.k_norm != nullptr) {
        first = first * scale * a.k_norm[i];
        second = second * scale * a.k_norm[i + half];
      }
      if (!kTokens || a.kv.format != quant::KvFormat::int4) rotate(first, second, angle + i, half);
      if constexpr (kTokens) {
        k[i] = first;
        k[i + half] = second;
      } else {
        store_kv(a.kv, a.slots[row], 0, head, i, first);
        store_kv(a.kv, a.slots[row], 0, head, i + half, second);
      }
    }
    if constexpr (kTokens) {
      sync_block();
      const float* v = a.scratch_v + static_cast<std::int64_t>(row) * a.v.rows + head * dim;
      if (thread < 32) store_token(a.kv, a.open, row, a.slots[row], head, static_cast<const float*>(k), v);
    }
  } else {
    head -= a.kv.num_kv_heads;
    float* q = a.q_out + row * a.q_stride + head * dim;
    const float scale = rms_scale<kGemvThreads>(q, dim, a.eps, scratch);
    for (int i = thread; i < dim; i += kGemvThreads) q[i] = q[i] * scale * a.q_norm[i];
  }
}

// ---- gate and up ----

/// A pair of a unit is a row of gate and the same of up.
template <int M>
struct GateUpJob {
  int units;  ///< up to the padded end of out's rows
  const ops::NormGateUpArgs& args;

  NB_DEVICE const uint4* row(int unit, int pair, int parity) const {
    const int at = unit * kUnitPairs + pair;
    return weight_row(parity == 0 ? args.gate : args.up, existing_row(args.gate, at));
  }

  NB_DEVICE void finish(int unit, const Totals<M>& totals, int thread) const {
    const int pair = thread % kUnitPairs, m = thread / kUnitPairs;
    const int at = unit * kUnitPairs + pair;
    if (m >= args.rows || m >= M) return;
    const float value = at < args.gate.rows ? silu_times(totals(pair, m, 0), totals(pair, m, 1)) : 0.0f;
    const std::int64_t place = static_cast<std::int64_t>(m) * args.out.cols + at;
    if (args.out.type == ops::ActType::bf16) {
      reinterpret_cast<Bf16*>(args.out.values)[place] = to_bf16(value);
    } else {
      args.out.values[place] = value;
    }
  }
};

/// grid: blocks_for_units().
template <class Number, class Act, int M>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks<M>) norm_gate_up_kernel(ops::NormGateUpArgs a) {
  grid_trigger();
  GateUpJob<M> job{a.out.cols / kUnitPairs, a};
  multiply<Number, Act, M>(job, a.gate.cols, [&] {
    const auto row_of = [&](int m) { return a.x + m * a.x_stride; };
    return stage_rows<Act, M, true>(row_of, a.rows, a.gate.cols, a.norm_weight, a.eps);
  });
}

// ---- the head ----

/// A thread keeps the best of what it has seen of one row of x.
template <int M>
struct HeadJob {
  int units;
  const ops::HeadArgs& args;
  Best best;

  NB_DEVICE const uint4* row(int unit, int pair, int parity) const {
    return weight_row(args.weight, existing_row(args.weight, unit * kUnitRows + pair * 2 + parity));
  }

  NB_DEVICE void finish(int unit, const Totals<M>& totals, int thread) {
    const int at = thread % kUnitRows, m = thread / kUnitRows;
    const int row = unit * kUnitRows + at;
    if (m >= args.rows || m >= M || row >= args.weight.rows) return;
    const float total = totals(at / 2, m, at % 2);
    if (args.logits != nullptr) args.logits[m * args.logits_stride + row] = total;
    best.take(total, row);
  }
};

/// grid: blocks_for_units(), at most ops::kHeadBlocks. Leaves the best of every block, blocks one after the other.
template <class Number, class Act, int M>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks<M>) head_kernel(ops::HeadArgs a) {
  grid_trigger();
  HeadJob<M> job{(a.weight.rows + kUnitRows - 1) / kUnitRows, a, Best{}};
  multiply<Number, Act, M>(job, a.weight.cols, [&] {
    const auto row_of = [&](int m) { return a.x + a.row_ids[m] * a.x_stride; };
    return stage_rows<Act, M, true>(row_of, a.rows, a.weight.cols, a.norm_weight, a.eps);
  });
  // The threads of one row of x are neighbours, and all in the first warp.
  Best best = job.best;
  for (int step = kUnitRows / 2; step > 0; step /= 2) best.take_from_lane(step);
  const int thread = static_cast<int>(threadIdx.x), m = thread / kUnitRows;
  if (m >= a.rows || thread % kUnitRows != 0) return;
  a.scratch_best[blockIdx.x * static_cast<unsigned>(a.rows) + static_cast<unsigned>(m)] = best.value;
  a.scratch_best_id[blockIdx.x * static_cast<unsigned>(a.rows) + static_cast<unsigned>(m)] = best.id;
}

/// grid: rows.
__global__ void __launch_bounds__(kGemvThreads) head_argmax_kernel(ops::HeadArgs a, int blocks) {
  NB_SHARED(float, values, kGemvWarps);
  NB_SHARED(int, ids, kGemvWarps);
  grid_trigger();
  grid_wait();
  const int row = static_cast<int>(blockIdx.x);
  Best best;
  for (int block = static_cast<int>(threadIdx.x); block < blocks; block += kGemvThreads) {
    best.take(a.scratch_best[block * a.rows + row], a.scratch_best_id[block * a.rows + row]);
  }
  best.take_from_block<kGemvThreads>(values, ids);
  if (threadIdx.x == 0) a.argmax[row] = best.found();
}

}  // namespace

void norm_qkv(const ops::NormQkvArgs& a, const Part&) {
  const bool keys_are_stored = stores_keys(a);
  const int q_units = units_of(a.q), v_units = units_of(a.v), units = q_units + v_units + units_of(a.k);
  in_staged_groups(
      a.q.format, a.act_type, a.rows, a.q.cols, [&](auto number, auto act, auto columns, int begin, int count) {
        using Act = decltype(act);
        ops::NormQkvArgs group = a;
        group.rows = count;
        group.x = a.x + begin * a.x_stride;
        group.key_positions = a.key_positions + begin;
        group.slots = a.slots + begin;
        group.scratch_k = a.scratch_k + static_cast<std::int64_t>(begin) * a.k.rows;
        group.scratch_v = a.scratch_v + static_cast<std::int64_t>(begin) * a.v.rows;
        group.q_out = a.q_out + begin * a.q_stride;
        launch({.name = "norm_qkv_kernel",
                .grid_x = static_cast<unsigned>(blocks_for_units(units)),
                .dynamic_shared_bytes = staged_bytes<Act>(count, a.q.cols)},
               norm_qkv_kernel<decltype(number), Act, columns.value>, group, units, q_units, v_units, keys_are_stored);
      });
  if (keys_are_stored) return;
  const int heads = a.kv.num_kv_heads + (a.q_norm == nullptr ? 0 : a.q.rows / a.kv.head_dim);
  const auto finish = [&](auto tokens) {
    launch({.name = "finish_heads_kernel",
            .grid_x = static_cast<unsigned>(heads),
            .grid_y = static_cast<unsigned>(a.rows)},
           finish_heads_kernel<decltype(tokens)::value>, a);
  };
  stores_tokens(a.kv.format) ? finish(std::true_type{}) : finish(std::false_type{});
}

void norm_gate_up(const ops::NormGateUpArgs& a, const Part&) {
  const unsigned blocks = static_cast<unsigned>(blocks_for_units(a.out.cols / kUnitPairs));
  in_staged_groups(a.gate.format, a.act_type, a.rows, a.gate.cols,
                   [&](auto number, auto act, auto columns, int begin, int count) {
                     using Act = decltype(act);
                     ops::NormGateUpArgs group = a;
                     group.rows = count;
                     group.x = a.x + begin * a.x_stride;
                     const int bytes = a.out.type == ops::ActType::bf16 ? 2 : 4;
                     group.out.values = reinterpret_cast<float*>(reinterpret_cast<std::uint8_t*>(a.out.values) +
                                                                 static_cast<std::int64_t>(begin) * a.out.cols * bytes);
                     launch({.name = "norm_gate_up_kernel",
                             .grid_x = blocks,
                             .dynamic_shared_bytes = staged_bytes<Act>(count, a.gate.cols)},
                            norm_gate_up_kernel<decltype(number), Act, columns.value>, group);
                   });
}

void head(const ops::HeadArgs& a, const Part&) {
  const int blocks = blocks_for_units(units_of(a.weight));
  in_staged_groups(a.weight.format, a.act_type, a.rows, a.weight.cols,
                   [&](auto number, auto act, auto columns, int begin, int count) {
                     using Act = decltype(act);
                     ops::HeadArgs group = a;
                     group.rows = count;
                     group.row_ids = a.row_ids + begin;
                     group.logits = a.logits == nullptr ? nullptr : a.logits + begin * a.logits_stride;
                     group.argmax = a.argmax + begin;
                     launch({.name = "head_kernel",
                             .grid_x = static_cast<unsigned>(blocks),
                             .dynamic_shared_bytes = staged_bytes<Act>(count, a.weight.cols)},
                            head_kernel<decltype(number), Act, columns.value>, group);
                     launch({.name = "head_argmax_kernel", .grid_x = static_cast<unsigned>(count)}, head_argmax_kernel,
                            group, blocks);
                   });
}

}  // namespace nb::cuda
