// Kernels of the matrix product of many rows; see gemm.h.
//
// Tensor cores: a block computes kBlockRows x kBlockCols outputs and walks along K in tiles of kBlockK columns, which
// cp.async brings into a ring of kStages stages; kStages - 1 tiles are under way while one is multiplied. A tile of
// either operand is [rows][kBlockK] in vectors of 16 bytes, and vector v of row r stands at v ^ turn(r):
//
//   row 0 | v0 v1 v2 v3 v4 v5 v6 v7      so that the 8 rows that ldmatrix reads at once (same v), and the 2 rows x 4
//   row 1 | v4 v5 v6 v7 v0 v1 v2 v3      vectors that 8 lanes copy at once (row pairs of W), lie in different banks
//   row 2 | v1 v0 v3 v2 v5 v4 v7 v6
//
// Weights that are codes come by way of registers, a tile ahead, and stand in a stage as bf16: each times its scale,
// rounded.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/weight.cuh"

namespace nb::cuda {

/// What a block of the tensor core kernel does, and how its warps share it.
template <int kRows, int kCols, int kK, int kWarpRowsPer, int kWarpColsPer, int kStagesOfK, int kBlocks>
struct MmaTile {
  static constexpr int kBlockRows = kRows;        ///< rows of x
  static constexpr int kBlockCols = kCols;        ///< rows of W
  static constexpr int kBlockK = kK;              ///< columns of both at a time
  static constexpr int kWarpRows = kWarpRowsPer;  ///< of the block's outputs, by one warp
  static constexpr int kWarpCols = kWarpColsPer;
  static constexpr int kStages = kStagesOfK;
  static constexpr int kBlocksPerSm = kBlocks;  ///< that registers must be left for
  static constexpr int kWarpsDown = kBlockRows / kWarpRows;
  static constexpr int kThreads = 32 * kWarpsDown * (kBlockCols / kWarpCols);
  static constexpr int kVectors = kBlockK / 8;  ///< of a row
  static constexpr int kStageNumbers = (kBlockRows + kBlockCols) * kBlockK;
  static constexpr std::size_t kSharedBytes = std::size_t{2} * kStages * kStageNumbers;
  static_assert(kWarpRows % 16 == 0 && kWarpCols % 16 == 0 && kVectors >= 4 && (kVectors & (kVectors - 1)) == 0);
  static_assert(kThreads % (2 * kVectors) == 0 && kBlockRows * kVectors % kThreads == 0 &&
                kBlockCols * kVectors % kThreads == 0);
};

using LargeTile = MmaTile<128, 128, 32, 64, 64, 4, 2>;
using MediumTile = MmaTile<64, 64, 64, 32, 32, 4, 3>;
using WideTile = MmaTile<32, 64, 64, 16, 32, 4, 4>;
using NarrowTile = MmaTile<32, 16, 128, 16, 16, 5, 3>;

/// By how much the vectors of a row are turned: different in the lowest bits for 8 rows in sequence, and in the highest
/// of these for the two rows of a pair.
template <int kVectors>
NB_DEVICE int turn(int row) {
  return ((row & 1) << 2 | (row >> 1 & 3)) & (kVectors - 1);
}

struct BlockPlace {
  int row;
  int col;
};

/// Which outputs a block has: blocks that run at the same time form squares, so that they share rows of both operands
/// in the L2 cache.
NB_DEVICE BlockPlace place_of_block(int index, int num_down, int num_across) {
  constexpr int kBand = 8;
  const int band = index / (kBand * num_across) * kBand;
  const int height = num_down - band < kBand ? num_down - band : kBand;
  const int within = index - band * num_across;
  return {band + within % height, within / height};
}

/// What a thread holds of a tile of W that is codes.
template <class Number, class Tile>
struct TileCodes {
  static constexpr int kVectors = Tile::kBlockK / kPerVector<SignedByte>;  // of codes, of a row
  static constexpr int kSteps = Tile::kBlockCols * kVectors / Tile::kThreads;
  static_assert(Tile::kBlockCols * kVectors % Tile::kThreads == 0);

  uint4 vectors[kSteps];
  Fp16 scales[kSteps];

  // Two lanes in sequence take the two rows of a pair.
  static NB_DEVICE int slot(int i) { return i * Tile::kThreads + static_cast<int>(threadIdx.x); }
  static NB_DEVICE int row(int i) { return slot(i) / (2 * kVectors) * 2 + slot(i) % 2; }
  static NB_DEVICE int vector(int i) { return slot(i) / 2 % kVectors; }

  NB_DEVICE void fetch(const ops::LinearSegment& weight, int first_row, int tile) {
    const int num_vectors = vectors_of<SignedByte>(weight.cols);
    NB_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      const int at = tile * kVectors + vector(i);
      vectors[i] = {};
      scales[i] = {};
      if (first_row + row(i) >= weight.rows || at >= num_vectors) continue;
      const uint4* const from = weight_row(weight, first_row + row(i));
      vectors[i] = load_weight(from + 2 * at);
      scales[i] = scale_of(from, num_vectors, at);
    }
  }

  NB_DEVICE void store(SharedPtr<Bf16> to) const {
    NB_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      const float scale = to_float(scales[i]);
      NB_UNROLL
      for (int half = 0; half < 2; ++half) {
        unsigned words[4];
        NB_UNROLL
        for (int word = 0; word < 4; ++word) {
          const int at = 8 * half + 2 * word;
          words[word] = pack_pair<Bf16>(element<SignedByte>(vectors[i], at) * scale,
                                        element<SignedByte>(vectors[i], at + 1) * scale);
        }
        const int place = 8 * ((2 * vector(i) + half) ^ turn<Tile::kVectors>(row(i)));
        shared_cast<uint4>(to + (row(i) * Tile::kBlockK + place))[0] = uint4{words[0], words[1], words[2], words[3]};
      }
    }
  }
};

/// Two outputs side by side, (row, col) and (row, col + 1): bias and the value before are added in this order.
NB_DEVICE void store_pair(const ops::LinearArgs& a, int row, int col, float first, float second) {
  if (row >= a.x.rows || col >= a.weight.rows) return;
  float* out = a.out + row * a.out_stride + col;
  const bool both = col + 1 < a.weight.rows;
  if (a.bias != nullptr) {
    first += a.bias[col];
    if (both) second += a.bias[col + 1];
  }
  if (both && reinterpret_cast<std::uintptr_t>(out) % sizeof(float2) == 0) {
    float2* pair = reinterpret_cast<float2*>(out);
    if (a.accumulate) {
      const float2 before = *pair;
      first += before.x;
      second += before.y;
    }
    *pair = {first, second};
    return;
  }
  out[0] = a.accumulate ? out[0] + first : first;
  if (both) out[1] = a.accumulate ? out[1] + second : second;
}

/// x is bf16, W of Number: bf16, or codes. grid: tiles, see place_of_block().
template <class Number, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm) gemm_bf16_kernel(ops::LinearArgs a) {
  constexpr int kVectors = Tile::kVectors;
  constexpr int kBlockK = Tile::kBlockK;
  constexpr int kRowTiles = Tile::kWarpRows / 16;
  constexpr int kColTiles = Tile::kWarpCols / 16;
  constexpr int kXRows = Tile::kThreads / kVectors;  // rows that all threads copy at once
  constexpr int kXSteps = Tile::kBlockRows / kXRows;
  constexpr int kWeightSteps = Tile::kBlockCols / kXRows;

  grid_trigger();
  const auto stages = dynamic_shared<Bf16>();
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = lane_id();
  const int num_down = (a.x.rows + Tile::kBlockRows - 1) / Tile::kBlockRows;
  const int num_across = (a.weight.rows + Tile::kBlockCols - 1) / Tile::kBlockCols;
  const BlockPlace place = place_of_block(static_cast<int>(blockIdx.x), num_down, num_across);
  const int row_begin = place.row * Tile::kBlockRows;
  const int col_begin = place.col * Tile::kBlockCols;
  const int num_vectors = a.x.cols / 8;  // of a row; K is padded with zeros to 32 columns
  const int num_tiles = (num_vectors + kVectors - 1) / kVectors;

  // What this thread copies of every tile. Two lanes in sequence take the two rows of a pair of W, which lie side by
  // side; a row of x is taken by lanes in sequence.
  const int x_row = thread / kVectors, x_vector = thread % kVectors;
  const Bf16* x = reinterpret_cast<const Bf16*>(a.x.values) + static_cast<std::int64_t>(row_begin + x_row) * a.x.cols +
                  8 * x_vector;
  const std::int64_t x_step = static_cast<std::int64_t>(kXRows) * a.x.cols;
  const int w_row = thread / (2 * kVectors) * 2 + thread % 2, w_vector = thread / 2 % kVectors;
  const uint4* w = weight_row(a.weight, col_begin + w_row) + 2 * w_vector;
  TileCodes<Number, Tile> codes;
  const std::int64_t w_step = (a.weight.strip_bytes == 0 ? kXRows : kXRows / 2) * (a.weight.pair_stride / 16);

  const auto copy_weight = [&](int tile) {
    if constexpr (kIsScaled<Number>) return;
    const auto to = stages + (tile % Tile::kStages * Tile::kStageNumbers + Tile::kBlockRows * kBlockK);
    NB_UNROLL
    for (int i = 0; i < kWeightSteps; ++i) {
      const int row = w_row + i * kXRows;
      cp_async16(to + (row * kBlockK + 8 * (w_vector ^ turn<kVectors>(row))), w + i * w_step + 2 * tile * kVectors,
                 col_begin + row < a.weight.rows && tile * kVectors + w_vector < num_vectors);
    }
  };
  const auto copy_x = [&](int tile) {
    const auto to = stages + tile % Tile::kStages * Tile::kStageNumbers;
    NB_UNROLL
    for (int i = 0; i < kXSteps; ++i) {
      const int row = x_row + i * kXRows;
      cp_async16(to + (row * kBlockK + 8 * (x_vector ^ turn<kVectors>(row))), x + i * x_step + tile * kBlockK,
                 row_begin + row < a.x.rows && tile * kVectors + x_vector < num_vectors);
    }
  };

  for (int tile = 0; tile < Tile::kStages - 1; ++tile) {
    if (tile < num_tiles) copy_weight(tile);
  }
  if constexpr (kIsScaled<Number>) codes.fetch(a.weight, col_begin, 0);
  grid_wait();
  for (int tile = 0; tile < Tile::kStages - 1; ++tile) {
    if (tile < num_tiles) copy_x(tile);
    cp_async_commit();
  }

  float sums[kRowTiles][2 * kColTiles][4];
  NB_UNROLL
  for (int i = 0; i < kRowTiles; ++i) {
    NB_UNROLL
    for (int j = 0; j < 2 * kColTiles; ++j) sums[i][j][0] = sums[i][j][1] = sums[i][j][2] = sums[i][j][3] = 0.0f;
  }
  const int warp = thread / 32;
  const int warp_row = warp % Tile::kWarpsDown * Tile::kWarpRows;
  const int warp_col = warp / Tile::kWarpsDown * Tile::kWarpCols;
  // The rows whose addresses this lane gives to ldmatrix: of x (16 rows x 8 columns) twice, of W (8 x 16) twice.
  const int a_row = warp_row + lane % 16, a_half = lane / 16;
  const int b_row = warp_col + lane / 16 * 8 + lane % 8, b_half = lane / 8 % 2;
  const int a_turn = turn<kVectors>(a_row), b_turn = turn<kVectors>(b_row);

  for (int tile = 0; tile < num_tiles; ++tile) {
    if constexpr (kIsScaled<Number>) {
      // Of the place of this tile nobody has read since the barrier of the tile before.
      codes.store(stages + (tile % Tile::kStages * Tile::kStageNumbers + Tile::kBlockRows * kBlockK));
      if (tile + 1 < num_tiles) codes.fetch(a.weight, col_begin, tile + 1);
    }
    cp_async_wait<Tile::kStages - 2>();
    sync_block();  // this tile is here for all, and nobody reads the one before any more, whose place is free
    if (tile + Tile::kStages - 1 < num_tiles) {
      copy_weight(tile + Tile::kStages - 1);
      copy_x(tile + Tile::kStages - 1);
    }
    cp_async_commit();
    const auto x_tile = stages + (tile % Tile::kStages * Tile::kStageNumbers + a_row * kBlockK);
    const auto w_tile = stages + (tile % Tile::kStages * Tile::kStageNumbers + (Tile::kBlockRows + b_row) * kBlockK);
    NB_UNROLL
    for (int step = 0; step < kBlockK / 16; ++step) {
      unsigned left[kRowTiles][4], right[kColTiles][4];
      NB_UNROLL
      for (int i = 0; i < kRowTiles; ++i) {
        ldmatrix_x4(left[i], x_tile + (i * 16 * kBlockK + 8 * ((2 * step + a_half) ^ a_turn)));
      }
      NB_UNROLL
      for (int j = 0; j < kColTiles; ++j) {
        ldmatrix_x4(right[j], w_tile + (j * 16 * kBlockK + 8 * ((2 * step + b_half) ^ b_turn)));
      }
      NB_UNROLL
      for (int i = 0; i < kRowTiles; ++i) {
        NB_UNROLL
        for (int j = 0; j < 2 * kColTiles; ++j) {
          const unsigned column[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
          mma_bf16(sums[i][j], left[i], column);
        }
      }
    }
  }

  const int out_row = row_begin + warp_row + lane / 4, out_col = col_begin + warp_col + 2 * (lane % 4);
  NB_UNROLL
  for (int i = 0; i < kRowTiles; ++i) {
    NB_UNROLL
    for (int j = 0; j < 2 * kColTiles; ++j) {
      store_pair(a, out_row + 16 * i, out_col + 8 * j, sums[i][j][0], sums[i][j][1]);
      store_pair(a, out_row + 16 * i + 8, out_col + 8 * j, sums[i][j][2], sums[i][j][3]);
    }
  }
}

/// What a block of the f32 kernel does; a thread computes kThreadRows x kThreadCols outputs.
template <int kRows, int kCols, int kThreadRowsOf, int kThreadColsOf>
struct FmaTile {
  static constexpr int kBlockRows = kRows;
  static constexpr int kBlockCols = kCols;
  static constexpr int kThreadRows = kThreadRowsOf;
  static constexpr int kThreadCols = kThreadColsOf;
  static constexpr int kThreads = kRows / kThreadRows * (kCols / kThreadCols);
  static_assert(kThreadRows % 4 == 0 && kThreadCols % 2 == 0);
};

using LargeFmaTile = FmaTile<64, 64, 8, 4>;
using SmallFmaTile = FmaTile<16, 32, 4, 2>;

/// Columns of K that the f32 kernel takes at a time.
inline constexpr int kFmaBlockK = 32;

/// Vectors of a tile of kRows x kFmaBlockK numbers as a thread holds them: vector i is of row slot(i) % kRows.
template <class Number, int kRows, int kThreads>
struct TileVectors {
  static constexpr int kCount = kRows * kFmaBlockK / kPerVector<Number>;
  static constexpr int kSteps = (kCount + kThreads - 1) / kThreads;
  uint4 vectors[kSteps];
  Fp16 scales[kSteps];  // of codes

  static NB_DEVICE int slot(int i) { return i * kThreads + static_cast<int>(threadIdx.x); }
};

/// Writes them into shared memory as f32, [column][row], kStride apart.
template <int kStride, class Number, int kRows, int kThreads>
NB_DEVICE void spread(const TileVectors<Number, kRows, kThreads>& held, SharedPtr<float> to) {
  using Held = TileVectors<Number, kRows, kThreads>;
  NB_UNROLL
  for (int i = 0; i < Held::kSteps; ++i) {
    const int slot = Held::slot(i);
    if (slot >= Held::kCount) break;
    NB_UNROLL
    for (int n = 0; n < kPerVector<Number>; ++n) {
      float number = element<Number>(held.vectors[i], n);
      if constexpr (kIsScaled<Number>) number *= to_float(held.scales[i]);
      to[(slot / kRows * kPerVector<Number> + n) * kStride + slot % kRows] = number;
    }
  }
}

/// Weights of WeightNumber, activations of XNumber, arithmetic in f32. grid: tiles, see place_of_block().
template <class WeightNumber, class XNumber, class Tile>
__global__ void __launch_bounds__(Tile::kThreads) gemm_f32_kernel(ops::LinearArgs a) {
  constexpr int kXStride = Tile::kBlockRows + 4, kWeightStride = Tile::kBlockCols + 4;
  constexpr int kAcross = Tile::kBlockCols / Tile::kThreadCols;
  using XVectors = TileVectors<XNumber, Tile::kBlockRows, Tile::kThreads>;
  using WeightVectors = TileVectors<WeightNumber, Tile::kBlockCols, Tile::kThreads>;
  NB_SHARED(float, x_tile, kFmaBlockK* kXStride);
  NB_SHARED(float, w_tile, kFmaBlockK* kWeightStride);

  grid_trigger();
  const int num_down = (a.x.rows + Tile::kBlockRows - 1) / Tile::kBlockRows;
  const int num_across = (a.weight.rows + Tile::kBlockCols - 1) / Tile::kBlockCols;
  const BlockPlace place = place_of_block(static_cast<int>(blockIdx.x), num_down, num_across);
  const int row_begin = place.row * Tile::kBlockRows;
  const int col_begin = place.col * Tile::kBlockCols;
  const int num_tiles = a.x.cols / kFmaBlockK;  // K is padded with zeros
  XVectors xs;
  WeightVectors ws;

  const auto fetch_weight = [&](int tile) {
    NB_UNROLL
    for (int i = 0; i < WeightVectors::kSteps; ++i) {
      const int slot = WeightVectors::slot(i);
      const int row = col_begin + slot % Tile::kBlockCols;
      const int vector = tile * (kFmaBlockK / kPerVector<WeightNumber>)+slot / Tile::kBlockCols;
      ws.vectors[i] = {};
      ws.scales[i] = {};
      if (slot < WeightVectors::kCount && row < a.weight.rows) {
        const uint4* const vectors = weight_row(a.weight, row);
        ws.vectors[i] = load_weight(vectors + 2 * vector);
        if constexpr (kIsScaled<WeightNumber>) {
          ws.scales[i] = scale_of(vectors, vectors_of<WeightNumber>(a.weight.cols), vector);
        }
      }
    }
  };
  const auto fetch_x = [&](int tile) {
    NB_UNROLL
    for (int i = 0; i < XVectors::kSteps; ++i) {
      const int slot = XVectors::slot(i);
      const int row = row_begin + slot % Tile::kBlockRows;
      const XNumber* x = reinterpret_cast<const XNumber*>(a.x.values) + static_cast<std::int64_t>(row) * a.x.cols;
      const int vector = tile * (kFmaBlockK / kPerVector<XNumber>)+slot / Tile::kBlockRows;
      xs.vectors[i] = {};
      if (slot < XVectors::kCount && row < a.x.rows) xs.vectors[i] = reinterpret_cast<const uint4*>(x)[vector];
    }
  };

  fetch_weight(0);
  grid_wait();
  fetch_x(0);
  float sums[Tile::kThreadRows][Tile::kThreadCols];
  NB_UNROLL
  for (int i = 0; i < Tile::kThreadRows; ++i) {
    NB_UNROLL
    for (int j = 0; j < Tile::kThreadCols; ++j) sums[i][j] = 0.0f;
  }
  const int row = static_cast<int>(threadIdx.x) / kAcross * Tile::kThreadRows;
  const int col = static_cast<int>(threadIdx.x) % kAcross * Tile::kThreadCols;

  for (int tile = 0; tile < num_tiles; ++tile) {
    spread<kXStride>(xs, x_tile);
    spread<kWeightStride>(ws, w_tile);
    sync_block();
    if (tile + 1 < num_tiles) {
      fetch_weight(tile + 1);
      fetch_x(tile + 1);
    }
    NB_UNROLL_BY(4)
    for (int k = 0; k < kFmaBlockK; ++k) {
      float left[Tile::kThreadRows], right[Tile::kThreadCols];
      NB_UNROLL
      for (int i = 0; i < Tile::kThreadRows; i += 4) {
        const float4 four = shared_cast<float4>(x_tile + (k * kXStride + row + i))[0];
        left[i] = four.x;
        left[i + 1] = four.y;
        left[i + 2] = four.z;
        left[i + 3] = four.w;
      }
      NB_UNROLL
      for (int j = 0; j < Tile::kThreadCols; j += 2) {
        const float2 two = shared_cast<float2>(w_tile + (k * kWeightStride + col + j))[0];
        right[j] = two.x;
        right[j + 1] = two.y;
      }
      NB_UNROLL
      for (int i = 0; i < Tile::kThreadRows; ++i) {
        NB_UNROLL
        for (int j = 0; j < Tile::kThreadCols; ++j) sums[i][j] = fmaf(left[i], right[j], sums[i][j]);
      }
    }
    sync_block();  // before the tiles are written again
  }

  NB_UNROLL
  for (int i = 0; i < Tile::kThreadRows; ++i) {
    NB_UNROLL
    for (int j = 0; j < Tile::kThreadCols; j += 2) {
      store_pair(a, row_begin + row + i, col_begin + col + j, sums[i][j], sums[i][j + 1]);
    }
  }
}

}  // namespace nb::cuda
