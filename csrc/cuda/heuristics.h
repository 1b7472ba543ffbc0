// Which tile a dense layer runs with: the only place that decides. A kernel never picks its own tile, and results never depend
// on the choice.
#pragma once
#include "packed_weight.h"

namespace probquant::cuda {

/// A block's share of the output and of K, and how its warps divide it.
template <int rows, int columns, int warp_rows, int warp_columns, int depth, int slices, int stages, int blocks>
struct Tile {
  static constexpr int kRows = rows, kColumns = columns;              ///< output positions and channels of a block
  static constexpr int kWarpRows = warp_rows, kWarpColumns = warp_columns;
  static constexpr int kDepth = depth;                                ///< k blocks of a stage
  static constexpr int kSlices = slices;                              ///< groups of warps that share them out and are summed up at the end
  static constexpr int kStages = stages;                              ///< of the copy pipeline
  static constexpr int kBlocks = blocks;                              ///< per multiprocessor, at least: the register budget
  static constexpr int kWarps = rows / warp_rows * (columns / warp_columns) * slices, kThreads = 32 * kWarps;
  static constexpr int kStageXBytes = depth * rows * kBlockK, kStageBytes = kStageXBytes + depth * columns * kBlockK;
  static constexpr int kSharedBytes = stages * kStageBytes;
};

// All of them have 128 threads and 48 KiB of shared memory, which every architecture gives without being asked. On an sm_86 or
// sm_89 (100 KiB) 2 blocks run per multiprocessor, on an A100 3, on an H100 4, where registers allow.
//
// Large: a warp's 64 x 64 outputs take 128 registers and read 8 KiB of shared memory for 64 mma, half of what the tensor
// cores' time allows. Two blocks, so that one's epilogue runs under the other's main loop.
using LargeTile = Tile<128, 128, 64, 64, 1, 1, 3, 2>;
// Medium: 32 x 32 outputs per warp, for layers too small to fill the device with large tiles. Stages of two k blocks, so that
// the same address arithmetic serves twice the mma.
using MediumTile = Tile<64, 64, 32, 32, 2, 1, 3, 3>;
// Small: few outputs and a long K. The 4 warps share the tile and split K.
using SmallTile = Tile<32, 64, 32, 64, 4, 4, 2, 2>;

/// Channels that are copied in smaller units than chunks (dense.cu) run with the medium tile whatever is chosen.
enum class DenseTile { large, medium, small };

constexpr DenseTile choose_dense_tile(int64_t rows, int64_t group_channels, int64_t groups, int64_t k_blocks) {
  // One wave of one block per multiprocessor of an H100 (132), a little more than one of an A100 (108). A large tile does
  // twice the work per byte of shared memory, but half a wave of them loses that again.
  constexpr int64_t kWave = 132;
  const auto tiles = [&](int64_t tile_rows, int64_t tile_columns) {
    return (rows + tile_rows - 1) / tile_rows * ((group_channels + tile_columns - 1) / tile_columns) * groups;
  };
  if (group_channels > MediumTile::kColumns && tiles(LargeTile::kRows, LargeTile::kColumns) >= kWave) return DenseTile::large;
  // Splitting K pays when its warps would otherwise sit on multiprocessors that have nothing else, and each gets 2 stages.
  if (tiles(MediumTile::kRows, MediumTile::kColumns) < kWave && k_blocks >= 2 * SmallTile::kDepth) return DenseTile::small;
  return DenseTile::medium;
}

}  // namespace probquant::cuda
