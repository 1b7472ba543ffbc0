// Register tiles of dense layers, AVX2: their sums, which the direct and the Winograd kernels share, and the latter's products of 16-bit
// inputs and weights. These weights lie as [inputs / 2][16 channels][2 inputs], so that vpmaddwd takes two inputs of 8 channels at once.
//
// A tile of 6 rows x 16 channels has 12 accumulators; 2 vectors of weights, an input and a product complete the registers.
// Two inputs are 8 loads, 12 vpmaddwd and 12 vpaddd: 8 clocks where 3 ports do these, 2 of them products. The weights have to be in
// registers for that: as memory operands of 3 rows x 32 channels, which take fewer instructions, they cost 14 % (Golden Cove).
#pragma once
#include "epilogue.h"

namespace probquant {
namespace {

/// Of 4 words of channels 0-3 and 4-7: the first two of 8 channels, and their last two.
inline void separate_pairs(__m256i low, __m256i high, __m256i (&pairs)[2]) {
  const __m256 a = _mm256_castsi256_ps(low), b = _mm256_castsi256_ps(high);
  pairs[0] = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), 0xd8);
  pairs[1] = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)), 0xd8);
}

/// Sums of kRows rows x 16 channels.
template <int kRows>
struct Accumulators {
  static constexpr int kVectors = 2;
  static constexpr int64_t kPairWords = kVectors * 16;  ///< weights of two inputs

  __m256i sum[kRows][kVectors];

  __attribute__((always_inline)) void clear() {
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm256_setzero_si256();
  }
  /// From and to memory, [row][stride].
  __attribute__((always_inline)) void load_from(const int32_t* at, int64_t stride) {
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] = load(at + i * stride + j * 8);
  }
  __attribute__((always_inline)) void store_to(int32_t* at, int64_t stride) const {
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) store(at + i * stride + j * 8, sum[i][j]);
  }

  /// Adds the products of 4 * steps inputs; rows of x are x_stride words apart.
  __attribute__((always_inline)) void add_words(const int16_t* x, int64_t x_stride, const int16_t* w, int64_t steps) {
    const int16_t* row[kRows];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) row[i] = x + i * x_stride;
    for (int64_t at = 0; at < 4 * steps; at += 4, w += 2 * kPairWords) {
#pragma GCC unroll 2
      for (int pair = 0; pair < 2; ++pair) {
        __m256i weight[kVectors];
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) {
          weight[j] = load(w + pair * kPairWords + j * 16);
          asm("" : "+x"(weight[j]));  // or they would be memory operands of every row
        }
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i) {
          int32_t two;
          __builtin_memcpy(&two, row[i] + at + 2 * pair, 4);
          const __m256i v = _mm256_set1_epi32(two);
#pragma GCC unroll 2
          for (int j = 0; j < kVectors; ++j) {
            sum[i][j] = _mm256_add_epi32(sum[i][j], _mm256_madd_epi16(v, weight[j]));
            asm("" : "+x"(sum[i][j]));  // or two products are added first, and wait for it in memory
          }
        }
      }
    }
  }
};

/// Kernels for every number of rows.
template <class Kernel>
struct TileKernels {
  Kernel of[6];
};
#define PROBQUANT_TILES(kernel) {{kernel<1>, kernel<2>, kernel<3>, kernel<4>, kernel<5>, kernel<6>}}

/// Calls visit(first row, rows of a tile, tiles) for what `rows` rows are made of: tiles of 6 rows, and one of the rest.
template <class Visit>
inline void for_each_part(int rows, Visit visit) {
  constexpr int most = 6;
  const int tiles = rows / most, rest = rows % most;
  if (tiles > 0) visit(0, most, tiles);
  if (rest > 0) visit(rows - rest, rest, 1);
}

}  // namespace
}  // namespace probquant
