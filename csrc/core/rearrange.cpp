// Ops that move codes and compute nothing: nearest upsampling. Scale and zero point pass through.
#include <algorithm>
#include <cstring>

#include "front_end.h"

namespace probquant {

void upsample_nearest2d(int64_t batch, int64_t in_height, int64_t in_width, int64_t channels, int64_t factor_height, int64_t factor_width,
                        const QuantizedInput& x, const QuantizedOutput& y, const Executor& executor) {
  check_upsample(batch, in_height, in_width, channels, factor_height, factor_width);
  clear_stats(y, batch, channels);
  pass_qparams(x, y, batch);
  const int64_t row = in_width * channels, out_row = row * factor_width;
  parallel_over_samples(executor, batch, in_height, 1, [&](int64_t n, int64_t begin, int64_t end) {
    const uint8_t* image = x.q + n * in_height * row;
    uint8_t* out = y.q + n * in_height * factor_height * out_row;
    if (!valid_scale(y.scale[n]))
      return static_cast<void>(std::fill(out + begin * factor_height * out_row, out + end * factor_height * out_row, uint8_t{0}));
    for (int64_t i = begin; i < end; ++i) {
      uint8_t* first = out + i * factor_height * out_row;
      for (int64_t j = 0; j < in_width * factor_width; ++j)
        std::memcpy(first + j * channels, image + i * row + j / factor_width * channels, static_cast<size_t>(channels));
      for (int64_t copy = 1; copy < factor_height; ++copy) std::memcpy(first + copy * out_row, first, static_cast<size_t>(out_row));
    }
    kernels().moments(image + begin * row, (end - begin) * row, channels, y.channel_stats, stats_row(y, n, channels));
  });
  // The sums are of the input's codes so far, and each of them was written factor_height * factor_width times.
  const int64_t columns = batch * stats_columns(channels, y.channel_stats);
  for (int64_t i = 0; i < columns; ++i) y.stats[i] *= factor_height * factor_width;
  mark_invalid(y, batch, channels);
}

}  // namespace probquant
