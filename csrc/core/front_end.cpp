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

}  // namespace probquant
