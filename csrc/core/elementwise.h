// What add, mul, activation and concat make of codes and of their inputs' parameters: shared by CPU and CUDA, csrc/NUMERICS.md's table
// "Ops without weights" line by line.
#pragma once
#include "surrogate.h"

namespace probquant {

/// Real value of a code of x.
PROBQUANT_HOST_DEVICE inline float code_value(int32_t q, const SampleEpilogue& e) { return e.x_scale * static_cast<float>(q - e.x_zero_point); }

/// A real value as a code of the output; an invalid sample has code 0.
PROBQUANT_HOST_DEVICE inline Code value_to_code(float value, const SampleEpilogue& e) {
  return e.valid ? round_to_code(value * e.inverse_scale, e.y_zero_point) : Code{0, false};
}

/// activation: what a code of x becomes.
PROBQUANT_HOST_DEVICE inline float activation_value(int32_t q, const SampleEpilogue& e, Activation kind, float activation_min, float activation_max) {
  const float v = code_value(q, e);
  return kind == Activation::clamp ? clamp_f(v, activation_min, activation_max) : activate(kind, v);
}

/// add: the sum of two codes, over 1.
PROBQUANT_HOST_DEVICE inline float add_value(int32_t a, int32_t b, const SampleEpilogue& e, float activation_min, float activation_max) {
  return layer_value(a - e.x_zero_point, {1.0f, 0.0f}, b - e.residual_zero_point, e, Activation::clamp, activation_min, activation_max, true);
}

/// add: the sum of two codes, requantized.
PROBQUANT_HOST_DEVICE inline Code add_code(int32_t a, int32_t b, const SampleEpilogue& e) {
  return requantize(a - e.x_zero_point, {1.0f, 0.0f}, b - e.residual_zero_point, e, Activation::clamp, true);
}

/// add, gaussian: both laws from the stats over `count` values, cut to what codes can add up to. `e`: valid inputs.
PROBQUANT_HOST_DEVICE inline QParams add_law_qparams(const int64_t* a_stats, const int64_t* b_stats, int64_t count, const SampleEpilogue& e,
                                                     const float* predictor, float activation_min, float activation_max) {
  const Law law = add_laws(law_of_stats(a_stats[kStatsSum], a_stats[kStatsSquares], count, e.x_zero_point, e.x_scale),
                           law_of_stats(b_stats[kStatsSum], b_stats[kStatsSquares], count, e.residual_zero_point, e.residual_scale), predictor[kPredictorRho]);
  float lo, hi;
  law_range(law, predictor[kPredictorAlpha], predictor[kPredictorBeta], lo, hi);
  const float smallest = fmaf(static_cast<float>(-e.residual_zero_point), e.residual_scale, code_value(0, e));
  const float largest = fmaf(static_cast<float>(255 - e.residual_zero_point), e.residual_scale, code_value(255, e));
  if (is_finite(lo) && is_finite(hi)) lo = clamp_f(lo, smallest, largest), hi = clamp_f(hi, smallest, largest);
  activation_range(Activation::clamp, activation_min, activation_max, {}, lo, hi);
  return qparams_from_range(lo, hi);
}

/// mul: constants but for the output's. x_scale is the product's, s_a s_b; the second factor's zero point is the residual's.
PROBQUANT_HOST_DEVICE inline SampleEpilogue mul_inputs(float a_scale, int32_t a_zero_point, float b_scale, int32_t b_zero_point) {
  const bool valid = valid_scale(a_scale) && valid_scale(b_scale);
  return sample_inputs(valid ? a_scale * b_scale : kNan, a_zero_point, 1.0f, b_zero_point);
}

/// mul: the product of two codes, over x_scale.
PROBQUANT_HOST_DEVICE inline float mul_value(int32_t a, int32_t b, const SampleEpilogue& e) {
  return static_cast<float>((a - e.x_zero_point) * (b - e.residual_zero_point));
}

/// mul: the product of two codes, requantized.
PROBQUANT_HOST_DEVICE inline Code mul_code(int32_t a, int32_t b, const SampleEpilogue& e) {
  return e.valid ? round_to_code(clamp_f(mul_value(a, b, e) * e.multiplier, e.activation_lo, e.activation_hi), e.y_zero_point) : Code{0, false};
}

/// mul, gaussian: the law of the product from both stats, over a_count and b_count values, cut to what codes can give. `e`: valid inputs.
PROBQUANT_HOST_DEVICE inline QParams mul_law_qparams(const int64_t* a_stats, int64_t a_count, float a_scale, const int64_t* b_stats, int64_t b_count,
                                                     float b_scale, const SampleEpilogue& e, const float* predictor) {
  const Law law = product_law(law_of_stats(a_stats[kStatsSum], a_stats[kStatsSquares], a_count, e.x_zero_point, a_scale),
                              law_of_stats(b_stats[kStatsSum], b_stats[kStatsSquares], b_count, e.residual_zero_point, b_scale));
  float lo, hi, least = kInfinity, largest = -kInfinity;
  law_range(law, predictor[kPredictorAlpha], predictor[kPredictorBeta], lo, hi);
  for (int32_t a = 0; a <= 255; a += 255)
    for (int32_t b = 0; b <= 255; b += 255) {
      const float end = mul_value(a, b, e) * e.x_scale;
      least = min_f(end, least), largest = max_f(end, largest);
    }
  if (is_finite(lo) && is_finite(hi)) lo = clamp_f(lo, least, largest), hi = clamp_f(hi, least, largest);
  return qparams_from_range(lo, hi);
}

/// concat: what is known of a sample's inputs, joined in any order.
struct ConcatInputs {
  bool valid = true, equal = true;  ///< all scales are valid; all parameters are the first input's
  float lo = kInfinity, hi = -kInfinity;

  PROBQUANT_HOST_DEVICE void add(float scale, int32_t zero_point, QParams first) {
    const SampleEpilogue e = sample_inputs(scale, zero_point, 1.0f, 0);
    valid = valid && e.valid;
    equal = equal && scale == first.scale && e.x_zero_point == clamp_zero_point(first.zero_point);
    lo = min_f(code_value(0, e), lo);
    hi = max_f(code_value(255, e), hi);
  }
  /// Of the output; `fixed` is a predictor or null.
  PROBQUANT_HOST_DEVICE QParams qparams(QParams first, const float* fixed) const {
    return fixed != nullptr ? fixed_qparams(fixed)
           : !valid         ? QParams{kNan, 0}
           : equal          ? QParams{first.scale, clamp_zero_point(first.zero_point)}
                            : qparams_from_range(lo, hi);
  }
};

/// concat: constants of one input, for an output with these parameters.
PROBQUANT_HOST_DEVICE inline SampleEpilogue concat_epilogue(float scale, int32_t zero_point, bool all_valid, QParams y) {
  SampleEpilogue e = sample_inputs(all_valid ? scale : kNan, zero_point, 1.0f, 0);
  set_output(e, y, -kInfinity, kInfinity);
  return e;
}

}  // namespace probquant
