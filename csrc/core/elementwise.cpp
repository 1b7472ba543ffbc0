// Ops without weights that act elementwise: add, activation, concat.
#include <algorithm>
#include <array>
#include <vector>

#include "front_end.h"

namespace probquant {
namespace {

constexpr int64_t kGrain = 16384;

int64_t row_grain(int64_t channels) { return std::max<int64_t>(1, kGrain / channels); }

void check_sizes(const char* op, int64_t samples, int64_t count, int64_t channels) {
  require(samples >= 0 && channels > 0 && count >= 0 && count % channels == 0, op, ": samples ", samples, ", ", count, " values of ", channels,
          " channels do not fit together");
}

/// Real value of a code, and the range all 256 of them span.
float code_value(int32_t q, const SampleEpilogue& e) { return e.x_scale * static_cast<float>(q - e.x_zero_point); }

using Table = std::array<Code, 256>;

/// Table that maps codes of `e`'s input to its output by the value function f.
template <class Value>
Table make_table(const SampleEpilogue& e, Value value) {
  Table table;
  for (int32_t q = 0; q < 256; ++q)
    table[static_cast<size_t>(q)] = e.valid ? round_to_code(value(q) * e.inverse_scale, e.y_zero_point) : Code{0, false};
  return table;
}

}  // namespace

void add(const QuantizedInput& a, const QuantizedInput& b, int64_t samples, int64_t count, int64_t channels, float activation_min,
         float activation_max, const RangeArguments& range, const QuantizedOutput& y, const Executor& executor) {
  check_sizes("add", samples, count, channels);
  check_range("add", range, 3);
  require(activation_min <= activation_max, "add: activation_min is above activation_max");
  require(samples == 0 || range.strategy != Strategy::gaussian || (a.stats && b.stats), "add: the gaussian strategy needs the stats of both inputs");
  if (samples == 0) return;
  const int64_t rows = count / channels;
  std::vector<SampleEpilogue> epilogues(static_cast<size_t>(samples));
  std::vector<float> exact(static_cast<size_t>(2 * samples));
  for (int64_t n = 0; n < samples; ++n) {
    epilogues[static_cast<size_t>(n)] = sample_inputs(a.scale[n], a.zero_point[n], b.scale[n], b.zero_point[n]);
    exact[static_cast<size_t>(2 * n)] = kInfinity, exact[static_cast<size_t>(2 * n + 1)] = -kInfinity;
  }
  if (range.strategy == Strategy::dynamic)
    parallel_over_samples(executor, samples, rows, row_grain(channels), [&](int64_t n, int64_t begin, int64_t end) {
      const int64_t at = n * count + begin * channels;
      float lo, hi;
      kernels().add_range(a.q + at, b.q + at, (end - begin) * channels, epilogues[static_cast<size_t>(n)], activation_min, activation_max, &lo, &hi);
      atomic_widen(&exact[static_cast<size_t>(2 * n)], lo, hi);
    });
  for (int64_t n = 0; n < samples; ++n) {
    SampleEpilogue& e = epilogues[static_cast<size_t>(n)];
    QParams qparams{kNan, 0};
    if (range.strategy == Strategy::fixed) {
      qparams = fixed_qparams(range.predictor);
    } else if (count == 0) {
      qparams = qparams_from_range(0.0f, 0.0f);
    } else if (range.strategy == Strategy::dynamic) {
      qparams = qparams_from_range(exact[static_cast<size_t>(2 * n)], exact[static_cast<size_t>(2 * n + 1)]);
    } else if (e.valid) {
      const int64_t *sa = a.stats + n * a.stats_stride, *sb = b.stats + n * b.stats_stride;
      const Law law = add_laws(law_of_stats(sa[kStatsSum], sa[kStatsSquares], count, e.x_zero_point, e.x_scale),
                               law_of_stats(sb[kStatsSum], sb[kStatsSquares], count, e.residual_zero_point, e.residual_scale),
                               range.predictor[kPredictorRho]);
      float lo, hi;
      law_range(law, range.predictor[kPredictorAlpha], range.predictor[kPredictorBeta], lo, hi);
      const float smallest = fmaf(static_cast<float>(-e.residual_zero_point), e.residual_scale, code_value(0, e));
      const float largest = fmaf(static_cast<float>(255 - e.residual_zero_point), e.residual_scale, code_value(255, e));
      if (is_finite(lo) && is_finite(hi)) lo = clamp_f(lo, smallest, largest), hi = clamp_f(hi, smallest, largest);
      activation_range(Activation::clamp, activation_min, activation_max, {}, lo, hi);
      qparams = qparams_from_range(lo, hi);
    }
    set_output(e, qparams, activation_min, activation_max);
    write_qparams(y, n, e, qparams);
  }
  clear_stats(y, samples, channels);
  parallel_over_samples(executor, samples, rows, row_grain(channels), [&](int64_t n, int64_t begin, int64_t end) {
    const int64_t at = n * count + begin * channels;
    kernels().add(a.q + at, b.q + at, (end - begin) * channels, channels, epilogues[static_cast<size_t>(n)], y.q + at, stats_row(y, n, channels),
                  y.channel_stats);
  });
  mark_invalid(y, samples, channels);
}

void activation(const QuantizedInput& x, int64_t samples, int64_t count, int64_t channels, Activation kind, float activation_min,
                float activation_max, const RangeArguments& range, const QuantizedOutput& y, const Executor& executor) {
  check_sizes("activation", samples, count, channels);
  check_range("activation", range, 0);
  require(kind != Activation::clamp || activation_min <= activation_max, "activation: activation_min is above activation_max");
  clear_stats(y, samples, channels);
  const int64_t rows = count / channels;
  std::vector<Table> tables(static_cast<size_t>(samples));
  parallel_for(executor, samples, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      SampleEpilogue e = sample_inputs(x.scale[n], x.zero_point[n], 1.0f, 0);
      const auto value = [&](int32_t q) {
        const float v = code_value(q, e);
        return kind == Activation::clamp ? clamp_f(v, activation_min, activation_max) : activate(kind, v);
      };
      QParams qparams{kNan, 0};
      if (range.strategy == Strategy::fixed) {
        qparams = fixed_qparams(range.predictor);
      } else if (e.valid) {
        bool seen[256];
        std::fill_n(seen, 256, range.strategy == Strategy::gaussian || count == 0);
        if (range.strategy == Strategy::dynamic) kernels().mark_codes(x.q + n * count, count, seen);
        float lo = kInfinity, hi = -kInfinity;
        for (int32_t q = 0; q < 256; ++q)
          if (seen[q]) lo = min_f(value(q), lo), hi = max_f(value(q), hi);
        qparams = qparams_from_range(lo, hi);
      }
      set_output(e, qparams, activation_min, activation_max);
      write_qparams(y, n, e, qparams);
      tables[static_cast<size_t>(n)] = make_table(e, value);
    }
  });
  parallel_over_samples(executor, samples, rows, row_grain(channels), [&](int64_t n, int64_t begin, int64_t end) {
    const int64_t at = n * count + begin * channels;
    int64_t* stats = stats_row(y, n, channels);
    int64_t* sums = y.channel_stats ? stats + kStatsSample : nullptr;
    kernels().lookup(x.q + at, end - begin, channels, channels, tables[static_cast<size_t>(n)].data(), y.q + at, channels, stats, sums,
                     sums ? sums + channels : nullptr);
  });
  mark_invalid(y, samples, channels);
}

void concat(const QuantizedInput* inputs, const int64_t* channels, int64_t input_count, int64_t samples, int64_t positions,
            const RangeArguments& range, const QuantizedOutput& y, const Executor& executor) {
  require(input_count > 0, "concat: no inputs");
  check_range("concat", range, 0);
  int64_t total = 0;
  for (int64_t i = 0; i < input_count; ++i) {
    require(channels[i] > 0, "concat: input ", i, " has ", channels[i], " channels, want > 0");
    total += channels[i];
  }
  require(samples >= 0 && positions >= 0, "concat: negative size [", samples, ", ", positions, "]");
  clear_stats(y, samples, total);
  parallel_for(executor, samples, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      bool valid = true, equal = true;
      float lo = kInfinity, hi = -kInfinity;
      for (int64_t i = 0; i < input_count; ++i) {
        const SampleEpilogue e = sample_inputs(inputs[i].scale[n], inputs[i].zero_point[n], 1.0f, 0);
        valid = valid && e.valid;
        equal = equal && inputs[i].scale[n] == inputs[0].scale[n] && e.x_zero_point == clamp_zero_point(inputs[0].zero_point[n]);
        lo = min_f(code_value(0, e), lo);
        hi = max_f(code_value(255, e), hi);
      }
      const QParams qparams = range.strategy == Strategy::fixed ? fixed_qparams(range.predictor)
                              : !valid                          ? QParams{kNan, 0}
                              : equal                           ? QParams{inputs[0].scale[n], clamp_zero_point(inputs[0].zero_point[n])}
                                                                : qparams_from_range(lo, hi);
      SampleEpilogue written = sample_inputs(valid ? 1.0f : kNan, 0, 1.0f, 0);
      set_output(written, qparams, -kInfinity, kInfinity);
      write_qparams(y, n, written, qparams);
      int64_t* stats = stats_row(y, n, total);
      int64_t offset = 0;
      for (int64_t i = 0; i < input_count; ++i) {
        SampleEpilogue e = sample_inputs(valid ? inputs[i].scale[n] : kNan, inputs[i].zero_point[n], 1.0f, 0);
        set_output(e, qparams, -kInfinity, kInfinity);
        const Table table = make_table(e, [&](int32_t q) { return code_value(q, e); });
        int64_t* sums = y.channel_stats ? stats + kStatsSample + offset : nullptr;
        kernels().lookup(inputs[i].q + n * positions * channels[i], positions, channels[i], channels[i], table.data(),
                         y.q + n * positions * total + offset, total, stats, sums, sums ? sums + total : nullptr);
        offset += channels[i];
      }
    }
  });
  mark_invalid(y, samples, total);
}

}  // namespace probquant
