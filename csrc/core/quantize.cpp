// quantize, dequantize and moments.
#include <algorithm>
#include <vector>

#include "front_end.h"

namespace probquant {
namespace {

constexpr int64_t kGrain = 16384;  // values below which a sample is not worth splitting

int64_t row_grain(int64_t row_values) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row_values)); }

int64_t element_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

void check_dtype(const char* op, DType dtype) {
  require(dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16, op, ": dtype ", static_cast<int64_t>(dtype),
          " is none of float32, float16, bfloat16");
}

}  // namespace

void quantize(const FloatView& x, const float* scale, const int32_t* zero_point, const QuantizedOutput& y, const Executor& executor) {
  check_dtype("quantize", x.dtype);
  for (int i = 0; i < 4; ++i) require(x.size[i] >= 0, "quantize: negative size ", x.size[i]);
  require((scale == nullptr) == (zero_point == nullptr), "quantize: scale and zero_point come together");
  const int64_t samples = x.size[0], rows = x.size[1], row_values = x.size[2] * x.size[3], channels = x.size[3];
  if (samples == 0) return;
  const auto problem = [&](int64_t n) {
    return QuantizeProblem{static_cast<const char*>(x.data) + n * x.stride[0] * element_bytes(x.dtype), x.dtype, {rows, x.size[2], channels},
                           {x.stride[1], x.stride[2], x.stride[3]}};
  };
  const int64_t grain = row_grain(row_values);
  std::vector<float> range;
  if (!scale) {
    range.resize(static_cast<size_t>(2 * samples));
    for (int64_t n = 0; n < samples; ++n) range[static_cast<size_t>(2 * n)] = kInfinity, range[static_cast<size_t>(2 * n + 1)] = -kInfinity;
    parallel_over_samples(executor, samples, rows, grain, [&](int64_t n, int64_t begin, int64_t end) {
      float lo, hi;
      kernels().float_range(problem(n), begin, end, &lo, &hi);
      atomic_widen(&range[static_cast<size_t>(2 * n)], lo, hi);
    });
  }
  clear_stats(y, samples, channels);
  const bool empty = rows * row_values == 0;
  for (int64_t n = 0; n < samples; ++n) {
    const float* r = scale ? nullptr : &range[static_cast<size_t>(2 * n)];
    const QParams qparams = scale ? QParams{valid_scale(*scale) ? *scale : kNan, clamp_zero_point(*zero_point)}
                                  : empty ? qparams_from_range(0.0f, 0.0f) : qparams_from_range(r[0], r[1]);
    y.scale[n] = qparams.scale;
    y.zero_point[n] = valid_scale(qparams.scale) ? qparams.zero_point : 0;
  }
  parallel_over_samples(executor, samples, rows, grain, [&](int64_t n, int64_t begin, int64_t end) {
    uint8_t* q = y.q + n * rows * row_values;
    if (valid_scale(y.scale[n]))
      kernels().quantize(problem(n), begin, end, 1.0f / y.scale[n], y.zero_point[n], q, stats_row(y, n, channels), y.channel_stats);
    else
      std::fill(q + begin * row_values, q + end * row_values, uint8_t{0});
  });
  mark_invalid(y, samples, channels);
}

void dequantize(const QuantizedInput& x, int64_t samples, int64_t count, DType dtype, void* y, const Executor& executor) {
  check_dtype("dequantize", dtype);
  require(samples >= 0 && count >= 0, "dequantize: negative size [", samples, ", ", count, "]");
  parallel_over_samples(executor, samples, count, kGrain, [&](int64_t n, int64_t begin, int64_t end) {
    const int64_t at = n * count + begin;
    const float scale = valid_scale(x.scale[n]) ? x.scale[n] : kNan;
    kernels().dequantize(x.q + at, end - begin, scale, clamp_zero_point(x.zero_point[n]), dtype, static_cast<char*>(y) + at * element_bytes(dtype));
  });
}

void moments(const uint8_t* q, int64_t samples, int64_t count, int64_t channels, bool channel_stats, int64_t* stats, const Executor& executor) {
  require(channels > 0 && count % channels == 0, "moments: channels ", channels, " does not divide the sample's ", count, " values");
  const int64_t columns = stats_columns(channels, channel_stats), rows = count / channels;
  std::fill_n(stats, samples * columns, int64_t{0});
  parallel_over_samples(executor, samples, rows, row_grain(channels), [&](int64_t n, int64_t begin, int64_t end) {
    kernels().moments(q + n * count + begin * channels, (end - begin) * channels, channels, channel_stats, stats + n * columns);
  });
}

}  // namespace probquant
