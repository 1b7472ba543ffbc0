// torch.ops.probquant on CUDA tensors: the CPU ops' checks and outputs, torch's current device and stream. Built in every
// case: without CUDA kernels a call says so.
#include <probquant/cuda.h>

#include "quantize_arguments.h"

namespace probquant::ops {
namespace {

/// Every tensor of an op lies on the device of its first one; the checks of the arguments compare device types only.
void check_same_device(Argument a, const Tensor& t, const Tensor& first) {
  require(t.device_index() == first.device_index(), a.op, ": ", a.name, " is on CUDA device ", t.device_index(), ", the op's first argument on ",
          first.device_index());
}

Quantized quantize(const Tensor& x, int64_t sample_dims, const OptionalTensor& scale, const OptionalTensor& zero_point, bool channel_stats) {
  const stable::DeviceGuard guard(x.device_index());
  QuantizeArguments a = quantize_arguments(x, sample_dims, scale, zero_point, channel_stats);
  if (scale) check_same_device({"quantize", "scale"}, *scale, x), check_same_device({"quantize", "zero_point"}, *zero_point, x);
  const Tensor workspace = stable::empty({cuda::quantize_workspace_bytes(a.x, a.scale != nullptr)}, codes().uint8, x);
  cuda::quantize(a.x, a.scale, a.zero_point, a.y.pointers, workspace.data(), stable::current_cuda_stream(x.device_index()));
  return a.y.release();
}

Tensor dequantize(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, std::optional<int32_t> dtype) {
  const stable::DeviceGuard guard(x.device_index());
  DequantizeArguments a = dequantize_arguments(x, x_scale, x_zero_point, dtype);
  check_same_device({"dequantize", "x_scale"}, x_scale, x), check_same_device({"dequantize", "x_zero_point"}, x_zero_point, x);
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
}};

}  // namespace
}  // namespace probquant::ops
