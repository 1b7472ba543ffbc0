// Attention, AVX-512 VNNI; keys and values are packed by the AVX2 kernel, a pair of values per dword, 16 columns per operand.
//
// Both products are vpdpwssd on centred 16-bit values, so that no zero point is left to correct. Register tile: 6 queries x 4
// blocks of 16 columns, 24 accumulators, 4 packed operands and a broadcast pair of 32 registers: 24 products on 10 loads, 12 clocks
// where two of each run at once. The keys of a head (or its values) come from L2, panel by panel, and meet all queries of the
// call, whose logits and weights (24 x 6 bytes per key) stay in L1 up to about 250 keys.
#include "sums.h"

namespace probquant {
namespace {

constexpr int kRows = 6, kBlocks = 4;

/// Adds both products of 16-bit values in each dword: vpdpwssd in place, for the reasons that dot() has.
inline void dot_pairs(__m512i& accumulator, __m512i a, __m512i b) {
#if defined(__AVX512VNNI__)
  __asm__("vpdpwssd %2, %1, %0" : "+v"(accumulator) : "v"(a), "v"(b));
#else
  accumulator = _mm512_dpwssd_epi32(accumulator, a, b);
#endif
}

/// out[row][blocks * 16 columns] = sum over pairs of a[row] * b[.][columns].
template <int kCount, int kWide>
void multiply_tile(const int16_t* a, int64_t a_stride, const int16_t* b, int64_t block_size, int64_t pairs, int32_t* out, int64_t out_stride) {
  __m512i acc[kCount][kWide];
#pragma GCC unroll 6
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) acc[i][j] = _mm512_setzero_si512();
  for (const int16_t* const end = a + 2 * pairs; a < end; a += 2, b += 2 * PairLayout::kColumns) {
    __m512i w[kWide];
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) w[j] = _mm512_loadu_si512(b + j * block_size);
#pragma GCC unroll 6
    for (int i = 0; i < kCount; ++i) {
      int32_t pair;
      __builtin_memcpy(&pair, a + i * a_stride, 4);
      const __m512i v = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) dot_pairs(acc[i][j], v, w[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) _mm512_storeu_si512(out + i * out_stride + j * PairLayout::kColumns, acc[i][j]);
}

using TileKernel = void (*)(const int16_t*, int64_t, const int16_t*, int64_t, int64_t, int32_t*, int64_t);
template <int kCount>
constexpr TileKernel kTilesOf[kBlocks] = {multiply_tile<kCount, 1>, multiply_tile<kCount, 2>, multiply_tile<kCount, 3>, multiply_tile<kCount, 4>};
constexpr const TileKernel* kTiles[kRows] = {kTilesOf<1>, kTilesOf<2>, kTilesOf<3>, kTilesOf<4>, kTilesOf<5>, kTilesOf<6>};

/// out[rows][columns, padded to 16] = a b. Panels are as wide as each other: one of a single block would wait for its own sums.
void multiply(const int16_t* a, int64_t a_stride, int64_t rows, const int16_t* b, const PairLayout& layout, int32_t* out, int64_t out_stride) {
  const int64_t blocks = layout.blocks(), panels = (blocks + kBlocks - 1) / kBlocks;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t first = blocks * panel / panels, wide = blocks * (panel + 1) / panels - first;
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t count = rows - row < kRows ? rows - row : kRows;
      kTiles[count - 1][wide - 1](a + row * a_stride, a_stride, b + first * layout.block_size(), layout.block_size(), layout.pairs(),
                                  out + row * out_stride + first * PairLayout::kColumns, out_stride);
    }
  }
}

/// Centres a head's codes of one token, [count] up to a multiple of 16; what lies behind meets zeros of the keys.
inline void centre(const uint8_t* q, int64_t count, int32_t zero_point, int16_t* to) {
  const __m256i z = _mm256_set1_epi16(static_cast<int16_t>(zero_point < 0 ? 0 : zero_point > 255 ? 255 : zero_point));
  for (int64_t d = 0; d < count; d += 16) {
    const __m256i codes = _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(first_lanes16(count - d), q + d));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d), _mm256_sub_epi16(codes, z));
  }
}

/// From the int32 products of one query in w to its weights in 8 bits (zeros up to a multiple of 16). Returns the factor of
/// their products with the values.
float weights_of(float* w, int64_t keys, const float* key_scale, const float* value_scale, float scale, int16_t* codes) {
  __m512 largest = _mm512_set1_ps(-__builtin_inff());
  for_each_vector(keys, [&](int64_t j, __mmask16 lanes) {
    const __m512 t = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(w + j)), _mm512_maskz_loadu_ps(lanes, key_scale + j));
    _mm512_storeu_ps(w + j, t);
    largest = _mm512_mask_max_ps(largest, lanes, t, largest);
  });
  const auto [ceiling, total] = weigh(w, keys, value_scale, scale, largest);
  const __m512 inverse = _mm512_set1_ps(255.0f / ceiling), zero = _mm512_setzero_ps(), full = _mm512_set1_ps(255.0f);
  for_each_vector(keys, [&](int64_t j, __mmask16 lanes) {
    const __m512 t = clamp_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, w + j), inverse), zero, full);
    _mm512_mask_cvtepi32_storeu_epi16(codes + j, 0xffff, _mm512_cvtps_epi32(t));
  });
  return ceiling / 255.0f / total;
}

void attention(const AttentionProblem& p, int64_t image, int64_t begin, int64_t end, const AttentionScratch& s, float* y) {
  const AttentionShape& shape = p.shape;
  const int64_t rows = end - begin, channels = shape.heads * shape.head_dim, first = image * shape.queries + begin;
  for (int64_t head = 0; head < shape.heads; ++head) {
    for (int64_t i = 0; i < rows; ++i)
      centre(p.query.q + (first + i) * channels + head * shape.head_dim, shape.head_dim, p.query.zero_point[first + i], s.query + i * s.dim_stride);
    multiply(s.query, s.dim_stride, rows, p.packed_keys(image, head), p.keys(), reinterpret_cast<int32_t*>(s.logits), s.key_stride);
    for (int64_t i = 0; i < rows; ++i)
      s.factors[i] = weights_of(s.logits + i * s.key_stride, shape.keys, p.key.scale + image * shape.keys, p.value.scale + image * shape.keys,
                                p.query.scale[first + i] * p.scale, s.weights + i * s.key_stride);
    multiply(s.weights, s.key_stride, rows, p.packed_values(image, head), p.values(), s.products, s.dim_stride);
    for (int64_t i = 0; i < rows; ++i) {
      const __m512 factor = _mm512_set1_ps(s.factors[i]);
      for_each_vector(shape.head_dim, [&](int64_t d, __mmask16 lanes) {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(s.products + i * s.dim_stride + d));
        _mm512_mask_storeu_ps(y + i * channels + head * shape.head_dim + d, lanes, _mm512_mul_ps(sum, factor));
      });
    }
  }
}

}  // namespace

void install_attention_avx512vnni(Kernels& table) { table.attention = attention; }

}  // namespace probquant
