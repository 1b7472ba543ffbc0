// The ops: raw pointers in, raw pointers out, no allocation of output size, deterministic for any thread count.
// Every front end checks its sizes and throws Error; pointers must hold what the shapes say.
// Formulas, rounding and edge cases: csrc/NUMERICS.md.
#pragma once
#include <probquant/types.h>

#include <utility>
#include <vector>

namespace probquant {

// ---------------------------------------------------------------------------------------------------------------------
// Layers

/// Largest size, kernel, stride, padding or dilation along one axis.
inline constexpr int64_t kMaxExtent = 0x7fffffff;

/// Geometry of a 2-d convolution, NHWC.
struct Conv2dShape {
  int64_t batch = 0, in_height = 0, in_width = 0, in_channels = 0, out_channels = 0;
  int64_t kernel_height = 1, kernel_width = 1;
  int64_t stride_height = 1, stride_width = 1;
  int64_t padding_top = 0, padding_bottom = 0, padding_left = 0, padding_right = 0;
  int64_t dilation_height = 1, dilation_width = 1;
  int64_t groups = 1;

  int64_t out_height() const { return extent(in_height + padding_top + padding_bottom, kernel_height, stride_height, dilation_height); }
  int64_t out_width() const { return extent(in_width + padding_left + padding_right, kernel_width, stride_width, dilation_width); }

 private:
  static int64_t extent(int64_t padded, int64_t kernel, int64_t stride, int64_t dilation) {
    const int64_t span = dilation * (kernel - 1) + 1;
    return padded < span ? 0 : (padded - span) / stride + 1;
  }
};

/// Size of a weight, canonical form int8 [out_channels, kernel_height, kernel_width, in_channels / groups].
struct WeightShape {
  int64_t out_channels = 0, kernel_height = 1, kernel_width = 1, in_channels_per_group = 0, groups = 1;
};

/// Of a layer's weight.
constexpr WeightShape weight_shape(const Conv2dShape& s) {
  return {s.out_channels, s.kernel_height, s.kernel_width, s.in_channels / s.groups, s.groups};
}
/// Whether every output channel sees one input channel out of several.
constexpr bool is_depthwise(const WeightShape& s) { return s.in_channels_per_group == 1 && s.groups > 1; }

/// Bytes of the packed form of a weight: the one CPU layout that serves every ISA.
PROBQUANT_API int64_t packed_weight_bytes(const WeightShape& shape);

/// Packs a canonical weight in [-127, 127] with its per-channel scale [O] and bias [O] (null: zeros).
/// output_profile [O] (null: ones), 2^-60 to 2^60: static factors r_o of the 8-bit output, whose codes then stand for
/// scale * r_o * (q - zero_point). They are the reader's to know: it folds them into its own weights. A residual has the same.
/// `packed` needs packed_weight_bytes(shape) bytes, 64-byte aligned for full speed.
PROBQUANT_API void pack_weight(const WeightShape& shape, const int8_t* weight, const float* weight_scale, const float* bias,
                               const float* output_profile, uint8_t* packed);

/// Everything of a layer but its geometry.
struct LayerArguments {
  QuantizedInput x;
  const uint8_t* packed_weight = nullptr;
  QuantizedInput residual;  ///< q == nullptr: none; else added before the activation, shaped like the output
  Activation activation = Activation::clamp;
  float activation_min = 0, activation_max = 0;  ///< bounds of Activation::clamp, may be infinite
  Strategy strategy = Strategy::none;
  const float* predictor = nullptr;
  int64_t predictor_size = 0;
  int64_t gamma = 1;         ///< the gaussian strategies sample every gamma-th position; 0: the input's moments alone
  QuantizedOutput y;         ///< every strategy but none; on the CPU y.q may be residual.q, of which each element is read before it is written
  float* y_float = nullptr;  ///< Strategy::none
  void* workspace = nullptr; ///< conv2d_workspace_bytes(shape, strategy) bytes
};

/// What the caller has read next, such as the next layer's packed weight. A layer that computes more than it reads may bring the beginning of it to
/// its cache meanwhile, of a size that leaves room for its own data. Results do not depend on it.
struct Upcoming {
  const void* data = nullptr;
  int64_t bytes = 0;
};

/// y = activation(conv2d(x, w) + b + residual). One scale per image.
PROBQUANT_API void conv2d(const Conv2dShape& shape, const LayerArguments& arguments, const Executor& executor, const Upcoming& upcoming = {});

/// Sums that are held in 32 bits until their range is known, of a few samples at a time: with the dynamic strategy, and with the probe of samples
/// that it sees whole. 0 where it takes less time to compute them twice, which depends on the instruction set, and with the other strategies.
PROBQUANT_API int64_t conv2d_workspace_bytes(const Conv2dShape& shape, Strategy strategy);

/// Rows (output positions of a sample, row-major) that Strategy::probe computes first, out of `rows`: disjoint ranges
/// [begin, end) in order.
PROBQUANT_API std::vector<std::pair<int64_t, int64_t>> probe_rows(int64_t rows);

/// A linear layer on [samples, rows, in_features] -> [samples, rows, out_features]; rows share their sample's scale
/// (rows = 1: one scale per token). It is conv2d with a 1x1 kernel on a height of 1.
constexpr Conv2dShape linear_shape(int64_t samples, int64_t rows, int64_t in_features, int64_t out_features) {
  Conv2dShape shape;
  shape.batch = samples, shape.in_height = 1, shape.in_width = rows;
  shape.in_channels = in_features, shape.out_channels = out_features;
  return shape;
}

/// How many laws a strategy has for a layer: one (gaussian, channel), or one per output channel (gaussian_channel, and
/// channel of a depthwise layer).
PROBQUANT_API int64_t surrogate_laws(const Conv2dShape& shape, Strategy strategy);

/// What such a strategy believes of a layer's pre-activations: mean and standard deviation, [batch, surrogate_laws, 2].
/// Calibration fits alpha and beta to it. Uses x, residual, strategy, predictor and gamma of the arguments.
PROBQUANT_API void surrogate_law(const Conv2dShape& shape, const LayerArguments& arguments, float* law, const Executor& executor);

// ---------------------------------------------------------------------------------------------------------------------
// Quantize and dequantize

/// Any strided float image tensor [samples, rows, columns, channels]; strides in elements. Rows of a linear layer are
/// [samples, 1, rows, K].
struct FloatView {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t size[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};
};

/// Quantizes with the exact minimum and maximum of each sample, or, when `scale` and `zero_point` are given (one value
/// each), with those.
PROBQUANT_API void quantize(const FloatView& x, const float* scale, const int32_t* zero_point, const QuantizedOutput& y,
                            const Executor& executor);

/// y = scale * (q - zero_point), dense, in x's order: [samples, count].
PROBQUANT_API void dequantize(const QuantizedInput& x, int64_t samples, int64_t count, DType dtype, void* y, const Executor& executor);

/// Recomputes stats of q [samples, count / channels, channels]; the clip count is 0.
PROBQUANT_API void moments(const uint8_t* q, int64_t samples, int64_t count, int64_t channels, bool channel_stats, int64_t* stats,
                           const Executor& executor);

// ---------------------------------------------------------------------------------------------------------------------
// Ops without weights

/// How the output range of an op without weights is found. Strategy::fixed takes predictor [scale, zero_point],
/// Strategy::dynamic the exact range of the result (two passes, nothing wide is stored), Strategy::gaussian what each op
/// says below.
struct RangeArguments {
  Strategy strategy = Strategy::dynamic;
  const float* predictor = nullptr;
  int64_t predictor_size = 0;
};

/// y = clamp(a + b, activation_min, activation_max), elementwise [samples, count / channels, channels].
/// gaussian: predictor [alpha, beta, rho]; mean and variance from both inputs' stats, cut to the sum of their code ranges.
PROBQUANT_API void add(const QuantizedInput& a, const QuantizedInput& b, int64_t samples, int64_t count, int64_t channels,
                       float activation_min, float activation_max, const RangeArguments& range, const QuantizedOutput& y,
                       const Executor& executor);

/// y = a * b, elementwise [samples, count / channels, channels]; per_channel: b is [samples, channels], the same for all positions (the
/// gate of a squeeze-and-excitation block). gaussian: predictor [alpha, beta]; mean and variance of a product of independent values,
/// from both inputs' stats, cut to the products of their code ranges.
PROBQUANT_API void mul(const QuantizedInput& a, const QuantizedInput& b, int64_t samples, int64_t count, int64_t channels, bool per_channel,
                       const RangeArguments& range, const QuantizedOutput& y, const Executor& executor);

/// y = activation(x) through a 256-entry table per sample, elementwise.
/// gaussian (predictor []): the range of the table over all codes.
PROBQUANT_API void activation(const QuantizedInput& x, int64_t samples, int64_t count, int64_t channels, Activation kind,
                              float activation_min, float activation_max, const RangeArguments& range,
                              const QuantizedOutput& y, const Executor& executor);

/// Joins inputs along the channels; channels[i] of inputs[i], positions per sample. Not fixed: the union of the inputs'
/// code ranges. Inputs with equal parameters pass through unchanged.
PROBQUANT_API void concat(const QuantizedInput* inputs, const int64_t* channels, int64_t input_count, int64_t samples,
                          int64_t positions, const RangeArguments& range, const QuantizedOutput& y, const Executor& executor);

/// Everything of a LayerNorm over the last dimension of [rows, channels] but its sizes. Every row has its own scale in and out.
struct LayerNormArguments {
  QuantizedInput x;               ///< codes with one scale per row; q == nullptr: x_float is read
  const float* x_float = nullptr;
  const float* residual = nullptr;  ///< added to x in front of the norm, null: none
  const float* weight = nullptr;    ///< gamma [channels], null: ones
  const float* bias = nullptr;      ///< beta [channels], null: zeros
  float eps = 0;
  RangeArguments range;      ///< none: y_float is written; fixed; dynamic and gaussian (predictor []): the row's exact range
  QuantizedOutput y;         ///< every strategy but none
  float* y_float = nullptr;  ///< Strategy::none
  float* sum = nullptr;      ///< x + residual in float32: what the next residual connection reads; on the CPU it may be the residual. Null: not wanted
};

/// sum = x + residual; y = (sum - mean) / sqrt(variance + eps) * weight + bias, per row (Ba et al., arXiv 1607.06450). A row stays in
/// L1 from its first read to its last write, so that its range is exact at no cost worth predicting.
PROBQUANT_API void layer_norm(int64_t rows, int64_t channels, const LayerNormArguments& arguments, const Executor& executor);

/// Sizes of an attention: query [batch, queries, heads * head_dim], key and value [batch, keys, heads * head_dim].
struct AttentionShape {
  int64_t batch = 0, queries = 0, keys = 0, heads = 0, head_dim = 0;

  int64_t channels() const { return heads * head_dim; }
};

/// Longest head and longest key sequence: their int32 sums of products of two codes cannot overflow.
inline constexpr int64_t kMaxAttentionSum = 33000;

struct AttentionArguments {
  QuantizedInput query, key, value;  ///< one scale per token
  float scale = 0;                   ///< of the logits, > 0; 1 / sqrt(head_dim) as a rule
  RangeArguments range;              ///< fixed; dynamic and gaussian (predictor []): the token's exact range
  QuantizedOutput y;                 ///< [batch, queries, heads * head_dim], one scale per token
  void* workspace = nullptr;         ///< attention_workspace_bytes bytes, 64-byte aligned for full speed
};

/// y = softmax(scale * query key^T) value per head (Vaswani et al., arXiv 1706.03762), both products in int32. Logits exist for a few
/// queries of one head at a time, as in FlashAttention (arXiv 2205.14135). The scales of the values' tokens go into the attention
/// weights, which get 8 bits per query: no value is rounded a second time.
PROBQUANT_API void attention(const AttentionShape& shape, const AttentionArguments& arguments, const Executor& executor);

/// Keys and values in 16 bits, of as many images as the executor has threads.
PROBQUANT_API int64_t attention_workspace_bytes(const AttentionShape& shape, const Executor& executor);

/// Pooling window; `shape` uses batch, in_*, kernel, stride, padding, dilation; groups and out_channels are ignored.
/// Max pooling passes scale and zero point through (padding never wins). Average pooling takes an exact integer sum
/// and rounds once; dynamic and gaussian give it the exact range of its result, fixed the given one.
/// `count_include_pad` as in torch.
PROBQUANT_API void pool2d(Pool kind, const Conv2dShape& shape, bool count_include_pad, const QuantizedInput& x,
                          const RangeArguments& range, const QuantizedOutput& y, const Executor& executor);

/// Average pooling to a given output size; window i of n covers [floor(i * in / n), ceil((i + 1) * in / n)).
PROBQUANT_API void adaptive_average_pool2d(int64_t batch, int64_t in_height, int64_t in_width, int64_t channels,
                                           int64_t out_height, int64_t out_width, const QuantizedInput& x,
                                           const RangeArguments& range, const QuantizedOutput& y, const Executor& executor);

/// Nearest-neighbour upsampling by whole factors: each pixel becomes a block of factor_height x factor_width equal ones.
/// Scale and zero point pass through.
PROBQUANT_API void upsample_nearest2d(int64_t batch, int64_t in_height, int64_t in_width, int64_t channels, int64_t factor_height,
                                      int64_t factor_width, const QuantizedInput& x, const QuantizedOutput& y, const Executor& executor);

}  // namespace probquant
