// What the op front ends share: argument checks, running work on an executor, starting and finishing an output.
#pragma once
#include <probquant/ops.h>

#include <string>
#include <type_traits>
#include <vector>

#include "../cpu/kernels.h"

namespace probquant {

/// Throws Error(message...) unless the condition holds. Parts are strings and numbers, or are called for a string, which costs
/// nothing while the condition holds.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::string message;
  const auto append = [&message](const auto& part) {
    using Part = std::decay_t<decltype(part)>;
    if constexpr (std::is_arithmetic_v<Part>) message += std::to_string(part);
    else if constexpr (std::is_invocable_v<Part>) message += part();
    else message += part;
  };
  (append(parts), ...);
  throw Error(message);
}

/// body(begin, end) over disjoint ranges of [0, count).
template <class Body>
void parallel_for(const Executor& executor, int64_t count, Body body) {
  if (count <= 0) return;
  if (count == 1 || executor.threads <= 1) return body(int64_t{0}, count);
  executor.parallel_for(executor.self, count, [](void* argument, int64_t begin, int64_t end) { (*static_cast<Body*>(argument))(begin, end); }, &body);
}

/// body(sample, begin, end): splits [0, extent) of every sample, into more than one part only when there are fewer
/// samples than threads.
template <class Body>
void parallel_over_samples(const Executor& executor, int64_t samples, int64_t extent, int64_t grain, Body body) {
  if (samples <= 0 || extent <= 0) return;
  int64_t parts = samples >= executor.threads ? 1 : (executor.threads + samples - 1) / samples;
  parts = std::max<int64_t>(1, std::min(parts, extent / std::max<int64_t>(grain, 1)));
  parallel_for(executor, samples * parts, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts;
      body(task / parts, extent * part / parts, extent * (part + 1) / parts);
    }
  });
}

/// Checks a window op's sizes: positive (padding: not negative), at most kMaxExtent, and at least one output.
void check_window(const char* op, const Conv2dShape& shape);

/// Checks what conv2d and surrogate_law are given, but for the weight; check_layer_shape looks at the sizes alone.
void check_layer_shape(const Conv2dShape& shape);
void check_layer(const Conv2dShape& shape, const LayerArguments& arguments);
/// Checks the sizes of a weight.
void check_weight(const WeightShape& shape);
/// Throws unless a packed weight is of the shape that a layer wants.
void check_packed_for(const WeightShape& wanted, const WeightShape& packed);

inline bool is_gaussian(Strategy s) { return s == Strategy::gaussian || s == Strategy::gaussian_channel; }
inline bool has_law(Strategy s) { return is_gaussian(s) || s == Strategy::channel; }
inline bool law_per_output(const Conv2dShape& s, Strategy strategy) {
  return strategy == Strategy::gaussian_channel || (strategy == Strategy::channel && is_depthwise(weight_shape(s)));
}
/// Weights per output of a layer.
inline int64_t field_weights(const Conv2dShape& s) { return s.kernel_height * s.kernel_width * (s.in_channels / s.groups); }
/// Whether the layer's one receptive field is the whole sample (a token, a pooled image), whose stats are its sums.
inline bool is_one_field(const Conv2dShape& s) {
  return field_weights(s) == s.in_height * s.in_width * s.in_channels && s.out_height() == 1 && s.out_width() == 1 &&
         s.padding_top + s.padding_left == 0 && s.padding_bottom + s.padding_right == 0;
}

/// Clears the stats of an output before kernels add to them.
void clear_stats(const QuantizedOutput& y, int64_t samples, int64_t channels);
inline int64_t* stats_row(const QuantizedOutput& y, int64_t sample, int64_t channels) {
  return y.stats + sample * stats_columns(channels, y.channel_stats);
}

/// Writes one sample's parameters; an invalid sample gets scale NaN, zero point 0.
void write_qparams(const QuantizedOutput& y, int64_t sample, const SampleEpilogue& epilogue, QParams qparams);
/// For an op that passes its input's codes on: their parameters.
void pass_qparams(const QuantizedInput& x, const QuantizedOutput& y, int64_t samples);
/// After the kernels: the clip count of invalid samples becomes -1.
void mark_invalid(const QuantizedOutput& y, int64_t samples, int64_t channels);

/// Checks that a predictor has the size its strategy needs.
void check_predictor(const char* op, Strategy strategy, const float* predictor, int64_t size, int64_t wanted);
/// Checks the range of an op without weights; a gaussian predictor has gaussian_size values.
void check_range(const char* op, const RangeArguments& range, int64_t gaussian_size);

/// Checks what the pools are given.
void check_pool(Pool kind, const Conv2dShape& shape, const RangeArguments& range);
void check_adaptive_pool(int64_t batch, int64_t in_height, int64_t in_width, int64_t channels, int64_t out_height, int64_t out_width,
                         const RangeArguments& range);

/// Checks what the ops without weights are given; check_concat returns the channels of the output.
void check_mul(const QuantizedInput& a, const QuantizedInput& b, int64_t samples, int64_t count, int64_t channels, const RangeArguments& range);
void check_add(const QuantizedInput& a, const QuantizedInput& b, int64_t samples, int64_t count, int64_t channels, float activation_min,
               float activation_max, const RangeArguments& range);
void check_activation(int64_t samples, int64_t count, int64_t channels, Activation kind, float activation_min, float activation_max,
                      const RangeArguments& range);
int64_t check_concat(const int64_t* channels, int64_t input_count, int64_t samples, int64_t positions, const RangeArguments& range);
void check_upsample(int64_t batch, int64_t in_height, int64_t in_width, int64_t channels, int64_t factor_height, int64_t factor_width);
void check_layer_norm(int64_t rows, int64_t channels, const LayerNormArguments& arguments);
void check_attention_shape(const AttentionShape& shape);
void check_attention(const AttentionShape& shape, const AttentionArguments& arguments);

/// Quantizes one row [channels] that is a sample of its own: fixed, or its exact range. `valid`: the scales it was made from are.
void quantize_row(const float* x, int64_t row, int64_t channels, bool valid, const RangeArguments& range, const QuantizedOutput& y);

}  // namespace probquant
