// Rows of floats, 8 at a time, AVX2: their ends, and sums in the order of numerics.h's kSumLanes. Everything has internal linkage.
#pragma once
#include "epilogue.h"

namespace probquant {
namespace {

inline __m256 load_floats(const float* from, int64_t n) { return _mm256_castsi256_ps(load_bytes32(from, 4 * n)); }
inline void store_floats(float* to, __m256 v, int64_t n) { store_bytes32(to, _mm256_castps_si256(v), 4 * n); }
/// v with zeros in the lanes behind the first n.
inline __m256 keep_floats(__m256 v, int64_t n) { return _mm256_castsi256_ps(keep_bytes(_mm256_castps_si256(v), 4 * n)); }

/// visit(i, present) for every vector of [0, count); `present` is below 8 in the last one only.
template <class Visit>
inline void for_each_vector(int64_t count, Visit visit) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) visit(i, int64_t{8});
  if (i < count) visit(i, count - i);
}

/// What total starts from zero becomes by total = step(i, present, total), lanes joined as join_lanes does. The step may put
/// anything into lanes that are not present.
template <class Step>
inline float sum_in_lanes(int64_t count, Step step) {
  __m256 lanes[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) lanes[j] = step(i + 8 * j, int64_t{8}, lanes[j]);
  for (int j = 0; i < count; ++j, i += 8) {
    const int64_t present = count - i < 8 ? count - i : 8;
    const __m256 total = step(i, present, lanes[j]);
    lanes[j] = present == 8 ? total : _mm256_blendv_ps(lanes[j], total, keep_floats(_mm256_set1_ps(-1.0f), present));
  }
  const __m256 eight = _mm256_add_ps(_mm256_add_ps(lanes[0], lanes[2]), _mm256_add_ps(lanes[1], lanes[3]));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace
}  // namespace probquant
