// The schemas of torch.ops.probquant, all of them, in one place. The fakes in probquant/_ops.py mirror them.
//
// A quantized activation is four tensors (csrc/NUMERICS.md): q uint8, scale float32, zero_point int32, stats int64. Images are
// logical NCHW in channels_last memory with scale [N]; rows are [..., K] with a scale for every leading index, or for
// a prefix of them. stats is scale's shape with 3 (or, with channel_stats, 3 + 2 C) more columns.
// layer_norm takes codes with a scale per row, or float32 (x_scale and x_zero_point None); its last result is x + residual in
// float32, empty unless keep_sum. attention takes [batch, tokens, heads * head_dim] with a scale per token.
// Strategy, activation: the integers of types.h. Bounds of None are infinite. padding is [height, width] or
// [top, bottom, left, right]. With strategy 0 (none) a layer or a
// layer_norm returns its float32 output and three empty tensors.
// run replays a recording of the others (recording.h). hold keeps one with its constants, under a number that run_held takes until release does; it
// gives how many are left.
#pragma once

#define PROBQUANT_X "Tensor x, Tensor x_scale, Tensor x_zero_point"
#define PROBQUANT_OUT " -> (Tensor, Tensor, Tensor, Tensor)"
#define PROBQUANT_LAYER                                                                                              \
  "Tensor? residual=None, Tensor? residual_scale=None, Tensor? residual_zero_point=None, Tensor? residual_stats=None, " \
  "int activation=0, float? activation_min=None, float? activation_max=None, int strategy=2, Tensor? predictor=None, " \
  "int gamma=0, bool channel_stats=False)" PROBQUANT_OUT
#define PROBQUANT_RANGE_ARGUMENTS "int strategy=2, Tensor? predictor=None, bool channel_stats=False)"
#define PROBQUANT_RANGE PROBQUANT_RANGE_ARGUMENTS PROBQUANT_OUT

namespace probquant {

inline constexpr const char* kSchemas[] = {
    "quantize(Tensor x, int sample_dims=1, Tensor? scale=None, Tensor? zero_point=None, bool channel_stats=False)" PROBQUANT_OUT,
    "dequantize(" PROBQUANT_X ", ScalarType? dtype=None) -> Tensor",
    "moments(Tensor q, int sample_dims=1, bool channel_stats=False) -> Tensor",
    "pack_weight(Tensor weight, Tensor weight_scale, Tensor? bias=None, int groups=1, Tensor? output_profile=None) -> Tensor",
    "linear(" PROBQUANT_X ", Tensor x_stats, Tensor packed_weight, int out_features, " PROBQUANT_LAYER,
    "conv2d(" PROBQUANT_X ", Tensor x_stats, Tensor packed_weight, int out_channels, int[] kernel_size, int[] stride, "
    "int[] padding, int[] dilation, int groups, " PROBQUANT_LAYER,
    "surrogate_law(" PROBQUANT_X ", Tensor x_stats, int out_channels, int[] kernel_size, int[] stride, int[] padding, "
    "int[] dilation, int groups, Tensor? residual=None, Tensor? residual_scale=None, Tensor? residual_zero_point=None, "
    "Tensor? residual_stats=None, *, int strategy, Tensor predictor, int gamma) -> Tensor",
    "add(Tensor a, Tensor a_scale, Tensor a_zero_point, Tensor a_stats, Tensor b, Tensor b_scale, Tensor b_zero_point, "
    "Tensor b_stats, float? activation_min=None, float? activation_max=None, " PROBQUANT_RANGE,
    "mul(Tensor a, Tensor a_scale, Tensor a_zero_point, Tensor a_stats, Tensor b, Tensor b_scale, Tensor b_zero_point, "
    "Tensor b_stats, " PROBQUANT_RANGE,
    "activation(" PROBQUANT_X ", int activation, float? activation_min=None, float? activation_max=None, " PROBQUANT_RANGE,
    "concat(Tensor[] xs, Tensor[] scales, Tensor[] zero_points, " PROBQUANT_RANGE,
    "max_pool2d(" PROBQUANT_X ", int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool channel_stats=False)" PROBQUANT_OUT,
    "avg_pool2d(" PROBQUANT_X ", int[] kernel_size, int[] stride, int[] padding, bool count_include_pad=True, " PROBQUANT_RANGE,
    "adaptive_avg_pool2d(" PROBQUANT_X ", int[] output_size, " PROBQUANT_RANGE,
    "upsample_nearest2d(" PROBQUANT_X ", int[] scale_factor, bool channel_stats=False)" PROBQUANT_OUT,
    "layer_norm(Tensor x, Tensor? x_scale, Tensor? x_zero_point, Tensor? residual, Tensor? weight, Tensor? bias, float eps=1e-05, "
    "bool keep_sum=False, " PROBQUANT_RANGE_ARGUMENTS " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "attention(Tensor query, Tensor query_scale, Tensor query_zero_point, Tensor key, Tensor key_scale, Tensor key_zero_point, "
    "Tensor value, Tensor value_scale, Tensor value_zero_point, int heads, float scale, " PROBQUANT_RANGE,
    "run(Tensor[] inputs, Tensor[] constants, str recording) -> Tensor[]",
    "hold(Tensor[] constants, str recording) -> int",
    "run_held(Tensor[] inputs, int held) -> Tensor[]",
    "release(int held) -> int",
};

}  // namespace probquant

#undef PROBQUANT_X
#undef PROBQUANT_OUT
#undef PROBQUANT_LAYER
#undef PROBQUANT_RANGE_ARGUMENTS
#undef PROBQUANT_RANGE
