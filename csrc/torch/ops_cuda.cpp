// torch.ops.probquant on CUDA tensors: the CPU ops' checks and outputs, torch's current device and stream. Built in every
// case: without CUDA kernels a call says so.
#include <probquant/cuda.h>

#include "elementwise_ops.h"
#include "layer_ops.h"
#include "pool_ops.h"
#include "transformer_ops.h"

namespace probquant::ops {
namespace {

/// CUDA's ops (elementwise_ops.h, layer_ops.h, pool_ops.h, transformer_ops.h).
class Cuda {
 public:
  explicit Cuda(const Tensor& first) : guard_(first.device_index()), stream_(stable::current_cuda_stream(first.device_index())) {}
  static int64_t packed_weight_bytes(const WeightShape& shape) { return cuda::packed_weight_bytes(shape); }
  static int64_t conv2d_workspace_bytes(const Conv2dShape& shape, Strategy strategy, int64_t gamma) {
    return cuda::conv2d_workspace_bytes(shape, strategy, gamma);
  }
  template <class... Arguments>
  void pack_weight(const Arguments&... arguments) const {
    cuda::pack_weight(arguments..., stream_);
  }
  void conv2d(const Conv2dShape& shape, const LayerArguments& a) const { cuda::conv2d(shape, a, stream_); }
  void surrogate_law(const Conv2dShape& shape, const LayerArguments& a, float* law) const { cuda::surrogate_law(shape, a, law, stream_); }
  static int64_t elementwise_workspace_bytes(int64_t samples, int64_t count, int64_t channels, Strategy strategy) {
    return cuda::elementwise_workspace_bytes(samples, count, channels, strategy);
  }
  template <class... Arguments>
  void add(const Arguments&... arguments) const {
    cuda::add(arguments..., stream_);
  }
  template <class... Arguments>
  void mul(const Arguments&... arguments) const {
    cuda::mul(arguments..., stream_);
  }
  template <class... Arguments>
  void activation(const Arguments&... arguments) const {
    cuda::activation(arguments..., stream_);
  }
  template <class... Arguments>
  void concat(const Arguments&... arguments) const {
    cuda::concat(arguments..., stream_);
  }
  template <class... Arguments>
  void upsample_nearest2d(const Arguments&... arguments) const {
    cuda::upsample_nearest2d(arguments..., stream_);
  }
  void layer_norm(int64_t rows, int64_t channels, const LayerNormArguments& a) const { cuda::layer_norm(rows, channels, a, stream_); }
  static int64_t attention_workspace_bytes(const AttentionShape& shape) { return cuda::attention_workspace_bytes(shape); }
  void attention(const AttentionShape& shape, const AttentionArguments& a) const { cuda::attention(shape, a, stream_); }
  static int64_t pool_workspace_bytes(int64_t batch, int64_t out_height, int64_t out_width, int64_t channels, Strategy strategy) {
    return cuda::pool_workspace_bytes(batch, out_height, out_width, channels, strategy);
  }
  template <class... Arguments>
  void pool2d(const Arguments&... arguments) const {
    cuda::pool2d(arguments..., stream_);
  }
  template <class... Arguments>
  void adaptive_average_pool2d(const Arguments&... arguments) const {
    cuda::adaptive_average_pool2d(arguments..., stream_);
  }

 private:
  stable::DeviceGuard guard_;
  void* stream_;
};

Quantized quantize(const Tensor& x, int64_t sample_dims, const OptionalTensor& scale, const OptionalTensor& zero_point, bool channel_stats) {
  const stable::DeviceGuard guard(x.device_index());
  QuantizeArguments a = quantize_arguments(x, sample_dims, scale, zero_point, channel_stats);
  const Tensor workspace = stable::empty({cuda::quantize_workspace_bytes(a.x, a.scale != nullptr)}, codes().uint8, x);
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
  cuda::moments(a.q, a.samples, a.count, a.channels, channel_stats, a.stats.data<int64_t>(), stable::current_cuda_stream(q.device_index()));
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
