// Max, average and adaptive average pooling. Sums are exact integers; an average rounds once. The range of an average is
// found by a first pass that computes the same sums and stores nothing.
#include <algorithm>
#include <vector>

#include "front_end.h"
#include "windows.h"

namespace probquant {
namespace {

void average(int64_t batch, int64_t channels, const AverageWindows& windows, const QuantizedInput& x, const RangeArguments& range,
             const QuantizedOutput& y, const Executor& executor) {
  if (batch == 0) return;
  const int64_t in_height = windows.in_height, in_width = windows.in_width, out_width = windows.out_width;
  clear_stats(y, batch, channels);
  std::vector<SampleEpilogue> epilogues(static_cast<size_t>(batch));
  std::vector<float> exact(static_cast<size_t>(2 * batch));
  const int64_t positions = windows.out_height * out_width;
  // visit(position, sums, offset, share): every channel of one output, share * (sum - offset)
  const auto for_each_output = [&](int64_t n, int64_t begin, int64_t end, auto visit) {
    std::vector<int32_t> sums(static_cast<size_t>(channels));
    for (int64_t position = begin; position < end; ++position) {
      const Window w = windows.at(position / out_width, position % out_width);
      const int64_t rows = w.y_end - w.y_begin, columns = w.x_end - w.x_begin;
      kernels().window_sums(x.q + ((n * in_height + w.y_begin) * in_width + w.x_begin) * channels, rows, columns, in_width * channels, channels,
                            channels, sums.data());
      const int32_t offset = static_cast<int32_t>(rows * columns) * epilogues[static_cast<size_t>(n)].x_zero_point;
      visit(position, sums.data(), offset, 1.0f / static_cast<float>(w.divisor));
    }
  };
  for (int64_t n = 0; n < batch; ++n) {
    epilogues[static_cast<size_t>(n)] = sample_inputs(x.scale[n], x.zero_point[n], 1.0f, 0);
    exact[static_cast<size_t>(2 * n)] = kInfinity, exact[static_cast<size_t>(2 * n + 1)] = -kInfinity;
  }
  if (range.strategy != Strategy::fixed)
    parallel_over_samples(executor, batch, positions, 1, [&](int64_t n, int64_t begin, int64_t end) {
      float lo = kInfinity, hi = -kInfinity;
      for_each_output(n, begin, end, [&](int64_t, const int32_t* sums, int32_t offset, float share) {
        float low, high;
        kernels().average_range(sums, channels, offset, share, epilogues[static_cast<size_t>(n)], &low, &high);
        lo = min_f(low, lo);
        hi = max_f(high, hi);
      });
      atomic_widen(&exact[static_cast<size_t>(2 * n)], lo, hi);
    });
  for (int64_t n = 0; n < batch; ++n) {
    const float* r = &exact[static_cast<size_t>(2 * n)];
    const QParams qparams = range.strategy == Strategy::fixed ? fixed_qparams(range.predictor) : qparams_from_range(r[0], r[1]);
    set_output(epilogues[static_cast<size_t>(n)], qparams, -kInfinity, kInfinity);
    write_qparams(y, n, epilogues[static_cast<size_t>(n)], qparams);
  }
  parallel_over_samples(executor, batch, positions, 1, [&](int64_t n, int64_t begin, int64_t end) {
    uint8_t* out = y.q + n * positions * channels;
    int64_t clipped = 0;
    for_each_output(n, begin, end, [&](int64_t position, const int32_t* sums, int32_t offset, float share) {
      clipped += kernels().average(sums, channels, offset, share, epilogues[static_cast<size_t>(n)], out + position * channels);
    });
    int64_t* stats = stats_row(y, n, channels);
    kernels().moments(out + begin * channels, (end - begin) * channels, channels, y.channel_stats, stats);
    atomic_add(stats + kStatsClipped, clipped);
  });
  mark_invalid(y, batch, channels);
}

/// Max pooling passes scale and zero point through; padding never wins.
void maximum(const Conv2dShape& s, const QuantizedInput& x, const QuantizedOutput& y, const Executor& executor) {
  if (s.batch == 0) return;
  const int64_t channels = s.in_channels, out_width = s.out_width(), positions = s.out_height() * out_width;
  clear_stats(y, s.batch, channels);
  pass_qparams(x, y, s.batch);
  const int64_t row = s.in_width * channels;
  parallel_over_samples(executor, s.batch, positions, 16, [&](int64_t n, int64_t begin, int64_t end) {
    const uint8_t* image = x.q + n * s.in_height * row;
    uint8_t* out = y.q + n * positions * channels;
    if (!valid_scale(y.scale[n])) return static_cast<void>(std::fill(out + begin * channels, out + end * channels, uint8_t{0}));
    for (int64_t position = begin; position < end; ++position) {
      const MaxTaps v(position / out_width, s.stride_height, s.padding_top, s.dilation_height, s.kernel_height, s.in_height);
      const MaxTaps h(position % out_width, s.stride_width, s.padding_left, s.dilation_width, s.kernel_width, s.in_width);
      kernels().window_max(image + v.first * row + h.first * channels, v.count, h.count, s.dilation_height * row,
                           s.dilation_width * channels, channels, out + position * channels);
    }
    kernels().moments(out + begin * channels, (end - begin) * channels, channels, y.channel_stats, stats_row(y, n, channels));
  });
  mark_invalid(y, s.batch, channels);
}

}  // namespace

void pool2d(Pool kind, const Conv2dShape& s, bool count_include_pad, const QuantizedInput& x, const RangeArguments& range, const QuantizedOutput& y,
            const Executor& executor) {
  check_pool(kind, s, range);
  if (kind == Pool::max) return maximum(s, x, y, executor);
  average(s.batch, s.in_channels, average_windows(s, count_include_pad), x, range, y, executor);
}

void adaptive_average_pool2d(int64_t batch, int64_t in_height, int64_t in_width, int64_t channels, int64_t out_height, int64_t out_width,
                             const QuantizedInput& x, const RangeArguments& range, const QuantizedOutput& y, const Executor& executor) {
  check_adaptive_pool(batch, in_height, in_width, channels, out_height, out_width, range);
  average(batch, channels, adaptive_windows(in_height, in_width, out_height, out_width), x, range, y, executor);
}

}  // namespace probquant
