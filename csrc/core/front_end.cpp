#include "front_end.h"

#include <algorithm>

namespace probquant {

Error::Error(const std::string& message) : std::runtime_error("probquant: " + message) {}
Error::~Error() = default;

void check_window(const char* op, const Conv2dShape& s) {
  const auto inside = [](int64_t value, int64_t least) { return value >= least && value <= kMaxExtent; };
  require(s.batch >= 0, op, ": batch ", s.batch, ", want >= 0");
  require(inside(s.in_height, 1) && inside(s.in_width, 1) && inside(s.in_channels, 1), op, ": input [", s.in_height, ", ", s.in_width, ", ",
          s.in_channels, "] (H, W, C), want positive sizes");
  require(inside(s.kernel_height, 1) && inside(s.kernel_width, 1), op, ": kernel (", s.kernel_height, ", ", s.kernel_width, "), want positive");
  require(inside(s.stride_height, 1) && inside(s.stride_width, 1), op, ": stride (", s.stride_height, ", ", s.stride_width, "), want positive");
  require(inside(s.dilation_height, 1) && inside(s.dilation_width, 1), op, ": dilation (", s.dilation_height, ", ", s.dilation_width,
          "), want positive");
  require(inside(s.padding_top, 0) && inside(s.padding_bottom, 0) && inside(s.padding_left, 0) && inside(s.padding_right, 0), op, ": padding (",
          s.padding_top, ", ", s.padding_bottom, ", ", s.padding_left, ", ", s.padding_right, "), want >= 0");
  require(s.out_height() > 0 && s.out_width() > 0, op, ": kernel (", s.kernel_height, ", ", s.kernel_width,
          ") with dilation is larger than the padded input (", s.in_height + s.padding_top + s.padding_bottom, ", ",
          s.in_width + s.padding_left + s.padding_right, ")");
}

void clear_stats(const QuantizedOutput& y, int64_t samples, int64_t channels) {
  std::fill_n(y.stats, samples * stats_columns(channels, y.channel_stats), int64_t{0});
}

void write_qparams(const QuantizedOutput& y, int64_t sample, const SampleEpilogue& epilogue, QParams qparams) {
  y.scale[sample] = epilogue.valid ? qparams.scale : kNan;
  y.zero_point[sample] = epilogue.y_zero_point;
}

void pass_qparams(const QuantizedInput& x, const QuantizedOutput& y, int64_t samples) {
  for (int64_t n = 0; n < samples; ++n) {
    const bool valid = valid_scale(x.scale[n]);
    y.scale[n] = valid ? x.scale[n] : kNan;
    y.zero_point[n] = valid ? clamp_zero_point(x.zero_point[n]) : 0;
  }
}

void mark_invalid(const QuantizedOutput& y, int64_t samples, int64_t channels) {
  for (int64_t n = 0; n < samples; ++n)
    if (!valid_scale(y.scale[n])) stats_row(y, n, channels)[kStatsClipped] = -1;
}

QParams fixed_qparams(const float* predictor) {
  const float zero_point = clamp_f(rintf(predictor[1]), 0.0f, 255.0f);
  return {predictor[0], static_cast<int32_t>(zero_point)};
}

void check_predictor(const char* op, Strategy strategy, const float* predictor, int64_t size, int64_t wanted) {
  require(size == wanted && (predictor != nullptr || wanted == 0), op, ": predictor has ", size, " values, strategy ",
          static_cast<int64_t>(strategy), " wants ", wanted);
}

void check_range(const char* op, const RangeArguments& range, int64_t gaussian_size) {
  require(range.strategy == Strategy::fixed || range.strategy == Strategy::dynamic || range.strategy == Strategy::gaussian, op, ": strategy ",
          static_cast<int64_t>(range.strategy), ", want fixed, dynamic or gaussian");
  check_predictor(op, range.strategy, range.predictor, range.predictor_size,
                  range.strategy == Strategy::fixed ? 2 : range.strategy == Strategy::gaussian ? gaussian_size : 0);
}

void quantize_row(const float* x, int64_t row, int64_t channels, bool valid, const RangeArguments& range, const QuantizedOutput& y) {
  const QuantizeProblem problem{x, DType::float32, {1, 1, channels}, {channels, channels, 1}};
  QParams qparams{kNan, 0};
  if (valid && range.strategy == Strategy::fixed) {
    qparams = fixed_qparams(range.predictor);
  } else if (valid) {
    float lo, hi;
    kernels().float_range(problem, 0, 1, &lo, &hi);
    qparams = qparams_from_range(lo, hi);
  }
  valid = valid_scale(qparams.scale);
  y.scale[row] = valid ? qparams.scale : kNan;
  y.zero_point[row] = valid ? qparams.zero_point : 0;
  int64_t* stats = stats_row(y, row, channels);
  std::fill_n(stats, stats_columns(channels, y.channel_stats), int64_t{0});
  uint8_t* q = y.q + row * channels;
  if (valid) return kernels().quantize(problem, 0, 1, 1.0f / qparams.scale, qparams.zero_point, q, stats, y.channel_stats);
  std::fill_n(q, channels, uint8_t{0});
  stats[kStatsClipped] = -1;
}

}  // namespace probquant
