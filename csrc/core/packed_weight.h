// The packed weight: the one CPU layout that serves every ISA. Owns the layout; pack.cpp writes it, kernels read it.
//
// Output channels come in blocks of 16 (of one group; a depthwise layer's blocks run over the groups). A block is
//   BlockHeader   sums of its weights and the epilogue's constants (zeros for channels that do not exist)
//   stream        [taps][ceil(I / 4)][16 channels][4 inputs] int8, tap = ky * kernel_width + kx, I = inputs per group
// so that 64 bytes hold 4 inputs of 16 channels: one vpdpbusd operand of AVX-512 VNNI, two of AVX2.
// Depthwise (I = 1, groups > 1, in_channels = groups) has 4 taps of one kernel column in the place of 4 inputs:
//   stream        [kernel_width][ceil(kernel_height / 4)][16 channels][4 ky]
// so that a step meets the 4 input rows of one column, interleaved once for all the outputs that touch the column.
// A group here is as many of the layer's groups as fill a block of 16 channels, with weights of 0 between them: that costs no more steps than
// blocks that are mostly empty, and a step's inputs lie together.
// AMX loads 16 steps at once, of which a segment's last may be beyond its end.
// Behind the last block comes a PackedTrailer, long enough for that. Everything is a multiple of 64 bytes.
#pragma once
#include <probquant/ops.h>

#include "numerics.h"

namespace probquant {

inline constexpr int64_t kBlockChannels = 16;
inline constexpr int64_t kStreamBytes = 64;

struct BlockHeader {
  int32_t weight_sum[kBlockChannels];
  float scale[kBlockChannels];  ///< this and the following: ChannelEpilogue of numerics.h
  float bias[kBlockChannels];
  float profile[kBlockChannels];  ///< last, since only curved activations, profiled bounds and float outputs read them
  float inverse_profile[kBlockChannels];
};
static_assert(sizeof(BlockHeader) == 320, "a block stays a multiple of 64 bytes");

struct PackedTrailer {
  ProfileSpan profile;
  float largest_scale, largest_bias;  ///< magnitudes of the headers', infinite if one is not finite (the CPU's)
  WeightShape shape;                  ///< since weights of different shapes may take the same bytes
  uint8_t padding[16 * kStreamBytes - sizeof(ProfileSpan) - 2 * sizeof(float) - sizeof(WeightShape)];
};
static_assert(sizeof(PackedTrailer) % kStreamBytes == 0, "a multiple of 64 bytes");

struct PackedLayout {
  bool depthwise;
  int64_t out_channels, own_inputs;            ///< own_inputs: of one output channel
  int64_t joined_groups;                       ///< the layer's groups that are one group of what follows
  int64_t groups, taps, inputs;                ///< inputs per group
  int64_t kernel_width, column_steps;          ///< column_steps: 64-byte steps per kernel column of a depthwise stream
  int64_t group_channels;                      ///< output channels per group, or all when depthwise
  int64_t group_blocks;                        ///< blocks per such group
  int64_t segment_taps;                        ///< taps per segment: 1, or the kernel's width
  int64_t segment_steps;                       ///< 64-byte steps per segment
  int64_t segments;                            ///< 0 when depthwise
  int64_t steps;                               ///< 64-byte steps in a block's stream
  int64_t sums_offset;                         ///< of the segments' sums in a block
  int64_t block_bytes;

  explicit PackedLayout(const WeightShape& s)
      : depthwise(is_depthwise(s)),
        out_channels(s.out_channels),
        own_inputs(s.in_channels_per_group),
        joined_groups(depthwise ? 1 : groups_of_block(s)),
        groups(s.groups / joined_groups),
        taps(s.kernel_height * s.kernel_width),
        inputs(own_inputs * joined_groups),
        kernel_width(s.kernel_width),
        column_steps((s.kernel_height + 3) / 4),
        group_channels(depthwise ? out_channels : out_channels / groups),
        group_blocks((group_channels + kBlockChannels - 1) / kBlockChannels),
        segment_taps(joins_rows(s) ? s.kernel_width : 1),
        segment_steps((segment_taps * inputs + 3) / 4),
        segments(depthwise ? 0 : taps / segment_taps),
        steps(depthwise ? kernel_width * column_steps : segments * segment_steps),
        sums_offset(static_cast<int64_t>(sizeof(BlockHeader)) + steps * kStreamBytes),
        block_bytes(sums_offset + (segments > 1 ? segments * kStreamBytes : 0)) {}

  int64_t columns() const { return trailer_offset() / block_bytes * kBlockChannels; }  ///< channels, those included that do not exist
  int64_t trailer_offset() const { return (depthwise ? 1 : groups) * group_blocks * block_bytes; }
  int64_t bytes() const { return trailer_offset() + static_cast<int64_t>(sizeof(PackedTrailer)); }

  /// Byte offset of the block that holds output channel o.
  int64_t block_offset(int64_t o) const {
    return ((o / group_channels) * group_blocks + (o % group_channels) / kBlockChannels) * block_bytes;
  }
  /// Whether whole blocks make up a group, whose inputs are whole steps: kernels may take neighbouring groups together.
  bool whole_groups() const { return !depthwise && groups * joined_groups > 1 && group_channels % kBlockChannels == 0 && inputs % 4 == 0; }
  /// Lane of channel o in its block.
  int64_t lane(int64_t o) const { return (o % group_channels) % kBlockChannels; }
  /// The first of channel o's own inputs, among those of its group.
  int64_t first_input(int64_t o) const { return o % group_channels * joined_groups / group_channels * own_inputs; }
  /// Byte offset in a block of the weight at (lane, tap, input).
  int64_t weight_offset(int64_t lane, int64_t tap, int64_t input) const {
    const int64_t at = depthwise ? tap / kernel_width : tap % segment_taps * inputs + input;
    const int64_t step = (depthwise ? tap % kernel_width * column_steps : tap / segment_taps * segment_steps) + at / 4;
    return static_cast<int64_t>(sizeof(BlockHeader)) + step * kStreamBytes + lane * 4 + at % 4;
  }

 private:
  /// As many groups as fill a block.
  static int64_t groups_of_block(const WeightShape& s) {
    int64_t count = kBlockChannels * s.groups / s.out_channels;
    while (count > 1 && (count > s.groups || s.groups % count != 0)) --count;
    return count > 1 ? count : 1;
  }
  static bool joins_rows(const WeightShape& s) {
    const int64_t row = s.kernel_width * s.in_channels_per_group;
    return s.groups == 1 && s.kernel_width > 1 && s.in_channels_per_group < 16 && s.in_channels_per_group % 4 != 0 && row <= 128;
  }
};

}  // namespace probquant
