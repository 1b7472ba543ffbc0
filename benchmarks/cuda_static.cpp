// Answers cuda_static.py, one line for one line: what the toolkit's own cuda_occupancy.h says, and what csrc/cuda/heuristics.h chooses.
//
//   occupancy MAJOR MINOR THREADS REGISTERS STATIC_SHARED DYNAMIC_SHARED     ->  blocks per multiprocessor
//   tile BATCH HEIGHT WIDTH IN OUT KERNEL STRIDE PADDING GROUPS              ->  tile rows, columns, k blocks per stage, warps, blocks, k blocks, bytes copied at once
#include <cuda_occupancy.h>

#include <iostream>
#include <string>

#include "cuda/heuristics.h"

namespace {

using namespace probquant;
using namespace probquant::cuda;

/// Per multiprocessor, from the table "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide.
cudaOccDeviceProp properties(int major, int minor) {
  const bool large = minor == 0 && major < 12;  // 8.0, 9.0 and 10.0: the data centers' parts
  cudaOccDeviceProp p;
  p.computeMajor = major, p.computeMinor = minor, p.warpSize = 32, p.numSms = 1;
  p.maxThreadsPerBlock = 1024, p.maxThreadsPerMultiprocessor = major == 7 ? 1024 : large ? 2048 : 1536;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.sharedMemPerBlock = 48 << 10;
  p.sharedMemPerMultiprocessor = static_cast<size_t>(major == 7 ? 64 : !large ? 100 : major == 8 ? 164 : 228) << 10;
  p.reservedSharedMemPerBlock = major == 7 ? 0 : 1 << 10;
  p.sharedMemPerBlockOptin = p.sharedMemPerMultiprocessor - p.reservedSharedMemPerBlock;
  return p;
}

int blocks_per_multiprocessor(int major, int minor, int threads, int registers, int static_shared, int dynamic_shared) {
  const cudaOccDeviceProp device = properties(major, minor);
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = threads, kernel.numRegs = registers, kernel.sharedSizeBytes = static_cast<size_t>(static_shared);
  const cudaOccDeviceState state;
  cudaOccResult result;
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, static_cast<size_t>(dynamic_shared)) != CUDA_OCC_SUCCESS) return -1;
  return result.activeBlocksPerMultiprocessor;
}

template <class Tile>
void print_tile(const PackedLayout& layout, int64_t rows, int unit) {
  const int64_t blocks = (rows + Tile::kRows - 1) / Tile::kRows * ((layout.group_channels + Tile::kColumns - 1) / Tile::kColumns) * layout.groups;
  std::cout << Tile::kRows << ' ' << Tile::kColumns << ' ' << Tile::kDepth << ' ' << Tile::kWarps << ' ' << blocks << ' ' << layout.k_blocks << ' ' << unit << '\n';
}

}  // namespace

int main() {
  std::string question;
  while (std::cin >> question) {
    if (question == "occupancy") {
      int v[6];
      for (int& value : v) std::cin >> value;
      std::cout << blocks_per_multiprocessor(v[0], v[1], v[2], v[3], v[4], v[5]) << '\n';
    } else {
      Conv2dShape s;
      std::cin >> s.batch >> s.in_height >> s.in_width >> s.in_channels >> s.out_channels >> s.kernel_height >> s.stride_height >> s.padding_top >> s.groups;
      s.kernel_width = s.kernel_height, s.stride_width = s.stride_height;
      s.padding_bottom = s.padding_left = s.padding_right = s.padding_top;
      const PackedLayout layout(weight_shape(s));
      const int64_t rows = s.batch * s.out_height() * s.out_width();
      const int unit = layout.inputs % kChunk == 0 ? kChunk : layout.inputs % 8 == 0 ? 8 : 1;
      const DenseTile tile = unit < kChunk ? DenseTile::medium : choose_dense_tile(rows, layout.group_channels, layout.groups, layout.k_blocks);
      if (tile == DenseTile::large) print_tile<LargeTile>(layout, rows, unit);
      if (tile == DenseTile::medium) print_tile<MediumTile>(layout, rows, unit);
      if (tile == DenseTile::small) print_tile<SmallTile>(layout, rows, unit);
    }
  }
}
