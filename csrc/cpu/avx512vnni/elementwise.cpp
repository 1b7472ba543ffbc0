// Ops without weights: elementwise ones and pooling, AVX-512: 64 codes per step. A step of add needs about 60 instructions and of lookup
// about 30, less than its bytes take to come from L3.
#include "epilogue.h"

namespace probquant {
namespace {

constexpr int64_t kVector = 64;

/// Codes widened to dwords in part order (byte 16 j + 4 p + i is dword 4 j + i of part p), less their zero point.
struct Parts {
  __m512i part[4];
  Parts(__m512i codes, __m512i zero_point) {
    const __m512i zero = _mm512_setzero_si512(), low = _mm512_unpacklo_epi8(codes, zero), high = _mm512_unpackhi_epi8(codes, zero);
    part[0] = _mm512_sub_epi32(_mm512_unpacklo_epi16(low, zero), zero_point);
    part[1] = _mm512_sub_epi32(_mm512_unpackhi_epi16(low, zero), zero_point);
    part[2] = _mm512_sub_epi32(_mm512_unpacklo_epi16(high, zero), zero_point);
    part[3] = _mm512_sub_epi32(_mm512_unpackhi_epi16(high, zero), zero_point);
  }
};

/// Which dwords of part p exist.
inline __mmask16 part_mask(__mmask64 bytes, int p) {
  const __mmask64 nibbles = bytes >> 4 * p & 0x000f000f000f000full;
  return static_cast<__mmask16>(nibbles | nibbles >> 12 | nibbles >> 24 | nibbles >> 36);
}

/// factor_a (a - z_a) + offset, plus factor_b (b - z_b), then the bounds: the arithmetic of requantize and layer_value.
struct Sum {
  __m512 factor_a, offset, factor_b, lo, hi;
  __m512i zero_a, zero_b;

  Sum(const SampleEpilogue& s, float a, float o, float b, float low, float high)
      : factor_a(_mm512_set1_ps(a)),
        offset(_mm512_set1_ps(o)),
        factor_b(_mm512_set1_ps(b)),
        lo(_mm512_set1_ps(low)),
        hi(_mm512_set1_ps(high)),
        zero_a(_mm512_set1_epi32(s.x_zero_point)),
        zero_b(_mm512_set1_epi32(s.residual_zero_point)) {}

  __m512 value(__m512i a, __m512i b) const {
    const __m512 t = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), factor_a, offset);
    return clamp_ps(_mm512_fmadd_ps(_mm512_cvtepi32_ps(b), factor_b, t), lo, hi);
  }
};

void add_range(const uint8_t* a, const uint8_t* b, int64_t count, const SampleEpilogue& s, float activation_min, float activation_max, float* lo,
               float* hi) {
  const Sum sum(s, s.x_scale, 0.0f, s.residual_scale, activation_min, activation_max);
  __m512 low = _mm512_set1_ps(kInfinity), high = _mm512_set1_ps(-kInfinity);
  for (int64_t i = 0; i < count; i += kVector) {
    const __mmask64 mask = first_lanes64(count - i);
    const Parts x(_mm512_maskz_loadu_epi8(mask, a + i), sum.zero_a), y(_mm512_maskz_loadu_epi8(mask, b + i), sum.zero_b);
    for (int p = 0; p < 4; ++p) {
      const __m512 value = sum.value(x.part[p], y.part[p]);
      const __mmask16 exists = part_mask(mask, p);
      low = _mm512_mask_min_ps(low, exists, value, low);
      high = _mm512_mask_max_ps(high, exists, value, high);
    }
  }
  *lo = _mm512_reduce_min_ps(low);
  *hi = _mm512_reduce_max_ps(high);
}

void add(const uint8_t* a, const uint8_t* b, int64_t count, int64_t channels, const SampleEpilogue& s, uint8_t* y, int64_t* stats,
         bool channel_stats) {
  const Sum sum(s, s.multiplier, s.inverse_scale * 0.0f, s.residual_multiplier, s.activation_lo, s.activation_hi);
  const Rounding rounding(s.y_zero_point);
  CodeSums sums;
  int64_t total = 0, squares = 0, clipped = 0, pending = 0;
  for (int64_t i = 0; i < count; i += kVector) {
    const __mmask64 mask = first_lanes64(count - i);
    if (!s.valid) {
      _mm512_mask_storeu_epi8(y + i, mask, _mm512_setzero_si512());
      continue;
    }
    Parts x(_mm512_maskz_loadu_epi8(mask, a + i), sum.zero_a);
    const Parts residual(_mm512_maskz_loadu_epi8(mask, b + i), sum.zero_b);
    for (int p = 0; p < 4; ++p) {
      const __m512 t = sum.value(x.part[p], residual.part[p]);
      clipped += __builtin_popcount(rounding.clipped(t) & part_mask(mask, p));
      x.part[p] = rounding.codes(t);
    }
    const __m512i q = _mm512_packus_epi16(_mm512_packs_epi32(x.part[0], x.part[1]), _mm512_packs_epi32(x.part[2], x.part[3]));
    _mm512_mask_storeu_epi8(y + i, mask, q);
    sums.add(_mm512_maskz_mov_epi8(mask, q));
    if (++pending == CodeSums::kFlushAfter) {
      sums.flush(total, squares);
      pending = 0;
    }
  }
  sums.flush(total, squares);
  add_to(stats + kStatsSum, total);
  add_to(stats + kStatsSquares, squares);
  add_to(stats + kStatsClipped, clipped);
  if (channel_stats && s.valid) add_channel_moments(y, count / channels, channels, channels, stats + kStatsSample, stats + kStatsSample + channels);
}

/// A table of 256 bytes in 4 registers, read two bytes at a time by vpermi2w.
struct ByteTable {
  __m512i quarter[4];

  explicit ByteTable(const uint8_t* bytes) {
    for (int i = 0; i < 4; ++i) quarter[i] = _mm512_load_si512(bytes + 64 * i);
  }
  /// Entries of the codes in the low bytes of words (the high bytes are ignored), in the low bytes.
  __m512i low_bytes(__m512i words) const {
    const __m512i pair = _mm512_srli_epi16(words, 1);  // vpermi2w takes the low 6 bits
    const __m512i lower = _mm512_permutex2var_epi16(quarter[0], pair, quarter[1]);
    const __m512i upper = _mm512_permutex2var_epi16(quarter[2], pair, quarter[3]);
    const __m512i word = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(words, _mm512_set1_epi16(0x80)), lower, upper);
    return _mm512_mask_srli_epi16(word, _mm512_test_epi16_mask(words, _mm512_set1_epi16(1)), word, 8);
  }
  __m512i look_up(__m512i codes) const {
    const __m512i even = _mm512_and_si512(low_bytes(codes), _mm512_set1_epi16(0xff));
    return _mm512_or_si512(even, _mm512_slli_epi16(low_bytes(_mm512_srli_epi16(codes, 8)), 8));
  }
};

void lookup(const uint8_t* q, int64_t rows, int64_t channels, int64_t q_stride, const Code* table, uint8_t* y, int64_t y_stride, int64_t* stats,
            int64_t* channel_sums, int64_t* channel_squares) {
  static_assert(sizeof(Code) == 2, "a code and its flag are a word");
  alignas(64) uint8_t bytes[256];
  CodeSet clipping;
  bool any_clips = false;
  for (int i = 0; i < 256; ++i) {
    bytes[i] = table[i].q;
    if (!table[i].clipped) continue;
    clipping.insert(static_cast<uint8_t>(i));
    any_clips = true;
  }
  const ByteTable entries(bytes);
  CodeSums sums;
  int64_t total = 0, squares = 0, clipped = 0, pending = 0;
  const bool dense = q_stride == channels && y_stride == channels;
  const int64_t runs = dense ? 1 : rows, count = dense ? rows * channels : channels;
  for (int64_t run = 0; run < runs; ++run)
    for (int64_t i = 0; i < count; i += kVector) {
      const __mmask64 mask = first_lanes64(count - i);
      const __m512i codes = _mm512_maskz_loadu_epi8(mask, q + run * q_stride + i), out = entries.look_up(codes);
      _mm512_mask_storeu_epi8(y + run * y_stride + i, mask, out);
      if (any_clips) clipped += __builtin_popcountll(clipping.contains(codes) & mask);
      sums.add(_mm512_maskz_mov_epi8(mask, out));
      if (++pending == CodeSums::kFlushAfter) {
        sums.flush(total, squares);
        pending = 0;
      }
    }
  sums.flush(total, squares);
  add_to(stats + kStatsSum, total);
  add_to(stats + kStatsSquares, squares);
  add_to(stats + kStatsClipped, clipped);
  if (channel_sums) add_channel_moments(y, rows, channels, y_stride, channel_sums, channel_squares);
}

/// Pooling: 16 or 64 channels at a time, the window's pixels in turn.
void window_max(const uint8_t* window, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, int64_t channels, uint8_t* y) {
  for (int64_t c = 0; c < channels; c += kVector) {
    const __mmask64 mask = first_lanes64(channels - c);
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        most = _mm512_max_epu8(most, _mm512_maskz_loadu_epi8(mask, window + i * row_step + j * column_step + c));
    _mm512_mask_storeu_epi8(y + c, mask, most);
  }
}

void window_sums(const uint8_t* window, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, int64_t channels, int32_t* sums) {
  for (int64_t c = 0; c < channels; c += 16) {
    const __mmask16 mask = first_lanes16(channels - c);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        sum = _mm512_add_epi32(sum, _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, window + i * row_step + j * column_step + c)));
    _mm512_mask_storeu_epi32(sums + c, mask, sum);
  }
}

void average_range(const int32_t* sums, int64_t count, int32_t offset, float share, const SampleEpilogue& s, float* lo, float* hi) {
  const __m512 factor = _mm512_set1_ps(s.x_scale * share), infinity = _mm512_set1_ps(kInfinity);
  __m512 low = infinity, high = negate_ps(infinity);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first_lanes16(count - i);
    const __m512i sum = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(mask, sums + i), _mm512_set1_epi32(offset));
    const __m512 y = clamp_ps(_mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, _mm512_setzero_ps()), negate_ps(infinity), infinity);
    low = _mm512_mask_min_ps(low, mask, y, low);
    high = _mm512_mask_max_ps(high, mask, y, high);
  }
  *lo = _mm512_reduce_min_ps(low);
  *hi = _mm512_reduce_max_ps(high);
}

int64_t average(const int32_t* sums, int64_t count, int32_t offset, float share, const SampleEpilogue& s, uint8_t* y) {
  const __m512 factor = _mm512_set1_ps(s.multiplier * share), bias = _mm512_set1_ps(s.inverse_scale * 0.0f);
  const Rounding rounding(s.y_zero_point);
  int64_t clipped = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first_lanes16(count - i);
    const __m512i sum = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(mask, sums + i), _mm512_set1_epi32(offset));
    __m512 t = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, bias);
    t = clamp_ps(t, _mm512_set1_ps(s.activation_lo), _mm512_set1_ps(s.activation_hi));
    if (s.valid) clipped += __builtin_popcount(rounding.clipped(t) & mask);
    _mm512_mask_cvtepi32_storeu_epi8(y + i, mask, s.valid ? rounding.codes(t) : _mm512_setzero_si512());
  }
  return clipped;
}

}  // namespace

void install_elementwise_avx512vnni(Kernels& table) {
  table.lookup = lookup;
  table.add_range = add_range;
  table.add = add;
  table.window_max = window_max;
  table.window_sums = window_sums;
  table.average_range = average_range;
  table.average = average;
}

}  // namespace probquant
