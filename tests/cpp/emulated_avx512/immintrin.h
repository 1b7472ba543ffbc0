// Stands in for the compiler's <immintrin.h> where csrc/cpu/avx512vnni is compiled without AVX-512 flags, so that the very
// files that are shipped run on a processor without AVX-512 (CMakeLists.txt beside this folder, PROBQUANT_EMULATE_AVX512).
//
// The types and most intrinsics are SIMDe's portable ones (https://github.com/simd-everywhere/simde, MIT; not part of this
// repository). Those that SIMDe lacks follow, each a transcript of its instruction's operation in the Intel 64 and IA-32
// Architectures Software Developer's Manual, volume 2. They are members of namespace probquant, where the kernels find
// them before the compiler's own. A kernel that uses one more fails to compile in this build: add it here.
#pragma once
#pragma GCC system_header
#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_NO_INLINE  // a register tile of dense.cpp would grow to more than a compiler digests
#include <simde/x86/avx512.h>

#include <cstdint>
#include <cstring>

// An alias of SIMDe 0.7 with too many parameters.
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
// Macros, of SIMDe or of GCC without optimization.
#undef _cvtu64_mask64
#undef _mm512_cvtps_ph
#undef _mm512_mask_cmp_ps_mask
#undef _mm512_mask_srli_epi16

namespace probquant {

#define EMULATED __attribute__((noinline, unused)) static

/// The lanes of a vector register as an array of T.
template <class T, class Vector>
struct Lanes {
  static constexpr int count = sizeof(Vector) / sizeof(T);
  T at[count];

  Lanes() = default;
  explicit Lanes(Vector v) { std::memcpy(at, &v, sizeof v); }
  Vector vector() const {
    Vector v;
    std::memcpy(&v, at, sizeof v);
    return v;
  }
};

/// dst[i] = mask[i] ? memory[i] : 0. Memory behind masked lanes is not touched (faults are suppressed).
template <class T, class Vector>
EMULATED Vector emulated_maskz_load(uint64_t mask, const void* memory) {
  Lanes<T, Vector> lanes{};
  for (int i = 0; i < lanes.count; ++i)
    if (mask >> i & 1) std::memcpy(&lanes.at[i], static_cast<const T*>(memory) + i, sizeof(T));
  return lanes.vector();
}
/// memory[i] = lane i, narrowed to T, where mask[i].
template <class T, class Lane, class Vector>
EMULATED void emulated_mask_store(void* memory, uint64_t mask, Vector v) {
  const Lanes<Lane, Vector> lanes(v);
  for (int i = 0; i < lanes.count; ++i)
    if (mask >> i & 1) {
      const auto value = static_cast<T>(lanes.at[i]);
      std::memcpy(static_cast<T*>(memory) + i, &value, sizeof(T));
    }
}
/// dst[i] = convert(a[i]); the result has as many lanes of To as it holds.
template <class To, class ToVector, class From, class FromVector, class Convert>
EMULATED ToVector emulated_convert(FromVector a, Convert convert) {
  const Lanes<From, FromVector> from(a);
  Lanes<To, ToVector> to;
  for (int i = 0; i < to.count; ++i) to.at[i] = convert(from.at[i]);
  return to.vector();
}
/// ((a[0] op a[n/2]) op ...): halves are joined until one lane is left. Only the order of float additions could matter.
template <class T, class Vector, class Join>
EMULATED T emulated_reduce(Vector a, Join join) {
  Lanes<T, Vector> lanes(a);
  for (int half = lanes.count / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes.at[i] = join(lanes.at[i], lanes.at[i + half]);
  return lanes.at[0];
}

// vmovdqu8, vmovdqu16, vmovdqu32, vmovups with a mask
EMULATED __m128i _mm_maskz_loadu_epi8(__mmask16 k, const void* p) { return emulated_maskz_load<uint8_t, __m128i>(k, p); }
EMULATED __m256i _mm256_maskz_loadu_epi8(__mmask32 k, const void* p) { return emulated_maskz_load<uint8_t, __m256i>(k, p); }
EMULATED __m256i _mm256_maskz_loadu_epi16(__mmask16 k, const void* p) { return emulated_maskz_load<uint16_t, __m256i>(k, p); }
EMULATED __m512i _mm512_maskz_loadu_epi8(__mmask64 k, const void* p) { return emulated_maskz_load<uint8_t, __m512i>(k, p); }
EMULATED __m512i _mm512_maskz_loadu_epi32(__mmask16 k, const void* p) { return emulated_maskz_load<uint32_t, __m512i>(k, p); }
EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 k, const void* p) { return emulated_maskz_load<float, __m512>(k, p); }
EMULATED void _mm_mask_storeu_epi8(void* p, __mmask16 k, __m128i a) { emulated_mask_store<uint8_t, uint8_t>(p, k, a); }
EMULATED void _mm256_mask_storeu_epi8(void* p, __mmask32 k, __m256i a) { emulated_mask_store<uint8_t, uint8_t>(p, k, a); }
EMULATED void _mm256_mask_storeu_epi16(void* p, __mmask16 k, __m256i a) { emulated_mask_store<uint16_t, uint16_t>(p, k, a); }
EMULATED void _mm512_mask_storeu_epi8(void* p, __mmask64 k, __m512i a) { emulated_mask_store<uint8_t, uint8_t>(p, k, a); }
EMULATED void _mm512_mask_storeu_epi32(void* p, __mmask16 k, __m512i a) { emulated_mask_store<uint32_t, uint32_t>(p, k, a); }
EMULATED void _mm512_mask_storeu_ps(void* p, __mmask16 k, __m512 a) { emulated_mask_store<float, float>(p, k, a); }
// vpmovdb, vpmovdw: truncation
EMULATED void _mm512_mask_cvtepi32_storeu_epi8(void* p, __mmask16 k, __m512i a) { emulated_mask_store<uint8_t, uint32_t>(p, k, a); }
EMULATED void _mm512_mask_cvtepi32_storeu_epi16(void* p, __mmask16 k, __m512i a) { emulated_mask_store<uint16_t, uint32_t>(p, k, a); }
EMULATED __m128i _mm512_cvtepi32_epi8(__m512i a) {
  return emulated_convert<uint8_t, __m128i, uint32_t>(a, [](uint32_t x) { return static_cast<uint8_t>(x); });
}

// vpmovzxbd, vpmovzxwd, vpmovzxdq, vpmovsxdq
EMULATED __m512i _mm512_cvtepu8_epi32(__m128i a) {
  return emulated_convert<uint32_t, __m512i, uint8_t>(a, [](uint8_t x) { return uint32_t{x}; });
}
EMULATED __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return emulated_convert<uint32_t, __m512i, uint16_t>(a, [](uint16_t x) { return uint32_t{x}; });
}
EMULATED __m512i _mm512_cvtepu32_epi64(__m256i a) {
  return emulated_convert<uint64_t, __m512i, uint32_t>(a, [](uint32_t x) { return uint64_t{x}; });
}
EMULATED __m512i _mm512_cvtepi32_epi64(__m256i a) {
  return emulated_convert<int64_t, __m512i, int32_t>(a, [](int32_t x) { return int64_t{x}; });
}

// vcvtdq2ps, vcvtps2dq: rounded to nearest even; what does not fit, and NaN, becomes 0x80000000
EMULATED __m512 _mm512_cvtepi32_ps(__m512i a) {
  return emulated_convert<float, __m512, int32_t>(a, [](int32_t x) { return static_cast<float>(x); });
}
EMULATED __m512i _mm512_cvtps_epi32(__m512 a) {
  return emulated_convert<int32_t, __m512i, float>(a, [](float x) {
    return x >= -0x1p31f && x < 0x1p31f ? static_cast<int32_t>(__builtin_rintf(x)) : INT32_MIN;
  });
}
EMULATED __m512i _mm512_mask_cvtps_epi32(__m512i source, __mmask16 k, __m512 a) {
  return _mm512_mask_mov_epi32(source, k, _mm512_cvtps_epi32(a));
}
// vcvtph2ps, vcvtps2ph, in two halves of F16C
EMULATED __m512 _mm512_cvtph_ps(__m256i a) {
  Lanes<__m256, __m512> to;
  to.at[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(a));
  to.at[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1));
  return to.vector();
}
EMULATED __m256i _mm512_cvtps_ph(__m512 a, int rounding) {
  static_assert((_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) == 8, "the one rounding in use");
  if (rounding != 8) __builtin_trap();
  const Lanes<__m256, __m512> from(a);
  Lanes<__m128i, __m256i> to;
  for (int i = 0; i < 2; ++i) to.at[i] = _mm256_cvtps_ph(from.at[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return to.vector();
}

// vcmpps, vpsrlw, vpackuswb with a mask; kmovq, vmovd, vmovdqa
#define _mm512_mask_cmp_ps_mask(k, a, b, predicate) static_cast<__mmask16>((k) & _mm512_cmp_ps_mask(a, b, predicate))
EMULATED __m512i _mm512_mask_srli_epi16(__m512i source, __mmask32 k, __m512i a, unsigned count) {
  return _mm512_mask_blend_epi16(k, source, _mm512_srli_epi16(a, count));
}
EMULATED __m512i _mm512_maskz_packus_epi16(__mmask64 k, __m512i a, __m512i b) { return _mm512_maskz_mov_epi8(k, _mm512_packus_epi16(a, b)); }
EMULATED __mmask64 _cvtu64_mask64(uint64_t a) { return a; }
EMULATED int _mm512_cvtsi512_si32(__m512i a) { return Lanes<int32_t, __m512i>(a).at[0]; }
EMULATED __m512i _mm512_zextsi128_si512(__m128i a) { return _mm512_inserti32x4(_mm512_setzero_si512(), a, 0); }

// Sequences of instructions, as documented in the Intel Intrinsics Guide. Minimum and maximum return their second operand
// when one is NaN.
EMULATED int _mm512_reduce_add_epi32(__m512i a) {
  return static_cast<int>(emulated_reduce<uint32_t>(a, [](uint32_t x, uint32_t y) { return x + y; }));
}
EMULATED long long _mm512_reduce_add_epi64(__m512i a) {
  return static_cast<long long>(emulated_reduce<uint64_t>(a, [](uint64_t x, uint64_t y) { return x + y; }));
}
EMULATED unsigned _mm512_reduce_max_epu32(__m512i a) {
  return emulated_reduce<uint32_t>(a, [](uint32_t x, uint32_t y) { return x > y ? x : y; });
}
EMULATED float _mm512_reduce_min_ps(__m512 a) {
  return emulated_reduce<float>(a, [](float x, float y) { return x < y ? x : y; });
}
EMULATED float _mm512_reduce_max_ps(__m512 a) {
  return emulated_reduce<float>(a, [](float x, float y) { return x > y ? x : y; });
}

#undef EMULATED

}  // namespace probquant
