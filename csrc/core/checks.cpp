// The checks of sizes and arguments that the front ends of CPU and CUDA share. Needs no kernel.
#include <algorithm>

#include "front_end.h"
#include "probe.h"

namespace probquant {
namespace {

/// Longest sum whose int32 accumulator cannot overflow: K * 255 * 127 < 2^31, rounded down.
constexpr int64_t kMaxSum = 66000;

void check_sizes(const char* op, int64_t samples, int64_t count, int64_t channels) {
  require(samples >= 0 && channels > 0 && count >= 0 && count % channels == 0, op, ": samples ", samples, ", ", count, " values of ", channels,
          " channels do not fit together");
}

}  // namespace

void check_window(const char* op, const Conv2dShape& s) {
  const auto inside = [](int64_t value, int64_t least) { return value >= least && value <= kMaxExtent; };
  require(s.batch >= 0, op, ": batch ", s.batch, ", want >= 0");
  require(inside(s.in_height, 1) && inside(s.in_width, 1) && inside(s.in_channels, 1), op, ": input [", s.in_height, ", ", s.in_width, ", ",
          s.in_channels, "] (H, W, C), want positive sizes");
  require(inside(s.kernel_height, 1) && inside(s.kernel_width, 1), op, ": kernel (", s.kernel_height, ", ", s.kernel_width, "), want positive");
  require(inside(s.stride_height, 1) && inside(s.stride_width, 1), op, ": stride (", s.stride_height, ", ", s.stride_width, "), want positive");
  require(inside(s.dilation_height, 1) && inside(s.dilation_width, 1), op, ": dilation (", s.dilation_height, ", ", s.dilation_width,
          "), want positive");
  require(inside(s.padding_top, 0) && inside(s.padding_bottom, 0) && inside(s.padding_left, 0) && inside(s.padding_right, 0), op, ": padding (",
          s.padding_top, ", ", s.padding_bottom, ", ", s.padding_left, ", ", s.padding_right, "), want >= 0");
  require(s.out_height() > 0 && s.out_width() > 0, op, ": kernel (", s.kernel_height, ", ", s.kernel_width,
          ") with dilation is larger than the padded input (", s.in_height + s.padding_top + s.padding_bottom, ", ",
          s.in_width + s.padding_left + s.padding_right, ")");
}

void check_predictor(const char* op, Strategy strategy, const float* predictor, int64_t size, int64_t wanted) {
  require(size == wanted && (predictor != nullptr || wanted == 0), op, ": predictor has ", size, " values, strategy ",
          static_cast<int64_t>(strategy), " wants ", wanted);
}

void check_range(const char* op, const RangeArguments& range, int64_t gaussian_size) {
  require(range.strategy == Strategy::fixed || range.strategy == Strategy::dynamic || range.strategy == Strategy::gaussian, op, ": strategy ",
          static_cast<int64_t>(range.strategy), ", want fixed, dynamic or gaussian");
  check_predictor(op, range.strategy, range.predictor, range.predictor_size,
                  range.strategy == Strategy::fixed ? 2 : range.strategy == Strategy::gaussian ? gaussian_size : 0);
}

void check_pool(Pool kind, const Conv2dShape& s, const RangeArguments& range) {
  check_window("pool2d", s);
  const auto covers = [](int64_t before, int64_t after, int64_t kernel, int64_t dilation) {
    return before < dilation * (kernel - 1) + 1 && after < dilation * (kernel - 1) + 1;
  };
  require(covers(s.padding_top, s.padding_bottom, s.kernel_height, s.dilation_height) && covers(s.padding_left, s.padding_right, s.kernel_width, s.dilation_width),
          "pool2d: padding (", s.padding_top, ", ", s.padding_bottom, ", ", s.padding_left, ", ", s.padding_right,
          ") must be smaller than the window (", s.kernel_height, ", ", s.kernel_width, ")");
  if (kind == Pool::max) return;
  require(s.dilation_height == 1 && s.dilation_width == 1, "pool2d: average pooling has no dilation");
  check_range("average pool", range, 0);
}

void check_adaptive_pool(int64_t batch, int64_t in_height, int64_t in_width, int64_t channels, int64_t out_height, int64_t out_width,
                         const RangeArguments& range) {
  require(batch >= 0 && in_height > 0 && in_width > 0 && channels > 0 && out_height > 0 && out_width > 0, "adaptive_average_pool2d: input [", batch,
          ", ", in_height, ", ", in_width, ", ", channels, "], output (", out_height, ", ", out_width, "), want positive sizes");
  check_range("average pool", range, 0);
}

void check_mul(const QuantizedInput& a, const QuantizedInput& b, int64_t samples, int64_t count, int64_t channels, const RangeArguments& range) {
  check_sizes("mul", samples, count, channels);
  check_range("mul", range, 2);
  require(samples == 0 || range.strategy != Strategy::gaussian || (a.stats && b.stats), "mul: the gaussian strategy needs the stats of both inputs");
}

void check_add(const QuantizedInput& a, const QuantizedInput& b, int64_t samples, int64_t count, int64_t channels, float activation_min,
               float activation_max, const RangeArguments& range) {
  check_sizes("add", samples, count, channels);
  check_range("add", range, 3);
  require(activation_min <= activation_max, "add: activation_min is above activation_max");
  require(samples == 0 || range.strategy != Strategy::gaussian || (a.stats && b.stats), "add: the gaussian strategy needs the stats of both inputs");
}

void check_activation(int64_t samples, int64_t count, int64_t channels, Activation kind, float activation_min, float activation_max,
                      const RangeArguments& range) {
  check_sizes("activation", samples, count, channels);
  check_range("activation", range, 0);
  require(kind != Activation::clamp || activation_min <= activation_max, "activation: activation_min is above activation_max");
}

int64_t check_concat(const int64_t* channels, int64_t input_count, int64_t samples, int64_t positions, const RangeArguments& range) {
  require(input_count > 0, "concat: no inputs");
  check_range("concat", range, 0);
  int64_t total = 0;
  for (int64_t i = 0; i < input_count; ++i) {
    require(channels[i] > 0, "concat: input ", i, " has ", channels[i], " channels, want > 0");
    total += channels[i];
  }
  require(samples >= 0 && positions >= 0, "concat: negative size [", samples, ", ", positions, "]");
  return total;
}

void check_upsample(int64_t batch, int64_t in_height, int64_t in_width, int64_t channels, int64_t factor_height, int64_t factor_width) {
  const auto fits = [](int64_t size, int64_t factor) { return size > 0 && factor > 0 && size <= kMaxExtent / factor; };
  require(batch >= 0 && channels > 0 && fits(in_height, factor_height) && fits(in_width, factor_width), "upsample_nearest2d: input [", batch, ", ",
          in_height, ", ", in_width, ", ", channels, "], scale_factor (", factor_height, ", ", factor_width, "), want positive sizes, and at most ",
          kMaxExtent, " pixels along an axis of the output");
}

void check_layer_norm(int64_t rows, int64_t channels, const LayerNormArguments& a) {
  require(rows >= 0 && channels > 0, "layer_norm: size [", rows, ", ", channels, "], want rows >= 0 and channels > 0");
  require(a.eps >= 0.0f && is_finite(a.eps), "layer_norm: eps ", std::to_string(a.eps), ", want finite and >= 0");
  if (a.range.strategy != Strategy::none) check_range("layer_norm", a.range, 0);
  else check_predictor("layer_norm", a.range.strategy, a.range.predictor, a.range.predictor_size, 0);
}

void check_attention_shape(const AttentionShape& s) {
  require(s.batch >= 0 && s.queries >= 0 && s.keys > 0 && s.heads > 0 && s.head_dim > 0, "attention: batch ", s.batch, ", queries ", s.queries, ", keys ",
          s.keys, ", heads ", s.heads, ", head_dim ", s.head_dim, ", want keys, heads and head_dim > 0");
  require(s.keys <= kMaxAttentionSum && s.head_dim <= kMaxAttentionSum, "attention: ", s.keys, " keys of head_dim ", s.head_dim,
          " overflow the int32 sums, want at most ", kMaxAttentionSum, " of both");
}

void check_attention(const AttentionShape& s, const AttentionArguments& a) {
  check_attention_shape(s);
  check_range("attention", a.range, 0);
  require(a.scale > 0.0f && is_finite(a.scale), "attention: scale ", std::to_string(a.scale), ", want finite and > 0");
  require(s.batch == 0 || s.queries == 0 || a.workspace != nullptr, "attention: workspace is null, want attention_workspace_bytes bytes");
}

void check_layer_shape(const Conv2dShape& s) {
  require(s.groups > 0 && s.in_channels % s.groups == 0, "conv2d: groups ", s.groups, " does not divide in_channels ", s.in_channels);
  check_window("conv2d", s);
}

void check_layer(const Conv2dShape& s, const LayerArguments& a) {
  check_layer_shape(s);
  require(a.activation == Activation::clamp || a.residual.q == nullptr, "conv2d: a curved activation cannot be fused behind a residual");
  require(a.activation != Activation::clamp || a.activation_min <= a.activation_max, "conv2d: activation_min is above activation_max");
  const int64_t wanted = a.strategy == Strategy::fixed              ? 2
                         : a.strategy == Strategy::gaussian         ? kGaussianPredictorSize
                         : law_per_output(s, a.strategy)            ? law_per_output_predictor_size(s.out_channels)
                         : a.strategy == Strategy::channel          ? channel_predictor_size(s.in_channels)
                         : a.strategy == Strategy::probe            ? kProbePredictorSize
                                                                    : 0;
  check_predictor("conv2d", a.strategy, a.predictor, a.predictor_size, wanted);
  if (!has_law(a.strategy)) return;
  require(s.batch == 0 || a.x.stats != nullptr, "conv2d: strategy ", static_cast<int64_t>(a.strategy), " needs x.stats");
  require(s.batch == 0 || a.residual.q == nullptr || a.residual.stats != nullptr, "conv2d: strategy ", static_cast<int64_t>(a.strategy),
          " needs residual.stats");
  if (a.strategy == Strategy::channel) {
    require(s.batch == 0 || a.x.stats_stride == stats_columns(s.in_channels, true), "conv2d: strategy 6 needs x.stats with channel moments, ",
            stats_columns(s.in_channels, true), " columns, got ", a.x.stats_stride);
    return;
  }
  require(a.gamma >= 0, "conv2d: gamma ", a.gamma, ", want >= 0");
  const double largest = 255.0 * static_cast<double>(field_weights(s));
  require(largest * largest * static_cast<double>(s.out_height() * s.out_width() * s.groups) < 9.2e18,
          "conv2d: the layer is too large for exact patch sums (", s.out_height(), " x ", s.out_width(), " positions of ", field_weights(s), " values)");
}

void check_packed_for(const WeightShape& wanted, const WeightShape& packed) {
  const auto text = [](const WeightShape& s) {
    return "[" + std::to_string(s.out_channels) + ", " + std::to_string(s.kernel_height) + ", " + std::to_string(s.kernel_width) + ", " +
           std::to_string(s.in_channels_per_group) + "] with groups " + std::to_string(s.groups);
  };
  const bool same = wanted.out_channels == packed.out_channels && wanted.kernel_height == packed.kernel_height && wanted.kernel_width == packed.kernel_width &&
                    wanted.in_channels_per_group == packed.in_channels_per_group && wanted.groups == packed.groups;
  require(same, "conv2d: packed_weight holds a weight of shape ", [&] { return text(packed); }, ", want ", [&] { return text(wanted); });
}

void check_weight(const WeightShape& s) {
  require(s.out_channels > 0 && s.kernel_height > 0 && s.kernel_width > 0 && s.in_channels_per_group > 0 && s.groups > 0,
          "weight: every size must be positive, got [", s.out_channels, ", ", s.kernel_height, ", ", s.kernel_width, ", ", s.in_channels_per_group,
          "] with groups ", s.groups);
  require(s.out_channels <= kMaxExtent, "weight: ", s.out_channels, " output channels, want at most ", kMaxExtent);
  require(s.out_channels % s.groups == 0, "weight: out_channels ", s.out_channels, " is not a multiple of groups ", s.groups);
  const double k = static_cast<double>(s.kernel_height) * static_cast<double>(s.kernel_width) * static_cast<double>(s.in_channels_per_group);
  require(k < kMaxSum, "weight: ", static_cast<int64_t>(std::min(k, 9e18)), " weights per output overflow the int32 accumulator, want fewer than ", kMaxSum);
}

}  // namespace probquant
