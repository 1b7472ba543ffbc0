// LayerNorm, with the residual add in front of it.
#include <algorithm>
#include <vector>

#include "front_end.h"

namespace probquant {

void layer_norm(int64_t rows, int64_t channels, const LayerNormArguments& a, const Executor& executor) {
  check_layer_norm(rows, channels, a);
  const bool quantized = a.range.strategy != Strategy::none;
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
