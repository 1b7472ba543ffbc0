#include "front_end.h"

#include <algorithm>

namespace probquant {

Error::Error(const std::string& message) : std::runtime_error("probquant: " + message) {}
Error::~Error() = default;

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
