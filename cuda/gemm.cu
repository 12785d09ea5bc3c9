#include "cuda/gemm.h"

#include "cuda/gemm.cuh"
#include "cuda/launch.cuh"

namespace nb::cuda {
namespace {

int tiles(int count, int size) { return (count + size - 1) / size; }

template <class Tile>
unsigned blocks(const ops::LinearArgs& a) {
  return static_cast<unsigned>(tiles(a.x.rows, Tile::kBlockRows) * tiles(a.weight.rows, Tile::kBlockCols));
}

template <class Number, class Tile>
void launch_bf16(const ops::LinearArgs& a) {
  launch({.name = "gemm_bf16_kernel",
          .grid_x = blocks<Tile>(a),
          .threads = Tile::kThreads,
          .dynamic_shared_bytes = Tile::kSharedBytes},
         gemm_bf16_kernel<Number, Tile>, a);
}

template <class Number>
void launch_bf16(const ops::LinearArgs& a, GemmTile tile) {
  if (tile == GemmTile::large) {
    launch_bf16<Number, LargeTile>(a);
  } else if (tile == GemmTile::medium) {
    launch_bf16<Number, MediumTile>(a);
  } else if (tile == GemmTile::wide) {
    launch_bf16<Number, WideTile>(a);
  } else {
    launch_bf16<Number, NarrowTile>(a);
  }
}

template <class WeightNumber, class XNumber, class Tile>
void launch_f32(const ops::LinearArgs& a) {
  launch({.name = "gemm_f32_kernel", .grid_x = blocks<Tile>(a), .threads = Tile::kThreads},
         gemm_f32_kernel<WeightNumber, XNumber, Tile>, a);
}

template <class XNumber, class Tile>
void launch_f32(const ops::LinearArgs& a) {
  if (a.weight.format == quant::Format::f32) {
    launch_f32<float, XNumber, Tile>(a);
  } else if (a.weight.format == quant::Format::f16) {
    launch_f32<Fp16, XNumber, Tile>(a);
  } else if constexpr (sizeof(XNumber) == sizeof(float)) {
    if (a.weight.format == quant::Format::q8_0) {
      launch_f32<SignedByte, XNumber, Tile>(a);
    } else {
      launch_f32<Bf16, XNumber, Tile>(a);
    }
  }
}

}  // namespace

GemmTile choose_gemm_tile(int rows, int cols) {
  constexpr int kEnoughBlocks = 128;  // for the multiprocessors of a large GPU
  const auto fits = [&](int tile_rows, int tile_cols) {
    return rows > tile_rows / 2 && tiles(rows, tile_rows) * tiles(cols, tile_cols) >= kEnoughBlocks;
  };
  if (fits(LargeTile::kBlockRows, LargeTile::kBlockCols)) return GemmTile::large;
  if (fits(MediumTile::kBlockRows, MediumTile::kBlockCols)) return GemmTile::medium;
  const int wide_blocks = tiles(rows, WideTile::kBlockRows) * tiles(cols, WideTile::kBlockCols);
  return wide_blocks >= kEnoughBlocks ? GemmTile::wide : GemmTile::narrow;
}

void gemm(const ops::LinearArgs& a, GemmTile tile) {
  const bool is_bf16 = a.x.type == ops::ActType::bf16;
  if (is_bf16 && a.weight.format == quant::Format::bf16) return launch_bf16<Bf16>(a, tile);
  if (is_bf16 && a.weight.format == quant::Format::q8_0) return launch_bf16<SignedByte>(a, tile);
  const bool is_large = tile == GemmTile::large || tile == GemmTile::medium;
  if (is_large) {
    is_bf16 ? launch_f32<Bf16, LargeFmaTile>(a) : launch_f32<float, LargeFmaTile>(a);
  } else {
    is_bf16 ? launch_f32<Bf16, SmallFmaTile>(a) : launch_f32<float, SmallFmaTile>(a);
  }
}

void gemm(const ops::LinearArgs& a) { gemm(a, choose_gemm_tile(a.x.rows, a.weight.rows)); }

}  // namespace nb::cuda
