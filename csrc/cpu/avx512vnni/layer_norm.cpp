// LayerNorm of a row, AVX-512: three passes over a row in L1.
#include "sums.h"

namespace probquant {
namespace {

void layer_norm(const LayerNormProblem& p, int64_t row, QParams x, float* sum, float* y) {
  const int64_t at = row * p.channels;
  const auto n = static_cast<float>(p.channels);
  const __m512 scale = _mm512_set1_ps(x.scale), zero = _mm512_setzero_ps();
  const __m512i zero_point = _mm512_set1_epi32(x.zero_point);
  const float mean = sum_in_lanes(p.channels, [&](int64_t i, __mmask16 lanes, __m512 total) {
    const __m512 residual = p.residual ? _mm512_maskz_loadu_ps(lanes, p.residual + at + i) : zero;
    __m512 value;
    if (p.q) {
      const __m512i centred = _mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, p.q + at + i)), zero_point);
      value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(centred), scale, residual);
    } else {
      value = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, p.x_float + at + i), residual);
    }
    _mm512_mask_storeu_ps(sum + i, lanes, value);
    return _mm512_add_ps(total, value);
  }) / n;
  const __m512 means = _mm512_set1_ps(mean);
  const float variance = sum_in_lanes(p.channels, [&](int64_t i, __mmask16 lanes, __m512 total) {
    const __m512 centred = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, sum + i), means);
    return _mm512_fmadd_ps(centred, centred, total);
  }) / n;
  const __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(variance + p.eps)), one = _mm512_set1_ps(1.0f);
  for_each_vector(p.channels, [&](int64_t i, __mmask16 lanes) {
    const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, sum + i), means), factor);
    const __m512 weight = p.weight ? _mm512_maskz_loadu_ps(lanes, p.weight + i) : one, bias = p.bias ? _mm512_maskz_loadu_ps(lanes, p.bias + i) : zero;
    _mm512_mask_storeu_ps(y + i, lanes, _mm512_fmadd_ps(unit, weight, bias));
  });
}

}  // namespace

void install_layer_norm_avx512vnni(Kernels& table) { table.layer_norm = layer_norm; }

}  // namespace probquant
