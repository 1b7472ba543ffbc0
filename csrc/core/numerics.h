// The arithmetic of csrc/NUMERICS.md, written once: every scalar kernel on the CPU and every CUDA kernel calls these, and
// every vector kernel must give their bits. Explicit fused multiply-adds, no contraction (-ffp-contract=off,
// nvcc -fmad=false), IEEE division and square root, values kept normal.
#pragma once
#include <probquant/types.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PROBQUANT_HOST_DEVICE __host__ __device__
#else
#define PROBQUANT_HOST_DEVICE
#endif

namespace probquant {

constexpr float kMinScale = 8.673617379884035e-19f;  // 2^-60
constexpr float kInfinity = __builtin_inff();
constexpr float kNan = __builtin_nanf("");

// min and max as vminps and vmaxps have them: the second operand wins when a NaN is involved.
PROBQUANT_HOST_DEVICE inline float min_f(float a, float b) { return a < b ? a : b; }
PROBQUANT_HOST_DEVICE inline float max_f(float a, float b) { return a > b ? a : b; }
PROBQUANT_HOST_DEVICE inline float clamp_f(float t, float lo, float hi) { return min_f(max_f(t, lo), hi); }
PROBQUANT_HOST_DEVICE inline bool is_finite(float x) { return std::fabs(x) < kInfinity; }

/// Scale and zero point of one sample. An invalid one has scale NaN and zero point 0.
struct QParams {
  float scale;
  int32_t zero_point;
};

PROBQUANT_HOST_DEVICE inline bool valid_scale(float scale) { return scale > 0.0f && scale < kInfinity; }
PROBQUANT_HOST_DEVICE inline int32_t clamp_zero_point(int32_t z) { return z < 0 ? 0 : z > 255 ? 255 : z; }

/// Range to parameters. A range that is not finite makes the sample invalid.
PROBQUANT_HOST_DEVICE inline QParams qparams_from_range(float lo, float hi) {
  if (!is_finite(lo) || !is_finite(hi)) return {kNan, 0};
  lo = min_f(lo, 0.0f);
  hi = max_f(hi, 0.0f);
  const float scale = max_f((hi - lo) / 255.0f, kMinScale);
  if (!valid_scale(scale)) return {kNan, 0};
  return {scale, static_cast<int32_t>(clamp_f(rintf(-lo / scale), 0.0f, 255.0f))};
}

/// Parameters given by a Strategy::fixed predictor [scale, zero_point].
PROBQUANT_HOST_DEVICE inline QParams fixed_qparams(const float* predictor) {
  return {predictor[0], static_cast<int32_t>(clamp_f(rintf(predictor[1]), 0.0f, 255.0f))};
}

/// What one rounding gives: the code and whether it saturated.
struct Code {
  uint8_t q;
  bool clipped;
};

/// The outermost t that round to a code: half a step beyond the codes, less what an even neighbour takes in a tie.
/// (1 - 2^-24) x is the float next to x.
PROBQUANT_HOST_DEVICE constexpr float lowest_unclipped(int32_t zero_point) {
  return (-0.5f - static_cast<float>(zero_point)) * ((zero_point & 1) == 0 ? 1.0f : 0.99999994f);
}
PROBQUANT_HOST_DEVICE constexpr float highest_unclipped(int32_t zero_point) {
  return (255.5f - static_cast<float>(zero_point)) * ((zero_point & 1) == 0 ? 0.99999994f : 1.0f);
}

/// t in units of the output's scale, relative to its zero point. Clipped is what rounds to no code, or is NaN.
PROBQUANT_HOST_DEVICE inline Code round_to_code(float t, int32_t zero_point) {
  const float z = static_cast<float>(zero_point);
  const float lo = -z, hi = 255.0f - z;
  const bool inside = t >= lowest_unclipped(zero_point) && t <= highest_unclipped(zero_point);
  return {static_cast<uint8_t>(static_cast<int32_t>(rintf(clamp_f(t, lo, hi))) + zero_point), !inside};
}

// ---------------------------------------------------------------------------------------------------------------------
// Activations

// Polynomials, from the highest power down. Types, since no device function reads an array of the host's.

/// (e^r - 1 - r) / r^2 for |r| <= log(2) / 2: Cephes' minimax polynomial.
struct ExpPolynomial {
  static constexpr int kTerms = 6;
  float of[kTerms] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};

/// p of the normal distribution function 0.5 + a p(a^2), in powers of a^2 - 12.5, whose terms do not cancel: the one whose gelu errs least, less than
/// 6e-7 (1 + |x|), among those that make it 0 and x, exactly, from 5 on.
struct GeluPolynomial {
  static constexpr int kTerms = 12;
  float of[kTerms] = {-1.04934380e-15f, 3.58216772e-14f, -4.87572547e-13f, 8.08780820e-12f,
                      -2.16874199e-10f, 4.48719595e-09f, -7.72570701e-08f, 1.28198008e-06f,
                      -2.06829100e-05f, 3.29798233e-04f, -5.62385423e-03f, 1.41363665e-01f};
};

template <class Polynomial>
PROBQUANT_HOST_DEVICE inline float horner_f(float x) {
  constexpr Polynomial p{};
  float sum = p.of[0];
  for (int i = 1; i < Polynomial::kTerms; ++i) sum = fmaf(sum, x, p.of[i]);
  return sum;
}

/// e^x for x in [-87, 87] (clamped to it): Cody-Waite reduction, within 2 ulp.
PROBQUANT_HOST_DEVICE inline float exp_f(float x) {
  x = clamp_f(x, -87.0f, 87.0f);
  const float n = rintf(x * 1.44269504088896341f);
  float r = fmaf(n, -0.693359375f, x);
  r = fmaf(n, 2.12194440e-4f, r);
  const float p = fmaf(horner_f<ExpPolynomial>(r), r * r, r) + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

/// x times the normal distribution function of x.
PROBQUANT_HOST_DEVICE inline float gelu_f(float x) {
  const float a = clamp_f(x, -5.0f, 5.0f);
  return x * (a * horner_f<GeluPolynomial>(fmaf(a, a, -12.5f)) + 0.5f);
}

PROBQUANT_HOST_DEVICE inline float sigmoid_f(float x) { return 1.0f / (1.0f + exp_f(-x)); }

/// The curved activations. Activation::clamp is not one: its bounds act on the requantized value (see requantize).
PROBQUANT_HOST_DEVICE inline float activate(Activation kind, float x) {
  switch (kind) {
    case Activation::silu: return x * sigmoid_f(x);
    case Activation::gelu: return gelu_f(x);
    case Activation::hardswish: return x * (clamp_f(x + 3.0f, 0.0f, 6.0f) * 0.166666667f);
    case Activation::sigmoid: return sigmoid_f(x);
    case Activation::clamp: break;
  }
  return x;
}

/// Where silu, gelu and hardswish have their minimum.
PROBQUANT_HOST_DEVICE inline float activation_argmin(Activation kind) {
  return kind == Activation::silu ? -1.2784645f : kind == Activation::gelu ? -0.7517916f : -1.5f;
}

/// The extremes of 1 / r_o over the channels of an output profile.
struct ProfileSpan {
  float least_inverse = 1.0f, largest_inverse = 1.0f;
};

PROBQUANT_HOST_DEVICE inline bool has_profile(ProfileSpan span) { return span.least_inverse != 1.0f || span.largest_inverse != 1.0f; }

/// Image of all numbers under an activation, over the output's profile.
PROBQUANT_HOST_DEVICE inline void activation_bounds(Activation kind, float activation_min, float activation_max, ProfileSpan span, float& least,
                                                    float& largest) {
  least = kind == Activation::clamp ? activation_min : kind == Activation::sigmoid ? 0.0f : activate(kind, activation_argmin(kind));
  largest = kind == Activation::clamp ? activation_max : kind == Activation::sigmoid ? 1.0f : kInfinity;
  least *= least < 0.0f ? span.largest_inverse : span.least_inverse;
  largest *= largest > 0.0f ? span.largest_inverse : span.least_inverse;
}

/// Image of [lo, hi], a range over the output's profile, under an activation: cut to the activation's bounds, which is exact
/// for clamp; without a profile exact for the curved ones too, by their single minimum.
PROBQUANT_HOST_DEVICE inline void activation_range(Activation kind, float activation_min, float activation_max, ProfileSpan span, float& lo, float& hi) {
  if (!is_finite(lo) || !is_finite(hi)) return;  // stays invalid
  if (kind == Activation::clamp || has_profile(span)) {
    float least, largest;
    activation_bounds(kind, activation_min, activation_max, span, least, largest);
    lo = clamp_f(lo, least, largest);
    hi = clamp_f(hi, least, largest);
    return;
  }
  const float at_lo = activate(kind, lo), at_hi = activate(kind, hi);
  const float argmin = activation_argmin(kind);
  const bool dips = kind != Activation::sigmoid && lo < argmin && argmin < hi;
  lo = dips ? activate(kind, argmin) : min_f(at_lo, at_hi);
  hi = max_f(at_lo, at_hi);
}

// ---------------------------------------------------------------------------------------------------------------------
// Requantization in an epilogue

/// Per-sample constants of a layer's epilogue.
struct SampleEpilogue {
  bool valid;                 ///< all scales are finite and positive
  int32_t x_zero_point;
  int32_t residual_zero_point;
  int32_t y_zero_point;
  float x_scale;              ///< s_x
  float residual_scale;       ///< s_res
  float inverse_scale;        ///< i_n = 1 / s_y
  float multiplier;           ///< a_n = s_x * i_n
  float residual_multiplier;  ///< s_res * i_n
  float activation_lo;        ///< activation_min * i_n
  float activation_hi;        ///< activation_max * i_n
};

/// Everything but the output's parameters. Zero points are clamped, invalid scales marked.
PROBQUANT_HOST_DEVICE inline SampleEpilogue sample_inputs(float x_scale, int32_t x_zero_point, float residual_scale, int32_t residual_zero_point) {
  SampleEpilogue s{};
  s.valid = valid_scale(x_scale) && valid_scale(residual_scale);
  s.x_zero_point = clamp_zero_point(x_zero_point);
  s.residual_zero_point = clamp_zero_point(residual_zero_point);
  s.x_scale = s.valid ? x_scale : kNan;
  s.residual_scale = s.valid ? residual_scale : kNan;
  return s;
}

/// Completes it for an 8-bit output. An invalid sample becomes all codes 0 with zero point 0.
PROBQUANT_HOST_DEVICE inline void set_output(SampleEpilogue& s, QParams y, float activation_min, float activation_max) {
  s.valid = s.valid && valid_scale(y.scale);
  s.y_zero_point = s.valid ? clamp_zero_point(y.zero_point) : 0;
  s.inverse_scale = s.valid ? 1.0f / y.scale : 0.0f;
  s.multiplier = s.valid ? s.x_scale * s.inverse_scale : 0.0f;
  s.residual_multiplier = s.valid ? s.residual_scale * s.inverse_scale : 0.0f;
  s.activation_lo = s.valid ? activation_min * s.inverse_scale : 0.0f;
  s.activation_hi = s.valid ? activation_max * s.inverse_scale : 0.0f;
}

/// Per-channel constants of a layer's epilogue. Accumulators become values of the output over its profile.
struct ChannelEpilogue {
  float weight_scale;            ///< over the profile
  float bias;                    ///< over the profile
  float profile = 1.0f;          ///< r_o: the output's codes stand for scale * r_o * (q - zero point)
  float inverse_profile = 1.0f;  ///< 1 / r_o
};

/// The layer's output in float, what Strategy::none stores. `accumulator` is zero-point corrected; `residual` is q - zero point
/// (0 without one), of a tensor with the output's profile.
PROBQUANT_HOST_DEVICE inline float layer_value(int32_t accumulator, const ChannelEpilogue& c, int32_t residual, const SampleEpilogue& s,
                                               Activation kind, float activation_min, float activation_max, bool has_residual) {
  float y = fmaf(static_cast<float>(accumulator), s.x_scale * c.weight_scale, c.bias);
  if (has_residual) y = fmaf(static_cast<float>(residual), s.residual_scale, y);
  y *= c.profile;
  return kind == Activation::clamp ? clamp_f(y, activation_min, activation_max) : activate(kind, y);
}

/// The output in units of its scale times its profile: what is rounded, and, with an output scale of 1, what the dynamic
/// strategy takes its range of.
PROBQUANT_HOST_DEVICE inline float output_value(int32_t accumulator, const ChannelEpilogue& c, int32_t residual, const SampleEpilogue& s,
                                                Activation kind, bool has_residual) {
  if (kind != Activation::clamp) {
    const float y = fmaf(static_cast<float>(accumulator), s.x_scale * c.weight_scale, c.bias);
    return activate(kind, y * c.profile) * (s.inverse_scale * c.inverse_profile);
  }
  float t = fmaf(static_cast<float>(accumulator), s.multiplier * c.weight_scale, s.inverse_scale * c.bias);
  if (has_residual) t = fmaf(static_cast<float>(residual), s.residual_multiplier, t);
  return clamp_f(t, s.activation_lo * c.inverse_profile, s.activation_hi * c.inverse_profile);
}

/// The one rounding of a layer.
PROBQUANT_HOST_DEVICE inline Code requantize(int32_t accumulator, const ChannelEpilogue& c, int32_t residual, const SampleEpilogue& s, Activation kind,
                                             bool has_residual) {
  if (!s.valid) return {0, false};
  return round_to_code(output_value(accumulator, c, residual, s, kind, has_residual), s.y_zero_point);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums of floats

/// The one order in which floats are summed: value i goes to lane i % 32, the lanes are joined by halves. Four vectors of
/// AVX2, two of AVX-512, one warp.
constexpr int kSumLanes = 32;
PROBQUANT_HOST_DEVICE inline float join_lanes(float (&lanes)[kSumLanes]) {
  for (int half = kSumLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

}  // namespace probquant
