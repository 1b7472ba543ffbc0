// The Gaussian surrogate (arXiv 2505.10689): what a layer's output will look like, known from its input.
// One inline function that CPU and CUDA share, so that both predict the same bits. Integer sums are centred and
// divided in double (exact enough that no cancellation shows), then everything is float32 in a fixed order.
#pragma once
#include "numerics.h"

namespace probquant {

/// Sums over sampled receptive fields, q centred on the zero point: T1 = sum (q - z), T2 = sum (q - z)^2 per field.
/// Padding contributes zeros. Every field counts the same number of weights.
struct PatchSums {
  int64_t count = 0;          ///< fields
  int64_t sum = 0;            ///< sum of T1
  int64_t squares = 0;        ///< sum of T2
  int64_t sum_of_squared = 0; ///< sum of T1^2
};

/// Means over the fields, in units of x: E[S1], E[S2], Var[S1].
struct FieldMoments {
  float s1, s2, var_s1;
};

PROBQUANT_HOST_DEVICE inline FieldMoments field_moments(const PatchSums& p, float scale) {
  const double n = static_cast<double>(p.count);
  const double mean = static_cast<double>(p.sum) / n;
  double variance = static_cast<double>(p.sum_of_squared) / n - mean * mean;
  variance = variance > 0.0 ? variance : 0.0;
  const float squared = scale * scale;
  return {scale * static_cast<float>(mean), squared * static_cast<float>(static_cast<double>(p.squares) / n), squared * static_cast<float>(variance)};
}

/// gamma = 0: fields of `weights` independent draws from an input with these moments over `count` values (borders ignored).
PROBQUANT_HOST_DEVICE inline FieldMoments field_moments_of_input(int64_t sum, int64_t squares, int64_t count, int32_t zero_point, int64_t weights,
                                                                 float scale) {
  const int64_t z = zero_point;
  const double n = static_cast<double>(count), k = static_cast<double>(weights);
  const double mean = static_cast<double>(sum - count * z) / n;
  const double second = static_cast<double>(squares - 2 * z * sum + count * z * z) / n;
  double variance = second - mean * mean;
  variance = variance > 0.0 ? variance : 0.0;
  const float squared = scale * scale;
  return {scale * static_cast<float>(k * mean), squared * static_cast<float>(k * second), squared * static_cast<float>(k * variance)};
}

/// Mean and variance of a tensor.
struct Law {
  float mean, variance;
};

/// Law of a quantized tensor from its stats: what a residual brings.
PROBQUANT_HOST_DEVICE inline Law law_of_stats(int64_t sum, int64_t squares, int64_t count, int32_t zero_point, float scale) {
  const FieldMoments m = field_moments_of_input(sum, squares, count, zero_point, 1, scale);
  return {m.s1, m.var_s1};
}

/// E[y] = mean_w S1 + b and Var[y] = var_w S2 + var_b, merged over the fields by the law of total variance.
PROBQUANT_HOST_DEVICE inline Law gaussian_law(const FieldMoments& m, float mean_w, float var_w, float mean_b, float var_b) {
  const float mean = fmaf(mean_w, m.s1, mean_b);
  const float within = fmaf(var_w, m.s2, var_b);
  return {mean, fmaf(mean_w * mean_w, m.var_s1, within)};
}

/// Law of a sum of two tensors with correlation rho.
PROBQUANT_HOST_DEVICE inline Law add_laws(Law a, Law b, float rho) {
  const float covariance = sqrtf(a.variance * b.variance);
  const float variance = fmaf(2.0f * rho, covariance, a.variance + b.variance);
  return {a.mean + b.mean, max_f(variance, 0.0f)};
}

/// [mean - alpha sigma, mean + beta sigma]
PROBQUANT_HOST_DEVICE inline void law_range(Law law, float alpha, float beta, float& lo, float& hi) {
  const float sigma = sqrtf(law.variance);
  lo = fmaf(-alpha, sigma, law.mean);
  hi = fmaf(beta, sigma, law.mean);
}

// Positions in a gaussian predictor.
inline constexpr int64_t kPredictorAlpha = 0, kPredictorBeta = 1, kPredictorRho = 2, kPredictorLaw = 3;
inline constexpr int64_t kGaussianPredictorSize = 7;
constexpr int64_t gaussian_channel_predictor_size(int64_t out_channels) { return kPredictorLaw + 3 * out_channels; }

}  // namespace probquant
