// The scale and zero point of a layer's output, before anything is requantized: given, from the range that a first launch found, or
// predicted by a surrogate from the input's stats and patch sums (surrogate.h).
//
// simple_qparams: what takes a few flops. The layer's own kernel does it, one thread per sample and block. predict: one law per output channel, one over
// channels, or one from patch sums: for one sample, by one block of kPredictThreads threads, in a launch in front of the layer's; each
// takes every 256th output channel's law. predict.cu and patch_sums.cu have the kernels.
#pragma once
#include "../core/probe.h"
#include "reduce.cuh"

namespace probquant::cuda {

inline constexpr int kPredictThreads = 256;  ///< of a block that predicts

__device__ inline SampleEpilogue epilogue_inputs(const LayerArguments& a, int64_t sample) {
  const bool residual = a.residual.q != nullptr;
  return sample_inputs(a.x.scale[sample], a.x.zero_point[sample], residual ? a.residual.scale[sample] : 1.0f,
                       residual ? a.residual.zero_point[sample] : 0);
}

/// Of the input's stats alone.
__device__ inline FieldMoments fields_of_stats(const PredictProblem& p, const LayerArguments& a, int64_t sample, const SampleEpilogue& e) {
  const int64_t* stats = a.x.stats + sample * a.x.stats_stride;
  if (a.gamma == 0) return field_moments_of_input(stats[kStatsSum], stats[kStatsSquares], p.count, e.x_zero_point, p.field_weights, e.x_scale);
  return field_moments(patch_sums_of_sample(stats[kStatsSum], stats[kStatsSquares], p.count, e.x_zero_point), e.x_scale);  // one field
}

/// A sample's patch sums: over all groups, or the shares of every group's, which other blocks of the launch have written.
struct SampledFields {
  FieldSums all;
  const FieldSums* of_groups;  ///< [chunks][groups], or null
  int64_t chunks;
};

/// Moments of the receptive fields of output channel o's group, or of all groups; without `sampled` those of the stats.
__device__ inline FieldMoments fields_of(const PredictProblem& p, const LayerArguments& a, int64_t sample, const SampleEpilogue& e, int64_t o,
                                         const SampledFields* sampled) {
  if (sampled == nullptr) return fields_of_stats(p, a, sample, e);
  if (sampled->of_groups == nullptr) return field_moments({p.fields * p.groups, sampled->all.sum, sampled->all.squares, sampled->all.sum_of_squared}, e.x_scale);
  PatchSums sums{p.fields};
#pragma unroll 1
  for (int64_t i = 0; i < sampled->chunks; ++i) {
    const volatile FieldSums& share = sampled->of_groups[i * p.groups + o / p.group_channels];
    sums.sum += share.sum, sums.squares += share.squares, sums.sum_of_squared += share.sum_of_squared;
  }
  return field_moments(sums, e.x_scale);
}

/// The law of a residual, added to the layer's.
__device__ inline Law with_residual(const PredictProblem& p, const LayerArguments& a, int64_t sample, const SampleEpilogue& e, Law law) {
  const int64_t* stats = a.residual.stats + sample * a.residual.stats_stride;
  return add_laws(law, law_of_stats(stats[kStatsSum], stats[kStatsSquares], p.out_count, e.residual_zero_point, e.residual_scale), a.predictor[kPredictorRho]);
}

/// A law's range, which is not finite where it makes the sample invalid.
__device__ inline Range range_of(const LayerArguments& a, Law law) {
  Range r;
  law_range(law, a.predictor[kPredictorAlpha], a.predictor[kPredictorBeta], r.lo, r.hi);
  if (!is_finite(r.lo) || !is_finite(r.hi)) r.lo = -kInfinity;
  return r;
}

__device__ inline QParams qparams_of(const PredictProblem& p, const LayerArguments& a, Range range) {
  activation_range(a.activation, a.activation_min, a.activation_max, *p.profile, range.lo, range.hi);
  return qparams_from_range(range.lo, range.hi);
}

/// Parameters that are given, or those of one law for all outputs, from stats, or of the range that a first launch has `measured`. By one thread.
__device__ inline QParams simple_qparams(const PredictProblem& p, const LayerArguments& a, int64_t sample, const SampleEpilogue& e, Range measured) {
  if (a.strategy == Strategy::fixed) return fixed_qparams(a.predictor);
  if (a.strategy == Strategy::dynamic) return qparams_from_range(measured.lo, measured.hi);
  if (a.strategy == Strategy::probe)
    return probe_qparams(measured.lo, measured.hi, p.probes_whole, a.predictor, a.activation, a.activation_min, a.activation_max, *p.profile);
  if (!e.valid) return {kNan, 0};
  const float* w = a.predictor + kPredictorLaw;
  const Law law = gaussian_law(fields_of_stats(p, a, sample, e), w[0], w[1], w[2], w[3]);
  return qparams_of(p, a, range_of(a, a.residual.q != nullptr ? with_residual(p, a, sample, e, law) : law));
}

/// channel_sums of surrogate.h, by all threads together: each computes the terms of a channel, kChannelLanes of them add up. The
/// result is in the first of them.
__device__ inline ChannelSums block_channel_sums(const PredictProblem& p, const LayerArguments& a, int64_t sample, const SampleEpilogue& e) {
  __shared__ ChannelSums terms[kPredictThreads];
  const int64_t *sums = a.x.stats + sample * a.x.stats_stride + kStatsSample, *squares = sums + p.in_channels;
  const float *mean_w = a.predictor + kPredictorChannels, *square_w = mean_w + p.in_channels;
  const double share = 1.0 / static_cast<double>(p.taps);
  ChannelSums lane{};
  for (int64_t first = 0; first < p.in_channels; first += kPredictThreads) {
    const int64_t c = first + threadIdx.x, left = p.in_channels - first;
    if (c < p.in_channels) terms[threadIdx.x] = channel_terms(sums[c], squares[c], p.positions, e.x_zero_point, share, mean_w[c], square_w[c]);
    __syncthreads();
    if (threadIdx.x < kChannelLanes)
      for (int64_t i = threadIdx.x; i < kPredictThreads && i < left; i += kChannelLanes) lane += terms[i];
    __syncthreads();
  }
#pragma unroll
  for (int half = kChannelLanes / 2; half > 0; half /= 2)
    lane += {__shfl_xor_sync(0xffffffffu, lane.mean, half), __shfl_xor_sync(0xffffffffu, lane.within, half), __shfl_xor_sync(0xffffffffu, lane.between, half)};
  return lane;
}

/// The law of output channel o, or of all outputs, before a residual. With Strategy::channel of a dense layer all threads must
/// call; the first one gets it.
__device__ inline Law own_law(const PredictProblem& p, const LayerArguments& a, int64_t sample, const SampleEpilogue& e, int64_t o, const SampledFields* sampled) {
  const float* w = a.predictor + kPredictorLaw;
  if (a.strategy == Strategy::gaussian) return gaussian_law(fields_of(p, a, sample, e, o, sampled), w[0], w[1], w[2], w[3]);
  const int64_t outputs = p.out_channels;
  if (a.strategy == Strategy::gaussian_channel)
    return gaussian_law(fields_of(p, a, sample, e, o, sampled), w[o], w[outputs + o], w[2 * outputs + o], 0.0f);
  if (p.laws == 1) return channel_law(block_channel_sums(p, a, sample, e), p.positions, e.x_scale, w[0], w[1], w[2], w[3]);
  const int64_t* sums = a.x.stats + sample * a.x.stats_stride + kStatsSample;
  const int64_t c = o / p.group_channels;
  return depthwise_law(sums[c], sums[p.in_channels + c], p.positions, e.x_zero_point, e.x_scale, w[o], w[outputs + o], w[2 * outputs + o]);
}

/// Calls visit(o, law) for this thread's output channels; the only law is the first thread's.
template <class Visit>
__device__ void for_each_law(const PredictProblem& p, const LayerArguments& a, int64_t sample, const SampleEpilogue& e, const SampledFields* sampled, Visit visit) {
  for (int64_t o = p.laws == 1 ? 0 : threadIdx.x; o < p.laws; o += kPredictThreads) {
    Law law = own_law(p, a, sample, e, o, sampled);
    if (a.residual.q != nullptr) law = with_residual(p, a, sample, e, law);
    if (p.laws > 1 || threadIdx.x == 0) visit(o, law);
  }
}

/// Writes the sample's scale and zero point, by a surrogate; by all threads of a block.
__device__ inline void predict(const PredictProblem& p, const LayerArguments& a, int64_t sample, const SampledFields* sampled = nullptr) {
  SampleEpilogue e = epilogue_inputs(a, sample);
  QParams qparams{kNan, 0};
  if (e.valid) {  // the same for all threads
    Range range{kInfinity, -kInfinity};
    for_each_law(p, a, sample, e, sampled, [&](int64_t, Law law) { range = join(range_of(a, law), range); });
    qparams = qparams_of(p, a, block_range(range));
  }
  set_output(e, qparams, a.activation_min, a.activation_max);
  if (threadIdx.x != 0) return;
  a.y.scale[sample] = e.valid ? qparams.scale : kNan;
  a.y.zero_point[sample] = e.y_zero_point;
}

/// Writes the sample's laws [p.laws][2]: means and standard deviations; by all threads of a block.
__device__ inline void write_laws(const PredictProblem& p, const LayerArguments& a, int64_t sample, float* laws, const SampledFields* sampled = nullptr) {
  const SampleEpilogue e = epilogue_inputs(a, sample);
  float* out = laws + sample * p.laws * 2;
  if (!e.valid) {
    for (int64_t i = threadIdx.x; i < 2 * p.laws; i += kPredictThreads) out[i] = kNan;
    return;
  }
  for_each_law(p, a, sample, e, sampled, [&](int64_t o, Law law) {
    out[2 * o] = law.mean;
    out[2 * o + 1] = sqrtf(law.variance);
  });
}

}  // namespace probquant::cuda
