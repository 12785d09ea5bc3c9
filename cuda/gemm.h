// The matrix product of many rows: out = x W^T (+ bias) (+ out), for prompts and large batches.
//
// A row's result does not depend on the number of rows or on the tile: every kernel adds up the columns of a row in
// ascending order in one chain, whatever the shape of its tiles. Not for few rows (gemv.cuh), though any number works.
#pragma once

#include <cstdint>

#include "ops/args.h"

namespace nb::cuda {

/// Shapes of what a block computes, from the largest to the smallest. All give the same bits.
enum class GemmTile : std::uint8_t {
  large,   ///< 128 x 128 outputs
  medium,  ///< 64 x 64
  wide,    ///< 32 x 64: few rows
  narrow,  ///< 32 x 16: few rows of a narrow matrix
};

/// The largest tile that leaves work for every multiprocessor and is at least half full of rows.
GemmTile choose_gemm_tile(int rows, int cols);

/// Starts the product. Weights and activations both bf16 are multiplied by tensor cores; anything else, f32, bf16 or
/// f16, with fused multiply-adds in f32.
void gemm(const ops::LinearArgs& args);

/// The same with a tile of choice.
void gemm(const ops::LinearArgs& args, GemmTile tile);

}  // namespace nb::cuda
