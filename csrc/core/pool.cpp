// Max, average and adaptive average pooling. Sums are exact integers; an average rounds once. The range of an average is
// found by a first pass that computes the same sums and stores nothing.
#include <algorithm>
#include <vector>

#include "front_end.h"

namespace probquant {
namespace {

/// One window, cut to the input.
struct Window {
  int64_t y_begin, y_end, x_begin, x_end;
  int64_t divisor;
};

/// Average pooling over any windows: window_at(oy, ox).
template <class WindowAt>
void average(int64_t batch, int64_t in_height, int64_t in_width, int64_t channels, int64_t out_height, int64_t out_width, const QuantizedInput& x,
             const RangeArguments& range, const QuantizedOutput& y, const Executor& executor, WindowAt window_at) {
  check_range("average pool", range, 0);
  if (batch == 0) return;
  clear_stats(y, batch, channels);
  std::vector<SampleEpilogue> epilogues(static_cast<size_t>(batch));
  std::vector<float> exact(static_cast<size_t>(2 * batch));
  const int64_t positions = out_height * out_width;
  // visit(position, sums, offset, share): every channel of one output, share * (sum - offset)
  const auto for_each_output = [&](int64_t n, int64_t begin, int64_t end, auto visit) {
    std::vector<int32_t> sums(static_cast<size_t>(channels));
    for (int64_t position = begin; position < end; ++position) {
      const Window w = window_at(position / out_width, position % out_width);
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
  // the part of a kernel axis inside the input: taps [begin, end), the first at `first`
  struct Taps {
    int64_t begin, end, first;
  };
  const auto taps = [](int64_t position, int64_t stride, int64_t padding, int64_t dilation, int64_t kernel, int64_t size) {
    const int64_t start = position * stride - padding;
    const int64_t begin = start < 0 ? (-start + dilation - 1) / dilation : 0, end = std::min(kernel, (size - start + dilation - 1) / dilation);
    return Taps{begin, std::max(begin, end), start + begin * dilation};
  };
  const int64_t row = s.in_width * channels;
  parallel_over_samples(executor, s.batch, positions, 16, [&](int64_t n, int64_t begin, int64_t end) {
    const uint8_t* image = x.q + n * s.in_height * row;
    uint8_t* out = y.q + n * positions * channels;
    if (!valid_scale(y.scale[n])) return static_cast<void>(std::fill(out + begin * channels, out + end * channels, uint8_t{0}));
    for (int64_t position = begin; position < end; ++position) {
      const Taps v = taps(position / out_width, s.stride_height, s.padding_top, s.dilation_height, s.kernel_height, s.in_height);
      const Taps h = taps(position % out_width, s.stride_width, s.padding_left, s.dilation_width, s.kernel_width, s.in_width);
      kernels().window_max(image + v.first * row + h.first * channels, v.end - v.begin, h.end - h.begin, s.dilation_height * row,
                           s.dilation_width * channels, channels, out + position * channels);
    }
    kernels().moments(out + begin * channels, (end - begin) * channels, channels, y.channel_stats, stats_row(y, n, channels));
  });
  mark_invalid(y, s.batch, channels);
}

}  // namespace

void pool2d(Pool kind, const Conv2dShape& s, bool count_include_pad, const QuantizedInput& x, const RangeArguments& range, const QuantizedOutput& y,
            const Executor& executor) {
  check_window("pool2d", s);
  const auto covers = [](int64_t before, int64_t after, int64_t kernel, int64_t dilation) {
    return before < dilation * (kernel - 1) + 1 && after < dilation * (kernel - 1) + 1;
  };
  require(covers(s.padding_top, s.padding_bottom, s.kernel_height, s.dilation_height) && covers(s.padding_left, s.padding_right, s.kernel_width, s.dilation_width),
          "pool2d: padding (", s.padding_top, ", ", s.padding_bottom, ", ", s.padding_left, ", ", s.padding_right,
          ") must be smaller than the window (", s.kernel_height, ", ", s.kernel_width, ")");
  if (kind == Pool::max) return maximum(s, x, y, executor);
  require(s.dilation_height == 1 && s.dilation_width == 1, "pool2d: average pooling has no dilation");
  average(s.batch, s.in_height, s.in_width, s.in_channels, s.out_height(), s.out_width(), x, range, y, executor, [&](int64_t oy, int64_t ox) {
    const int64_t top = oy * s.stride_height - s.padding_top, left = ox * s.stride_width - s.padding_left;
    const int64_t bottom = std::min(top + s.kernel_height, s.in_height + s.padding_bottom);
    const int64_t right = std::min(left + s.kernel_width, s.in_width + s.padding_right);
    Window w{std::max<int64_t>(top, 0), std::min(bottom, s.in_height), std::max<int64_t>(left, 0), std::min(right, s.in_width), 0};
    w.divisor = count_include_pad ? (bottom - top) * (right - left) : (w.y_end - w.y_begin) * (w.x_end - w.x_begin);
    return w;
  });
}

void adaptive_average_pool2d(int64_t batch, int64_t in_height, int64_t in_width, int64_t channels, int64_t out_height, int64_t out_width,
                             const QuantizedInput& x, const RangeArguments& range, const QuantizedOutput& y, const Executor& executor) {
  require(batch >= 0 && in_height > 0 && in_width > 0 && channels > 0 && out_height > 0 && out_width > 0, "adaptive_average_pool2d: input [", batch,
          ", ", in_height, ", ", in_width, ", ", channels, "], output (", out_height, ", ", out_width, "), want positive sizes");
  average(batch, in_height, in_width, channels, out_height, out_width, x, range, y, executor, [&](int64_t oy, int64_t ox) {
    Window w{oy * in_height / out_height, ((oy + 1) * in_height + out_height - 1) / out_height, ox * in_width / out_width,
             ((ox + 1) * in_width + out_width - 1) / out_width, 0};
    w.divisor = (w.y_end - w.y_begin) * (w.x_end - w.x_begin);
    return w;
  });
}

}  // namespace probquant
