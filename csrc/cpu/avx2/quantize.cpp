// quantize, dequantize, moments and mark_codes, AVX2: as avx512vnni/quantize.cpp with 8 floats or 32 codes per step. The
// ends of rows go through a buffer on the stack.
#include "epilogue.h"

namespace probquant {
namespace {

constexpr int64_t kLanes = 8, kVector = 32;
constexpr int64_t kFlushAfter = 32768;  // vectors of dword sums of squares, 255^2 each

int64_t element_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

/// The first n of 8 floats, zeros behind.
inline __m256 load_floats(const void* from, DType dtype, int64_t n) {
  if (dtype == DType::float32) return _mm256_castsi256_ps(load_bytes32(from, 4 * n));
  const __m128i half = load_bytes16(from, 2 * n);
  if (dtype == DType::float16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/// Calls visit(at, count, dense index) for every contiguous run of rows [begin, end); `unit` is the dimension whose
/// stride is 1 (1: columns of a plane, 2: channels). The dense index holds for unit 2 only.
template <class Visit>
inline void for_each_run(const QuantizeProblem& p, int unit, int64_t begin, int64_t end, Visit visit) {
  const int other = 3 - unit;
  const auto* base = static_cast<const char*>(p.x);
  int64_t rows = end - begin, others = p.size[other], count = p.size[unit];
  const int64_t row_values = p.size[1] * p.size[2];
  if (unit == 2 && p.stride[1] == count) {
    count *= others, others = 1;
    if (p.stride[0] == count) count *= rows, rows = 1;
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < others; ++j)
      visit(base + ((begin + i) * p.stride[0] + j * p.stride[other]) * element_bytes(p.dtype), count, (begin + i) * row_values + j * count);
}

/// The dimension to walk along, 0 if no stride is 1.
int unit_dimension(const QuantizeProblem& p) { return p.stride[2] == 1 ? 2 : p.stride[1] == 1 ? 1 : 0; }

void float_range(const QuantizeProblem& p, int64_t begin, int64_t end, float* lo, float* hi) {
  const int unit = unit_dimension(p);
  if (unit == 0) return kReferenceKernels.float_range(p, begin, end, lo, hi);
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256 low = _mm256_set1_ps(kInfinity), high = _mm256_set1_ps(-kInfinity);
  __m256i largest = _mm256_setzero_si256();
  const auto take = [&](__m256 x) {
    low = _mm256_min_ps(x, low);
    high = _mm256_max_ps(x, high);
    largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(x), magnitude));
  };
  for_each_run(p, unit, begin, end, [&](const char* from, int64_t count, int64_t) {
    const int64_t bytes = element_bytes(p.dtype);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) take(load_floats(from + i * bytes, p.dtype, kLanes));
    for (; i < count; ++i) take(_mm256_broadcastss_ps(_mm256_castps256_ps128(load_floats(from + i * bytes, p.dtype, 1))));
  });
  alignas(32) float lows[kLanes], highs[kLanes];
  alignas(32) uint32_t magnitudes[kLanes];
  _mm256_store_ps(lows, low);
  _mm256_store_ps(highs, high);
  _mm256_store_si256(reinterpret_cast<__m256i*>(magnitudes), largest);
  bool finite = true;
  *lo = kInfinity;
  *hi = -kInfinity;
  for (int i = 0; i < kLanes; ++i) {
    finite = finite && magnitudes[i] < 0x7f800000u;
    *lo = lows[i] < *lo ? lows[i] : *lo;
    *hi = highs[i] > *hi ? highs[i] : *hi;
  }
  if (!finite) *lo = kNan;
}

/// Codes of 8 floats in dwords, counted.
struct Quantizer {
  Rounding rounding;
  __m256 inverse_scale;
  __m256i sums = _mm256_setzero_si256(), products = _mm256_setzero_si256();
  int64_t vectors = 0, sum = 0, squares = 0, clipped = 0;

  Quantizer(float inverse, int32_t zero_point) : rounding(zero_point), inverse_scale(_mm256_set1_ps(inverse)) {}

  /// The first n count; the others become 0.
  __m256i codes(__m256 x, int64_t n) {
    const __m256 t = _mm256_mul_ps(x, inverse_scale);
    clipped += count_bits(rounding.clipped(t) & first_lanes8(n));
    const __m256i q = keep_bytes(rounding.codes(t), 4 * n);
    sums = _mm256_add_epi32(sums, q);
    products = _mm256_add_epi32(products, _mm256_madd_epi16(q, q));
    if (++vectors == kFlushAfter) flush();
    return q;
  }
  void flush() {
    sum += sum_epu32(sums);
    squares += sum_epu32(products);
    sums = products = _mm256_setzero_si256();
    vectors = 0;
  }
};

/// 8 dwords below 256 to the first 8 bytes.
inline __m128i narrow(__m256i v) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  return _mm_packus_epi16(words, words);
}

/// 8 pixels of planes to interleaved channels, four channels of a pixel per dword.
void quantize_planes(const QuantizeProblem& p, int64_t begin, int64_t end, Quantizer& quantizer, uint8_t* q) {
  const int64_t columns = p.size[1], channels = p.size[2], bytes = element_bytes(p.dtype);
  const __m256i three_of_four = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
  for (int64_t i = begin; i < end; ++i)
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t pixels = columns - j < kLanes ? columns - j : kLanes;
      const char* from = static_cast<const char*>(p.x) + (i * p.stride[0] + j) * bytes;
      uint8_t* to = q + (i * columns + j) * channels;
      for (int64_t c = 0; c < channels; c += 4) {
        const int64_t present = channels - c < 4 ? channels - c : 4;
        __m256i dwords = _mm256_setzero_si256();
        for (int64_t k = 0; k < present; ++k) {
          const __m256i codes = quantizer.codes(load_floats(from + (c + k) * p.stride[2] * bytes, p.dtype, pixels), pixels);
          dwords = _mm256_or_si256(dwords, _mm256_sll_epi32(codes, _mm_cvtsi64_si128(8 * k)));
        }
        if (channels == 3) {
          const __m256i packed = _mm256_shuffle_epi8(dwords, three_of_four);
          store_bytes16(to, _mm256_castsi256_si128(packed), 3 * pixels < 12 ? 3 * pixels : 12);
          if (pixels > 4) store_bytes16(to + 12, _mm256_extracti128_si256(packed, 1), 3 * pixels - 12);
          continue;
        }
        alignas(32) uint32_t pixel[kLanes];
        _mm256_store_si256(reinterpret_cast<__m256i*>(pixel), dwords);
        for (int64_t n = 0; n < pixels; ++n) __builtin_memcpy(to + n * channels + c, &pixel[n], static_cast<size_t>(present));
      }
    }
}

void quantize(const QuantizeProblem& p, int64_t begin, int64_t end, float inverse_scale, int32_t zero_point, uint8_t* q, int64_t* stats,
              bool channel_stats) {
  const int unit = unit_dimension(p);
  if (unit == 0) return kReferenceKernels.quantize(p, begin, end, inverse_scale, zero_point, q, stats, channel_stats);
  Quantizer quantizer(inverse_scale, zero_point);
  if (unit == 1) {
    quantize_planes(p, begin, end, quantizer, q);
  } else {
    for_each_run(p, unit, begin, end, [&](const char* from, int64_t count, int64_t at) {
      for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t n = count - i < kLanes ? count - i : kLanes;
        store_bytes16(q + at + i, narrow(quantizer.codes(load_floats(from + i * element_bytes(p.dtype), p.dtype, n), n)), n);
      }
    });
  }
  quantizer.flush();
  add_to(stats + kStatsSum, quantizer.sum);
  add_to(stats + kStatsSquares, quantizer.squares);
  add_to(stats + kStatsClipped, quantizer.clipped);
  const int64_t channels = p.size[2], positions = (end - begin) * p.size[1];
  int64_t* sums = stats + kStatsSample;
  if (channel_stats) add_channel_moments(q + begin * p.size[1] * channels, positions, channels, channels, sums, sums + channels);
}

void dequantize(const uint8_t* q, int64_t count, float scale, int32_t zero_point, DType dtype, void* y) {
  const __m256 factor = _mm256_set1_ps(scale);
  const __m256i z = _mm256_set1_epi32(zero_point);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = count - i < kLanes ? count - i : kLanes;
    const __m256i code = _mm256_cvtepu8_epi32(load_bytes16(q + i, n));
    const __m256 value = _mm256_mul_ps(factor, _mm256_cvtepi32_ps(_mm256_sub_epi32(code, z)));
    if (dtype == DType::float32) {
      store_bytes32(static_cast<float*>(y) + i, _mm256_castps_si256(value), 4 * n);
      continue;
    }
    __m128i half;
    if (dtype == DType::float16) {
      half = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      const __m256i bits = _mm256_castps_si256(value), lowest_kept = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), lowest_kept), 16);
      const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
      const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
      half = _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
    }
    store_bytes16(static_cast<uint16_t*>(y) + i, half, 2 * n);
  }
}

void moments(const uint8_t* q, int64_t count, int64_t channels, bool channel_stats, int64_t* stats) {
  int64_t sum = 0, squares = 0;
  for (int64_t begin = 0; begin < count; begin += CodeSums::kFlushAfter * kVector) {
    const int64_t end = count - begin < CodeSums::kFlushAfter * kVector ? count : begin + CodeSums::kFlushAfter * kVector;
    CodeSums sums;
    for (int64_t i = begin; i < end; i += kVector) sums.add(load_bytes32(q + i, end - i));
    sums.flush(sum, squares);
  }
  add_to(stats + kStatsSum, sum);
  add_to(stats + kStatsSquares, squares);
  if (channel_stats) add_channel_moments(q, count / channels, channels, channels, stats + kStatsSample, stats + kStatsSample + channels);
}

/// Tests 32 codes at once against what has been seen; after the first few vectors there is rarely anything new.
void mark_codes(const uint8_t* q, int64_t count, bool* seen) {
  CodeSet set;
  for (int c = 0; c < 256; ++c)
    if (seen[c]) set.insert(static_cast<uint8_t>(c));
  for (int64_t i = 0; i < count; i += kVector) {
    const uint32_t exist = count - i >= kVector ? ~0u : (1u << (count - i)) - 1;
    for (uint32_t fresh = ~set.contains(load_bytes32(q + i, count - i)) & exist; fresh; fresh &= fresh - 1) {
      const uint8_t code = q[i + __builtin_ctz(fresh)];
      seen[code] = true;
      set.insert(code);
    }
  }
}

}  // namespace

void install_quantize_avx2(Kernels& table) {
  table.float_range = float_range;
  table.quantize = quantize;
  table.dequantize = dequantize;
  table.moments = moments;
  table.mark_codes = mark_codes;
}

}  // namespace probquant
