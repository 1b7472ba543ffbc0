// Register tiles of convolutions with narrow groups, AVX-512 VNNI. Included by dense.cpp. Internal linkage.
//
// A block of 16 outputs reads `inputs` bytes of its own, so that blocks of different groups share no activations: a product needs a load of them,
// and two of each start per clock. The tile is 8 rows, whose pointers stay in registers, x 2 sums: 16 chains of products, where 10 fill both units
// (5 clocks of latency), on 16 loads of activations (8 of groups of 8) and 2 of weights: 9 (8) clocks per 16 products.
//   Groups of 4 inputs and outputs: 4 of them are a block, and packed as one group of 16, so that 3 of 4 weights are 0. vbroadcasti32x4 puts
// the block's 16 inputs into every 128 bits: dword k of each is what group k reads, and lane 4 l + k the place of its output l. The lanes
// of a step's own weights, brought there once per call (spread_weights), take 1 product per tap instead of 4. One permutation of the sums puts
// outputs in order.
//   Groups of 8: 2 are a block; dword k is half k % 2 of what group k / 2 reads. Two sums, of outputs l and 4 + l of each group, take a product each per
// tap, again from one load; halves of a sum lie in neighbouring lanes and are added at the end: 2 products per tap instead of 4.
//   Others take products with a dword of their inputs in all lanes, as dense layers do: groups of 16 or more have no zeros to leave out.
// Bound of a 3x3 layer per row and block, in clocks: groups of 4: 5, of 8: 9, of 16: 20, of 32: 41.
#pragma once
#include "../dense_driver.h"
#include "epilogue.h"

namespace probquant {
namespace {

/// What lanes of a product read.
enum class GroupLanes { same, of_4, of_8 };
constexpr int kGroupRows = 8;

inline GroupLanes lanes_of(const PackedLayout& layout) {
  if (layout.joined_groups == 4 && layout.own_inputs == 4) return GroupLanes::of_4;
  return layout.joined_groups == 2 && layout.own_inputs == 8 ? GroupLanes::of_8 : GroupLanes::same;
}

/// Lane 4 l + k is output 4 k + l, and the other way round.
alignas(64) constexpr int32_t kSpreadOrder[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
/// The same of the lanes beside those.
alignas(64) constexpr int32_t kNeighbourOrder[16] = {1, 5, 9, 13, 0, 4, 8, 12, 3, 7, 11, 15, 2, 6, 10, 14};
/// Lane 4 l + k is output l of the block's group k / 2, of 8.
alignas(64) constexpr int32_t kHalvesOrder[16] = {0, 0, 8, 8, 1, 1, 9, 9, 2, 2, 10, 10, 3, 3, 11, 11};
constexpr __mmask16 kOddLanes = 0xaaaa;

struct alignas(64) SpreadStep {
  uint8_t weights[kStreamBytes];
};

/// Brings the weights of a block's stream, 4 steps per tap with zeros between groups, to the lanes that need them: [taps], of groups of 8 for each sum.
inline void spread_weights(GroupLanes lanes, const uint8_t* stream, int64_t taps, SpreadStep* to) {
  for (int64_t tap = 0; tap < taps; ++tap, stream += 4 * kStreamBytes, ++to) {
    __m512i step[4];
    for (int i = 0; i < 4; ++i) step[i] = _mm512_loadu_si512(stream + i * kStreamBytes);
    const __m512i first = _mm512_or_si512(step[0], step[2]), second = _mm512_or_si512(step[1], step[3]);
    if (lanes == GroupLanes::of_4) {
      _mm512_store_si512(to, _mm512_permutexvar_epi32(_mm512_load_si512(kSpreadOrder), _mm512_or_si512(first, second)));
      continue;
    }
    for (int sum = 0; sum < 2; ++sum) {
      const __m512i order = _mm512_add_epi32(_mm512_load_si512(kHalvesOrder), _mm512_set1_epi32(4 * sum));
      const __m512i halves = _mm512_mask_mov_epi32(_mm512_permutexvar_epi32(order, first), kOddLanes, _mm512_permutexvar_epi32(order, second));
      _mm512_store_si512(to + sum * taps, halves);
    }
  }
}

/// What a register tile needs: two sums of each row, the second being the first again where there is one.
struct GroupInput {
  const Segment* segments;
  int64_t segment_count;
  const uint8_t* const* rows;     ///< as TileInput's, from the tile's first row on
  int64_t row_step;
  int64_t x_offset, x_second;     ///< from the rows' pointers to the first block's inputs, and from there to the second's
  const uint8_t* weights;         ///< the first sum's, of the first tap
  int64_t weights_second;         ///< from there to the second's
  const uint8_t* weight_sums[2];  ///< int32 [16], of all outputs of a block
  const int32_t* zero_points;     ///< as TileInput's
  bool one_zero_point;
  const int32_t* partial;         ///< null, or what is added instead of the zero points' correction
  int32_t* out;                   ///< this and `partial`: `row_sums` from row to row
  int64_t row_sums;
};

/// Computes the sums of kRows rows for kBlocks blocks.
template <GroupLanes kLanes, int kBlocks, int kRows>
__attribute__((noinline)) void multiply_groups(const GroupInput& of) {
  constexpr bool kSame = kLanes == GroupLanes::same, kHalves = kLanes == GroupLanes::of_8;
  constexpr int kSums = kHalves ? 2 : kBlocks;
  constexpr int64_t kTaken = kSame ? 4 : 16;  // bytes of x that a product takes
  __m512i acc[kRows][kSums];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kSums; ++j) acc[i][j] = _mm512_setzero_si512();
  const uint8_t* x[kRows];
  for (int64_t s = 0; s < of.segment_count; ++s) {
    const GroupInput* again = &of;  // read anew for every segment, rather than kept where the pointers should be
    asm("" : "+r"(again));
    const Segment& segment = again->segments[s];
    if (s == 0 || again->row_step != 0) {
      const uint8_t* const* rows = again->rows + s * again->row_step;
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) x[i] = rows[i] + again->x_offset;
    }
    const uint8_t* w = again->weights + segment.weight_offset / (kSame ? 1 : 4);
    const uint8_t* w_second = w + again->weights_second;
    int64_t at = segment.x_offset, at_second = at + again->x_second;
    const int64_t end = at + 4 * segment.steps;
    for (; at < end; at += kTaken, at_second += kTaken, w += kStreamBytes, w_second += kStreamBytes) {
      const __m512i weights[2] = {_mm512_loadu_si512(w), kSums > 1 ? _mm512_loadu_si512(w_second) : _mm512_setzero_si512()};
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        __m512i v;
#pragma GCC unroll 2
        for (int j = 0; j < kSums; ++j) {
          const uint8_t* const from = x[i] + (j == 0 ? at : at_second);
          if (kSame) {
            int32_t four;
            __builtin_memcpy(&four, from, 4);
            v = _mm512_set1_epi32(four);
          } else if (j == 0 || !kHalves) {
            v = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
          }
          dot(acc[i][j], v, weights[j]);
        }
      }
    }
  }
  const GroupInput* again = &of;
  asm("" : "+r"(again));
  const int64_t row_sums = again->row_sums;
  const bool corrected = again->partial != nullptr, each = !again->one_zero_point;
#pragma GCC unroll 2
  for (int j = 0; j < kBlocks; ++j) {
    const __m512i sums = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(again->weight_sums[j]));
    __m512i start = _mm512_mullo_epi32(sums, _mm512_set1_epi32(again->zero_points[0]));
    int32_t* out = again->out + j * kBlockChannels;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i, out += row_sums) {
      if (__builtin_expect(corrected, false)) start = _mm512_loadu_si512(again->partial + i * row_sums + j * kBlockChannels);
      else if (__builtin_expect(each, false)) start = _mm512_mullo_epi32(sums, _mm512_set1_epi32(again->zero_points[i]));
      __m512i sum = acc[i][j];
      if (kHalves) {
        const __m512i second = acc[i][kSums - 1], there = _mm512_mask_mov_epi32(sum, kOddLanes, second), beside = _mm512_mask_mov_epi32(second, kOddLanes, sum);
        sum = _mm512_add_epi32(_mm512_permutexvar_epi32(_mm512_load_si512(kSpreadOrder), there),
                               _mm512_permutexvar_epi32(_mm512_load_si512(kNeighbourOrder), beside));
      } else if (!kSame) {
        sum = _mm512_permutexvar_epi32(_mm512_load_si512(kSpreadOrder), sum);
      }
      _mm512_storeu_si512(out, _mm512_add_epi32(sum, start));
    }
  }
}

using GroupTile = void (*)(const GroupInput&);
#define PROBQUANT_TILES(lanes, blocks)                                                                                              \
  {multiply_groups<lanes, blocks, 1>, multiply_groups<lanes, blocks, 2>, multiply_groups<lanes, blocks, 3>, multiply_groups<lanes, blocks, 4>, \
   multiply_groups<lanes, blocks, 5>, multiply_groups<lanes, blocks, 6>, multiply_groups<lanes, blocks, 7>, multiply_groups<lanes, blocks, 8>}
/// [lanes][blocks - 1][rows - 1]
constexpr GroupTile kGroupTiles[3][2][kGroupRows] = {{PROBQUANT_TILES(GroupLanes::same, 1), PROBQUANT_TILES(GroupLanes::same, 2)},
                                                     {PROBQUANT_TILES(GroupLanes::of_4, 1), PROBQUANT_TILES(GroupLanes::of_4, 2)},
                                                     {PROBQUANT_TILES(GroupLanes::of_8, 1), {}}};
#undef PROBQUANT_TILES

}  // namespace
}  // namespace probquant
