// How a tensor [samples, positions, channels] is shared out among thread blocks: the one heuristic of the memory-bound
// kernels. A block belongs to one sample, a tile of channels and a part of the positions. Its threads form
// position_lanes x channel_lanes; a thread keeps one channel and walks over its part's positions in steps of
// position_lanes, so neighbouring threads touch neighbouring channels (whole sectors in NHWC), and a channel's sums stay
// in registers. Results never depend on the choice: minima, maxima and integer sums have no order.
#pragma once
#include "../core/numerics.h"

namespace probquant::cuda {

inline constexpr int kMaxThreads = 256;

struct Partition {
  int64_t samples, positions, channels;
  int32_t channel_lanes, position_lanes;  ///< channel_lanes * position_lanes <= threads; threads beyond idle
  int32_t threads;                        ///< per block: whole warps
  int32_t channel_tiles;                  ///< of channel_lanes channels
  int64_t position_parts;                 ///< of part_positions positions
  int64_t part_positions;

  PROBQUANT_HOST_DEVICE constexpr int64_t blocks_per_sample() const { return channel_tiles * position_parts; }
  constexpr int64_t blocks() const { return samples * blocks_per_sample(); }
};

/// Aims at kWantedBlocks blocks: enough to fill 132 multiprocessors with 8 blocks each. A thread gets at least
/// kMinPerThread values, so that its setup and the block's reduction stay small beside its work, and no more than
/// kMaxPerThread, whose squares still sum up in 32 bits. In between, a sample has at most kMaxBlocksPerSample blocks: each of
/// them reads the partial ranges of all. Where channels have stats, the last block adds up those of every part (parts.cuh): 64 parts, if
/// a part's positions then sum up in 32 bits.
inline constexpr int64_t kWantedBlocks = 1056, kMinPerThread = 4, kMaxPerThread = 65536, kMaxBlocksPerSample = 1024, kMaxChannelParts = 64;
static_assert(kMaxPerThread * 255 * 255 < int64_t{1} << 32, "a thread, and a channel's part, sum squares of codes in 32 bits");

/// Every size may be 0; a sample has at least one block, which writes its parameters.
constexpr Partition make_partition(int64_t samples, int64_t positions, int64_t channels, bool channel_stats) {
  const auto at_least_1 = [](int64_t v) { return v > 1 ? v : 1; };
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t tiles = at_least_1(divide_up(channels, kMaxThreads)), lanes = at_least_1(divide_up(channels, tiles));
  const int64_t rows = at_least_1(smaller(kMaxThreads / lanes, positions));
  const int64_t wanted_parts = at_least_1(kWantedBlocks / at_least_1(samples * tiles));
  const int64_t most_parts = at_least_1(smaller(divide_up(positions, rows * kMinPerThread), channel_stats ? kMaxChannelParts : kMaxBlocksPerSample / tiles));
  const int64_t part_positions = smaller(at_least_1(divide_up(positions, smaller(wanted_parts, most_parts))), (channel_stats ? 1 : rows) * kMaxPerThread);
  Partition p{};
  p.samples = samples, p.positions = positions, p.channels = channels;
  p.channel_lanes = static_cast<int32_t>(lanes);
  p.position_lanes = static_cast<int32_t>(rows);
  p.threads = static_cast<int32_t>(divide_up(lanes * rows, 32) * 32);
  p.channel_tiles = static_cast<int32_t>(tiles);
  p.position_parts = at_least_1(divide_up(positions, part_positions));
  p.part_positions = part_positions;
  return p;
}

}  // namespace probquant::cuda
