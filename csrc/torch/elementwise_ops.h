// The elementwise ops and those that move codes, for a backend (layer_ops.h) that has
//   elementwise_workspace_bytes                          static, as in probquant/cuda.h
//   add, mul, activation, concat, upsample_nearest2d     as in probquant/cuda.h, without a stream
#pragma once
#include "layer_ops.h"

namespace probquant::ops {

inline Tensor empty_like(const Tensor& x, const Geometry& g) {
  const IntView s = x.sizes();
  return g.image ? empty_image(s[0], s[1], s[2], s[3], codes().uint8, x) : stable::empty(s, codes().uint8, x);
}

/// What add, mul and activation need; without values there is nothing to measure.
template <class Backend>
OptionalTensor elementwise_workspace(const Geometry& g, const RangeArguments& range, const Tensor& like) {
  return g.channels > 0 ? make_workspace(Backend::elementwise_workspace_bytes(g.samples, g.count, g.channels, range.strategy), like) : std::nullopt;
}

template <class Backend>
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
  const Backend backend(a);
  const OptionalTensor workspace = elementwise_workspace<Backend>(g, range, a);
  backend.add(left, right, g.samples, g.count, g.channels, bounds.lo, bounds.hi, range, y.pointers, workspace ? workspace->data() : nullptr);
  return y.release();
}

template <class Backend>
Quantized mul(const Tensor& a, const Tensor& a_scale, const Tensor& a_zero_point, const Tensor& a_stats, const Tensor& b, const Tensor& b_scale,
              const Tensor& b_zero_point, const Tensor& b_stats, int64_t strategy, const OptionalTensor& predictor, bool channel_stats) {
  const char* op = "mul";
  const Geometry g = check_quantized(op, "a", a, a_scale, a_zero_point);
  check_quantized(op, "b", b, b_scale, b_zero_point);
  require(device_of(a) == device_of(b), op, ": a and b are on different devices");
  const bool equal = same(a.sizes(), b.sizes());
  const bool per_channel = !equal && g.image && b.dim() == 4 && same(b.sizes(), Ints{a.size(0), a.size(1), 1, 1});
  require((equal || per_channel) && same(a_scale.sizes(), b_scale.sizes()), op, ": b has shape ", text(b.sizes()), " with scale ", text(b_scale.sizes()),
          ", want a's ", text(a.sizes()), " (an image's may be [N, C, 1, 1]) with scale ", text(a_scale.sizes()));
  QuantizedInput left = input(a, a_scale, a_zero_point), right = input(b, b_scale, b_zero_point);
  add_stats(left, a_stats, check_stats({op, "a_stats"}, a_stats, a_scale));
  add_stats(right, b_stats, check_stats({op, "b_stats"}, b_stats, b_scale));
  const RangeArguments range = range_arguments(op, strategy, predictor, device_of(a));
  Output y(empty_like(a, g), a_scale.sizes(), g.channels, channel_stats);
  const Backend backend(a);
  const OptionalTensor workspace = elementwise_workspace<Backend>(g, range, a);
  backend.mul(left, right, g.samples, g.count, g.channels, per_channel, range, y.pointers, workspace ? workspace->data() : nullptr);
  return y.release();
}

template <class Backend>
Quantized activation(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, int64_t kind, OptionalDouble activation_min,
                     OptionalDouble activation_max, int64_t strategy, const OptionalTensor& predictor, bool channel_stats) {
  const char* op = "activation";
  const Geometry g = check_quantized(op, "x", x, x_scale, x_zero_point);
  const Bounds bounds(op, activation_min, activation_max);
  const RangeArguments range = range_arguments(op, strategy, predictor, device_of(x));
  const Activation checked = check_activation(op, kind);
  Output y(empty_like(x, g), x_scale.sizes(), g.channels, channel_stats);
  const Backend backend(x);
  const OptionalTensor workspace = elementwise_workspace<Backend>(g, range, x);
  backend.activation(input(x, x_scale, x_zero_point), g.samples, g.count, g.channels, checked, bounds.lo, bounds.hi, range, y.pointers,
                     workspace ? workspace->data() : nullptr);
  return y.release();
}

template <class Backend>
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
  Backend(xs[0]).concat(inputs.data(), channels.data(), static_cast<int64_t>(inputs.size()), first.samples, positions, range, y.pointers);
  return y.release();
}

template <class Backend>
Quantized upsample_nearest2d(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, const Ints& scale_factor, bool channel_stats) {
  const char* op = "upsample_nearest2d";
  check_image(op, x, check_quantized(op, "x", x, x_scale, x_zero_point));
  const Pair factor({op, "scale_factor"}, scale_factor);
  require(factor.height > 0 && factor.width > 0, op, ": scale_factor (", factor.height, ", ", factor.width, "), want positive");
  Output y(empty_image(x.size(0), x.size(1), x.size(2) * factor.height, x.size(3) * factor.width, codes().uint8, x), x_scale.sizes(), x.size(1),
           channel_stats);
  Backend(x).upsample_nearest2d(x.size(0), x.size(2), x.size(3), x.size(1), factor.height, factor.width, input(x, x_scale, x_zero_point), y.pointers);
  return y.release();
}

}  // namespace probquant::ops
