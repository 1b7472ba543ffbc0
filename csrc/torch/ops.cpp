// torch.ops.probquant on the CPU: checks arguments, allocates outputs, calls the core. Nothing is computed here.
#include "layer_ops.h"
#include "pool_ops.h"
#include "schemas.h"

namespace probquant::ops {
namespace {

/// The CPU's layers and pools (layer_ops.h, pool_ops.h).
struct Cpu {
  explicit Cpu(const Tensor&) {}
  static int64_t packed_weight_bytes(const WeightShape& shape) { return probquant::packed_weight_bytes(shape); }
  static int64_t conv2d_workspace_bytes(const Conv2dShape& shape, Strategy strategy, int64_t) { return probquant::conv2d_workspace_bytes(shape, strategy); }
  template <class... Arguments>
  void pack_weight(const Arguments&... arguments) const {
    probquant::pack_weight(arguments...);
  }
  void conv2d(const Conv2dShape& shape, const LayerArguments& a) const { probquant::conv2d(shape, a, stable::torch_executor()); }
  void surrogate_law(const Conv2dShape& shape, const LayerArguments& a, float* law) const {
    probquant::surrogate_law(shape, a, law, stable::torch_executor());
  }
  static int64_t pool_workspace_bytes(int64_t, int64_t, int64_t, int64_t, Strategy) { return 0; }
  void pool2d(Pool kind, const Conv2dShape& shape, bool count_include_pad, const QuantizedInput& x, const RangeArguments& range, const QuantizedOutput& y,
              void*) const {
    probquant::pool2d(kind, shape, count_include_pad, x, range, y, stable::torch_executor());
  }
  void adaptive_average_pool2d(int64_t batch, int64_t in_height, int64_t in_width, int64_t channels, int64_t out_height, int64_t out_width,
                               const QuantizedInput& x, const RangeArguments& range, const QuantizedOutput& y, void*) const {
    probquant::adaptive_average_pool2d(batch, in_height, in_width, channels, out_height, out_width, x, range, y, stable::torch_executor());
  }
};

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
  require(device_of(a) == device_of(b), op, ": a and b are on different devices");
  require(same(a.sizes(), b.sizes()) && same(a_scale.sizes(), b_scale.sizes()), op, ": b has shape ", text(b.sizes()), " with scale ",
          text(b_scale.sizes()), ", want a's ", text(a.sizes()), " with scale ", text(a_scale.sizes()));
  const Bounds bounds(op, activation_min, activation_max);
  QuantizedInput left = input(a, a_scale, a_zero_point), right = input(b, b_scale, b_zero_point);
  add_stats(left, a_stats, check_stats({op, "a_stats"}, a_stats, a_scale));
  add_stats(right, b_stats, check_stats({op, "b_stats"}, b_stats, b_scale));
  const RangeArguments range = range_arguments(op, strategy, predictor, device_of(a));
  Output y(empty_like(a, g), a_scale.sizes(), g.channels, channel_stats);
  probquant::add(left, right, g.samples, g.count, g.channels, bounds.lo, bounds.hi, range, y.pointers, stable::torch_executor());
  return y.release();
}

Quantized activation(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, int64_t kind, OptionalDouble activation_min,
                     OptionalDouble activation_max, int64_t strategy, const OptionalTensor& predictor, bool channel_stats) {
  const char* op = "activation";
  const Geometry g = check_quantized(op, "x", x, x_scale, x_zero_point);
  const Bounds bounds(op, activation_min, activation_max);
  const RangeArguments range = range_arguments(op, strategy, predictor, device_of(x));
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
  const RangeArguments range = range_arguments(op, strategy, predictor, device_of(xs[0]));
  Tensor q = first.image ? empty_image(y_sizes[0], y_sizes[1], y_sizes[2], y_sizes[3], codes().uint8, xs[0])
                         : stable::empty(y_sizes, codes().uint8, xs[0]);
  Output y(std::move(q), scales[0].sizes(), y_sizes[axis], channel_stats);
  const int64_t positions = first.channels > 0 ? first.count / first.channels : 0;
  probquant::concat(inputs.data(), channels.data(), static_cast<int64_t>(inputs.size()), first.samples, positions, range, y.pointers,
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
  const Device device = device_of(x);
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
    require(device_of(x) == device_of(query), op, ": ", name, " is on another device than query");
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
  a.range = range_arguments(op, strategy, predictor, device_of(query));
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
  cpu.implement<&pack_weight<Cpu>>("pack_weight");
  cpu.implement<&linear<Cpu>>("linear");
  cpu.implement<&conv2d<Cpu>>("conv2d");
  cpu.implement<&surrogate_law<Cpu>>("surrogate_law");
  cpu.implement<&add>("add");
  cpu.implement<&activation>("activation");
  cpu.implement<&concat>("concat");
  cpu.implement<&max_pool2d<Cpu>>("max_pool2d");
  cpu.implement<&avg_pool2d<Cpu>>("avg_pool2d");
  cpu.implement<&adaptive_avg_pool2d<Cpu>>("adaptive_avg_pool2d");
  cpu.implement<&upsample_nearest2d>("upsample_nearest2d");
  cpu.implement<&layer_norm>("layer_norm");
  cpu.implement<&attention>("attention");
}};

}  // namespace
}  // namespace probquant::ops
