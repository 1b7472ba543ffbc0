// quantize, dequantize, moments and mark_codes, AVX-512. All but the quantize of other than three planes stream through memory once, 16 or
// 64 floats or 64 codes per step; a step needs about 8 instructions per 16 floats, under the time they take to come from L3.
#include "epilogue.h"

namespace probquant {
namespace {

constexpr int64_t kLanes = 16, kVector = 64;
constexpr int64_t kFlushAfter = 32768;  // vectors of dword sums of squares, 255^2 each

int64_t element_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

inline __m512 load_floats(const void* from, DType dtype, __mmask16 mask) {
  if (dtype == DType::float32) return _mm512_maskz_loadu_ps(mask, from);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, from);
  if (dtype == DType::float16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
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
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512 low = _mm512_set1_ps(kInfinity), high = _mm512_set1_ps(-kInfinity);
  __m512i largest = _mm512_setzero_si512();
  for_each_run(p, unit, begin, end, [&](const char* from, int64_t count, int64_t) {
    for (int64_t i = 0; i < count; i += kLanes, from += kLanes * element_bytes(p.dtype)) {
      const __mmask16 mask = first_lanes16(count - i);
      const __m512 x = load_floats(from, p.dtype, mask);
      low = _mm512_mask_min_ps(low, mask, x, low);
      high = _mm512_mask_max_ps(high, mask, x, high);
      largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(x), magnitude));
    }
  });
  *lo = _mm512_reduce_max_epu32(largest) < 0x7f800000u ? _mm512_reduce_min_ps(low) : kNan;
  *hi = _mm512_reduce_max_ps(high);
}

/// Codes of 16 floats in dwords, or of a run of floats, counted.
struct Quantizer {
  Rounding rounding;
  WordRounding words;
  __m512 inverse_scale;
  __m512i sums = _mm512_setzero_si512(), products = _mm512_setzero_si512();  ///< of codes in dwords
  CodeSums codes_sums;  ///< of 64 at a time
  ClipCount clips;
  int64_t vectors = 0, codes_vectors = 0, sum = 0, squares = 0, clipped = 0;

  Quantizer(float inverse, int32_t zero_point)
      : rounding(zero_point), words{_mm512_set1_epi16(static_cast<int16_t>(zero_point)), {}, {}}, inverse_scale(_mm512_set1_ps(inverse)) {}

  /// Codes of 64 floats in words, as the layers' epilogue has them: a third of the instructions.
  __m512i codes64(const char* from, DType dtype) {
    const __m512 beyond = _mm512_set1_ps(1000.0f);  // clipped by any zero point, and fits words
    __m512i code[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m512 x = load_floats(from + k * kLanes * element_bytes(dtype), dtype, 0xffff);
      code[k] = _mm512_cvtps_epi32(clamp_ps(_mm512_mul_ps(x, inverse_scale), negate_ps(beyond), beyond));
    }
    const __m512i low = words.words<Clamp::open>(code[0], code[1]), high = words.words<Clamp::open>(code[2], code[3]);
    clips.add<Clamp::open>(low, ~__mmask32{0});
    clips.add<Clamp::open>(high, ~__mmask32{0});
    const __m512i packed = _mm512_packus_epi16(low, high);
    codes_sums.add(packed);
    if (++codes_vectors == CodeSums::kFlushAfter) flush();
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), packed);
  }

  void run(const char* from, DType dtype, int64_t count, uint8_t* q) {
    int64_t i = 0;
    for (; i + kVector <= count; i += kVector, from += kVector * element_bytes(dtype)) _mm512_storeu_si512(q + i, codes64(from, dtype));
    for (; i < count; i += kLanes, from += kLanes * element_bytes(dtype)) {
      const __mmask16 mask = first_lanes16(count - i);
      _mm512_mask_cvtepi32_storeu_epi8(q + i, mask, codes(load_floats(from, dtype, mask), mask));
    }
  }

  __m512i codes(__m512 x, __mmask16 mask) {
    const __m512 t = _mm512_mul_ps(x, inverse_scale);
    clipped += __builtin_popcount(rounding.clipped(t) & mask);
    const __m512i q = _mm512_maskz_mov_epi32(mask, rounding.codes(t));
    sums = _mm512_add_epi32(sums, q);
    products = _mm512_add_epi32(products, _mm512_madd_epi16(q, q));
    if (++vectors == kFlushAfter) flush();
    return q;
  }
  void flush() {
    const auto wide = [](__m512i v) {
      return _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_cvtepu32_epi64(_mm512_castsi512_si256(v)),
                                                      _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(v, 1))));
    };
    sum += wide(sums);
    squares += wide(products);
    sums = products = _mm512_setzero_si512();
    codes_sums.flush(sum, squares);
    clipped += clips.flush();
    vectors = codes_vectors = 0;
  }
};

/// 64 pixels of three planes, interleaved.
struct ThreePlanes {
  __m512i from[3][3];  ///< [16 bytes of 48][plane]: of which pixel, in each 128 bits

  ThreePlanes() {
    for (int part = 0; part < 3; ++part)
      for (int plane = 0; plane < 3; ++plane) {
        alignas(16) int8_t at[16];
        for (int i = 0; i < 16; ++i) at[i] = static_cast<int8_t>((16 * part + i) % 3 == plane ? (16 * part + i) / 3 : -1);
        from[part][plane] = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(at)));
      }
  }
  void store(const __m512i (&planes)[3], uint8_t* to) const {
#pragma GCC unroll 3
    for (int part = 0; part < 3; ++part, to += 16) {
      const auto bytes = [&](int plane) { return _mm512_shuffle_epi8(planes[plane], from[part][plane]); };
      const __m512i v = _mm512_or_si512(_mm512_or_si512(bytes(0), bytes(1)), bytes(2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(v));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 48), _mm512_extracti32x4_epi32(v, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 96), _mm512_extracti32x4_epi32(v, 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 144), _mm512_extracti32x4_epi32(v, 3));
    }
  }
};

/// Pixels of planes to interleaved channels: 64 of three planes, 16 of any others with four channels of a pixel per dword.
void quantize_planes(const QuantizeProblem& p, int64_t begin, int64_t end, Quantizer& quantizer, uint8_t* q) {
  const int64_t columns = p.size[1], channels = p.size[2], bytes = element_bytes(p.dtype);
  const __m512i three_of_four = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
  const ThreePlanes three_planes;
  for (int64_t i = begin; i < end; ++i) {
    int64_t j = 0;
    for (; channels == 3 && j + kVector <= columns; j += kVector) {
      const char* from = static_cast<const char*>(p.x) + (i * p.stride[0] + j) * bytes;
      __m512i planes[3];
#pragma GCC unroll 3
      for (int c = 0; c < 3; ++c) planes[c] = quantizer.codes64(from + c * p.stride[2] * bytes, p.dtype);
      three_planes.store(planes, q + (i * columns + j) * 3);
    }
    for (; j < columns; j += kLanes) {
      const int64_t pixels = columns - j < kLanes ? columns - j : kLanes;
      const __mmask16 mask = first_lanes16(pixels);
      const char* from = static_cast<const char*>(p.x) + (i * p.stride[0] + j) * bytes;
      uint8_t* to = q + (i * columns + j) * channels;
      for (int64_t c = 0; c < channels; c += 4) {
        const int64_t present = channels - c < 4 ? channels - c : 4;
        __m512i dwords = _mm512_setzero_si512();
        for (int64_t k = 0; k < present; ++k) {
          const __m512i codes = quantizer.codes(load_floats(from + (c + k) * p.stride[2] * bytes, p.dtype, mask), mask);
          dwords = _mm512_or_si512(dwords, _mm512_sll_epi32(codes, _mm_cvtsi64_si128(8 * k)));
        }
        if (channels == 3) {
          alignas(64) uint8_t packed[kVector];
          _mm512_store_si512(packed, _mm512_shuffle_epi8(dwords, three_of_four));
          for (int64_t lane = 0; lane < 4; ++lane) {
            const int64_t left = 3 * pixels - 12 * lane;
            _mm_mask_storeu_epi8(to + 12 * lane, static_cast<__mmask16>(first_lanes16(left) & 0x0fff),
                                 _mm_load_si128(reinterpret_cast<const __m128i*>(packed + 16 * lane)));
          }
          continue;
        }
        alignas(64) uint32_t pixel[kLanes];
        _mm512_store_si512(pixel, dwords);
        for (int64_t n = 0; n < pixels; ++n) __builtin_memcpy(to + n * channels + c, &pixel[n], static_cast<size_t>(present));
      }
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
    for_each_run(p, unit, begin, end, [&](const char* from, int64_t count, int64_t at) { quantizer.run(from, p.dtype, count, q + at); });
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
  const __m512 factor = _mm512_set1_ps(scale);
  const __m512i z = _mm512_set1_epi32(zero_point);
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 mask = first_lanes16(count - i);
    const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, q + i));
    const __m512 value = _mm512_mul_ps(factor, _mm512_cvtepi32_ps(_mm512_sub_epi32(code, z)));
    if (dtype == DType::float32) {
      _mm512_mask_storeu_ps(static_cast<float*>(y) + i, mask, value);
    } else if (dtype == DType::float16) {
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + i, mask, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else {
      const __m512i bits = _mm512_castps_si512(value), lowest_kept = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), lowest_kept), 16);
      const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      _mm512_mask_cvtepi32_storeu_epi16(static_cast<uint16_t*>(y) + i, mask, _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
    }
  }
}

void moments(const uint8_t* q, int64_t count, int64_t channels, bool channel_stats, int64_t* stats) {
  int64_t sum = 0, squares = 0;
  for (int64_t begin = 0; begin < count; begin += CodeSums::kFlushAfter * kVector) {
    const int64_t end = count - begin < CodeSums::kFlushAfter * kVector ? count : begin + CodeSums::kFlushAfter * kVector;
    CodeSums even, odd;
    int64_t i = begin;
    for (; i + 2 * kVector <= end; i += 2 * kVector) {
      even.add(_mm512_loadu_si512(q + i));
      odd.add(_mm512_loadu_si512(q + i + kVector));
    }
    for (; i < end; i += kVector) even.add(_mm512_maskz_loadu_epi8(first_lanes64(end - i), q + i));
    even.flush(sum, squares);
    odd.flush(sum, squares);
  }
  add_to(stats + kStatsSum, sum);
  add_to(stats + kStatsSquares, squares);
  if (channel_stats) add_channel_moments(q, count / channels, channels, channels, stats + kStatsSample, stats + kStatsSample + channels);
}

/// Tests 64 codes at once against what has been seen; after the first few vectors there is rarely anything new.
void mark_codes(const uint8_t* q, int64_t count, bool* seen) {
  CodeSet set;
  for (int c = 0; c < 256; ++c)
    if (seen[c]) set.insert(static_cast<uint8_t>(c));
  for (int64_t i = 0; i < count; i += kVector) {
    const __mmask64 mask = first_lanes64(count - i);
    for (__mmask64 fresh = ~set.contains(_mm512_maskz_loadu_epi8(mask, q + i)) & mask; fresh; fresh &= fresh - 1) {
      const uint8_t code = q[i + __builtin_ctzll(fresh)];
      seen[code] = true;
      set.insert(code);
    }
  }
}

}  // namespace

void install_quantize_avx512vnni(Kernels& table) {
  table.float_range = float_range;
  table.quantize = quantize;
  table.dequantize = dequantize;
  table.moments = moments;
  table.mark_codes = mark_codes;
}

}  // namespace probquant
