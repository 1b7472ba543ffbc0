// What the AVX2 kernels share behind their accumulators: core/numerics.h in vectors of 8 floats, the same operations in the
// same order and so the same bits, and the moments of written codes. Everything has internal linkage.
#pragma once
#include <immintrin.h>

#include "../kernels.h"

namespace probquant {
namespace {

inline __m256i load(const void* at) { return _mm256_load_si256(static_cast<const __m256i*>(at)); }
inline __m256i load_unaligned(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
inline void store(void* at, __m256i v) { _mm256_store_si256(static_cast<__m256i*>(at), v); }

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic of numerics.h. vmaxps and vminps return their second operand when a NaN is involved, as max_f and min_f do.

inline __m256 clamp_ps(__m256 t, __m256 lo, __m256 hi) { return _mm256_min_ps(_mm256_max_ps(t, lo), hi); }
inline __m256 negate_ps(__m256 x) { return _mm256_xor_ps(x, _mm256_set1_ps(-0.0f)); }

/// horner_f() of numerics.h.
template <class Polynomial>
__attribute__((always_inline)) inline __m256 horner_ps(__m256 x) {
  constexpr Polynomial p{};
  __m256 sum = _mm256_set1_ps(p.of[0]);
  for (int i = 1; i < Polynomial::kTerms; ++i) sum = _mm256_fmadd_ps(sum, x, _mm256_set1_ps(p.of[i]));
  return sum;
}

inline __m256 exp_ps(__m256 x) {
  x = clamp_ps(x, _mm256_set1_ps(-87.0f), _mm256_set1_ps(87.0f));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fmadd_ps(n, _mm256_set1_ps(-0.693359375f), x);
  r = _mm256_fmadd_ps(n, _mm256_set1_ps(2.12194440e-4f), r);
  __m256 p = horner_ps<ExpPolynomial>(r);
  p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

inline __m256 gelu_ps(__m256 x) {
  const __m256 a = clamp_ps(x, _mm256_set1_ps(-5.0f), _mm256_set1_ps(5.0f)), w = _mm256_fmadd_ps(a, a, _mm256_set1_ps(-12.5f));
  return _mm256_mul_ps(x, _mm256_add_ps(_mm256_mul_ps(a, horner_ps<GeluPolynomial>(w)), _mm256_set1_ps(0.5f)));
}

inline __m256 sigmoid_ps(__m256 x) {
  const __m256 one = _mm256_set1_ps(1.0f);
  return _mm256_div_ps(one, _mm256_add_ps(one, exp_ps(negate_ps(x))));
}

/// activate() of numerics.h.
inline __m256 activate_ps(Activation kind, __m256 x) {
  switch (kind) {
    case Activation::silu: return _mm256_mul_ps(x, sigmoid_ps(x));
    case Activation::gelu: return gelu_ps(x);
    case Activation::hardswish: {
      const __m256 gate = clamp_ps(_mm256_add_ps(x, _mm256_set1_ps(3.0f)), _mm256_setzero_ps(), _mm256_set1_ps(6.0f));
      return _mm256_mul_ps(x, _mm256_mul_ps(gate, _mm256_set1_ps(0.166666667f)));
    }
    case Activation::sigmoid: return sigmoid_ps(x);
    case Activation::clamp: break;
  }
  return x;
}

/// round_to_code() of numerics.h for one sample: codes in the 32-bit lanes, and a bit for every lane that saturated.
struct Rounding {
  __m256 lo, hi, lo_edge, hi_edge;
  __m256i zero_point;

  explicit Rounding(int32_t z)
      : lo(_mm256_set1_ps(-static_cast<float>(z))),
        hi(_mm256_set1_ps(255.0f - static_cast<float>(z))),
        lo_edge(_mm256_set1_ps(lowest_unclipped(z))),
        hi_edge(_mm256_set1_ps(highest_unclipped(z))),
        zero_point(_mm256_set1_epi32(z)) {}

  __m256i codes(__m256 t) const { return _mm256_add_epi32(_mm256_cvtps_epi32(clamp_ps(t, lo, hi)), zero_point); }
  int clipped(__m256 t) const {  // a NaN is
    const __m256 inside = _mm256_and_ps(_mm256_cmp_ps(t, lo_edge, _CMP_GE_OQ), _mm256_cmp_ps(t, hi_edge, _CMP_LE_OQ));
    return _mm256_movemask_ps(inside) ^ 0xff;
  }
};

/// round_to_code() behind clamp_f() to the activation's bounds, for a sample in which few instructions do: codes less their
/// zero point, to be packed with saturation, and a count of the lanes that clipped.
struct ClampedRounding {
  __m256 activation_lo, lo_edge, hi, hi_edge;
  __m256i zero_point;  ///< 16-bit lanes

  /// The sample is valid, and its activation leaves something of the range.
  static bool covers(const SampleEpilogue& e, Activation activation) {
    return e.valid && activation == Activation::clamp && e.activation_hi >= lowest_unclipped(e.y_zero_point) &&
           e.activation_lo <= highest_unclipped(e.y_zero_point);
  }
  explicit ClampedRounding(const SampleEpilogue& e) {
    const float top = 255.0f - static_cast<float>(e.y_zero_point), edge = highest_unclipped(e.y_zero_point);
    activation_lo = _mm256_set1_ps(e.activation_lo);
    lo_edge = _mm256_set1_ps(lowest_unclipped(e.y_zero_point));
    hi = _mm256_set1_ps(e.activation_hi < top ? e.activation_hi : top);
    hi_edge = _mm256_set1_ps(e.activation_hi <= edge ? __builtin_inff() : edge);
    zero_point = _mm256_set1_epi16(static_cast<int16_t>(e.y_zero_point));
  }

  /// A NaN becomes activation_lo, as in clamp_f. What is above the range is cut; what is far below converts to INT_MIN, or
  /// saturates when it is packed.
  __m256i code(__m256 t, __m256i& clipped) const {
    t = _mm256_max_ps(t, activation_lo);
    const __m256 outside = _mm256_or_ps(_mm256_cmp_ps(t, lo_edge, _CMP_LT_OQ), _mm256_cmp_ps(t, hi_edge, _CMP_GT_OQ));
    clipped = _mm256_sub_epi32(clipped, _mm256_castps_si256(outside));
    return _mm256_cvtps_epi32(_mm256_min_ps(t, hi));
  }
  /// 16 codes plus the zero point: words, above 255 or below 0 only where packing to bytes saturates rightly.
  __m256i words(__m256i low, __m256i high) const { return _mm256_adds_epi16(_mm256_packs_epi32(low, high), zero_point); }
};

/// round_to_code() behind clamp_f() to the activation's bounds, for one sample whose values are known to fit int32: they are rounded at
/// once, and clamping, which commutes with rounding, acts on words, twice as many at a time.
struct WordRounding {
  __m256i zero_point, floor, ceiling;  ///< bounds as codes, one step outside of them at most, where values count as clipped

  static bool covers(const LayerProblem& p, const SampleEpilogue& e) {
    const auto& weight = *reinterpret_cast<const PackedTrailer*>(p.packed_weight + p.layout.trailer_offset());
    const float accumulator = static_cast<float>(p.layout.taps * p.layout.inputs) * (255.0f * 127.0f);
    const float reach = e.multiplier * weight.largest_scale * accumulator + e.inverse_scale * weight.largest_bias + e.residual_multiplier * 255.0f;
    return e.valid && p.activation == Activation::clamp && !p.profiled_bounds() && reach < 1e9f;
  }
  explicit WordRounding(const SampleEpilogue& e)
      : zero_point(_mm256_set1_epi16(static_cast<int16_t>(e.y_zero_point))),
        floor(bound(e.activation_lo, e.y_zero_point)),
        ceiling(bound(e.activation_hi, e.y_zero_point)) {}

  /// 16 rounded values as words that pack to their codes with saturation. Those that do not clip are counted in `inside`.
  __m256i words(__m256i low, __m256i high, __m256i& inside, __m256i lanes) const {
    const __m256i w = _mm256_min_epi16(_mm256_max_epi16(_mm256_adds_epi16(_mm256_packs_epi32(low, high), zero_point), floor), ceiling);
    inside = _mm256_sub_epi16(inside, _mm256_and_si256(_mm256_cmpeq_epi16(w, _mm256_and_si256(w, _mm256_set1_epi16(255))), lanes));
    return w;
  }
  __m256i words(__m256i low, __m256i high, __m256i& inside) const { return words(low, high, inside, _mm256_set1_epi16(-1)); }

 private:
  static __m256i bound(float t, int32_t z) {
    const __m128 cut = _mm_min_ss(_mm_max_ss(_mm_set_ss(t), _mm_set_ss(-1000.0f)), _mm_set_ss(1000.0f));
    const int32_t code = _mm_cvtss_si32(cut) + z;
    return _mm256_set1_epi16(static_cast<int16_t>(code < -1 ? -1 : code > 256 ? 256 : code));
  }
};

/// The lanes whose bits are set.
inline __m256 lanes_of(int mask) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask), bit), bit));
}

/// Minimum and maximum of the lanes, passing over NaNs.
inline void reduce_range(__m256 low, __m256 high, float* lo, float* hi) {
  alignas(32) float lows[8], highs[8];
  _mm256_store_ps(lows, low);
  _mm256_store_ps(highs, high);
  *lo = kInfinity;
  *hi = -kInfinity;
  for (int i = 0; i < 8; ++i) {
    *lo = lows[i] < *lo ? lows[i] : *lo;
    *hi = highs[i] > *hi ? highs[i] : *hi;
  }
}

inline int count_bits(int mask) { return __builtin_popcount(static_cast<unsigned>(mask)); }

// ---------------------------------------------------------------------------------------------------------------------
// Bytes at the end of a buffer

/// The first n of 32 (16) bytes, zeros behind; n may be more.
inline __m256i load_bytes32(const void* from, int64_t n) {
  if (n >= 32) return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  alignas(32) uint8_t buffer[32] = {};
  if (n > 0) __builtin_memcpy(buffer, from, static_cast<size_t>(n));
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(buffer));
}
inline __m128i load_bytes16(const void* from, int64_t n) {
  if (n >= 16) return _mm_loadu_si128(static_cast<const __m128i*>(from));
  if (n == 8) return _mm_loadl_epi64(static_cast<const __m128i*>(from));
  alignas(16) uint8_t buffer[16] = {};
  if (n > 0) __builtin_memcpy(buffer, from, static_cast<size_t>(n));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}
inline void store_bytes32(void* to, __m256i v, int64_t n) {
  if (n >= 32) return _mm256_storeu_si256(static_cast<__m256i*>(to), v);
  alignas(32) uint8_t buffer[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(buffer), v);
  if (n > 0) __builtin_memcpy(to, buffer, static_cast<size_t>(n));
}
inline void store_bytes16(void* to, __m128i v, int64_t n) {
  if (n >= 16) return _mm_storeu_si128(static_cast<__m128i*>(to), v);
  if (n == 8) return _mm_storel_epi64(static_cast<__m128i*>(to), v);
  alignas(16) uint8_t buffer[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), v);
  if (n > 0) __builtin_memcpy(to, buffer, static_cast<size_t>(n));
}
/// v with the bytes behind the first n zeroed.
inline __m256i keep_bytes(__m256i v, int64_t n) {
  if (n >= 32) return v;
  const __m256i index = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28,
                                         29, 30, 31);
  return _mm256_and_si256(v, _mm256_cmpgt_epi8(_mm256_set1_epi8(static_cast<char>(n)), index));
}
/// Bits of the first n lanes of 8.
inline int first_lanes8(int64_t n) { return n >= 8 ? 0xff : n <= 0 ? 0 : (1 << n) - 1; }

// ---------------------------------------------------------------------------------------------------------------------
// Moments

/// atomic_add of kernels.h, with internal linkage.
inline void add_to(int64_t* counter, int64_t value) { __atomic_fetch_add(counter, value, __ATOMIC_RELAXED); }

inline int64_t sum_epi64(__m256i v) {
  const __m128i pair = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  return _mm_cvtsi128_si64(pair) + _mm_extract_epi64(pair, 1);
}
inline int64_t sum_epu32(__m256i v) {
  return sum_epi64(_mm256_add_epi64(_mm256_and_si256(v, _mm256_set1_epi64x(0xffffffff)), _mm256_srli_epi64(v, 32)));
}

/// Sum of words below 2^15.
inline int64_t sum_epi16(__m256i v) { return sum_epu32(_mm256_madd_epi16(v, _mm256_set1_epi16(1))); }

/// Running sums of codes, 32 at a time. A dword of the squares grows by at most 4 * 255^2 per vector: flush before
/// kFlushAfter vectors.
struct CodeSums {
  static constexpr int64_t kFlushAfter = 16000;
  __m256i sum = _mm256_setzero_si256(), product = _mm256_setzero_si256();

  void add(__m256i q) {
    const __m256i even = _mm256_and_si256(q, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(q, 8);
    sum = _mm256_add_epi64(sum, _mm256_sad_epu8(q, _mm256_setzero_si256()));
    product = _mm256_add_epi32(product, _mm256_add_epi32(_mm256_madd_epi16(even, even), _mm256_madd_epi16(odd, odd)));
  }
  /// Adds to the totals and starts again.
  void flush(int64_t& total, int64_t& squares) {
    total += sum_epi64(sum);
    squares += sum_epu32(product);
    sum = product = _mm256_setzero_si256();
  }
};

/// Adds the moments of every channel of codes [rows, channels] with `stride` codes from row to row.
inline void add_channel_moments(const uint8_t* q, int64_t rows, int64_t channels, int64_t stride, int64_t* sums, int64_t* squares) {
  constexpr int64_t kRows = 32768;  // 255^2 each stay below 2^32
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    const int64_t count = rows - begin < kRows ? rows - begin : kRows;
    for (int64_t c = 0; c < channels; c += 8) {
      const int64_t present = channels - c < 8 ? channels - c : 8;
      __m256i s = _mm256_setzero_si256(), ss = s;
      for (int64_t i = 0; i < count; ++i) {
        const __m256i v = _mm256_cvtepu8_epi32(load_bytes16(q + (begin + i) * stride + c, present));
        s = _mm256_add_epi32(s, v);
        ss = _mm256_add_epi32(ss, _mm256_madd_epi16(v, v));
      }
      alignas(32) uint32_t sum[8], square[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(sum), s);
      _mm256_store_si256(reinterpret_cast<__m256i*>(square), ss);
      for (int64_t i = 0; i < present; ++i) {
        add_to(sums + c + i, sum[i]);
        add_to(squares + c + i, square[i]);
      }
    }
  }
}

/// A set of codes: bit (code & 7) of row (code >> 3 & 1), byte (code >> 4).
struct CodeSet {
  alignas(16) uint8_t bits[2][16] = {};

  void insert(uint8_t code) { bits[code >> 3 & 1][code >> 4] = static_cast<uint8_t>(bits[code >> 3 & 1][code >> 4] | 1u << (code & 7)); }
  /// Which of 32 codes are in it.
  uint32_t contains(__m256i codes) const {
    const auto table = [](const uint8_t* row) { return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(row))); };
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble), low = _mm256_and_si256(codes, nibble);
    const __m256i bit = _mm256_shuffle_epi8(_mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201)), low);
    const __m256i upper = _mm256_slli_epi16(codes, 4);  // bit 3 of a code becomes the sign of its byte
    const __m256i row = _mm256_blendv_epi8(_mm256_shuffle_epi8(table(bits[0]), high), _mm256_shuffle_epi8(table(bits[1]), high), upper);
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_and_si256(row, bit), bit)));
  }
};

}  // namespace
}  // namespace probquant
