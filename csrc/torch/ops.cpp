// torch.ops.probquant on the CPU: checks arguments, allocates outputs, calls the core. Nothing is computed here.
#include "quantize_arguments.h"
#include "schemas.h"

namespace probquant::ops {
namespace {

using OptionalDouble = std::optional<double>;

void check_image(const char* op, const Tensor& x, const Geometry& g) {
  require(g.image, op, ": x has shape ", text(x.sizes()), ", want [N, C, H, W] with one scale per image");
}

/// Checks stats against the scale they belong to and returns their columns.
int64_t check_stats(Argument a, const Tensor& stats, const Tensor& scale) {
  check_device_and_dtype(a, stats, scale.device_type(), codes().int64);
  const IntView sizes = stats.sizes(), leading = scale.sizes();
  require(sizes.size() == leading.size() + 1 && same({sizes.data(), leading.size()}, leading) && sizes[leading.size()] >= kStatsSample, a.op, ": ",
          a.name, " has shape ", text(sizes), ", want the scale's ", text(leading), " and at least 3 columns");
  require(stats.is_contiguous(), a.op, ": ", a.name, " must be contiguous, has strides ", text(stats.strides()));
  return sizes[leading.size()];
}

void add_stats(QuantizedInput& x, const Tensor& stats, int64_t columns) {
  x.stats = stats.data<const int64_t>();
  x.stats_stride = columns;
}

/// Predictor tensor: float32, one dimension, on the op's device. The core checks its length against the strategy.
void set_predictor(const char* op, const OptionalTensor& predictor, int32_t device, const float*& data, int64_t& size) {
  data = nullptr;
  size = 0;
  if (!predictor) return;
  check_device_and_dtype({op, "predictor"}, *predictor, device, codes().float32);
  require(predictor->dim() == 1 && predictor->is_contiguous(), op, ": predictor has shape ", text(predictor->sizes()),
          ", want one contiguous dimension");
  data = predictor->data<const float>();
  size = predictor->numel();
}

RangeArguments range_arguments(const char* op, int64_t strategy, const OptionalTensor& predictor, int32_t device) {
  RangeArguments range;
  range.strategy = check_strategy(op, strategy);
  set_predictor(op, predictor, device, range.predictor, range.predictor_size);
  return range;
}

// ---------------------------------------------------------------------------------------------------------------------
// Quantize, dequantize, moments

Quantized quantize(const Tensor& x, int64_t sample_dims, const OptionalTensor& scale, const OptionalTensor& zero_point, bool channel_stats) {
  QuantizeArguments a = quantize_arguments(x, sample_dims, scale, zero_point, channel_stats);
  probquant::quantize(a.x, a.scale, a.zero_point, a.y.pointers, stable::torch_executor());
  return a.y.release();
}

Tensor dequantize(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, std::optional<int32_t> dtype) {
  DequantizeArguments a = dequantize_arguments(x, x_scale, x_zero_point, dtype);
  probquant::dequantize(a.x, a.samples, a.count, a.dtype, a.y.data(), stable::torch_executor());
  return std::move(a.y);
}

Tensor moments(const Tensor& q, int64_t sample_dims, bool channel_stats) {
  MomentsArguments a = moments_arguments(q, sample_dims, channel_stats);
  probquant::moments(a.q, a.samples, a.count, a.channels, channel_stats, a.stats.data<int64_t>(), stable::torch_executor());
  return std::move(a.stats);
}

// ---------------------------------------------------------------------------------------------------------------------
// Layers

Tensor pack_weight(const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias, int64_t groups,
                   const OptionalTensor& output_profile) {
  const char* op = "pack_weight";
  const IntView sizes = weight.sizes();
  require(sizes.size() == 2 || sizes.size() == 4, op, ": weight has shape ", text(sizes),
          ", want [out_features, in_features] or [out_channels, kernel_height, kernel_width, in_channels / groups]");
  const bool conv = sizes.size() == 4;
  const WeightShape shape{sizes[0], conv ? sizes[1] : 1, conv ? sizes[2] : 1, sizes[conv ? 3 : 1], groups};
  check_dense({op, "weight"}, weight, weight.device_type(), codes().int8, sizes);
  check_dense({op, "weight_scale"}, weight_scale, weight.device_type(), codes().float32, {shape.out_channels});
  if (bias) check_dense({op, "bias"}, *bias, weight.device_type(), codes().float32, {shape.out_channels});
  if (output_profile) check_dense({op, "output_profile"}, *output_profile, weight.device_type(), codes().float32, {shape.out_channels});
  const auto optional = [](const OptionalTensor& t) { return t ? t->data<const float>() : nullptr; };
  Tensor packed = stable::empty({packed_weight_bytes(shape)}, codes().uint8, weight);
  probquant::pack_weight(shape, weight.data<const int8_t>(), weight_scale.data<const float>(), optional(bias), optional(output_profile),
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

/// What linear and conv2d share once the geometry is known. `y_sizes` is the output's shape.
Quantized run_layer(const char* op, const Conv2dShape& shape, bool image, const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                    const Tensor& x_stats, const Tensor& packed_weight, IntView y_sizes, const Residual& residual, int64_t activation,
                    const OptionalDouble& activation_min, const OptionalDouble& activation_max, int64_t strategy, const OptionalTensor& predictor,
                    int64_t gamma, bool channel_stats) {
  const int32_t device = x.device_type();
  LayerArguments a;
  a.x = input(x, x_scale, x_zero_point);
  add_stats(a.x, x_stats, check_stats({op, "x_stats"}, x_stats, x_scale));
  check_dense({op, "packed_weight"}, packed_weight, device, codes().uint8, {packed_weight_bytes(weight_shape(shape))});
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

  const bool quantized = a.strategy != Strategy::none;
  const int32_t dtype = quantized ? codes().uint8 : codes().float32;
  Tensor y = image ? empty_image(y_sizes[0], y_sizes[1], y_sizes[2], y_sizes[3], dtype, x) : stable::empty(y_sizes, dtype, x);
  if (!quantized) {
    a.y_float = y.data<float>();
    probquant::conv2d(shape, a, stable::torch_executor());
    return {std::move(y), stable::empty({0}, codes().float32, x), stable::empty({0}, codes().int32, x), stable::empty({0}, codes().int64, x)};
  }
  Output out(std::move(y), x_scale.sizes(), shape.out_channels, channel_stats);
  a.y = out.pointers;
  const int64_t workspace_bytes = conv2d_workspace_bytes(shape, a.strategy);
  OptionalTensor workspace;  // torch's allocator: its profiler sees what the dynamic strategy costs
  if (workspace_bytes > 0) {
    workspace.emplace(stable::empty({workspace_bytes}, codes().uint8, x));
    a.workspace = workspace->data();
  }
  probquant::conv2d(shape, a, stable::torch_executor());
  return out.release();
}

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
  return run_layer(op, shape, false, x, x_scale, x_zero_point, x_stats, packed_weight, y_sizes,
                   {residual, residual_scale, residual_zero_point, residual_stats}, activation, activation_min, activation_max, strategy, predictor,
                   gamma, channel_stats);
}

Conv2dShape conv2d_shape(const char* op, const Tensor& x, int64_t out_channels, const Ints& kernel_size, const Ints& stride, const Ints& padding,
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

Quantized conv2d(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, const Tensor& x_stats, const Tensor& packed_weight,
                 int64_t out_channels, const Ints& kernel_size, const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                 const OptionalTensor& residual, const OptionalTensor& residual_scale, const OptionalTensor& residual_zero_point,
                 const OptionalTensor& residual_stats, int64_t activation, OptionalDouble activation_min, OptionalDouble activation_max,
                 int64_t strategy, const OptionalTensor& predictor, int64_t gamma, bool channel_stats) {
  const char* op = "conv2d";
  check_image(op, x, check_quantized(op, "x", x, x_scale, x_zero_point));
  const Conv2dShape shape = conv2d_shape(op, x, out_channels, kernel_size, stride, padding, dilation, groups);
  const int64_t y_sizes[] = {shape.batch, out_channels, shape.out_height(), shape.out_width()};
  return run_layer(op, shape, true, x, x_scale, x_zero_point, x_stats, packed_weight, {y_sizes, 4},
                   {residual, residual_scale, residual_zero_point, residual_stats}, activation, activation_min, activation_max, strategy, predictor,
                   gamma, channel_stats);
}

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
  check_dense({op, "predictor"}, predictor, x.device_type(), codes().float32, {predictor.numel()});
  a.predictor = predictor.data<const float>();
  a.predictor_size = predictor.numel();
  a.gamma = gamma;
  Tensor law = stable::empty({shape.batch, surrogate_laws(shape, a.strategy), 2}, codes().float32, x);
  probquant::surrogate_law(shape, a, law.data<float>(), stable::torch_executor());
  return law;
}

// ---------------------------------------------------------------------------------------------------------------------
// Ops without weights

Tensor empty_like(const Tensor& x, const Geometry& g) {
  const IntView s = x.sizes();
  return g.image ? empty_image(s[0], s[1], s[2], s[3], codes().uint8, x) : stable::empty(s, codes().uint8, x);
}

Quantized add(const Tensor& a, const Tensor& a_scale, const Tensor& a_zero_point, const Tensor& a_stats, const Tensor& b, const Tensor& b_scale,
              const Tensor& b_zero_point, const Tensor& b_stats, OptionalDouble activation_min, OptionalDouble activation_max, int64_t strategy,
              const OptionalTensor& predictor, bool channel_stats) {
  const char* op = "add";
  const Geometry g = check_quantized(op, "a", a, a_scale, a_zero_point);
  check_quantized(op, "b", b, b_scale, b_zero_point);
  require(a.device_type() == b.device_type(), op, ": a and b are on different devices");
  require(same(a.sizes(), b.sizes()) && same(a_scale.sizes(), b_scale.sizes()), op, ": b has shape ", text(b.sizes()), " with scale ",
          text(b_scale.sizes()), ", want a's ", text(a.sizes()), " with scale ", text(a_scale.sizes()));
  const Bounds bounds(op, activation_min, activation_max);
  QuantizedInput left = input(a, a_scale, a_zero_point), right = input(b, b_scale, b_zero_point);
  add_stats(left, a_stats, check_stats({op, "a_stats"}, a_stats, a_scale));
  add_stats(right, b_stats, check_stats({op, "b_stats"}, b_stats, b_scale));
  const RangeArguments range = range_arguments(op, strategy, predictor, a.device_type());
  Output y(empty_like(a, g), a_scale.sizes(), g.channels, channel_stats);
  probquant::add(left, right, g.samples, g.count, g.channels, bounds.lo, bounds.hi, range, y.pointers, stable::torch_executor());
  return y.release();
}

Quantized activation(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, int64_t kind, OptionalDouble activation_min,
                     OptionalDouble activation_max, int64_t strategy, const OptionalTensor& predictor, bool channel_stats) {
  const char* op = "activation";
  const Geometry g = check_quantized(op, "x", x, x_scale, x_zero_point);
  const Bounds bounds(op, activation_min, activation_max);
  const RangeArguments range = range_arguments(op, strategy, predictor, x.device_type());
  const Activation checked = check_activation(op, kind);
  Output y(empty_like(x, g), x_scale.sizes(), g.channels, channel_stats);
  probquant::activation(input(x, x_scale, x_zero_point), g.samples, g.count, g.channels, checked, bounds.lo, bounds.hi, range, y.pointers,
                        stable::torch_executor());
  return y.release();
}

Quantized concat(const std::vector<Tensor>& xs, const std::vector<Tensor>& scales, const std::vector<Tensor>& zero_points, int64_t strategy,
                 const OptionalTensor& predictor, bool channel_stats) {
  const char* op = "concat";
  require(!xs.empty(), op, ": xs is empty");
  require(scales.size() == xs.size() && zero_points.size() == xs.size(), op, ": ", static_cast<int64_t>(xs.size()), " xs, ",
          static_cast<int64_t>(scales.size()), " scales, ", static_cast<int64_t>(zero_points.size()), " zero_points, want as many of each");
  const Geometry first = check_quantized(op, "xs[0]", xs[0], scales[0], zero_points[0]);
  const size_t axis = first.image ? 1 : static_cast<size_t>(xs[0].dim() - 1);
  Ints y_sizes(xs[0].sizes().begin(), xs[0].sizes().end()), channels;
  std::vector<QuantizedInput> inputs;
  y_sizes[axis] = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    const std::string name = "xs[" + std::to_string(i) + "]";
    const Geometry g = check_quantized(op, name.c_str(), xs[i], scales[i], zero_points[i]);
    Ints sizes(xs[i].sizes().begin(), xs[i].sizes().end());
    require(sizes.size() == y_sizes.size() && same(scales[i].sizes(), scales[0].sizes()), op, ": ", name, " has shape ", text(sizes), " with scale ",
            text(scales[i].sizes()), ", want the rank and samples of xs[0] ", text(xs[0].sizes()));
    sizes[axis] = y_sizes[axis];
    require(same(sizes, y_sizes), op, ": ", name, " has shape ", text(xs[i].sizes()), ", want that of xs[0] ", text(xs[0].sizes()),
            " but for the channels");
    channels.push_back(g.channels);
    y_sizes[axis] += g.channels;
    inputs.push_back(input(xs[i], scales[i], zero_points[i]));
  }
  const RangeArguments range = range_arguments(op, strategy, predictor, xs[0].device_type());
  Tensor q = first.image ? empty_image(y_sizes[0], y_sizes[1], y_sizes[2], y_sizes[3], codes().uint8, xs[0])
                         : stable::empty(y_sizes, codes().uint8, xs[0]);
  Output y(std::move(q), scales[0].sizes(), y_sizes[axis], channel_stats);
  const int64_t positions = first.channels > 0 ? first.count / first.channels : 0;
  probquant::concat(inputs.data(), channels.data(), static_cast<int64_t>(inputs.size()), first.samples, positions, range, y.pointers,
                    stable::torch_executor());
  return y.release();
}

Quantized pool(const char* op, Pool kind, const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, const Ints& kernel_size,
               const Ints& stride, const Ints& padding, const Ints& dilation, bool count_include_pad, const RangeArguments& range,
               bool channel_stats) {
  check_image(op, x, check_quantized(op, "x", x, x_scale, x_zero_point));
  const Conv2dShape shape = conv2d_shape(op, x, x.size(1), kernel_size, stride, padding, dilation, 1);
  Output y(empty_image(shape.batch, shape.in_channels, shape.out_height(), shape.out_width(), codes().uint8, x), x_scale.sizes(), shape.in_channels,
           channel_stats);
  pool2d(kind, shape, count_include_pad, input(x, x_scale, x_zero_point), range, y.pointers, stable::torch_executor());
  return y.release();
}

Quantized max_pool2d(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, const Ints& kernel_size, const Ints& stride,
                     const Ints& padding, const Ints& dilation, bool channel_stats) {
  return pool("max_pool2d", Pool::max, x, x_scale, x_zero_point, kernel_size, stride, padding, dilation, false, {}, channel_stats);
}

Quantized avg_pool2d(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, const Ints& kernel_size, const Ints& stride,
                     const Ints& padding, bool count_include_pad, int64_t strategy, const OptionalTensor& predictor, bool channel_stats) {
  const RangeArguments range = range_arguments("avg_pool2d", strategy, predictor, x.device_type());
  return pool("avg_pool2d", Pool::average, x, x_scale, x_zero_point, kernel_size, stride, padding, {1}, count_include_pad, range, channel_stats);
}

Quantized adaptive_avg_pool2d(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, const Ints& output_size, int64_t strategy,
                              const OptionalTensor& predictor, bool channel_stats) {
  const char* op = "adaptive_avg_pool2d";
  check_image(op, x, check_quantized(op, "x", x, x_scale, x_zero_point));
  const Pair size({op, "output_size"}, output_size);
  require(size.height > 0 && size.width > 0, op, ": output_size (", size.height, ", ", size.width, "), want positive");
  const RangeArguments range = range_arguments(op, strategy, predictor, x.device_type());
  Output y(empty_image(x.size(0), x.size(1), size.height, size.width, codes().uint8, x), x_scale.sizes(), x.size(1), channel_stats);
  adaptive_average_pool2d(x.size(0), x.size(2), x.size(3), x.size(1), size.height, size.width, input(x, x_scale, x_zero_point), range, y.pointers,
                          stable::torch_executor());
  return y.release();
}

Quantized upsample_nearest2d(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, const Ints& scale_factor, bool channel_stats) {
  const char* op = "upsample_nearest2d";
  check_image(op, x, check_quantized(op, "x", x, x_scale, x_zero_point));
  const Pair factor({op, "scale_factor"}, scale_factor);
  require(factor.height > 0 && factor.width > 0, op, ": scale_factor (", factor.height, ", ", factor.width, "), want positive");
  Output y(empty_image(x.size(0), x.size(1), x.size(2) * factor.height, x.size(3) * factor.width, codes().uint8, x), x_scale.sizes(), x.size(1),
           channel_stats);
  probquant::upsample_nearest2d(x.size(0), x.size(2), x.size(3), x.size(1), factor.height, factor.width, input(x, x_scale, x_zero_point), y.pointers,
                                stable::torch_executor());
  return y.release();
}

// ---------------------------------------------------------------------------------------------------------------------
// Transformers

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_zero_point,
                                                              const OptionalTensor& residual, const OptionalTensor& weight,
                                                              const OptionalTensor& bias, double eps, bool keep_sum, int64_t strategy,
                                                              const OptionalTensor& predictor, bool channel_stats) {
  const char* op = "layer_norm";
  const int32_t device = x.device_type();
  const IntView sizes = x.sizes();
  require(sizes.size() >= 2, op, ": x has shape ", text(sizes), ", want at least two dimensions");
  const IntView leading{sizes.data(), sizes.size() - 1};
  const int64_t channels = x.size(-1);
  require(x_scale.has_value() == x_zero_point.has_value(), op, ": x_scale and x_zero_point come together");
  LayerNormArguments a;
  if (x_scale) {
    check_quantized(op, "x", x, *x_scale, *x_zero_point);
    require(same(x_scale->sizes(), leading), op, ": x_scale has shape ", text(x_scale->sizes()), ", want one scale per row ", text(leading));
    a.x = input(x, *x_scale, *x_zero_point);
  } else {
    check_dense({op, "x"}, x, device, codes().float32, sizes);
    a.x_float = x.data<const float>();
  }
  const auto optional = [&](const char* name, const OptionalTensor& t, IntView wanted) -> const float* {
    if (!t) return nullptr;
    check_dense({op, name}, *t, device, codes().float32, wanted);
    return t->data<const float>();
  };
  a.residual = optional("residual", residual, sizes);
  a.weight = optional("weight", weight, {channels});
  a.bias = optional("bias", bias, {channels});
  a.eps = static_cast<float>(eps);
  a.range = range_arguments(op, strategy, predictor, device);
  int64_t rows = 1;
  for (const int64_t size : leading) rows *= size;
  Tensor sum = stable::empty(keep_sum ? sizes : IntView{0}, codes().float32, x);
  if (keep_sum) a.sum = sum.data<float>();
  const bool quantized = a.range.strategy != Strategy::none;
  Tensor y = stable::empty(sizes, quantized ? codes().uint8 : codes().float32, x);
  if (!quantized) {
    a.y_float = y.data<float>();
    probquant::layer_norm(rows, channels, a, stable::torch_executor());
    return {std::move(y), stable::empty({0}, codes().float32, x), stable::empty({0}, codes().int32, x), stable::empty({0}, codes().int64, x),
            std::move(sum)};
  }
  Output out(std::move(y), leading, channels, channel_stats);
  a.y = out.pointers;
  probquant::layer_norm(rows, channels, a, stable::torch_executor());
  return std::tuple_cat(out.release(), std::make_tuple(std::move(sum)));
}

Quantized attention(const Tensor& query, const Tensor& query_scale, const Tensor& query_zero_point, const Tensor& key, const Tensor& key_scale,
                    const Tensor& key_zero_point, const Tensor& value, const Tensor& value_scale, const Tensor& value_zero_point, int64_t heads,
                    double scale, int64_t strategy, const OptionalTensor& predictor, bool channel_stats) {
  const char* op = "attention";
  const auto check = [&](const char* name, const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point) {
    check_quantized(op, name, x, x_scale, x_zero_point);
    require(x.dim() == 3 && x_scale.dim() == 2, op, ": ", name, " has shape ", text(x.sizes()), " with scale ", text(x_scale.sizes()),
            ", want [batch, tokens, heads * head_dim] with one scale per token");
    require(x.device_type() == query.device_type(), op, ": ", name, " is on another device than query");
    return input(x, x_scale, x_zero_point);
  };
  AttentionArguments a;
  a.query = check("query", query, query_scale, query_zero_point);
  a.key = check("key", key, key_scale, key_zero_point);
  a.value = check("value", value, value_scale, value_zero_point);
  const int64_t channels = query.size(2);
  require(heads > 0 && channels % heads == 0, op, ": heads ", heads, ", want a divisor of query's ", channels, " channels");
  const AttentionShape shape{query.size(0), query.size(1), key.size(1), heads, channels / heads};
  const int64_t wanted[] = {shape.batch, shape.keys, channels};
  require(same(key.sizes(), {wanted, 3}), op, ": key has shape ", text(key.sizes()), ", want ", text({wanted, 3}), " as query's batch and channels");
  require(same(value.sizes(), {wanted, 3}), op, ": value has shape ", text(value.sizes()), ", want key's ", text({wanted, 3}));
  a.scale = static_cast<float>(scale);
  a.range = range_arguments(op, strategy, predictor, query.device_type());
  const Executor executor = stable::torch_executor();
  Tensor workspace = stable::empty({attention_workspace_bytes(shape, executor)}, codes().uint8, query);
  a.workspace = workspace.data();
  Output y(stable::empty(query.sizes(), codes().uint8, query), query_scale.sizes(), channels, channel_stats);
  a.y = y.pointers;
  probquant::attention(shape, a, executor);
  return y.release();
}

const stable::RegisterAtLoad register_at_load{[] {
  const auto library = stable::Library::fragment("probquant");
  for (const char* schema : kSchemas) library.define(schema);
  const auto cpu = stable::Library::kernels("probquant", "CPU");
  cpu.implement<&quantize>("quantize");
  cpu.implement<&dequantize>("dequantize");
  cpu.implement<&moments>("moments");
  cpu.implement<&pack_weight>("pack_weight");
  cpu.implement<&linear>("linear");
  cpu.implement<&conv2d>("conv2d");
  cpu.implement<&surrogate_law>("surrogate_law");
  cpu.implement<&add>("add");
  cpu.implement<&activation>("activation");
  cpu.implement<&concat>("concat");
  cpu.implement<&max_pool2d>("max_pool2d");
  cpu.implement<&avg_pool2d>("avg_pool2d");
  cpu.implement<&adaptive_avg_pool2d>("adaptive_avg_pool2d");
  cpu.implement<&upsample_nearest2d>("upsample_nearest2d");
  cpu.implement<&layer_norm>("layer_norm");
  cpu.implement<&attention>("attention");
}};

}  // namespace
}  // namespace probquant::ops
