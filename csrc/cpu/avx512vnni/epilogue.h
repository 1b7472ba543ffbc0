// What the AVX-512 kernels share behind their accumulators: core/numerics.h in vectors of 16 floats, the same operations
// in the same order and so the same bits, and the moments of written codes. Everything has internal linkage.
#pragma once
#include <immintrin.h>

#include "../kernels.h"

namespace probquant {
namespace {

/// Mask of the first n lanes, n clamped to 0..16 (0..64).
inline __mmask16 first_lanes16(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1); }
inline __mmask64 first_lanes64(int64_t n) { return n >= 64 ? ~0ull : n <= 0 ? 0 : (1ull << n) - 1; }

/// Adds the four products in each dword, unsigned times signed: vpdpbusd in place. The intrinsic makes GCC copy all accumulators
/// in every turn of a loop; it serves where the compiler targets less than the instruction (tests/cpp/emulated_avx512).
inline void dot(__m512i& accumulator, __m512i x, __m512i weights) {
#if defined(__AVX512VNNI__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(accumulator) : "v"(x), "v"(weights));
#else
  accumulator = _mm512_dpbusd_epi32(accumulator, x, weights);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic of numerics.h. vmaxps and vminps return their second operand when a NaN is involved, as max_f and min_f do.

inline __m512 clamp_ps(__m512 t, __m512 lo, __m512 hi) { return _mm512_min_ps(_mm512_max_ps(t, lo), hi); }
inline __m512 negate_ps(__m512 x) { return _mm512_xor_ps(x, _mm512_set1_ps(-0.0f)); }

/// horner_f() of numerics.h.
template <class Polynomial>
__attribute__((always_inline)) inline __m512 horner_ps(__m512 x) {
  constexpr Polynomial p{};
  __m512 sum = _mm512_set1_ps(p.of[0]);
  for (int i = 1; i < Polynomial::kTerms; ++i) sum = _mm512_fmadd_ps(sum, x, _mm512_set1_ps(p.of[i]));
  return sum;
}

/// rint: behind 2^23 floats are integers, and float additions do not compete with the products of tiles. |x| < 2^22.
inline __m512 exp_ps(__m512 x) {
  x = clamp_ps(x, _mm512_set1_ps(-87.0f), _mm512_set1_ps(87.0f));
  const __m512 shift = _mm512_set1_ps(12582912.0f), shifted = _mm512_add_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), shift);
  const __m512 n = _mm512_sub_ps(shifted, shift);
  __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = horner_ps<ExpPolynomial>(r);
  p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));  // times 2^n, normal
}

inline __m512 gelu_ps(__m512 x) {
  const __m512 a = clamp_ps(x, _mm512_set1_ps(-5.0f), _mm512_set1_ps(5.0f)), w = _mm512_fmadd_ps(a, a, _mm512_set1_ps(-12.5f));
  return _mm512_mul_ps(x, _mm512_add_ps(_mm512_mul_ps(a, horner_ps<GeluPolynomial>(w)), _mm512_set1_ps(0.5f)));
}

inline __m512 sigmoid_ps(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp_ps(negate_ps(x))));
}

/// activate() of numerics.h.
inline __m512 activate_ps(Activation kind, __m512 x) {
  switch (kind) {
    case Activation::silu: return _mm512_mul_ps(x, sigmoid_ps(x));
    case Activation::gelu: return gelu_ps(x);
    case Activation::hardswish: {
      const __m512 gate = clamp_ps(_mm512_add_ps(x, _mm512_set1_ps(3.0f)), _mm512_setzero_ps(), _mm512_set1_ps(6.0f));
      return _mm512_mul_ps(x, _mm512_mul_ps(gate, _mm512_set1_ps(0.166666667f)));
    }
    case Activation::sigmoid: return sigmoid_ps(x);
    case Activation::clamp: break;
  }
  return x;
}

/// round_to_code() of numerics.h for one sample: codes in the 32-bit lanes, and the lanes that saturated.
struct Rounding {
  __m512 lo, hi, lo_edge, hi_edge;
  __m512i zero_point;

  explicit Rounding(int32_t z)
      : lo(_mm512_set1_ps(-static_cast<float>(z))),
        hi(_mm512_set1_ps(255.0f - static_cast<float>(z))),
        lo_edge(_mm512_set1_ps(lowest_unclipped(z))),
        hi_edge(_mm512_set1_ps(highest_unclipped(z))),
        zero_point(_mm512_set1_epi32(z)) {}

  __m512i codes(__m512 t) const { return _mm512_add_epi32(_mm512_cvtps_epi32(clamp_ps(t, lo, hi)), zero_point); }
  __mmask16 clipped(__m512 t) const {  // a NaN is
    return static_cast<__mmask16>(~_mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(t, lo_edge, _CMP_GE_OQ), t, hi_edge, _CMP_LE_OQ));
  }
};

/// How the activation's bounds act on codes: clamping commutes with rounding, so it happens behind it, on words.
enum class Clamp {
  any,   ///< any bounds, any zero point
  open,  ///< no bounds
  relu,  ///< zero point 0 and nothing below it
  positive,  ///< the same, and above it no bound that is a code below 255
};

/// Bounds t of an activation as codes, in dwords; one step outside of the codes at most, where values count as clipped.
inline __m512i bound_codes(__m512 t, int32_t zero_point) {
  const __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(clamp_ps(t, _mm512_set1_ps(-1000.0f), _mm512_set1_ps(1000.0f))), _mm512_set1_epi32(zero_point));
  return _mm512_min_epi32(_mm512_max_epi32(code, _mm512_set1_epi32(-1)), _mm512_set1_epi32(256));
}

/// round_to_code() behind an activation's bounds in a few instructions, for values that fit int32: words for two vectors of rounded
/// values, as vpackssdw puts them together. A word is the code, or lies outside of 0..255, where vpackuswb saturates and ClipCount counts.
struct WordRounding {
  __m512i zero_point, floor, ceiling;  ///< bounds from bound_codes()

  template <Clamp kClamp>
  __m512i words(__m512i a, __m512i b) const {
    if (kClamp == Clamp::relu) return _mm512_min_epu16(_mm512_packus_epi32(a, b), ceiling);
    if (kClamp == Clamp::positive) return _mm512_packs_epi32(a, b);
    const __m512i v = _mm512_adds_epi16(_mm512_packs_epi32(a, b), zero_point);
    return kClamp == Clamp::open ? v : _mm512_min_epi16(_mm512_max_epi16(v, floor), ceiling);
  }
};

/// Counts words outside of 0..255, per dword. What exists is counted; of Clamp::relu, whose other words are 0 or codes, everything. Of
/// Clamp::positive, words above 255, per word, by a comparison, which does not compete with the products of tiles.
struct ClipCount {
  __m512i lanes = _mm512_setzero_si512();

  template <Clamp kClamp>
  void add(__m512i words, __mmask32 exist) {
    if (kClamp == Clamp::positive) {
      lanes = _mm512_mask_sub_epi16(lanes, _mm512_cmpgt_epi16_mask(words, _mm512_set1_epi16(255)), lanes, _mm512_set1_epi16(-1));
      return;
    }
    if (kClamp != Clamp::relu) words = _mm512_maskz_min_epu16(exist, words, _mm512_set1_epi16(256));
    lanes = _mm512_dpbusd_epi32(lanes, words, _mm512_set1_epi16(0x0100));  // their high bytes
  }
  void add(__mmask16 clipped) { lanes = _mm512_mask_sub_epi32(lanes, clipped, lanes, _mm512_set1_epi32(-1)); }
  /// The counts per word become such per dword.
  void widen() { lanes = _mm512_add_epi32(_mm512_and_si512(lanes, _mm512_set1_epi32(0xffff)), _mm512_srli_epi32(lanes, 16)); }
  /// The count; starts again.
  int64_t flush() {
    const int64_t count = _mm512_reduce_add_epi32(lanes);
    lanes = _mm512_setzero_si512();
    return count;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Moments

/// atomic_add of kernels.h, with internal linkage.
inline void add_to(int64_t* counter, int64_t value) { __atomic_fetch_add(counter, value, __ATOMIC_RELAXED); }

/// Running sums of codes, 64 at a time: sum q, and sum q (q - 128), whose second factor fits vpdpbusd's signed side.
/// A lane grows by at most 4 * 255 * 127 per vector: flush before kFlushAfter vectors.
struct CodeSums {
  static constexpr int64_t kFlushAfter = 16000;
  __m512i sum = _mm512_setzero_si512(), product = _mm512_setzero_si512();

  void add(__m512i q) {
    sum = _mm512_dpbusd_epi32(sum, q, _mm512_set1_epi8(1));
    product = _mm512_dpbusd_epi32(product, q, _mm512_xor_si512(q, _mm512_set1_epi8(-128)));
  }

  /// Adds to the totals and starts again.
  void flush(int64_t& total, int64_t& squares) {
    const auto wide = [](__m512i v) {
      return _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(v)),
                                                      _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1))));
    };
    const int64_t s = wide(sum);
    total += s;
    squares += wide(product) + 128 * s;
    sum = product = _mm512_setzero_si512();
  }
};

/// A set of codes: bit (code & 7) of row (code >> 3 & 1), byte (code >> 4).
struct CodeSet {
  alignas(16) uint8_t bits[2][16] = {};

  void insert(uint8_t code) { bits[code >> 3 & 1][code >> 4] = static_cast<uint8_t>(bits[code >> 3 & 1][code >> 4] | 1u << (code & 7)); }
  /// Which of 64 codes are in it.
  __mmask64 contains(__m512i codes) const {
    const auto table = [](const uint8_t* row) { return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(row))); };
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble), low = _mm512_and_si512(codes, nibble);
    const __m512i bit = _mm512_shuffle_epi8(_mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201)), low);
    const __mmask64 upper = _mm512_test_epi8_mask(codes, _mm512_set1_epi8(8));
    const __m512i row = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(table(bits[0]), high), upper, table(bits[1]), high);
    return _mm512_test_epi8_mask(row, bit);
  }
};

/// Adds the moments of every channel of codes [rows, channels] with `stride` codes from row to row.
inline void add_channel_moments(const uint8_t* q, int64_t rows, int64_t channels, int64_t stride, int64_t* sums, int64_t* squares) {
  constexpr int64_t kRows = 32768;  // 255^2 each stay below 2^32
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    const int64_t count = rows - begin < kRows ? rows - begin : kRows;
    for (int64_t c = 0; c < channels; c += 16) {
      const __mmask16 mask = first_lanes16(channels - c);
      const uint8_t* from = q + begin * stride + c;
      __m512i s = _mm512_setzero_si512(), ss = s;
      for (int64_t i = 0; i < count; ++i) {
        const __m512i v = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, from + i * stride));
        s = _mm512_add_epi32(s, v);
        ss = _mm512_add_epi32(ss, _mm512_madd_epi16(v, v));
      }
      alignas(64) uint32_t sum[16], square[16];
      _mm512_store_si512(sum, s);
      _mm512_store_si512(square, ss);
      for (int64_t i = 0; i < 16 && c + i < channels; ++i) {
        add_to(sums + c + i, sum[i]);
        add_to(squares + c + i, square[i]);
      }
    }
  }
}

}  // namespace
}  // namespace probquant
