// LayerNorm and attention, for a backend (layer_ops.h) that has
//   attention_workspace_bytes                            static, as in probquant/cuda.h
//   layer_norm, attention                                as in probquant/cuda.h, without a stream
#pragma once
#include "layer_ops.h"

namespace probquant::ops {

template <class Backend>
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
    Backend(x).layer_norm(rows, channels, a);
    return {std::move(y), stable::empty({0}, codes().float32, x), stable::empty({0}, codes().int32, x), stable::empty({0}, codes().int64, x),
            std::move(sum)};
  }
  Output out(std::move(y), leading, channels, channel_stats);
  a.y = out.pointers;
  Backend(x).layer_norm(rows, channels, a);
  return std::tuple_cat(out.release(), std::make_tuple(std::move(sum)));
}

template <class Backend>
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
  const Backend backend(query);
  const Tensor workspace = stable::empty({Backend::attention_workspace_bytes(shape)}, codes().uint8, query);
  a.workspace = workspace.data();
  Output y(stable::empty(query.sizes(), codes().uint8, query), query_scale.sizes(), channels, channel_stats);
  a.y = y.pointers;
  backend.attention(shape, a);
  return y.release();
}

}  // namespace probquant::ops
