// Ops without weights: elementwise ones and pooling, AVX2: as avx512vnni/elementwise.cpp with 32 codes per step. A table of 256 bytes is 16
// registers' worth: it is read by the scalar unit, which keeps up with a byte per cycle.
#include "epilogue.h"

namespace probquant {
namespace {

constexpr int64_t kVector = 32;

/// Codes widened to dwords in part order (byte 16 j + 4 p + i is dword 4 j + i of part p), less their zero point.
struct Parts {
  __m256i part[4];
  Parts(__m256i codes, __m256i zero_point) {
    const __m256i zero = _mm256_setzero_si256(), low = _mm256_unpacklo_epi8(codes, zero), high = _mm256_unpackhi_epi8(codes, zero);
    part[0] = _mm256_sub_epi32(_mm256_unpacklo_epi16(low, zero), zero_point);
    part[1] = _mm256_sub_epi32(_mm256_unpackhi_epi16(low, zero), zero_point);
    part[2] = _mm256_sub_epi32(_mm256_unpacklo_epi16(high, zero), zero_point);
    part[3] = _mm256_sub_epi32(_mm256_unpackhi_epi16(high, zero), zero_point);
  }
};

/// Which dwords of part p are among the first n bytes.
inline int part_mask(int64_t n, int p) {
  const uint32_t bytes = n >= 32 ? ~0u : (1u << n) - 1;
  return static_cast<int>((bytes >> 4 * p & 0xf) | (bytes >> (16 + 4 * p) & 0xf) << 4);
}
/// factor_a (a - z_a) + offset, plus factor_b (b - z_b): the arithmetic of requantize and layer_value.
struct Sum {
  __m256 factor_a, offset, factor_b;
  __m256i zero_a, zero_b;

  Sum(const SampleEpilogue& s, float a, float o, float b)
      : factor_a(_mm256_set1_ps(a)),
        offset(_mm256_set1_ps(o)),
        factor_b(_mm256_set1_ps(b)),
        zero_a(_mm256_set1_epi32(s.x_zero_point)),
        zero_b(_mm256_set1_epi32(s.residual_zero_point)) {}

  __m256 value(__m256i a, __m256i b) const {
    const __m256 t = _mm256_fmadd_ps(_mm256_cvtepi32_ps(a), factor_a, offset);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(b), factor_b, t);
  }
};

/// (a - z_a)(b - z_b), an exact product of two exact floats, times a factor.
struct Product {
  __m256 factor;
  __m256i zero_a, zero_b;

  Product(const SampleEpilogue& s, float f)
      : factor(_mm256_set1_ps(f)), zero_a(_mm256_set1_epi32(s.x_zero_point)), zero_b(_mm256_set1_epi32(s.residual_zero_point)) {}

  __m256 value(__m256i a, __m256i b) const { return _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)), factor); }
};

/// Rows of a, `length` codes each, with rows of b that are b_step codes apart: the range of f.value(), clamped.
template <class Function>
void range_of_pairs(const uint8_t* a, const uint8_t* b, int64_t rows, int64_t length, int64_t b_step, const Function& f, float activation_min,
                    float activation_max, float* lo, float* hi) {
  const __m256 least = _mm256_set1_ps(activation_min), most = _mm256_set1_ps(activation_max);
  __m256 low = _mm256_set1_ps(kInfinity), high = _mm256_set1_ps(-kInfinity);
  for (int64_t row = 0; row < rows; ++row, a += length, b += b_step)
    for (int64_t i = 0; i < length; i += kVector) {
      const Parts x(load_bytes32(a + i, length - i), f.zero_a), y(load_bytes32(b + i, length - i), f.zero_b);
      for (int p = 0; p < 4; ++p) {
        const __m256 value = clamp_ps(f.value(x.part[p], y.part[p]), least, most), exists = lanes_of(part_mask(length - i, p));
        low = _mm256_min_ps(_mm256_blendv_ps(low, value, exists), low);
        high = _mm256_max_ps(_mm256_blendv_ps(high, value, exists), high);
      }
    }
  reduce_range(low, high, lo, hi);
}

/// The same, f.value() requantized into y, [rows, length].
template <class Function>
void requantize_pairs(const uint8_t* a, const uint8_t* b, int64_t rows, int64_t length, int64_t b_step, const Function& f, const SampleEpilogue& s,
                      uint8_t* y, int64_t* stats) {
  const Rounding rounding(s.y_zero_point);
  const ClampedRounding clamped(s);
  const bool plain = ClampedRounding::covers(s, Activation::clamp);
  const __m256 least = _mm256_set1_ps(s.activation_lo), most = _mm256_set1_ps(s.activation_hi);
  __m256i clipped_lanes = _mm256_setzero_si256();
  CodeSums sums;
  int64_t total = 0, squares = 0, clipped = 0, pending = 0;
  for (int64_t row = 0; row < rows; ++row, a += length, b += b_step, y += length)
    for (int64_t i = 0; i < length; i += kVector) {
      const int64_t n = length - i;
      if (!s.valid) {
        store_bytes32(y + i, _mm256_setzero_si256(), n);
        continue;
      }
      Parts x(load_bytes32(a + i, n), f.zero_a);
      const Parts other(load_bytes32(b + i, n), f.zero_b);
      __m256i q;
      if (plain && n >= kVector) {
        for (int p = 0; p < 4; ++p) x.part[p] = clamped.code(f.value(x.part[p], other.part[p]), clipped_lanes);
        q = _mm256_packus_epi16(clamped.words(x.part[0], x.part[1]), clamped.words(x.part[2], x.part[3]));
      } else {
        for (int p = 0; p < 4; ++p) {
          const __m256 t = clamp_ps(f.value(x.part[p], other.part[p]), least, most);
          clipped += count_bits(rounding.clipped(t) & part_mask(n, p));
          x.part[p] = rounding.codes(t);
        }
        q = _mm256_packus_epi16(_mm256_packs_epi32(x.part[0], x.part[1]), _mm256_packs_epi32(x.part[2], x.part[3]));
      }
      store_bytes32(y + i, q, n);
      sums.add(keep_bytes(q, n));
      if (++pending == CodeSums::kFlushAfter) {
        sums.flush(total, squares);
        clipped += sum_epu32(clipped_lanes);
        clipped_lanes = _mm256_setzero_si256();
        pending = 0;
      }
    }
  sums.flush(total, squares);
  add_to(stats + kStatsSum, total);
  add_to(stats + kStatsSquares, squares);
  add_to(stats + kStatsClipped, clipped + sum_epu32(clipped_lanes));
}

void add_range(const uint8_t* a, const uint8_t* b, int64_t count, const SampleEpilogue& s, float activation_min, float activation_max, float* lo,
               float* hi) {
  range_of_pairs(a, b, 1, count, 0, Sum(s, s.x_scale, 0.0f, s.residual_scale), activation_min, activation_max, lo, hi);
}

void add(const uint8_t* a, const uint8_t* b, int64_t count, int64_t channels, const SampleEpilogue& s, uint8_t* y, int64_t* stats,
         bool channel_stats) {
  requantize_pairs(a, b, 1, count, 0, Sum(s, s.multiplier, s.inverse_scale * 0.0f, s.residual_multiplier), s, y, stats);
  if (channel_stats && s.valid) add_channel_moments(y, count / channels, channels, channels, stats + kStatsSample, stats + kStatsSample + channels);
}

void mul_range(const uint8_t* a, const uint8_t* b, int64_t rows, int64_t channels, int64_t b_step, const SampleEpilogue& s, float* lo, float* hi) {
  const Product product(s, 1.0f);
  if (b_step == channels) range_of_pairs(a, b, 1, rows * channels, 0, product, -kInfinity, kInfinity, lo, hi);
  else range_of_pairs(a, b, rows, channels, b_step, product, -kInfinity, kInfinity, lo, hi);
}

void mul(const uint8_t* a, const uint8_t* b, int64_t rows, int64_t channels, int64_t b_step, const SampleEpilogue& s, uint8_t* y, int64_t* stats,
         bool channel_stats) {
  const Product product(s, s.multiplier);
  if (b_step == channels) requantize_pairs(a, b, 1, rows * channels, 0, product, s, y, stats);
  else requantize_pairs(a, b, rows, channels, b_step, product, s, y, stats);
  if (channel_stats && s.valid) add_channel_moments(y, rows, channels, channels, stats + kStatsSample, stats + kStatsSample + channels);
}

void lookup(const uint8_t* q, int64_t rows, int64_t channels, int64_t q_stride, const Code* table, uint8_t* y, int64_t y_stride, int64_t* stats,
            int64_t* channel_sums, int64_t* channel_squares) {
  uint8_t bytes[256];
  CodeSet clipping;
  bool any_clips = false;
  for (int i = 0; i < 256; ++i) {
    bytes[i] = table[i].q;
    if (!table[i].clipped) continue;
    clipping.insert(static_cast<uint8_t>(i));
    any_clips = true;
  }
  CodeSums sums;
  int64_t total = 0, squares = 0, clipped = 0, pending = 0;
  const bool dense = q_stride == channels && y_stride == channels;
  const int64_t runs = dense ? 1 : rows, count = dense ? rows * channels : channels;
  for (int64_t run = 0; run < runs; ++run)
    for (int64_t i = 0; i < count; i += kVector) {
      const int64_t n = count - i < kVector ? count - i : kVector;
      const uint8_t* from = q + run * q_stride + i;
      alignas(32) uint8_t out[kVector] = {};
      if (any_clips) clipped += __builtin_popcount(clipping.contains(load_bytes32(from, n)) & (n == kVector ? ~0u : (1u << n) - 1));
      for (int64_t k = 0; k < n; ++k) out[k] = bytes[from[k]];
      const __m256i codes = _mm256_load_si256(reinterpret_cast<const __m256i*>(out));
      store_bytes32(y + run * y_stride + i, codes, n);
      sums.add(codes);
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

/// Pooling: 8 or 32 channels at a time, the window's pixels in turn.
void window_max(const uint8_t* window, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, int64_t channels, uint8_t* y) {
  for (int64_t c = 0; c < channels; c += kVector) {
    __m256i most = _mm256_setzero_si256();
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) most = _mm256_max_epu8(most, load_bytes32(window + i * row_step + j * column_step + c, channels - c));
    store_bytes32(y + c, most, channels - c);
  }
}

void window_sums(const uint8_t* window, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, int64_t channels, int32_t* sums) {
  for (int64_t c = 0; c < channels; c += 8) {
    const int64_t present = channels - c < 8 ? channels - c : 8;
    __m256i sum = _mm256_setzero_si256();
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        sum = _mm256_add_epi32(sum, _mm256_cvtepu8_epi32(load_bytes16(window + i * row_step + j * column_step + c, present)));
    store_bytes32(sums + c, sum, 4 * present);
  }
}

void average_range(const int32_t* sums, int64_t count, int32_t offset, float share, const SampleEpilogue& s, float* lo, float* hi) {
  const __m256 factor = _mm256_set1_ps(s.x_scale * share), infinity = _mm256_set1_ps(kInfinity);
  __m256 low = infinity, high = negate_ps(infinity);
  for (int64_t i = 0; i < count; i += 8) {
    const __m256i sum = _mm256_sub_epi32(load_bytes32(sums + i, 4 * (count - i)), _mm256_set1_epi32(offset));
    const __m256 y = clamp_ps(_mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), factor, _mm256_setzero_ps()), negate_ps(infinity), infinity);
    const __m256 exists = lanes_of(first_lanes8(count - i));
    low = _mm256_min_ps(_mm256_blendv_ps(low, y, exists), low);
    high = _mm256_max_ps(_mm256_blendv_ps(high, y, exists), high);
  }
  reduce_range(low, high, lo, hi);
}

int64_t average(const int32_t* sums, int64_t count, int32_t offset, float share, const SampleEpilogue& s, uint8_t* y) {
  const __m256 factor = _mm256_set1_ps(s.multiplier * share), bias = _mm256_set1_ps(s.inverse_scale * 0.0f);
  const Rounding rounding(s.y_zero_point);
  int64_t clipped = 0;
  for (int64_t i = 0; i < count; i += 8) {
    const int64_t n = count - i < 8 ? count - i : 8;
    const __m256i sum = _mm256_sub_epi32(load_bytes32(sums + i, 4 * n), _mm256_set1_epi32(offset));
    __m256 t = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), factor, bias);
    t = clamp_ps(t, _mm256_set1_ps(s.activation_lo), _mm256_set1_ps(s.activation_hi));
    if (s.valid) clipped += count_bits(rounding.clipped(t) & first_lanes8(n));
    const __m256i q = s.valid ? rounding.codes(t) : _mm256_setzero_si256();
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    store_bytes16(y + i, _mm_packus_epi16(words, words), n);
  }
  return clipped;
}

}  // namespace

void install_elementwise_avx2(Kernels& table) {
  table.lookup = lookup;
  table.add_range = add_range;
  table.add = add;
  table.mul_range = mul_range;
  table.mul = mul;
  table.window_max = window_max;
  table.window_sums = window_sums;
  table.average_range = average_range;
  table.average = average;
}

}  // namespace probquant
