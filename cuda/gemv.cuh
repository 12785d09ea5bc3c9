// out[m] = x[m] W^T for up to 8 rows x[m]: the products of decoding. Memory-bound: each weight is read once.
//
// W lies in pairs of rows, each pair as vectors of 16 bytes, the two rows in turn (cpp/ops/args.h). A block of 128
// threads computes units of two pairs: thread t has row t % 2 of each pair and every 64th vector from t / 2 on, so that
// a warp reads 512 bytes in one piece and numbers of x serve twice. A thread adds its products in ascending order, the
// 16 threads of a warp and row are added as a tree, the warps in order: all of that depends on K only, never on the
// number of rows of x, nor on the grid. Vectors are asked for some steps ahead, those of the first steps before
// grid_wait(), those of the next unit before the sums of this one are taken.
//
// What the units are and what becomes of the sums is said by a job: a struct with
//   int units;                                                   // of the whole grid
//   const uint4* row(int unit, int pair, int parity);            // a row to read, always one that exists
//   void finish(int unit, const Totals<M>& totals, int thread);  // called by all threads
#pragma once

#include "cuda/number.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/weight.cuh"

namespace nb::cuda {

inline constexpr int kGemvThreads = 128;
inline constexpr int kGemvWarps = kGemvThreads / 32;
inline constexpr int kUnitPairs = 2;
inline constexpr int kUnitRows = 2 * kUnitPairs;
inline constexpr int kMaxColumns = 8;                 ///< rows of x at most
inline constexpr int kVectorStep = kGemvThreads / 2;  ///< from a thread's vector to its next

/// Blocks a multiprocessor has registers for: one row of x is the usual case, and wants many vectors under way.
template <int M>
constexpr int kGemvBlocks = M == 1 ? 8 : (M == 8 ? 3 : 4);

/// Steps whose vectors are asked for ahead: a matter of registers, and of how many bytes keep the memory busy. Of codes
/// a row has half as many vectors.
template <class Number, int M>
NB_DEVICE constexpr int steps_ahead() {
  if (kIsScaled<Number>) return 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return M == 1 ? 3 : 2;
#else
  return M <= 2 ? 4 : 2;
#endif
}

/// The row, or the last one: units may reach past the end, where rows that take turns have no padding.
NB_DEVICE int existing_row(const ops::LinearSegment& weight, int row) {
  return row < weight.rows ? row : weight.rows - 1;
}

/// Rows of x in global memory, in the type they are multiplied as; `cols` rounded up to 32, padding zero.
template <class Act>
struct GlobalRows {
  const Act* values;
  int rows;
  int cols;

  /// 8 or 16 bytes of row m from a column on; surplus rows are row 0.
  template <class Vector>
  NB_DEVICE Vector at(int m, int col) const {
    return *reinterpret_cast<const Vector*>(values + (m < rows ? m * cols : 0) + col);
  }
};

/// The same in shared memory.
template <class Act>
struct SharedRows {
  SharedPtr<Act> values;
  int rows;
  int cols;

  template <class Vector>
  NB_DEVICE Vector at(int m, int col) const {
    return shared_cast<Vector>(values + ((m < rows ? m * cols : 0) + col))[0];
  }
};

template <class Act>
constexpr bool kIsHalf = sizeof(Act) == 2;

/// kCount numbers (4 or 8) of row m from a column on.
template <class Act, int kCount, class Rows>
NB_DEVICE void load_numbers(float (&out)[kCount], const Rows& x, int m, int col) {
  if constexpr (!kIsHalf<Act>) {
    NB_UNROLL
    for (int part = 0; part < kCount / 4; ++part) {
      const uint4 vector = x.template at<uint4>(m, col + 4 * part);
      NB_UNROLL
      for (int i = 0; i < 4; ++i) out[4 * part + i] = element<float>(vector, i);
    }
  } else if constexpr (kCount == 8) {
    const uint4 vector = x.template at<uint4>(m, col);
    NB_UNROLL
    for (int i = 0; i < 8; ++i) out[i] = element<Act>(vector, i);
  } else {
    const uint2 half = x.template at<uint2>(m, col);
    const uint4 vector = {half.x, half.y, 0, 0};
    NB_UNROLL
    for (int i = 0; i < 4; ++i) out[i] = element<Act>(vector, i);
  }
}

NB_DEVICE void store_number(SharedPtr<float> out, int at, float value) { out[at] = value; }
NB_DEVICE void store_number(SharedPtr<Bf16> out, int at, float value) { out[at] = to_bf16(value); }

/// Brings f32 rows into shared memory as they are multiplied: normalised if kNorm, rounded to Act, padded with zeros.
/// row_of(m) is where row m begins. With the bits of the small operators rms_norm and prepare.
template <class Act, int M, bool kNorm, class RowOf>
NB_DEVICE SharedRows<Act> stage_rows(const RowOf& row_of, int rows, int cols, const float* norm_weight, float eps) {
  NB_SHARED(float, scratch, kGemvWarps* M);
  const SharedRows<Act> staged{dynamic_shared<Act>(), rows, (cols + 31) / 32 * 32};
  const float* x[M];
  NB_UNROLL
  for (int m = 0; m < M; ++m) x[m] = row_of(m < rows ? m : 0);
  float scales[M];
  if constexpr (kNorm) rms_scales<kGemvThreads>(scales, x, cols, eps, scratch);
  for (int col = static_cast<int>(threadIdx.x); col < staged.cols; col += kGemvThreads) {
    float gain = 1.0f;
    if (kNorm && col < cols) gain = norm_weight[col];
    NB_UNROLL
    for (int m = 0; m < M; ++m) {
      if (m >= rows) break;
      float value = col < cols ? x[m][col] : 0.0f;
      if (kNorm && col < cols) value = value * scales[m] * gain;
      store_number(staged.values, m * staged.cols + col, value);
    }
  }
  sync_block();
  return staged;
}

/// The sum over the lanes of a warp with the same lowest bit of each value, as a tree over steps 16, 8, 4, 2. Lane l
/// gets the sum of value l / (32 / kCount), for kCount up to 16 a power of two: while there are several values, the two
/// lanes of a step share them out between them.
template <int kCount>
NB_DEVICE float sum_lanes(float (&values)[kCount]) {
  int count = kCount;
  NB_UNROLL
  for (int step = 16; step >= 2; step /= 2) {
    if (count > 1) {
      count /= 2;
      const bool upper = (lane_id() & step) != 0;
      NB_UNROLL
      for (int i = 0; i < kCount / 2; ++i) {
        if (i >= count) break;
        const float given = upper ? values[i] : values[i + count];
        const float kept = upper ? values[i + count] : values[i];
        values[i] = kept + shuffle_xor(given, step);
      }
    } else {
      values[0] += shuffle_xor(values[0], step);
    }
  }
  return values[0];
}

/// The sums of one unit.
template <int M>
struct Totals {
  SharedPtr<float> sums;  ///< [warp][pair][m][parity]

  NB_DEVICE float operator()(int pair, int m, int parity) const {
    float total = 0.0f;
    for (int warp = 0; warp < kGemvWarps; ++warp) total += sums[((warp * kUnitPairs + pair) * M + m) * 2 + parity];
    return total;
  }
};

/// Multiplies the units of this block. `cols` of the weight; ready() is called after grid_wait() and gives the rows of
/// x (GlobalRows or SharedRows of Act).
template <class Number, class Act, int M, class Job, class Ready>
NB_DEVICE void multiply(Job& job, int cols, const Ready& ready) {
  constexpr int kWidth = kPerVector<Number>;
  constexpr int kSteps = steps_ahead<Number, M>();
  constexpr int kCount = kUnitPairs * M;
  constexpr int kPart = kWidth < 8 ? kWidth : 8;  // columns whose numbers are in registers at once
  NB_SHARED(float, sums, 2 * kGemvWarps * kCount * 2);

  const int thread = static_cast<int>(threadIdx.x);
  const int parity = thread % 2, first = thread / 2;
  const int num_vectors = vectors_of<Number>(cols);
  int unit = static_cast<int>(blockIdx.x);
  const uint4* row[kUnitPairs];
  uint4 ahead[kSteps][kUnitPairs];
  Fp16 scales[kSteps][kUnitPairs];  // of codes
  const auto ask_for = [&](int step, int vector) {
    NB_UNROLL
    for (int pair = 0; pair < kUnitPairs; ++pair) {
      ahead[step][pair] = load_weight(row[pair] + 2 * vector);
      if constexpr (kIsScaled<Number>) scales[step][pair] = scale_of(row[pair], num_vectors, vector);
    }
  };
  NB_UNROLL
  for (int pair = 0; pair < kUnitPairs; ++pair) row[pair] = job.row(unit, pair, parity);
  NB_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    const int vector = first + step * kVectorStep;
    if (vector < num_vectors) ask_for(step, vector);
  }
  grid_wait();
  const auto x = ready();

  for (int turn = 0; unit < job.units; turn ^= 1) {
    const int next = unit + static_cast<int>(gridDim.x);
    float sum[kCount];
    NB_UNROLL
    for (int i = 0; i < kCount; ++i) sum[i] = 0.0f;
    for (int base = 0; base < num_vectors; base += kSteps * kVectorStep) {
      const bool is_last = base + kSteps * kVectorStep >= num_vectors;
      const bool more = !is_last || next < job.units;
      if (is_last && more) {
        NB_UNROLL
        for (int pair = 0; pair < kUnitPairs; ++pair) row[pair] = job.row(next, pair, parity);
      }
      NB_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        const int vector = base + first + step * kVectorStep;
        if (vector < num_vectors) {
          float of_vector[kCount];  // of codes, whose scale comes last
          float(&to)[kCount] = kIsScaled<Number> ? of_vector : sum;
          if constexpr (kIsScaled<Number>) {
            NB_UNROLL
            for (int i = 0; i < kCount; ++i) of_vector[i] = 0.0f;
          }
          NB_UNROLL
          for (int part = 0; part < kWidth; part += kPart) {
            float weights[kUnitPairs][kPart];
            NB_UNROLL
            for (int pair = 0; pair < kUnitPairs; ++pair) {
              NB_UNROLL
              for (int i = 0; i < kPart; ++i) weights[pair][i] = element<Number>(ahead[step][pair], part + i);
            }
            NB_UNROLL
            for (int m = 0; m < M; ++m) {
              float numbers[kPart];
              load_numbers<Act>(numbers, x, m, vector * kWidth + part);
              NB_UNROLL
              for (int i = 0; i < kPart; ++i) {
                NB_UNROLL
                for (int pair = 0; pair < kUnitPairs; ++pair) {
                  to[pair * M + m] = fmaf(weights[pair][i], numbers[i], to[pair * M + m]);
                }
              }
            }
          }
          if constexpr (kIsScaled<Number>) {
            NB_UNROLL
            for (int i = 0; i < kCount; ++i) sum[i] = fmaf(to_float(scales[step][i / M]), of_vector[i], sum[i]);
          }
        }
        const int coming = is_last ? first + step * kVectorStep : vector + kSteps * kVectorStep;
        if (more && coming < num_vectors) ask_for(step, coming);
      }
    }

    // Two sets of sums in turn, so that one barrier a unit is enough.
    const auto mine = sums + turn * kGemvWarps * kCount * 2;
    const float total = sum_lanes(sum);
    constexpr int kLanes = 32 / kCount;  // that have the same sum, for both parities
    if (lane_id() % kLanes < 2) mine[(thread / 32 * kCount + lane_id() / kLanes) * 2 + parity] = total;
    sync_block();
    job.finish(unit, Totals<M>{mine}, thread);
    unit = next;
  }
}

/// Units that all rows of a weight make.
inline int units_of(const ops::LinearSegment& weight) { return (weight.rows + kUnitRows - 1) / kUnitRows; }

/// Blocks for `units` units where every block first brings x to itself: few enough to be resident together (four for
/// each of the 132 multiprocessors of an H100), each with as many units.
inline int blocks_for_units(int units) {
  constexpr int kMost = ops::kHeadBlocks;
  const int each = (units + kMost - 1) / kMost;
  return each == 0 ? 0 : (units + each - 1) / each;
}

/// How many rows of x a kernel takes that stages `cols` columns of them: as many as leave room for other blocks.
template <class Act>
int rows_to_stage(int cols) {
  constexpr std::int64_t kMostBytes = 96 << 10;
  const std::int64_t row_bytes = (cols + 31) / 32 * 32 * static_cast<std::int64_t>(sizeof(Act));
  int rows = kMaxColumns;
  while (rows > 1 && rows * row_bytes > kMostBytes) rows /= 2;
  return rows;
}

/// Dynamic shared memory for that.
template <class Act>
std::size_t staged_bytes(int rows, int cols) {
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>((cols + 31) / 32 * 32) * sizeof(Act);
}

template <int N>
struct Columns {
  static constexpr int value = N;
};

/// Calls visit(Columns<M>{}) with the smallest M there is that holds `rows` rows.
template <class Visit>
void with_columns(int rows, Visit&& visit) {
  if (rows <= 1) {
    visit(Columns<1>{});
  } else if (rows <= 2) {
    visit(Columns<2>{});
  } else if (rows <= 4) {
    visit(Columns<4>{});
  } else {
    visit(Columns<8>{});
  }
}

/// Calls visit(Number{}, Act{}).
template <class Visit>
void with_types(quant::Format format, ops::ActType act, Visit&& visit) {
  with_number(format, [&](auto number) {
    if (act == ops::ActType::bf16) {
      visit(number, Bf16{});
    } else {
      visit(number, float{});
    }
  });
}

/// Calls visit(Number{}, Act{}, Columns<M>{}, begin, count) for rows [begin, begin + count) after each other, at most
/// as many at once as can be staged.
template <class Visit>
void in_staged_groups(quant::Format format, ops::ActType type, int rows, int cols, Visit&& visit) {
  with_types(format, type, [&](auto number, auto act) {
    const int most = rows_to_stage<decltype(act)>(cols);
    for (int begin = 0; begin < rows; begin += most) {
      const int count = rows - begin < most ? rows - begin : most;
      with_columns(count, [&](auto columns) { visit(number, act, columns, begin, count); });
    }
  });
}

}  // namespace nb::cuda
