// out[m] = x[m] W^T for up to 8 rows x[m]: the product of decoding. Memory-bound: each weight is read once.
//
// W is packed by pairs of output rows: [row / 2][vector of 16 bytes along K][row % 2]. A block of 128 threads computes
// one pair; thread t has row t % 2 and every 64th vector from t / 2 on, so that a warp reads 512 bytes in one piece.
// The order of additions depends on K only, never on M, so a row gives the same bits in any batch. The input may be
// normalised on the way in (RMSNorm, computed again by every block), which saves a kernel.
#pragma once

#include "cuda/number.cuh"
#include "cuda/ptx.cuh"

namespace nb::cuda {

inline constexpr int kGemvThreads = 128;
inline constexpr int kGemvRows = 2;
inline constexpr int kMaxGemvColumns = 8;

struct GemvArgs {
  const void* weight;  ///< packed; rows rounded up to a pair, K to a whole vector, padding zero
  int rows;            ///< N, of W
  int cols;            ///< K, unpadded
  const float* x;      ///< [M, K]
  std::int64_t x_stride;
  const float* norm_weight;  ///< [K]: x is RMSNorm'ed first; unused without kNorm
  float eps;
  const float* bias;      ///< [N] or null
  const float* residual;  ///< [M, N] or null: added; may be out
  std::int64_t residual_stride;
  float* out;  ///< [M, N]
  std::int64_t out_stride;
};

/// Bytes of a packed weight.
template <class Number>
constexpr std::int64_t gemv_weight_bytes(std::int64_t rows, std::int64_t cols) {
  const std::int64_t vectors = (cols + kPerVector<Number> - 1) / kPerVector<Number>;
  return (rows + kGemvRows - 1) / kGemvRows * kGemvRows * vectors * 16;
}

/// Where number (row, col) stands in a packed weight, in numbers.
template <class Number>
constexpr std::int64_t gemv_weight_index(std::int64_t row, std::int64_t col, std::int64_t cols) {
  const std::int64_t width = kPerVector<Number>;
  const std::int64_t vectors = (cols + width - 1) / width;
  return ((row / kGemvRows * vectors + col / width) * kGemvRows + row % kGemvRows) * width + col % width;
}

/// The sum over a block, for all threads, in a fixed order. `scratch` holds one value a warp.
NB_DEVICE float block_sum(float value, SharedPtr<float> scratch) {
  value = warp_sum(value);
  if (lane_id() == 0) scratch[threadIdx.x / 32] = value;
  sync_block();
  float sum = 0.0f;
  for (int warp = 0; warp < kGemvThreads / 32; ++warp) sum += scratch[warp];
  sync_block();
  return sum;
}

/// M: rows of x; grid: pairs of output rows.
template <class Number, int M, bool kNorm>
__global__ void __launch_bounds__(kGemvThreads) gemv(GemvArgs args) {
  constexpr int kWidth = kPerVector<Number>;
  constexpr int kAhead = 4;  // vectors a thread asks for before it waits for x
  constexpr int kStep = kGemvThreads / kGemvRows;
  NB_SHARED(float, sums, 4 * kGemvRows * M);
  NB_SHARED(float, scratch, kGemvThreads / 32);

  grid_trigger();
  const int thread = static_cast<int>(threadIdx.x);
  const int num_vectors = (args.cols + kWidth - 1) / kWidth;
  const int first = thread / kGemvRows;
  const uint4* weight = static_cast<const uint4*>(args.weight) +
                        (static_cast<std::int64_t>(blockIdx.x) * num_vectors * kGemvRows + thread % kGemvRows);
  uint4 ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int vector = first + i * kStep;
    if (vector < num_vectors) ahead[i] = load_weight(weight + static_cast<std::int64_t>(vector) * kGemvRows);
  }
  grid_wait();

  float scale[M];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    scale[m] = 1.0f;
    if constexpr (kNorm) {
      float squares = 0.0f;
      for (int k = thread; k < args.cols; k += kGemvThreads) {
        const float value = args.x[m * args.x_stride + k];
        squares = fmaf(value, value, squares);
      }
      squares = block_sum(squares, scratch);
      scale[m] = 1.0f / sqrtf(squares / static_cast<float>(args.cols) + args.eps);
    }
  }

  float sum[M];
#pragma unroll
  for (int m = 0; m < M; ++m) sum[m] = 0.0f;
  const auto add = [&](const uint4& packed, int vector) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int k = vector * kWidth + i;
      if (k >= args.cols) break;
      const float w = element<Number>(packed, i);
      const float gain = kNorm ? args.norm_weight[k] : 1.0f;
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const float value = args.x[m * args.x_stride + k];
        sum[m] = fmaf(w, kNorm ? value * scale[m] * gain : value, sum[m]);
      }
    }
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (first + i * kStep < num_vectors) add(ahead[i], first + i * kStep);
  }
  for (int vector = first + kAhead * kStep; vector < num_vectors; vector += kStep) {
    add(load_weight(weight + static_cast<std::int64_t>(vector) * kGemvRows), vector);
  }

  // Lanes of one row differ in the bits above the lowest.
#pragma unroll
  for (int m = 0; m < M; ++m) {
    for (int step = 16; step >= kGemvRows; step /= 2) sum[m] += shuffle_xor(sum[m], step);
  }
  if (lane_id() < kGemvRows) {
#pragma unroll
    for (int m = 0; m < M; ++m) sums[(thread / 32 * kGemvRows + lane_id()) * M + m] = sum[m];
  }
  sync_block();
  if (thread < kGemvRows * M) {
    const int m = thread % M;
    const int row = static_cast<int>(blockIdx.x) * kGemvRows + thread / M;
    if (row < args.rows) {
      float total = args.bias != nullptr ? args.bias[row] : 0.0f;
      for (int warp = 0; warp < 4; ++warp) total += sums[(warp * kGemvRows + thread / M) * M + m];
      if (args.residual != nullptr) total += args.residual[m * args.residual_stride + row];
      args.out[m * args.out_stride + row] = total;
    }
  }
}

}  // namespace nb::cuda
