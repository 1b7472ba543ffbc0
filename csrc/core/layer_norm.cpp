// LayerNorm, with the residual add in front of it.
#include <algorithm>
#include <vector>

#include "front_end.h"

namespace probquant {

void layer_norm(int64_t rows, int64_t channels, const LayerNormArguments& a, const Executor& executor) {
  require(rows >= 0 && channels > 0, "layer_norm: size [", rows, ", ", channels, "], want rows >= 0 and channels > 0");
  require(a.eps >= 0.0f && is_finite(a.eps), "layer_norm: eps ", std::to_string(a.eps), ", want finite and >= 0");
  const bool quantized = a.range.strategy != Strategy::none;
  if (quantized) check_range("layer_norm", a.range, 0);
  else check_predictor("layer_norm", a.range.strategy, a.range.predictor, a.range.predictor_size, 0);
  const LayerNormProblem p{channels, a.x.q, a.x_float, a.residual, a.weight, a.bias, a.eps};
  parallel_for(executor, rows, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(2 * channels));
    for (int64_t row = begin; row < end; ++row) {
      QParams x{1.0f, 0};
      if (p.q) x = {valid_scale(a.x.scale[row]) ? a.x.scale[row] : kNan, clamp_zero_point(a.x.zero_point[row])};
      float* sum = a.sum ? a.sum + row * channels : scratch.data();
      float* y = quantized ? scratch.data() + channels : a.y_float + row * channels;
      const bool valid = valid_scale(x.scale);
      if (valid) kernels().layer_norm(p, row, x, sum, y);
      else std::fill_n(sum, channels, kNan), std::fill_n(y, channels, kNan);
      if (quantized) quantize_row(y, row, channels, valid, a.range, a.y);
    }
  });
}

}  // namespace probquant
