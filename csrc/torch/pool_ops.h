// The pooling ops, for a backend (layer_ops.h) that has
//   pool_workspace_bytes                                 static, as in probquant/cuda.h
//   pool2d, adaptive_average_pool2d                      as in probquant/cuda.h, without a stream
#pragma once
#include "layer_ops.h"

namespace probquant::ops {

template <class Backend>
OptionalTensor pool_workspace(const Output& y, const RangeArguments& range, const Tensor& like) {
  const IntView size = y.q.sizes();
  return make_workspace(Backend::pool_workspace_bytes(size[0], size[2], size[3], size[1], range.strategy), like);
}

template <class Backend>
Quantized pool(const char* op, Pool kind, const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, const Ints& kernel_size,
               const Ints& stride, const Ints& padding, const Ints& dilation, bool count_include_pad, const RangeArguments& range,
               bool channel_stats) {
  check_image(op, x, check_quantized(op, "x", x, x_scale, x_zero_point));
  const Conv2dShape shape = conv2d_shape(op, x, x.size(1), kernel_size, stride, padding, dilation, 1);
  Output y(empty_image(shape.batch, shape.in_channels, shape.out_height(), shape.out_width(), codes().uint8, x), x_scale.sizes(), shape.in_channels,
           channel_stats);
  const Backend backend(x);
  const OptionalTensor workspace = kind == Pool::max ? std::nullopt : pool_workspace<Backend>(y, range, x);
  backend.pool2d(kind, shape, count_include_pad, input(x, x_scale, x_zero_point), range, y.pointers, workspace ? workspace->data() : nullptr);
  return y.release();
}

template <class Backend>
Quantized max_pool2d(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, const Ints& kernel_size, const Ints& stride,
                     const Ints& padding, const Ints& dilation, bool channel_stats) {
  return pool<Backend>("max_pool2d", Pool::max, x, x_scale, x_zero_point, kernel_size, stride, padding, dilation, false, {}, channel_stats);
}

template <class Backend>
Quantized avg_pool2d(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, const Ints& kernel_size, const Ints& stride,
                     const Ints& padding, bool count_include_pad, int64_t strategy, const OptionalTensor& predictor, bool channel_stats) {
  const RangeArguments range = range_arguments("avg_pool2d", strategy, predictor, device_of(x));
  return pool<Backend>("avg_pool2d", Pool::average, x, x_scale, x_zero_point, kernel_size, stride, padding, {1}, count_include_pad, range, channel_stats);
}

template <class Backend>
Quantized adaptive_avg_pool2d(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, const Ints& output_size, int64_t strategy,
                              const OptionalTensor& predictor, bool channel_stats) {
  const char* op = "adaptive_avg_pool2d";
  check_image(op, x, check_quantized(op, "x", x, x_scale, x_zero_point));
  const Pair size({op, "output_size"}, output_size);
  require(size.height > 0 && size.width > 0, op, ": output_size (", size.height, ", ", size.width, "), want positive");
  const RangeArguments range = range_arguments(op, strategy, predictor, device_of(x));
  Output y(empty_image(x.size(0), x.size(1), size.height, size.width, codes().uint8, x), x_scale.sizes(), x.size(1), channel_stats);
  const Backend backend(x);
  const OptionalTensor workspace = pool_workspace<Backend>(y, range, x);
  backend.adaptive_average_pool2d(x.size(0), x.size(2), x.size(3), x.size(1), size.height, size.width, input(x, x_scale, x_zero_point), range, y.pointers,
                                  workspace ? workspace->data() : nullptr);
  return y.release();
}

}  // namespace probquant::ops
