// The layer ops, for a backend: check every argument, allocate the outputs, call the backend's core. Nothing is computed here.
//
// A backend is made from the op's first tensor, whose device it makes current, and has
//   packed_weight_bytes, conv2d_workspace_bytes          static
//   pack_weight, conv2d, surrogate_law                   as in probquant/ops.h, without an executor or a stream
#pragma once
#include "quantize_arguments.h"

namespace probquant::ops {

using OptionalDouble = std::optional<double>;

inline void check_image(const char* op, const Tensor& x, const Geometry& g) {
  require(g.image, op, ": x has shape ", text(x.sizes()), ", want [N, C, H, W] with one scale per image");
}

/// Checks stats against the scale they belong to and returns their columns.
inline int64_t check_stats(Argument a, const Tensor& stats, const Tensor& scale) {
  check_device_and_dtype(a, stats, device_of(scale), codes().int64);
  const IntView sizes = stats.sizes(), leading = scale.sizes();
  require(sizes.size() == leading.size() + 1 && same({sizes.data(), leading.size()}, leading) && sizes[leading.size()] >= kStatsSample, a.op, ": ",
          a.name, " has shape ", text(sizes), ", want the scale's ", text(leading), " and at least 3 columns");
  require(stats.is_contiguous(), a.op, ": ", a.name, " must be contiguous, has strides ", text(stats.strides()));
  return sizes[leading.size()];
}

inline void add_stats(QuantizedInput& x, const Tensor& stats, int64_t columns) {
  x.stats = stats.data<const int64_t>();
  x.stats_stride = columns;
}

/// Predictor tensor: float32, one dimension, on the op's device. The core checks its length against the strategy.
inline void set_predictor(const char* op, const OptionalTensor& predictor, Device device, const float*& data, int64_t& size) {
  data = nullptr;
  size = 0;
  if (!predictor) return;
  check_device_and_dtype({op, "predictor"}, *predictor, device, codes().float32);
  require(predictor->dim() == 1 && predictor->is_contiguous(), op, ": predictor has shape ", text(predictor->sizes()),
          ", want one contiguous dimension");
  data = predictor->data<const float>();
  size = predictor->numel();
}

inline RangeArguments range_arguments(const char* op, int64_t strategy, const OptionalTensor& predictor, Device device) {
  RangeArguments range;
  range.strategy = check_strategy(op, strategy);
  set_predictor(op, predictor, device, range.predictor, range.predictor_size);
  return range;
}

template <class Backend>
Tensor pack_weight(const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias, int64_t groups,
                   const OptionalTensor& output_profile) {
  const char* op = "pack_weight";
  const IntView sizes = weight.sizes();
  require(sizes.size() == 2 || sizes.size() == 4, op, ": weight has shape ", text(sizes),
          ", want [out_features, in_features] or [out_channels, kernel_height, kernel_width, in_channels / groups]");
  const bool conv = sizes.size() == 4;
  const WeightShape shape{sizes[0], conv ? sizes[1] : 1, conv ? sizes[2] : 1, sizes[conv ? 3 : 1], groups};
  check_dense({op, "weight"}, weight, device_of(weight), codes().int8, sizes);
  check_dense({op, "weight_scale"}, weight_scale, device_of(weight), codes().float32, {shape.out_channels});
  if (bias) check_dense({op, "bias"}, *bias, device_of(weight), codes().float32, {shape.out_channels});
  if (output_profile) check_dense({op, "output_profile"}, *output_profile, device_of(weight), codes().float32, {shape.out_channels});
  const auto optional = [](const OptionalTensor& t) { return t ? t->data<const float>() : nullptr; };
  const Backend backend(weight);
  Tensor packed = stable::empty({Backend::packed_weight_bytes(shape)}, codes().uint8, weight);
  backend.pack_weight(shape, weight.data<const int8_t>(), weight_scale.data<const float>(), optional(bias), optional(output_profile),
                      packed.data<uint8_t>());
  return packed;
}

struct Residual {
  const OptionalTensor &q, &scale, &zero_point, &stats;

  /// Checked against the output's shape; the parameters share the input's samples.
  QuantizedInput check(const char* op, IntView y_sizes, IntView leading) const {
    QuantizedInput residual;
    if (!q) {
      require(!scale && !zero_point && !stats, op, ": residual_scale, residual_zero_point and residual_stats need a residual");
      return residual;
    }
    require(scale && zero_point, op, ": a residual needs residual_scale and residual_zero_point");
    check_quantized(op, "residual", *q, *scale, *zero_point);
    require(same(q->sizes(), y_sizes), op, ": residual has shape ", text(q->sizes()), ", want the output's ", text(y_sizes));
    require(same(scale->sizes(), leading), op, ": residual_scale has shape ", text(scale->sizes()), ", want x_scale's ", text(leading));
    residual = input(*q, *scale, *zero_point);
    if (stats) add_stats(residual, *stats, check_stats({op, "residual_stats"}, *stats, *scale));
    return residual;
  }
};

/// A workspace from torch's allocator, whose profiler then sees what a strategy costs; empty if none is wanted.
inline OptionalTensor make_workspace(int64_t bytes, const Tensor& like) {
  if (bytes == 0) return std::nullopt;
  return stable::empty({bytes}, codes().uint8, like);
}

/// What linear and conv2d share once the geometry is known. `y_sizes` is the output's shape.
template <class Backend>
Quantized run_layer(const char* op, const Conv2dShape& shape, bool image, const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                    const Tensor& x_stats, const Tensor& packed_weight, IntView y_sizes, const Residual& residual, int64_t activation,
                    const OptionalDouble& activation_min, const OptionalDouble& activation_max, int64_t strategy, const OptionalTensor& predictor,
                    int64_t gamma, bool channel_stats) {
  const Device device = device_of(x);
  LayerArguments a;
  a.x = input(x, x_scale, x_zero_point);
  add_stats(a.x, x_stats, check_stats({op, "x_stats"}, x_stats, x_scale));
  check_device_and_dtype({op, "packed_weight"}, packed_weight, device, codes().uint8);
  const int64_t packed_bytes = Backend::packed_weight_bytes(weight_shape(shape));
  require(same(packed_weight.sizes(), {packed_bytes}), op, ": packed_weight has shape ", text(packed_weight.sizes()), ", want [", packed_bytes, "], of a weight ",
          text({shape.out_channels, shape.kernel_height, shape.kernel_width, shape.in_channels / shape.groups}), " for ", shape.in_channels, " channels of x");
  require(packed_weight.is_contiguous(), op, ": packed_weight must be contiguous, has strides ", text(packed_weight.strides()));
  a.packed_weight = packed_weight.data<const uint8_t>();
  a.residual = residual.check(op, y_sizes, x_scale.sizes());
  a.activation = check_activation(op, activation);
  const Bounds bounds(op, activation_min, activation_max);
  require(a.activation == Activation::clamp || (!activation_min && !activation_max), op, ": activation_min and activation_max belong to activation 0 (clamp)");
  a.activation_min = bounds.lo;
  a.activation_max = bounds.hi;
  a.strategy = check_strategy(op, strategy);
  set_predictor(op, predictor, device, a.predictor, a.predictor_size);
  a.gamma = gamma;

  const Backend backend(x);
  const bool quantized = a.strategy != Strategy::none;
  const int32_t dtype = quantized ? codes().uint8 : codes().float32;
  Tensor y = image ? empty_image(y_sizes[0], y_sizes[1], y_sizes[2], y_sizes[3], dtype, x) : stable::empty(y_sizes, dtype, x);
  if (!quantized) {
    a.y_float = y.data<float>();
    backend.conv2d(shape, a);
    return {std::move(y), stable::empty({0}, codes().float32, x), stable::empty({0}, codes().int32, x), stable::empty({0}, codes().int64, x)};
  }
  Output out(std::move(y), x_scale.sizes(), shape.out_channels, channel_stats);
  a.y = out.pointers;
  const OptionalTensor workspace = make_workspace(Backend::conv2d_workspace_bytes(shape, a.strategy, gamma), x);
  if (workspace) a.workspace = workspace->data();
  backend.conv2d(shape, a);
  return out.release();
}

template <class Backend>
Quantized linear(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, const Tensor& x_stats, const Tensor& packed_weight,
                 int64_t out_features, const OptionalTensor& residual, const OptionalTensor& residual_scale,
                 const OptionalTensor& residual_zero_point, const OptionalTensor& residual_stats, int64_t activation,
                 OptionalDouble activation_min, OptionalDouble activation_max, int64_t strategy, const OptionalTensor& predictor, int64_t gamma,
                 bool channel_stats) {
  const char* op = "linear";
  const Geometry g = check_quantized(op, "x", x, x_scale, x_zero_point);
  require(x.is_contiguous(), op, ": x of shape ", text(x.sizes()), " has strides ", text(x.strides()), ", want contiguous");
  const int64_t in_features = x.size(-1);
  require(in_features > 0, op, ": x has no features, shape ", text(x.sizes()));
  require(out_features > 0, op, ": out_features ", out_features, ", want > 0");
  require(out_features <= kMaxExtent, op, ": out_features ", out_features, ", want at most ", kMaxExtent);
  Ints y_sizes(x.sizes().begin(), x.sizes().end());
  y_sizes.back() = out_features;
  const Conv2dShape shape = linear_shape(g.samples, g.count / in_features, in_features, out_features);
  return run_layer<Backend>(op, shape, false, x, x_scale, x_zero_point, x_stats, packed_weight, y_sizes,
                   {residual, residual_scale, residual_zero_point, residual_stats}, activation, activation_min, activation_max, strategy, predictor,
                   gamma, channel_stats);
}

inline Conv2dShape conv2d_shape(const char* op, const Tensor& x, int64_t out_channels, const Ints& kernel_size, const Ints& stride, const Ints& padding,
                         const Ints& dilation, int64_t groups) {
  const Pair k({op, "kernel_size"}, kernel_size), s({op, "stride"}, stride), d({op, "dilation"}, dilation);
  const Padding p(op, padding);
  Conv2dShape shape;
  shape.batch = x.size(0), shape.in_channels = x.size(1), shape.in_height = x.size(2), shape.in_width = x.size(3);
  shape.out_channels = out_channels;
  shape.kernel_height = k.height, shape.kernel_width = k.width;
  shape.stride_height = s.height, shape.stride_width = s.width;
  shape.padding_top = p.top, shape.padding_bottom = p.bottom, shape.padding_left = p.left, shape.padding_right = p.right;
  shape.dilation_height = d.height, shape.dilation_width = d.width;
  shape.groups = groups;
  require(k.height > 0 && k.width > 0, op, ": kernel_size (", k.height, ", ", k.width, "), want positive");
  require(s.height > 0 && s.width > 0, op, ": stride (", s.height, ", ", s.width, "), want positive");
  require(d.height > 0 && d.width > 0, op, ": dilation (", d.height, ", ", d.width, "), want positive");
  require(out_channels <= kMaxExtent, op, ": out_channels ", out_channels, ", want at most ", kMaxExtent);
  require(groups > 0 && shape.in_channels % groups == 0 && out_channels > 0 && out_channels % groups == 0, op, ": groups ", groups,
          " must divide in_channels ", shape.in_channels, " and out_channels ", out_channels);
  return shape;
}

template <class Backend>
Quantized conv2d(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, const Tensor& x_stats, const Tensor& packed_weight,
                 int64_t out_channels, const Ints& kernel_size, const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                 const OptionalTensor& residual, const OptionalTensor& residual_scale, const OptionalTensor& residual_zero_point,
                 const OptionalTensor& residual_stats, int64_t activation, OptionalDouble activation_min, OptionalDouble activation_max,
                 int64_t strategy, const OptionalTensor& predictor, int64_t gamma, bool channel_stats) {
  const char* op = "conv2d";
  check_image(op, x, check_quantized(op, "x", x, x_scale, x_zero_point));
  const Conv2dShape shape = conv2d_shape(op, x, out_channels, kernel_size, stride, padding, dilation, groups);
  const int64_t y_sizes[] = {shape.batch, out_channels, shape.out_height(), shape.out_width()};
  return run_layer<Backend>(op, shape, true, x, x_scale, x_zero_point, x_stats, packed_weight, {y_sizes, 4},
                   {residual, residual_scale, residual_zero_point, residual_stats}, activation, activation_min, activation_max, strategy, predictor,
                   gamma, channel_stats);
}

template <class Backend>
Tensor surrogate_law(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, const Tensor& x_stats, int64_t out_channels,
                     const Ints& kernel_size, const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                     const OptionalTensor& residual, const OptionalTensor& residual_scale, const OptionalTensor& residual_zero_point,
                     const OptionalTensor& residual_stats, int64_t strategy, const Tensor& predictor, int64_t gamma) {
  const char* op = "surrogate_law";
  check_image(op, x, check_quantized(op, "x", x, x_scale, x_zero_point));
  const Conv2dShape shape = conv2d_shape(op, x, out_channels, kernel_size, stride, padding, dilation, groups);
  const int64_t y_sizes[] = {shape.batch, out_channels, shape.out_height(), shape.out_width()};
  LayerArguments a;
  a.x = input(x, x_scale, x_zero_point);
  add_stats(a.x, x_stats, check_stats({op, "x_stats"}, x_stats, x_scale));
  a.residual = Residual{residual, residual_scale, residual_zero_point, residual_stats}.check(op, {y_sizes, 4}, x_scale.sizes());
  a.activation_min = -kInfinity;
  a.activation_max = kInfinity;
  a.strategy = check_strategy(op, strategy);
  check_dense({op, "predictor"}, predictor, device_of(x), codes().float32, {predictor.numel()});
  a.predictor = predictor.data<const float>();
  a.predictor_size = predictor.numel();
  a.gamma = gamma;
  Tensor law = stable::empty({shape.batch, surrogate_laws(shape, a.strategy), 2}, codes().float32, x);
  const Backend backend(x);
  const OptionalTensor workspace = make_workspace(Backend::conv2d_workspace_bytes(shape, a.strategy, gamma), x);
  if (workspace) a.workspace = workspace->data();
  backend.surrogate_law(shape, a, law.data<float>());
  return law;
}

}  // namespace probquant::ops
