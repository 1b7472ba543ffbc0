// LayerNorm with the residual add in front of it: a warp per row, which it reads once, and quantizes before it leaves the registers. What
// is beyond a row's first 1,024 channels is read again for each of the four passes, from L1.
//
// Launch: a block of 4 warps per 4 rows, at most 168 registers (3 blocks per multiprocessor), no shared memory. Lanes read and write
// neighbouring channels: whole sectors where a row is a multiple of 32 channels. Bound by memory (a residual and a sum in float32 are 8 of
// the 10 bytes per value), by latency where there are fewer rows than the device has warps.
#include "row.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

constexpr int kRows = 4;

__global__ void __launch_bounds__(32 * kRows, 3) layer_norm_kernel(const int64_t rows, const int32_t channels, const LayerNormArguments a) {
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t at = row * channels;
  const bool codes = a.x.q != nullptr;
  const float scale = codes ? a.x.scale[row] : 1.0f;
  const bool valid = valid_scale(scale);
  const int32_t zero_point = codes ? clamp_zero_point(a.x.zero_point[row]) : 0;
  const WarpRow sums(channels, [&](int32_t i) {
    const float residual = a.residual != nullptr ? a.residual[at + i] : 0.0f;
    if (!valid) return kNan;
    return codes ? fmaf(static_cast<float>(a.x.q[at + i] - zero_point), scale, residual) : a.x_float[at + i] + residual;
  });
  if (a.sum != nullptr) sums.for_each([&](int32_t i, float v) { a.sum[at + i] = v; });
  const auto n = static_cast<float>(channels);
  const float mean = sums.sum([](float v, float total) { return total + v; }) / n;
  const float variance = sums.sum([mean](float v, float total) { return fmaf(v - mean, v - mean, total); }) / n;
  const float factor = 1.0f / sqrtf(variance + a.eps);
  const auto y = sums.mapped([&a, mean, factor](int32_t i, float v) {
    return fmaf((v - mean) * factor, a.weight != nullptr ? a.weight[i] : 1.0f, a.bias != nullptr ? a.bias[i] : 0.0f);
  });
  if (a.range.strategy == Strategy::none) {
    y.for_each([&](int32_t i, float v) { a.y_float[at + i] = valid ? v : kNan; });
  } else {
    quantize_row(y, row, channels, valid, a.range.strategy == Strategy::fixed ? a.range.predictor : nullptr, a.y);
  }
}

}  // namespace

void launch_layer_norm(int64_t rows, int64_t channels, const LayerNormArguments& a, void* stream) {
  launch("layer_norm", layer_norm_kernel, {(rows + kRows - 1) / kRows, 32 * kRows}, stream, rows, static_cast<int32_t>(channels), a);
}

}  // namespace probquant::cuda
