// Depthwise convolution, AVX-512 VNNI.
//
// A group is 64 channels at a time, one zmm of bytes. For every input column the rows that one or two output rows need
// are interleaved in quads, byte by byte, so that a dword holds 4 rows of one channel: 4 loads, 8 unpacks, 4 stores of
// 64 bytes into a strip in L1. The unpacks work within 128-bit lanes and leave the channels in "part order": part p,
// dword 4 j + i is channel 16 j + 4 p + i; the packs at the end undo it. A strip's column is then met by kernel_width
// output columns and, at stride 1, by two output rows (whose weights are shifted one row down within the quads).
//
// A group with one or two blocks of 16 channels left would waste 3/4 or 1/2 of the vector: it fills the other lanes with
// the same channels of other output rows ("slots").
//
// Register tile: 2 rows x 2 columns or 1 row x 4 columns, times 4 parts: 16 accumulators. A step (one quad of one kernel
// column) needs 4 x columns strip loads and 4 x rows weights, for 16 vpdpbusd; 8 registers hold them in flight. The
// epilogue keeps 4 of moments and clip counts and reads its constants (two floats per part) from L1.
// L1: a strip is at most kStripQuads x 256 bytes = 16 KB; the weights of a group 2 x steps x 256 bytes (1.5 KB for 3x3).
#include "../depthwise_geometry.h"
#include "epilogue.h"

namespace probquant {
namespace {

constexpr int64_t kVector = 64, kParts = 4, kQuadBytes = kParts * kVector;
constexpr int64_t kMaxSteps = 32;    // of the stream; 9x9 has 27
constexpr int64_t kStripQuads = 64;  // interleaved (column, quad) pairs held at once

struct alignas(64) Zeros {
  uint8_t bytes[kQuadBytes];
};
constexpr Zeros kZeros{};

/// Part order to the natural order of dwords, and back: lane j of vector p and lane p of vector j change places.
inline void transpose_lanes(__m512i (&v)[kParts]) {
  const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
  const __m512i c = _mm512_shuffle_i32x4(v[2], v[3], 0x44), d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  v[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
  v[2] = _mm512_shuffle_i32x4(b, d, 0x88);
  v[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

/// Up to 64 channels [channel, channel + channels) with their weights in part order.
struct Group {
  int64_t channel, channels;
  int slots;              ///< 1, 2 or 4 output rows (or pairs of them) share a vector
  int64_t slot_channels;  ///< 64 / slots
  __mmask64 slot_mask;    ///< bytes of slot 0 that are channels
  alignas(64) int32_t weight_sum[kParts][16];
  alignas(64) float scale[kParts][16];
  alignas(64) float bias[kParts][16];
  alignas(64) int8_t weights[2][kMaxSteps * kQuadBytes];  ///< of the first output row of a pair, and of the second

  Group(const LayerProblem& p, int64_t first, int64_t end) : channel(first), channels(end - first < kVector ? end - first : kVector) {
    const int64_t blocks = (channels + kBlockChannels - 1) / kBlockChannels;
    slots = blocks == 1 ? 4 : blocks == 2 ? 2 : 1;
    slot_channels = kVector / slots;
    slot_mask = first_lanes64(channels);
    const uint8_t* lane[4];
    for (int64_t j = 0; j < 4; ++j)
      lane[j] = blocks == 3 && j == 3 ? nullptr : p.packed_weight + (first / kBlockChannels + j % blocks) * p.layout.block_bytes;
    const auto gather = [&](int64_t offset, void* out) {
      __m512i v[kParts];
      for (int j = 0; j < 4; ++j) v[j] = lane[j] ? _mm512_loadu_si512(lane[j] + offset) : _mm512_setzero_si512();
      transpose_lanes(v);
      for (int j = 0; j < 4; ++j) _mm512_store_si512(static_cast<char*>(out) + j * kVector, v[j]);
    };
    gather(offsetof(BlockHeader, weight_sum), weight_sum);
    gather(offsetof(BlockHeader, scale), scale);
    gather(offsetof(BlockHeader, bias), bias);
    const int64_t steps = p.layout.steps, quads = p.layout.column_steps;
    for (int64_t step = 0; step < steps; ++step) {
      int8_t* first_row = weights[0] + step * kQuadBytes;
      gather(static_cast<int64_t>(sizeof(BlockHeader)) + step * kStreamBytes, first_row);
      for (int64_t i = 0; i < kParts; ++i) {
        __m512i v = _mm512_slli_epi32(_mm512_load_si512(first_row + i * kVector), 8);
        if (step % quads) v = _mm512_or_si512(v, _mm512_srli_epi32(_mm512_load_si512(first_row - kQuadBytes + i * kVector), 24));
        _mm512_store_si512(weights[1] + step * kQuadBytes + i * kVector, v);
      }
    }
  }
};

/// Where a tile's outputs go: offset of slot 0, first row, first column, and the distances.
struct Place {
  int64_t at, row_step, slot_step, column_step;
  __mmask64 rows[2];  ///< bytes that exist, per row of a pair
};

inline __m512i load_slots(const uint8_t* from, int64_t slot_step, const Group& g, __mmask64 existing) {
  if (g.slots == 1) return _mm512_maskz_loadu_epi8(existing, from);
  __m512i v = _mm512_setzero_si512();
  for (int slot = 0; slot < g.slots; ++slot) {
    const int64_t lane = slot * g.slot_channels;
    const __mmask64 mask = existing >> lane & g.slot_mask;
    if (mask == 0) continue;
    const __m512i part = _mm512_maskz_loadu_epi8(mask, from + slot * slot_step);
    v = _mm512_or_si512(v, slot == 0   ? part
                           : lane == 16 ? _mm512_shuffle_i32x4(_mm512_setzero_si512(), part, 0) , part
                                        : part);
  }
  return v;
}
