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

/// Sums of the one field that is a whole sample of `count` values, from its stats.
PROBQUANT_HOST_DEVICE inline PatchSums patch_sums_of_sample(int64_t sum, int64_t squares, int64_t count, int32_t zero_point) {
  const int64_t z = zero_point, centred = sum - count * z;
  return {1, centred, squares - 2 * z * sum + count * z * z, centred * centred};
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

/// Sums over input channels of a layer's laws (one per input channel), still in units of codes.
struct ChannelSums {
  double mean, within, between;
};

/// Of the channel's `count` values: T1 = sum (q - z), and n^2 times their variance.
PROBQUANT_HOST_DEVICE inline void channel_moments(int64_t sum, int64_t squares, int64_t count, int32_t zero_point, double& t1, double& variance) {
  const int64_t z = zero_point;
  t1 = static_cast<double>(sum - count * z);
  const double t2 = static_cast<double>(squares - 2 * z * sum + count * z * z);
  variance = static_cast<double>(count) * t2 - t1 * t1;
  variance = variance > 0.0 ? variance : 0.0;
}

/// What one input channel adds to the sums. Its weights (over all outputs and taps) have the mean sum mean_w over an output's
/// taps, and the mean sum of squares square_w; `share` = 1 / taps.
PROBQUANT_HOST_DEVICE inline ChannelSums channel_terms(int64_t sum, int64_t squares, int64_t count, int32_t zero_point, double share, float mean_w,
                                                       float square_w) {
  double t1, variance;
  channel_moments(sum, squares, count, zero_point, t1, variance);
  const double w = static_cast<double>(mean_w), w2 = static_cast<double>(square_w);
  double spread = w2 - w * w * share;  // variance of the weights, summed over the taps
  spread = spread > 0.0 ? spread : 0.0;
  return {w * t1, w2 * variance, spread * (t1 * t1)};
}

PROBQUANT_HOST_DEVICE inline void operator+=(ChannelSums& a, const ChannelSums& b) {
  a.mean += b.mean;
  a.within += b.within;
  a.between += b.between;
}

/// Sums over all channels: in kChannelLanes interleaved sums that are then halved, so that loops vectorise.
inline constexpr int64_t kChannelLanes = 8;
PROBQUANT_HOST_DEVICE inline ChannelSums channel_sums(const int64_t* sums, const int64_t* squares, int64_t channels, int64_t count,
                                                      int32_t zero_point, int64_t taps, const float* mean_w, const float* square_w) {
  ChannelSums lanes[kChannelLanes] = {};
  const double share = 1.0 / static_cast<double>(taps);
  const auto add = [&](int64_t c, int64_t lane) { lanes[lane] += channel_terms(sums[c], squares[c], count, zero_point, share, mean_w[c], square_w[c]); };
  int64_t c = 0;
  for (; c + kChannelLanes <= channels; c += kChannelLanes)
    for (int64_t lane = 0; lane < kChannelLanes; ++lane) add(c + lane, lane);
  for (int64_t lane = 0; c + lane < channels; ++lane) add(c + lane, lane);
  for (int64_t half = kChannelLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

/// Law of all outputs: what varies over the positions of a channel and, between channels, its mean; `within` and `between`
/// are calibrated factors on the two (taps and channels are not independent).
PROBQUANT_HOST_DEVICE inline Law channel_law(ChannelSums s, int64_t count, float scale, float mean_b, float var_b, float within, float between) {
  const double n = static_cast<double>(count);
  const float squared = scale * scale;
  const float inner = squared * static_cast<float>(s.within / (n * n)), outer = squared * static_cast<float>(s.between / (n * n));
  return {fmaf(scale, static_cast<float>(s.mean / n), mean_b), fmaf(within, inner, fmaf(between, outer, var_b))};
}

/// Law of a depthwise layer's output channel: its mean is exact but for the border.
PROBQUANT_HOST_DEVICE inline Law depthwise_law(int64_t sum, int64_t squares, int64_t count, int32_t zero_point, float scale, float mean_w,
                                               float square_w, float bias) {
  const double n = static_cast<double>(count);
  double t1, variance;
  channel_moments(sum, squares, count, zero_point, t1, variance);
  return {fmaf(mean_w, scale * static_cast<float>(t1 / n), bias), square_w * (scale * scale * static_cast<float>(variance / (n * n)))};
}

/// Law of a sum of two tensors with correlation rho.
PROBQUANT_HOST_DEVICE inline Law add_laws(Law a, Law b, float rho) {
  const float covariance = sqrtf(a.variance * b.variance);
  const float variance = fmaf(2.0f * rho, covariance, a.variance + b.variance);
  return {a.mean + b.mean, max_f(variance, 0.0f)};
}

/// A product of two independent values.
PROBQUANT_HOST_DEVICE inline Law product_law(Law a, Law b) {
  const float crossed = fmaf(a.mean * a.mean, b.variance, (b.mean * b.mean) * a.variance);
  return {a.mean * b.mean, fmaf(a.variance, b.variance, crossed)};
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
constexpr int64_t law_per_output_predictor_size(int64_t out_channels) { return kPredictorLaw + 3 * out_channels; }
inline constexpr int64_t kPredictorChannels = kPredictorLaw + 4;  ///< behind mean_b, var_b, within, between
constexpr int64_t channel_predictor_size(int64_t in_channels) { return kPredictorChannels + 2 * in_channels; }

}  // namespace probquant
