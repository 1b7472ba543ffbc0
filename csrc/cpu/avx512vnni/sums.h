// Rows of floats, 16 at a time, AVX-512: their ends, sums in the order of numerics.h's kSumLanes, and what attention makes of its logits. Everything has
// internal linkage.
#pragma once
#include "epilogue.h"

namespace probquant {
namespace {

/// visit(i, lanes that exist) for every vector of [0, count).
template <class Visit>
inline void for_each_vector(int64_t count, Visit visit) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) visit(i, static_cast<__mmask16>(0xffff));
  if (i < count) visit(i, first_lanes16(count - i));
}

/// What total starts from zero becomes by total = step(i, lanes, total), lanes joined as join_lanes does. The step may put
/// anything into lanes that do not exist.
template <class Step>
inline float sum_in_lanes(int64_t count, Step step) {
  __m512 even = _mm512_setzero_ps(), odd = even;
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    even = step(i, static_cast<__mmask16>(0xffff), even);
    odd = step(i + 16, static_cast<__mmask16>(0xffff), odd);
  }
  if (i < count) {
    const __mmask16 lanes = first_lanes16(count - i);
    even = _mm512_mask_mov_ps(even, lanes, step(i, lanes, even));
  }
  if (i + 16 < count) {
    const __mmask16 lanes = first_lanes16(count - i - 16);
    odd = _mm512_mask_mov_ps(odd, lanes, step(i + 16, lanes, odd));
  }
  const __m512 all = _mm512_add_ps(even, odd);
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all), _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(all), 1)));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/// An attention's weights before they become codes: their largest, and the sum of the exponentials.
struct Weighed {
  float ceiling, total;
};

/// exp((t - largest) * scale) * value scale of every key, in place of its t.
inline Weighed weigh(float* w, int64_t keys, const float* value_scale, float scale, __m512 largest) {
  __m512 most = _mm512_setzero_ps();
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest)), factor = _mm512_set1_ps(scale);
  const float total = sum_in_lanes(keys, [&](int64_t j, __mmask16 lanes, __m512 partial) {
    const __m512 e = exp_ps(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(w + j), top), factor));
    const __m512 weight = _mm512_mul_ps(e, _mm512_maskz_loadu_ps(lanes, value_scale + j));  // zeros behind the end
    _mm512_storeu_ps(w + j, weight);
    most = _mm512_max_ps(weight, most);
    return _mm512_add_ps(partial, e);
  });
  return {_mm512_reduce_max_ps(most), total};
}

}  // namespace
}  // namespace probquant
