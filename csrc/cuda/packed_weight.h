// The packed weight on CUDA. Owns the layout; pack.cu writes it, dense.cu and depthwise.cu read it.
//
// Output channels come in blocks of 64 of one group. A block is
//   BlockHeader   sums of its weights and the epilogue's constants (zeros for channels that do not exist)
//   stream        [k_blocks][64 channels][64 bytes of K] int8, swizzled (swizzle() below)
// A k block is the image of a shared-memory tile: a kernel copies it as it lies. K is the concatenation of segments, each
// padded with zeros to 16 bytes, all of them to 64. A segment is one tap with the group's inputs; where these are no multiple
// of 16 and one group has them all, it is a whole kernel row, so that an image with 3 channels pads a 7x7 kernel to
// 7 x 32 bytes, not to 49 x 16.
// Depthwise (I = 1, groups > 1) blocks run over all output channels, and their stream is
//   stream        [kernel_width][ceil(kernel_height / 4)][64 channels][4 ky] int8
// so that one dp4a meets 4 taps of a kernel column. Behind the last block comes a PackedTrailer. Everything is a multiple of 64
// bytes; the start must be aligned to 16.
#pragma once
#include <probquant/ops.h>

#include "../core/numerics.h"

namespace probquant::cuda {

inline constexpr int kBlockChannels = 64;
inline constexpr int kBlockK = 64;                          ///< bytes of K in a k block
inline constexpr int kTileBytes = kBlockChannels * kBlockK;  ///< of a k block
inline constexpr int kChunk = 16;                           ///< bytes of a cp.async, of an ldmatrix row and of a bank group

struct BlockHeader {
  int32_t weight_sum[kBlockChannels];
  float scale[kBlockChannels];  ///< this and the following: ChannelEpilogue of numerics.h
  float bias[kBlockChannels];
  float profile[kBlockChannels];
  float inverse_profile[kBlockChannels];
};
static_assert(sizeof(BlockHeader) % 64 == 0, "a block stays a multiple of 64 bytes");

struct PackedTrailer {
  ProfileSpan profile;
  uint8_t padding[64 - sizeof(ProfileSpan)];
};

/// Byte offset of chunk `chunk` (0..3) of row `row` in a tile [rows][64 bytes]. Two rows share a line of the 32 banks; the exclusive
/// or spreads the same chunk of 8 neighbouring rows, which ldmatrix reads at once, over all 8 bank groups.
PROBQUANT_HOST_DEVICE constexpr int32_t swizzle(int32_t row, int32_t chunk) { return row * kBlockK + ((chunk ^ (row >> 1 & 3)) * kChunk); }

struct PackedLayout {
  bool depthwise;
  int64_t out_channels, groups, kernel_height, kernel_width, inputs;  ///< inputs per group
  int64_t group_channels;                                             ///< output channels per group of blocks: O / groups, or O when depthwise
  int64_t group_blocks;                                               ///< blocks per such group
  bool joined_rows;                                                   ///< a segment is a kernel row
  int64_t row_segments;                                               ///< segments per kernel row
  int64_t segment_inputs, segment_bytes;                              ///< weights of a segment, and with its padding
  int64_t k_blocks;                                                   ///< 0 when depthwise
  int64_t column_steps;                                               ///< 4-byte steps per kernel column of a depthwise stream
  int64_t block_bytes;

  explicit constexpr PackedLayout(const WeightShape& s)
      : depthwise(is_depthwise(s)),
        out_channels(s.out_channels),
        groups(s.groups),
        kernel_height(s.kernel_height),
        kernel_width(s.kernel_width),
        inputs(s.in_channels_per_group),
        group_channels(depthwise ? s.out_channels : s.out_channels / s.groups),
        group_blocks(divide_up(group_channels, kBlockChannels)),
        joined_rows(s.groups == 1 && s.kernel_width > 1 && inputs % kChunk != 0),
        row_segments(joined_rows ? 1 : kernel_width),
        segment_inputs(joined_rows ? kernel_width * inputs : inputs),
        segment_bytes(divide_up(segment_inputs, kChunk) * kChunk),
        k_blocks(depthwise ? 0 : divide_up(kernel_height * row_segments * segment_bytes, kBlockK)),
        column_steps(divide_up(kernel_height, 4)),
        block_bytes(static_cast<int64_t>(sizeof(BlockHeader)) + (depthwise ? kernel_width * column_steps * 4 * kBlockChannels : k_blocks * kTileBytes)) {}

  constexpr int64_t blocks() const { return (depthwise ? 1 : groups) * group_blocks; }
  constexpr int64_t trailer_offset() const { return blocks() * block_bytes; }
  constexpr int64_t bytes() const { return trailer_offset() + static_cast<int64_t>(sizeof(PackedTrailer)); }

  /// Byte offset behind a block's header of the weight at (channel in the block, ky, kx, input).
  PROBQUANT_HOST_DEVICE int64_t weight_offset(int64_t channel, int64_t ky, int64_t kx, int64_t input) const {
    if (depthwise) return ((kx * column_steps + ky / 4) * kBlockChannels + channel) * 4 + ky % 4;
    const int64_t k = joined_rows ? ky * segment_bytes + kx * inputs + input : (ky * kernel_width + kx) * segment_bytes + input;
    return k / kBlockK * kTileBytes + swizzle(static_cast<int32_t>(channel), static_cast<int32_t>(k % kBlockK / kChunk)) + k % kChunk;
  }

 private:
  static constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
};

}  // namespace probquant::cuda
