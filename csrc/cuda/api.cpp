// The public functions of cuda.h but for the layers: checks, partition, launches. Host code only; the checks are those of the CPU
// front ends.
#include <probquant/cuda.h>

#include "../core/front_end.h"
#include "launch.h"

namespace probquant::cuda {
namespace {

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

Partition checked_partition(const char* op, int64_t samples, int64_t positions, int64_t channels, bool channel_stats = false) {
  const Partition p = make_partition(samples, positions, channels, channel_stats);
  require(p.blocks() <= kMaxBlocks, op, ": ", samples, " samples of ", positions, " x ", channels, " values need ", p.blocks(),
          " thread blocks, CUDA has ", kMaxBlocks);
  return p;
}

/// The workspace of an op: parts of its stats, then what a first launch has measured.
class Workspace {
 public:
  Workspace(const Partition& p, bool channel_stats, bool measures)
      : layout_(parts_layout(p, p.channels, channel_stats)), range_bytes_(measures ? p.blocks() * static_cast<int64_t>(sizeof(Range)) : 0) {}
  int64_t bytes() const { return layout_.bytes() + range_bytes_; }
  void check(const char* op, const void* workspace) const {
    require(workspace != nullptr || bytes() == 0, op, ": workspace is null, want workspace_bytes: ", bytes(), " bytes");
  }
  Parts parts(void* workspace) const { return layout_.at(workspace); }
  Range* ranges(void* workspace) const { return range_bytes_ > 0 ? reinterpret_cast<Range*>(static_cast<uint8_t*>(workspace) + layout_.bytes()) : nullptr; }

 private:
  PartsLayout layout_;
  int64_t range_bytes_;
};

void check_dtype(const char* op, DType dtype) {
  require(dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16, op, ": dtype ", static_cast<int64_t>(dtype),
          " is none of float32, float16, bfloat16");
}

Partition quantize_partition(const FloatView& x, bool channel_stats) {
  check_dtype("quantize", x.dtype);
  for (const int64_t size : x.size) require(size >= 0, "quantize: negative size ", size);
  return checked_partition("quantize", x.size[0], x.size[1] * x.size[2], x.size[3], channel_stats);
}

void average_pool(const char* op, int64_t batch, int64_t channels, const AverageWindows& windows, const QuantizedInput& x, const RangeArguments& range,
                  const QuantizedOutput& y, void* workspace, void* stream) {
  const Partition p = checked_partition(op, batch, windows.out_height * windows.out_width, channels, y.channel_stats);
  if (batch == 0) return;
  const bool fixed = range.strategy == Strategy::fixed;
  const Workspace w(p, y.channel_stats, !fixed);
  w.check(op, workspace);
  launch_average_pool(p, windows, x, fixed ? range.predictor : nullptr, w.ranges(workspace), y, w.parts(workspace), stream);
}

}  // namespace

int64_t workspace_bytes(int64_t samples, int64_t positions, int64_t channels, bool channel_stats, bool measures) {
  require(samples >= 0 && positions >= 0 && channels >= 0, "workspace_bytes: negative size [", samples, ", ", positions, ", ", channels, "]");
  return Workspace(checked_partition("workspace_bytes", samples, positions, channels, channel_stats), channel_stats, measures).bytes();
}

void quantize(const FloatView& x, const float* scale, const int32_t* zero_point, const QuantizedOutput& y, void* workspace, void* stream) {
  const Partition p = quantize_partition(x, y.channel_stats);
  require((scale == nullptr) == (zero_point == nullptr), "quantize: scale and zero_point come together");
  if (p.samples == 0) return;
  const Workspace w(p, y.channel_stats, scale == nullptr);
  w.check("quantize", workspace);
  const FloatSource source{x.data, x.dtype, x.size[2], {x.stride[0], x.stride[1], x.stride[2], x.stride[3]}};
  if (!scale) launch_range(p, source, w.ranges(workspace), stream);
  launch_quantize(p, source, w.ranges(workspace), scale, zero_point, y, w.parts(workspace), stream);
}

void dequantize(const QuantizedInput& x, int64_t samples, int64_t count, DType dtype, void* y, void* stream) {
  check_dtype("dequantize", dtype);
  require(samples >= 0 && count >= 0, "dequantize: negative size [", samples, ", ", count, "]");
  if (samples == 0 || count == 0) return;
  launch_dequantize(checked_partition("dequantize", samples, count, 1), x, dtype, y, stream);
}

void moments(const uint8_t* q, int64_t samples, int64_t count, int64_t channels, bool channel_stats, int64_t* stats, void* workspace, void* stream) {
  require(samples >= 0 && count >= 0, "moments: negative size [", samples, ", ", count, "]");
  require(channels > 0 && count % channels == 0, "moments: channels ", channels, " does not divide the sample's ", count, " values");
  const Partition p = checked_partition("moments", samples, count / channels, channels, channel_stats);
  if (samples == 0) return;
  const Workspace w(p, channel_stats, false);
  w.check("moments", workspace);
  launch_moments(p, q, {nullptr, nullptr, nullptr, stats, channel_stats}, w.parts(workspace), stream);
}

void add(const QuantizedInput& a, const QuantizedInput& b, int64_t samples, int64_t count, int64_t channels, float activation_min, float activation_max,
         const RangeArguments& range, const QuantizedOutput& y, void* workspace, void* stream) {
  check_add(a, b, samples, count, channels, activation_min, activation_max, range);
  const Partition p = checked_partition("add", samples, count / channels, channels, y.channel_stats);
  if (samples == 0) return;
  const Workspace w(p, y.channel_stats, range.strategy == Strategy::dynamic);
  w.check("add", workspace);
  launch_add(p, {a, b, activation_min, activation_max, false}, range.strategy, range.predictor, w.ranges(workspace), y, w.parts(workspace), stream);
}

void mul(const QuantizedInput& a, const QuantizedInput& b, int64_t samples, int64_t count, int64_t channels, bool per_channel, const RangeArguments& range,
         const QuantizedOutput& y, void* workspace, void* stream) {
  check_mul(a, b, samples, count, channels, range);
  const Partition p = checked_partition("mul", samples, count / channels, channels, y.channel_stats);
  if (samples == 0) return;
  const Workspace w(p, y.channel_stats, range.strategy == Strategy::dynamic);
  w.check("mul", workspace);
  launch_mul(p, {a, b, -kInfinity, kInfinity, per_channel}, range.strategy, range.predictor, w.ranges(workspace), y, w.parts(workspace), stream);
}

void activation(const QuantizedInput& x, int64_t samples, int64_t count, int64_t channels, Activation kind, float activation_min, float activation_max,
                const RangeArguments& range, const QuantizedOutput& y, void* workspace, void* stream) {
  check_activation(samples, count, channels, kind, activation_min, activation_max, range);
  const Partition p = checked_partition("activation", samples, count / channels, channels, y.channel_stats);
  if (samples == 0) return;
  const Workspace w(p, y.channel_stats, range.strategy == Strategy::dynamic);
  w.check("activation", workspace);
  launch_activation(p, {x, kind, activation_min, activation_max}, range.strategy == Strategy::fixed ? range.predictor : nullptr,
                    count > 0 ? w.ranges(workspace) : nullptr, y, w.parts(workspace), stream);  // without values: all codes
}

void concat(const QuantizedInput* inputs, const int64_t* channels, int64_t input_count, int64_t samples, int64_t positions, const RangeArguments& range,
            const QuantizedOutput& y, void* workspace, void* stream) {
  const int64_t total = check_concat(channels, input_count, samples, positions, range);
  require(input_count <= kMaxConcatInputs, "concat: ", input_count, " inputs, CUDA kernels take at most ", kMaxConcatInputs);
  const Partition p = checked_partition("concat", samples, positions, total, y.channel_stats);
  if (samples == 0) return;
  ConcatArguments a{};
  a.count = static_cast<int32_t>(input_count);
  for (int64_t i = 0; i < input_count; ++i) {
    a.inputs[i] = {inputs[i].q, inputs[i].scale, inputs[i].zero_point};
    a.channels[i] = channels[i];
  }
  const Workspace w(p, y.channel_stats, false);
  w.check("concat", workspace);
  launch_concat(p, a, range.strategy == Strategy::fixed ? range.predictor : nullptr, y, w.parts(workspace), stream);
}

void upsample_nearest2d(int64_t batch, int64_t in_height, int64_t in_width, int64_t channels, int64_t factor_height, int64_t factor_width,
                        const QuantizedInput& x, const QuantizedOutput& y, void* workspace, void* stream) {
  check_upsample(batch, in_height, in_width, channels, factor_height, factor_width);
  const Partition p = checked_partition("upsample_nearest2d", batch, in_height * in_width, channels, y.channel_stats);
  if (batch == 0) return;
  const Workspace w(p, y.channel_stats, false);
  w.check("upsample_nearest2d", workspace);
  launch_upsample(p, {in_width, factor_height, factor_width}, x, y, w.parts(workspace), stream);
}

void pool2d(Pool kind, const Conv2dShape& s, bool count_include_pad, const QuantizedInput& x, const RangeArguments& range, const QuantizedOutput& y,
            void* workspace, void* stream) {
  check_pool(kind, s, range);
  if (kind == Pool::average) return average_pool("pool2d", s.batch, s.in_channels, average_windows(s, count_include_pad), x, range, y, workspace, stream);
  const Partition p = checked_partition("pool2d", s.batch, s.out_height() * s.out_width(), s.in_channels, y.channel_stats);
  if (s.batch == 0) return;
  const Workspace w(p, y.channel_stats, false);
  w.check("pool2d", workspace);
  launch_max_pool(p, {s.in_height, s.in_width, s.out_width(), s.kernel_height, s.kernel_width, s.stride_height, s.stride_width, s.padding_top, s.padding_left,
                      s.dilation_height, s.dilation_width}, x, y, w.parts(workspace), stream);
}

void adaptive_average_pool2d(int64_t batch, int64_t in_height, int64_t in_width, int64_t channels, int64_t out_height, int64_t out_width,
                             const QuantizedInput& x, const RangeArguments& range, const QuantizedOutput& y, void* workspace, void* stream) {
  check_adaptive_pool(batch, in_height, in_width, channels, out_height, out_width, range);
  average_pool("adaptive_average_pool2d", batch, channels, adaptive_windows(in_height, in_width, out_height, out_width), x, range, y, workspace, stream);
}

}  // namespace probquant::cuda
