// Ops without weights that act elementwise: add, mul, activation, concat.
#include <algorithm>
#include <array>
#include <vector>

#include "elementwise.h"
#include "front_end.h"

namespace probquant {
namespace {

constexpr int64_t kGrain = 16384;

int64_t row_grain(int64_t channels) { return std::max<int64_t>(1, kGrain / channels); }

/// Codes of an output by codes of the input.
using Table = std::array<Code, 256>;

template <class Value>
Table make_table(const SampleEpilogue& e, Value value) {
  Table table;
  for (int32_t q = 0; q < 256; ++q) table[static_cast<size_t>(q)] = value_to_code(value(q), e);
  return table;
}

/// A sum or a product of two tensors. `b_count` and `b_step`: values of a sample of b, and how far a row of a takes b ahead. Op has
///   inputs(n): the sample's epilogue, without its output;
///   range(at, b_at, rows, epilogue, lo, hi): extremes of the output of rows of codes, and exact(epilogue, lo, hi): what they give;
///   law(n, epilogue): what is predicted for a valid sample;
///   write(at, b_at, rows, epilogue, stats_row): the codes.
template <class Op>
void combine(const Op& op, int64_t samples, int64_t count, int64_t channels, int64_t b_count, int64_t b_step, float activation_min, float activation_max,
             const RangeArguments& range, const QuantizedOutput& y, const Executor& executor) {
  if (samples == 0) return;
  std::vector<SampleEpilogue> epilogues(static_cast<size_t>(samples));
  std::vector<float> exact(static_cast<size_t>(2 * samples));
  for (int64_t n = 0; n < samples; ++n) {
    epilogues[static_cast<size_t>(n)] = op.inputs(n);
    exact[static_cast<size_t>(2 * n)] = kInfinity, exact[static_cast<size_t>(2 * n + 1)] = -kInfinity;
  }
  const auto over_rows = [&](auto body) {  // body(sample, first code of a, first code of b, rows)
    parallel_over_samples(executor, samples, count / channels, row_grain(channels), [&](int64_t n, int64_t begin, int64_t end) {
      body(n, n * count + begin * channels, n * b_count + begin * b_step, end - begin);
    });
  };
  if (range.strategy == Strategy::dynamic)
    over_rows([&](int64_t n, int64_t at, int64_t b_at, int64_t rows) {
      float lo, hi;
      op.range(at, b_at, rows, epilogues[static_cast<size_t>(n)], &lo, &hi);
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
      qparams = op.exact(e, exact[static_cast<size_t>(2 * n)], exact[static_cast<size_t>(2 * n + 1)]);
    } else if (e.valid) {
      qparams = op.law(n, e);
    }
    set_output(e, qparams, activation_min, activation_max);
    write_qparams(y, n, e, qparams);
  }
  clear_stats(y, samples, channels);
  over_rows([&](int64_t n, int64_t at, int64_t b_at, int64_t rows) {
    op.write(at, b_at, rows, epilogues[static_cast<size_t>(n)], stats_row(y, n, channels));
  });
  mark_invalid(y, samples, channels);
}

}  // namespace

void add(const QuantizedInput& a, const QuantizedInput& b, int64_t samples, int64_t count, int64_t channels, float activation_min,
         float activation_max, const RangeArguments& range, const QuantizedOutput& y, const Executor& executor) {
  check_add(a, b, samples, count, channels, activation_min, activation_max, range);
  struct Sum {
    const QuantizedInput &a, &b;
    int64_t count, channels;
    float activation_min, activation_max;
    const float* predictor;
    const QuantizedOutput& y;

    SampleEpilogue inputs(int64_t n) const { return sample_inputs(a.scale[n], a.zero_point[n], b.scale[n], b.zero_point[n]); }
    void range(int64_t at, int64_t b_at, int64_t rows, const SampleEpilogue& e, float* lo, float* hi) const {
      kernels().add_range(a.q + at, b.q + b_at, rows * channels, e, activation_min, activation_max, lo, hi);
    }
    QParams exact(const SampleEpilogue&, float lo, float hi) const { return qparams_from_range(lo, hi); }
    QParams law(int64_t n, const SampleEpilogue& e) const {
      return add_law_qparams(a.stats + n * a.stats_stride, b.stats + n * b.stats_stride, count, e, predictor, activation_min, activation_max);
    }
    void write(int64_t at, int64_t b_at, int64_t rows, const SampleEpilogue& e, int64_t* stats) const {
      kernels().add(a.q + at, b.q + b_at, rows * channels, channels, e, y.q + at, stats, y.channel_stats);
    }
  };
  combine(Sum{a, b, count, channels, activation_min, activation_max, range.predictor, y}, samples, count, channels, count, channels, activation_min,
          activation_max, range, y, executor);
}

void mul(const QuantizedInput& a, const QuantizedInput& b, int64_t samples, int64_t count, int64_t channels, bool per_channel,
         const RangeArguments& range, const QuantizedOutput& y, const Executor& executor) {
  check_mul(a, b, samples, count, channels, range);
  struct Product {
    const QuantizedInput &a, &b;
    int64_t count, channels, b_count, b_step;
    const float* predictor;
    const QuantizedOutput& y;

    SampleEpilogue inputs(int64_t n) const { return mul_inputs(a.scale[n], a.zero_point[n], b.scale[n], b.zero_point[n]); }
    void range(int64_t at, int64_t b_at, int64_t rows, const SampleEpilogue& e, float* lo, float* hi) const {
      kernels().mul_range(a.q + at, b.q + b_at, rows, channels, b_step, e, lo, hi);
    }
    QParams exact(const SampleEpilogue& e, float lo, float hi) const { return qparams_from_range(lo * e.x_scale, hi * e.x_scale); }
    QParams law(int64_t n, const SampleEpilogue& e) const {
      return mul_law_qparams(a.stats + n * a.stats_stride, count, a.scale[n], b.stats + n * b.stats_stride, b_count, b.scale[n], e, predictor);
    }
    void write(int64_t at, int64_t b_at, int64_t rows, const SampleEpilogue& e, int64_t* stats) const {
      kernels().mul(a.q + at, b.q + b_at, rows, channels, b_step, e, y.q + at, stats, y.channel_stats);
    }
  };
  const int64_t b_count = per_channel ? channels : count, b_step = per_channel ? 0 : channels;
  combine(Product{a, b, count, channels, b_count, b_step, range.predictor, y}, samples, count, channels, b_count, b_step, -kInfinity, kInfinity, range, y,
          executor);
}

void activation(const QuantizedInput& x, int64_t samples, int64_t count, int64_t channels, Activation kind, float activation_min,
                float activation_max, const RangeArguments& range, const QuantizedOutput& y, const Executor& executor) {
  check_activation(samples, count, channels, kind, activation_min, activation_max, range);
  clear_stats(y, samples, channels);
  const int64_t rows = count / channels;
  std::vector<Table> tables(static_cast<size_t>(samples));
  parallel_for(executor, samples, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      SampleEpilogue e = sample_inputs(x.scale[n], x.zero_point[n], 1.0f, 0);
      const auto value = [&](int32_t q) { return activation_value(q, e, kind, activation_min, activation_max); };
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
  const int64_t total = check_concat(channels, input_count, samples, positions, range);
  clear_stats(y, samples, total);
  parallel_for(executor, samples, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const QParams first_input{inputs[0].scale[n], inputs[0].zero_point[n]};
      ConcatInputs all;
      for (int64_t i = 0; i < input_count; ++i) all.add(inputs[i].scale[n], inputs[i].zero_point[n], first_input);
      const QParams qparams = all.qparams(first_input, range.strategy == Strategy::fixed ? range.predictor : nullptr);
      write_qparams(y, n, concat_epilogue(first_input.scale, 0, all.valid, qparams), qparams);
      int64_t* stats = stats_row(y, n, total);
      int64_t offset = 0;
      for (int64_t i = 0; i < input_count; ++i) {
        const SampleEpilogue e = concat_epilogue(inputs[i].scale[n], inputs[i].zero_point[n], all.valid, qparams);
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
