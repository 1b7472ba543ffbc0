// torch.ops.probquant on CUDA tensors: the CPU ops' checks and outputs, torch's current device and stream. Built in every
// case: without CUDA kernels a call says so.
#include <probquant/cuda.h>

#include <numeric>

#include "elementwise_ops.h"
#include "layer_ops.h"
#include "pool_ops.h"
#include "transformer_ops.h"

namespace probquant::ops {
namespace {

/// CUDA's ops (elementwise_ops.h, layer_ops.h, pool_ops.h, transformer_ops.h). Every launch gets a workspace of its own from torch's allocator,
/// on the stream that is current: two launches never share one, in whatever streams and CUDA graphs they run.
class Cuda {
 public:
  explicit Cuda(const Tensor& first) : first_(first), guard_(first.device_index()), stream_(stable::current_cuda_stream(first.device_index())) {}
  static int64_t packed_weight_bytes(const WeightShape& shape) { return cuda::packed_weight_bytes(shape); }
  template <class... Arguments>
  void pack_weight(const Arguments&... arguments) const {
    cuda::pack_weight(arguments..., stream_);
  }

  // The front ends allocate none: only here is known whether the output's channels have stats.
  static int64_t conv2d_workspace_bytes(const Conv2dShape&, Strategy, int64_t) { return 0; }
  static int64_t elementwise_workspace_bytes(int64_t, int64_t, int64_t, Strategy) { return 0; }
  static int64_t pool_workspace_bytes(int64_t, int64_t, int64_t, int64_t, Strategy) { return 0; }

  void conv2d(const Conv2dShape& shape, LayerArguments a) const {
    const Tensor workspace = allocate(cuda::conv2d_workspace_bytes(shape, a.strategy, a.gamma, a.y.channel_stats));
    a.workspace = workspace.data();
    cuda::conv2d(shape, a, stream_);
  }
  void surrogate_law(const Conv2dShape& shape, LayerArguments a, float* law) const {
    const Tensor workspace = allocate(cuda::conv2d_workspace_bytes(shape, a.strategy, a.gamma, false));
    a.workspace = workspace.data();
    cuda::surrogate_law(shape, a, law, stream_);
  }
  void add(const QuantizedInput& a, const QuantizedInput& b, int64_t samples, int64_t count, int64_t channels, float lo, float hi, const RangeArguments& range,
           const QuantizedOutput& y, void*) const {
    const Tensor workspace = of_values(samples, count, channels, y, range);
    cuda::add(a, b, samples, count, channels, lo, hi, range, y, workspace.data(), stream_);
  }
  void mul(const QuantizedInput& a, const QuantizedInput& b, int64_t samples, int64_t count, int64_t channels, bool per_channel, const RangeArguments& range,
           const QuantizedOutput& y, void*) const {
    const Tensor workspace = of_values(samples, count, channels, y, range);
    cuda::mul(a, b, samples, count, channels, per_channel, range, y, workspace.data(), stream_);
  }
  void activation(const QuantizedInput& x, int64_t samples, int64_t count, int64_t channels, Activation kind, float lo, float hi, const RangeArguments& range,
                  const QuantizedOutput& y, void*) const {
    const Tensor workspace = of_values(samples, count, channels, y, range);
    cuda::activation(x, samples, count, channels, kind, lo, hi, range, y, workspace.data(), stream_);
  }
  void concat(const QuantizedInput* inputs, const int64_t* channels, int64_t count, int64_t samples, int64_t positions, const RangeArguments& range,
              const QuantizedOutput& y) const {
    const Tensor workspace = allocate(cuda::workspace_bytes(samples, positions, std::accumulate(channels, channels + count, int64_t{0}), y.channel_stats, false));
    cuda::concat(inputs, channels, count, samples, positions, range, y, workspace.data(), stream_);
  }
  void upsample_nearest2d(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t factor_height, int64_t factor_width, const QuantizedInput& x,
                          const QuantizedOutput& y) const {
    const Tensor workspace = allocate(cuda::workspace_bytes(batch, height * width, channels, y.channel_stats, false));
    cuda::upsample_nearest2d(batch, height, width, channels, factor_height, factor_width, x, y, workspace.data(), stream_);
  }
  void layer_norm(int64_t rows, int64_t channels, const LayerNormArguments& a) const { cuda::layer_norm(rows, channels, a, stream_); }
  static int64_t attention_workspace_bytes(const AttentionShape& shape) { return cuda::attention_workspace_bytes(shape); }
  void attention(const AttentionShape& shape, const AttentionArguments& a) const { cuda::attention(shape, a, stream_); }
  void pool2d(Pool kind, const Conv2dShape& s, bool count_include_pad, const QuantizedInput& x, const RangeArguments& range, const QuantizedOutput& y, void*) const {
    const Tensor workspace = of_pool(s.batch, s.out_height(), s.out_width(), s.in_channels, y, kind == Pool::average && range.strategy != Strategy::fixed);
    cuda::pool2d(kind, s, count_include_pad, x, range, y, workspace.data(), stream_);
  }
  void adaptive_average_pool2d(int64_t batch, int64_t in_height, int64_t in_width, int64_t channels, int64_t out_height, int64_t out_width, const QuantizedInput& x,
                               const RangeArguments& range, const QuantizedOutput& y, void*) const {
    const Tensor workspace = of_pool(batch, out_height, out_width, channels, y, range.strategy != Strategy::fixed);
    cuda::adaptive_average_pool2d(batch, in_height, in_width, channels, out_height, out_width, x, range, y, workspace.data(), stream_);
  }

 private:
  Tensor allocate(int64_t bytes) const { return stable::empty({bytes}, codes().uint8, first_); }
  Tensor of_values(int64_t samples, int64_t count, int64_t channels, const QuantizedOutput& y, const RangeArguments& range) const {
    return allocate(channels > 0 ? cuda::workspace_bytes(samples, count / channels, channels, y.channel_stats, range.strategy == Strategy::dynamic) : 0);
  }
  /// With errors for sizes that the op itself refuses, and better.
  Tensor of_pool(int64_t batch, int64_t height, int64_t width, int64_t channels, const QuantizedOutput& y, bool measures) const {
    return allocate(height > 0 && width > 0 ? cuda::workspace_bytes(batch, height * width, channels, y.channel_stats, measures) : 0);
  }

  const Tensor& first_;
  stable::DeviceGuard guard_;
  void* stream_;
};

Quantized quantize(const Tensor& x, int64_t sample_dims, const OptionalTensor& scale, const OptionalTensor& zero_point, bool channel_stats) {
  const stable::DeviceGuard guard(x.device_index());
  QuantizeArguments a = quantize_arguments(x, sample_dims, scale, zero_point, channel_stats);
  const int64_t* size = a.x.size;
  const Tensor workspace = stable::empty({cuda::workspace_bytes(size[0], size[1] * size[2], size[3], channel_stats, a.scale == nullptr)}, codes().uint8, x);
  cuda::quantize(a.x, a.scale, a.zero_point, a.y.pointers, workspace.data(), stable::current_cuda_stream(x.device_index()));
  return a.y.release();
}

Tensor dequantize(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, std::optional<int32_t> dtype) {
  const stable::DeviceGuard guard(x.device_index());
  DequantizeArguments a = dequantize_arguments(x, x_scale, x_zero_point, dtype);
  cuda::dequantize(a.x, a.samples, a.count, a.dtype, a.y.data(), stable::current_cuda_stream(x.device_index()));
  return std::move(a.y);
}

Tensor moments(const Tensor& q, int64_t sample_dims, bool channel_stats) {
  const stable::DeviceGuard guard(q.device_index());
  MomentsArguments a = moments_arguments(q, sample_dims, channel_stats);
  const int64_t bytes = a.channels > 0 ? cuda::workspace_bytes(a.samples, a.count / a.channels, a.channels, channel_stats, false) : 0;
  const Tensor workspace = stable::empty({bytes}, codes().uint8, q);
  cuda::moments(a.q, a.samples, a.count, a.channels, channel_stats, a.stats.data<int64_t>(), workspace.data(), stable::current_cuda_stream(q.device_index()));
  return std::move(a.stats);
}

const stable::RegisterAtLoad register_at_load{[] {
  const auto library = stable::Library::kernels("probquant", "CUDA");
  library.implement<&quantize>("quantize");
  library.implement<&dequantize>("dequantize");
  library.implement<&moments>("moments");
  library.implement<&pack_weight<Cuda>>("pack_weight");
  library.implement<&linear<Cuda>>("linear");
  library.implement<&conv2d<Cuda>>("conv2d");
  library.implement<&surrogate_law<Cuda>>("surrogate_law");
  library.implement<&add<Cuda>>("add");
  library.implement<&mul<Cuda>>("mul");
  library.implement<&activation<Cuda>>("activation");
  library.implement<&concat<Cuda>>("concat");
  library.implement<&upsample_nearest2d<Cuda>>("upsample_nearest2d");
  library.implement<&layer_norm<Cuda>>("layer_norm");
  library.implement<&attention<Cuda>>("attention");
  library.implement<&max_pool2d<Cuda>>("max_pool2d");
  library.implement<&avg_pool2d<Cuda>>("avg_pool2d");
  library.implement<&adaptive_avg_pool2d<Cuda>>("adaptive_avg_pool2d");
}};

}  // namespace
}  // namespace probquant::ops
