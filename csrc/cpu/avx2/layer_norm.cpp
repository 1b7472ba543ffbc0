// LayerNorm of a row, AVX2: three passes over a row in L1.
#include "epilogue.h"
#include "sums.h"

namespace probquant {
namespace {

void layer_norm(const LayerNormProblem& p, int64_t row, QParams x, float* sum, float* y) {
  const int64_t at = row * p.channels;
  const auto n = static_cast<float>(p.channels);
  const __m256 scale = _mm256_set1_ps(x.scale), zero = _mm256_setzero_ps();
  const __m256i zero_point = _mm256_set1_epi32(x.zero_point);
  const float mean = sum_in_lanes(p.channels, [&](int64_t i, int64_t present, __m256 total) {
    const __m256 residual = p.residual ? load_floats(p.residual + at + i, present) : zero;
    __m256 value;
    if (p.q) {
      const __m256i centred = _mm256_sub_epi32(_mm256_cvtepu8_epi32(load_bytes16(p.q + at + i, present)), zero_point);
      value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(centred), scale, residual);
    } else {
      value = _mm256_add_ps(load_floats(p.x_float + at + i, present), residual);
    }
    store_floats(sum + i, value, present);
    return _mm256_add_ps(total, value);
  }) / n;
  const __m256 means = _mm256_set1_ps(mean);
  const float variance = sum_in_lanes(p.channels, [&](int64_t i, int64_t present, __m256 total) {
    const __m256 centred = _mm256_sub_ps(load_floats(sum + i, present), means);
    return _mm256_fmadd_ps(centred, centred, total);
  }) / n;
  const __m256 factor = _mm256_set1_ps(1.0f / __builtin_sqrtf(variance + p.eps)), one = _mm256_set1_ps(1.0f);
  for_each_vector(p.channels, [&](int64_t i, int64_t present) {
    const __m256 unit = _mm256_mul_ps(_mm256_sub_ps(load_floats(sum + i, present), means), factor);
    const __m256 weight = p.weight ? load_floats(p.weight + i, present) : one, bias = p.bias ? load_floats(p.bias + i, present) : zero;
    store_floats(y + i, _mm256_fmadd_ps(unit, weight, bias), present);
  });
}

}  // namespace

void install_layer_norm_avx2(Kernels& table) { table.layer_norm = layer_norm; }

}  // namespace probquant
