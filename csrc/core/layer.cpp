// Convolution and linear layers: validate, predict every sample's range, then run the row kernel of the selected ISA over
// the executor's threads. The kernel's epilogue writes 8 bits at once. Where an exact range is wanted, of all outputs (dynamic) or of a
// sixteenth of them (probe), a first pass finds it, whose sums are computed again, or held in 32 bits where that takes less time.
#include <algorithm>
#include <vector>

#include "front_end.h"
#include "probe.h"

namespace probquant {
namespace {

SampleEpilogue epilogue_inputs(const LayerArguments& a, int64_t sample) {
  const bool residual = a.residual.q != nullptr;
  return sample_inputs(a.x.scale[sample], a.x.zero_point[sample], residual ? a.residual.scale[sample] : 1.0f,
                       residual ? a.residual.zero_point[sample] : 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Prediction

/// Per-sample scratch of a prediction: one entry, or one per group.
using FieldScratch = std::vector<PatchSums>;

/// Moments of the receptive fields of one sample: of group g (per_group), else of all.
void sample_fields(const Conv2dShape& s, const LayerArguments& a, int64_t sample, const SampleEpilogue& e, bool per_group, FieldScratch& sums,
                   std::vector<FieldMoments>& fields) {
  const int64_t count = s.in_height * s.in_width * s.in_channels, weights = field_weights(s);
  const int64_t* stats = a.x.stats + sample * a.x.stats_stride;
  const size_t groups = per_group ? static_cast<size_t>(s.groups) : 1;
  fields.resize(groups);
  if (a.gamma == 0) {
    std::fill(fields.begin(), fields.end(),
              field_moments_of_input(stats[kStatsSum], stats[kStatsSquares], count, e.x_zero_point, weights, e.x_scale));
    return;
  }
  sums.assign(groups, PatchSums{});
  if (is_one_field(s)) {  // the producer's epilogue summed it already
    sums[0] = patch_sums_of_sample(stats[kStatsSum], stats[kStatsSquares], count, e.x_zero_point);
  } else {
    kernels().patch_sums(s, a.x.q + sample * count, e.x_zero_point, a.gamma, per_group, sums.data());
  }
  for (size_t g = 0; g < groups; ++g) fields[g] = field_moments(sums[g], e.x_scale);
}

/// The law of the sample's outputs before a residual: of output channel o (law_per_output), or of all.
Law own_law(const Conv2dShape& s, const LayerArguments& a, int64_t sample, const SampleEpilogue& e, const std::vector<FieldMoments>& fields, int64_t o) {
  const float* p = a.predictor + kPredictorLaw;
  const int64_t outputs = s.out_channels;
  if (is_gaussian(a.strategy)) {
    const FieldMoments& m = fields[fields.size() == 1 ? 0 : static_cast<size_t>(o / (outputs / s.groups))];
    if (a.strategy == Strategy::gaussian) return gaussian_law(m, p[0], p[1], p[2], p[3]);
    return gaussian_law(m, p[o], p[outputs + o], p[2 * outputs + o], 0.0f);
  }
  const int64_t inputs = s.in_channels, count = s.in_height * s.in_width;
  const int64_t* sums = a.x.stats + sample * a.x.stats_stride + kStatsSample;
  if (law_per_output(s, a.strategy)) {
    const int64_t c = o / (outputs / s.groups);
    return depthwise_law(sums[c], sums[inputs + c], count, e.x_zero_point, e.x_scale, p[o], p[outputs + o], p[2 * outputs + o]);
  }
  const float* weights = a.predictor + kPredictorChannels;
  const ChannelSums totals =
      channel_sums(sums, sums + inputs, inputs, count, e.x_zero_point, s.kernel_height * s.kernel_width, weights, weights + inputs);
  return channel_law(totals, count, e.x_scale, p[0], p[1], p[2], p[3]);
}

/// Calls visit(o, law) for the one law of the layer, or for every output channel's.
template <class Visit>
void for_each_law(const Conv2dShape& s, const LayerArguments& a, int64_t sample, const SampleEpilogue& e, FieldScratch& sums,
                  std::vector<FieldMoments>& fields, Visit visit) {
  if (is_gaussian(a.strategy)) sample_fields(s, a, sample, e, a.strategy == Strategy::gaussian_channel && s.groups > 1, sums, fields);
  Law shortcut{};
  if (a.residual.q != nullptr) {
    const int64_t* stats = a.residual.stats + sample * a.residual.stats_stride;
    shortcut = law_of_stats(stats[kStatsSum], stats[kStatsSquares], s.out_height() * s.out_width() * s.out_channels, e.residual_zero_point,
                            e.residual_scale);
  }
  for (int64_t o = 0, laws = surrogate_laws(s, a.strategy); o < laws; ++o) {
    Law law = own_law(s, a, sample, e, fields, o);
    if (a.residual.q != nullptr) law = add_laws(law, shortcut, a.predictor[kPredictorRho]);
    visit(o, law);
  }
}

QParams predict(const Conv2dShape& s, const LayerArguments& a, ProfileSpan profile, int64_t sample, const SampleEpilogue& e, FieldScratch& sums,
                std::vector<FieldMoments>& fields) {
  float lo = kInfinity, hi = -kInfinity;
  bool finite = true;
  for_each_law(s, a, sample, e, sums, fields, [&](int64_t, Law law) {
    float law_lo, law_hi;
    law_range(law, a.predictor[kPredictorAlpha], a.predictor[kPredictorBeta], law_lo, law_hi);
    finite = finite && is_finite(law_lo) && is_finite(law_hi);
    lo = min_f(law_lo, lo);
    hi = max_f(law_hi, hi);
  });
  if (!finite) return {kNan, 0};
  activation_range(a.activation, a.activation_min, a.activation_max, profile, lo, hi);
  return qparams_from_range(lo, hi);
}

// ---------------------------------------------------------------------------------------------------------------------
// Running a row kernel

/// Calls body(task, channel_begin, channel_end) for every task, over the threads; with fewer tasks than threads, the blocks
/// of output channels are split, too.
template <class Body>
void run_tasks(const LayerProblem& p, int64_t tasks, const Executor& executor, Body body) {
  if (tasks <= 0) return;
  const PackedLayout& layout = p.layout;
  const int64_t blocks = (layout.depthwise ? 1 : layout.groups) * layout.group_blocks;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(blocks, executor.threads / tasks));
  const auto first_channel = [&](int64_t block) {
    return std::min(p.shape.out_channels,
                    block / layout.group_blocks * layout.group_channels + block % layout.group_blocks * kBlockChannels);
  };
  parallel_for(executor, tasks * parts, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / parts, first_channel(blocks * (i % parts) / parts), first_channel(blocks * (i % parts + 1) / parts));
  });
}

/// A kernel over rows [row_begin, row_end).
void run_rows(const LayerProblem& p, LayerKernel kernel, int64_t row_begin, int64_t row_end, const Executor& executor) {
  constexpr int64_t kRowsPerTask = 48;  // a few register tiles: below that, splitting channels costs less than splitting rows
  const int64_t rows = row_end - row_begin, tasks = std::max<int64_t>(1, std::min<int64_t>(executor.threads, rows / kRowsPerTask));
  run_tasks(p, tasks, executor, [&](int64_t i, int64_t channel_begin, int64_t channel_end) {
    kernel(p, {row_begin + rows * i / tasks, row_begin + rows * (i + 1) / tasks, channel_begin, channel_end});
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Exact ranges: of all rows (dynamic), or of those that the probe sees

/// How the exact range of each sample's rows is found before anything is rounded: their sums are held in 32 bits, or their products are
/// computed twice, first only for the range, which needs no memory. A block's sums of a row are 64 bytes. To store them in L2 and to load them
/// takes less time than any products to be had; beyond, it takes longer than products of few weights. A probe of some rows holds nothing.
struct ExactRange {
  int64_t sample_bytes;  ///< of sums
  int64_t samples;       ///< of a pass
  bool holds;

  ExactRange(const Conv2dShape& s, const PackedLayout& layout, Strategy strategy) {
    const int64_t rows = s.out_height() * s.out_width();
    sample_bytes = 4 * rows * layout.columns();
    holds = !layout.depthwise && (strategy == Strategy::dynamic || probes_whole(rows)) &&
            (sample_bytes <= kCached || field_weights(s) * kBlockChannels > kClocksBeyond * kernels().macs_per_clock);
    const int64_t most = std::max<int64_t>(1, kCached / std::max<int64_t>(1, holds ? sample_bytes : s.in_height * s.in_width * s.in_channels));
    const int64_t passes = (s.batch + most - 1) / most;
    samples = passes > 0 ? (s.batch + passes - 1) / passes : 0;
  }
  int64_t workspace_bytes() const { return holds ? samples * sample_bytes : 0; }

 private:
  static constexpr int64_t kCached = int64_t{1} << 20;  ///< bytes that L2 has for sums, or for the input of the samples of a pass
  static constexpr int64_t kClocksBeyond = 8;           ///< of products, from which on it is worth the while to hold sums beyond L2
};

/// The ranges of as many samples at a time as that says, from all rows or from the probe's segments, and then their output. Segments are computed
/// again with the rows between them: to spare that would cut the rest to pieces, and takes longer.
void run_exact(LayerProblem& p, const LayerKernels& run, const LayerArguments& a, std::vector<SampleEpilogue>& samples, const Executor& executor) {
  const ExactRange exact(p.shape, p.layout, a.strategy);
  const int64_t rows = p.rows_per_sample, segments = probe_segments(rows);
  const bool dynamic = a.strategy == Strategy::dynamic, whole = probes_whole(rows);
  std::vector<float> range(static_cast<size_t>(2 * exact.samples));
  for (int64_t begin = 0; begin < p.shape.batch; begin += exact.samples) {
    const int64_t end = std::min(p.shape.batch, begin + exact.samples);
    p.range = range.data() - 2 * begin;  // kernels index by absolute sample, and row
    if (exact.holds) p.held = static_cast<int32_t*>(a.workspace) - begin * rows * p.layout.columns();
    for (int64_t n = begin; n < end; ++n) {
      p.range[2 * n] = kInfinity, p.range[2 * n + 1] = -kInfinity;
      set_output(samples[static_cast<size_t>(n)], {1.0f, 0}, a.activation_min, a.activation_max);
    }
    if (dynamic || whole) {
      run_rows(p, run.range, begin * rows, end * rows, executor);
    } else {
      run_tasks(p, (end - begin) * segments, executor, [&](int64_t i, int64_t channel_begin, int64_t channel_end) {
        const int64_t first = (begin + i / segments) * rows;
        const RowSpan span = probe_segment(rows, i % segments);
        run.range(p, {first + span.begin, first + span.end, channel_begin, channel_end});
      });
    }
    for (int64_t n = begin; n < end; ++n) {
      SampleEpilogue& e = samples[static_cast<size_t>(n)];
      const float lo = p.range[2 * n], hi = p.range[2 * n + 1];
      const QParams y = dynamic ? qparams_from_range(lo, hi)
                                : probe_qparams(lo, hi, whole, a.predictor, a.activation, a.activation_min, a.activation_max, p.profile);
      set_output(e, y, a.activation_min, a.activation_max);
      write_qparams(a.y, n, e, y);
    }
    run_rows(p, run.quantized, begin * rows, end * rows, executor);
  }
}

}  // namespace

int64_t conv2d_workspace_bytes(const Conv2dShape& shape, Strategy strategy) {
  if (strategy != Strategy::dynamic && strategy != Strategy::probe) return 0;
  check_layer_shape(shape);
  return ExactRange(shape, PackedLayout(weight_shape(shape)), strategy).workspace_bytes();
}

std::vector<std::pair<int64_t, int64_t>> probe_rows(int64_t rows) {
  require(rows >= 0, "probe_rows: rows ", rows, ", want >= 0");
  std::vector<std::pair<int64_t, int64_t>> spans;
  for (int64_t i = 0; i < probe_segments(rows); ++i) spans.emplace_back(probe_segment(rows, i).begin, probe_segment(rows, i).end);
  return spans;
}

void conv2d(const Conv2dShape& shape, const LayerArguments& a, const Executor& executor, const Upcoming& upcoming) {
  check_layer(shape, a);
  if (shape.batch == 0) return;

  LayerProblem p(shape);
  p.out_height = shape.out_height();
  p.out_width = shape.out_width();
  p.rows_per_sample = p.out_height * p.out_width;
  p.x = a.x.q;
  p.packed_weight = a.packed_weight;
  p.residual = a.residual.q;
  p.activation = a.activation;
  p.activation_min = a.activation_min;
  p.activation_max = a.activation_max;
  const auto& trailer = *reinterpret_cast<const PackedTrailer*>(a.packed_weight + p.layout.trailer_offset());
  check_packed_for(weight_shape(shape), trailer.shape);
  p.profile = trailer.profile;
  p.y = a.y.q;
  p.stats = a.y.stats;
  p.channel_stats = a.y.channel_stats;
  p.y_float = a.y_float;
  p.range = nullptr;
  p.held = nullptr;
  p.upcoming = upcoming;

  std::vector<SampleEpilogue> samples(static_cast<size_t>(shape.batch));
  parallel_for(executor, has_law(a.strategy) ? shape.batch : 1, [&](int64_t begin, int64_t end) {
    if (!has_law(a.strategy)) end = shape.batch;  // nothing to share out
    FieldScratch sums;
    std::vector<FieldMoments> fields;
    for (int64_t n = begin; n < end; ++n) {
      SampleEpilogue& e = samples[static_cast<size_t>(n)] = epilogue_inputs(a, n);
      if (a.strategy != Strategy::fixed && !has_law(a.strategy)) continue;
      const QParams y = a.strategy == Strategy::fixed ? fixed_qparams(a.predictor)
                        : e.valid                     ? predict(shape, a, p.profile, n, e, sums, fields)
                                                      : QParams{kNan, 0};
      set_output(e, y, a.activation_min, a.activation_max);
      write_qparams(a.y, n, e, y);
    }
  });
  p.samples = samples.data();

  const int64_t rows = shape.batch * p.rows_per_sample;
  const LayerKernels& run = kernels().layer(p.layout);
  if (a.strategy == Strategy::none) {
    run_rows(p, run.to_float, 0, rows, executor);
    const int64_t values = p.rows_per_sample * shape.out_channels;
    for (int64_t n = 0; n < shape.batch; ++n)  // whatever an activation made of it
      if (!samples[static_cast<size_t>(n)].valid) std::fill_n(p.y_float + n * values, values, kNan);
    return;
  }
  clear_stats(a.y, shape.batch, shape.out_channels);
  require(a.workspace != nullptr || conv2d_workspace_bytes(shape, a.strategy) == 0, "conv2d: workspace is null, want conv2d_workspace_bytes bytes");
  if (a.strategy == Strategy::dynamic || a.strategy == Strategy::probe) {
    run_exact(p, run, a, samples, executor);
  } else {
    run_rows(p, run.quantized, 0, rows, executor);
  }
  mark_invalid(a.y, shape.batch, shape.out_channels);
}

int64_t surrogate_laws(const Conv2dShape& shape, Strategy strategy) { return law_per_output(shape, strategy) ? shape.out_channels : 1; }

void surrogate_law(const Conv2dShape& shape, const LayerArguments& a, float* law, const Executor& executor) {
  require(has_law(a.strategy), "surrogate_law: strategy ", static_cast<int64_t>(a.strategy), " has no law, want gaussian, gaussian_channel or channel");
  check_layer(shape, a);
  const int64_t laws = surrogate_laws(shape, a.strategy);
  parallel_for(executor, shape.batch, [&](int64_t begin, int64_t end) {
    FieldScratch sums;
    std::vector<FieldMoments> fields;
    for (int64_t n = begin; n < end; ++n) {
      const SampleEpilogue e = epilogue_inputs(a, n);
      float* out = law + n * laws * 2;
      if (!e.valid) {
        std::fill_n(out, laws * 2, kNan);
        continue;
      }
      for_each_law(shape, a, n, e, sums, fields, [&](int64_t o, Law l) {
        out[2 * o] = l.mean;
        out[2 * o + 1] = sqrtf(l.variance);
      });
    }
  });
}

}  // namespace probquant
