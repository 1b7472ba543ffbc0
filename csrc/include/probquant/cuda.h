// The ops on a GPU: the same bytes as ops.h gives on the CPU. All data pointers are device pointers; `stream` is a
// cudaStream_t (null: the default stream) of the calling thread's current device. Every function only enqueues work: it never
// waits, allocates or reads a device value on the host, so all of them can be captured in a CUDA graph.
// Wrong arguments, a missing driver or device and refused launches throw Error. In a build without CUDA kernels
// (build_info().cuda) every function throws Error.
#pragma once
#include <probquant/ops.h>
#include <probquant/types.h>

namespace probquant::cuda {

/// Bytes of device memory that quantize, moments, the ops without weights and pools need beside their output: 32 per thread block, with channel stats
/// 8 per channel and block in addition, and 8 more per block where an op `measures` its range (quantize without given parameters; add, mul and activation with
/// the dynamic strategy; average pools that are not fixed). `positions` x `channels` are the values of a sample: of the output, but of the input
/// for upsample_nearest2d. Workspaces are 8-byte aligned, may hold anything before, and are free again when the stream has passed.
PROBQUANT_API int64_t workspace_bytes(int64_t samples, int64_t positions, int64_t channels, bool channel_stats, bool measures);

/// As probquant::quantize; `scale` and `zero_point` are device pointers to one value each, or null.
PROBQUANT_API void quantize(const FloatView& x, const float* scale, const int32_t* zero_point, const QuantizedOutput& y, void* workspace,
                            void* stream);

/// As probquant::dequantize.
PROBQUANT_API void dequantize(const QuantizedInput& x, int64_t samples, int64_t count, DType dtype, void* y, void* stream);

/// As probquant::moments.
PROBQUANT_API void moments(const uint8_t* q, int64_t samples, int64_t count, int64_t channels, bool channel_stats, int64_t* stats, void* workspace,
                           void* stream);

// ---------------------------------------------------------------------------------------------------------------------
// Layers

/// As probquant::packed_weight_bytes, of the layout that the CUDA kernels read: another one than the CPU's.
PROBQUANT_API int64_t packed_weight_bytes(const WeightShape& shape);

/// As probquant::pack_weight, from and to device memory; `packed` is aligned to 16 bytes. No value is looked at on the host: that
/// weights lie in [-127, 127] and the profile in its bounds is the caller's promise.
PROBQUANT_API void pack_weight(const WeightShape& shape, const int8_t* weight, const float* weight_scale, const float* bias,
                               const float* output_profile, uint8_t* packed, void* stream);

/// Workspace of conv2d and surrogate_law: a sector per thread block and sample that it sees, for stats, ranges (dynamic, probe) and patch
/// sums (gamma > 0), and with channel stats (of y) 8 bytes per output channel and row of blocks.
PROBQUANT_API int64_t conv2d_workspace_bytes(const Conv2dShape& shape, Strategy strategy, int64_t gamma, bool channel_stats);

/// As probquant::conv2d; the workspace needs conv2d_workspace_bytes bytes. One launch where y's parameters are given or follow from one
/// law over the input's stats; two with patch sums, with a law per channel, with the probe and the dynamic strategy. The dynamic strategy runs the layer
/// twice, the probe a sixteenth of it: no output is ever held in 32 bits. A layer whose output positions, padded rows or receptive field reach 2^31 throws.
PROBQUANT_API void conv2d(const Conv2dShape& shape, const LayerArguments& arguments, void* stream);

/// As probquant::surrogate_law.
PROBQUANT_API void surrogate_law(const Conv2dShape& shape, const LayerArguments& arguments, float* law, void* stream);

// ---------------------------------------------------------------------------------------------------------------------
// Ops without weights

/// As probquant::add; the workspace needs workspace_bytes bytes.
PROBQUANT_API void add(const QuantizedInput& a, const QuantizedInput& b, int64_t samples, int64_t count, int64_t channels, float activation_min,
                       float activation_max, const RangeArguments& range, const QuantizedOutput& y, void* workspace, void* stream);

/// As probquant::mul, with the workspace of add.
PROBQUANT_API void mul(const QuantizedInput& a, const QuantizedInput& b, int64_t samples, int64_t count, int64_t channels, bool per_channel,
                       const RangeArguments& range, const QuantizedOutput& y, void* workspace, void* stream);

/// As probquant::activation, with the workspace of add.
PROBQUANT_API void activation(const QuantizedInput& x, int64_t samples, int64_t count, int64_t channels, Activation kind, float activation_min,
                              float activation_max, const RangeArguments& range, const QuantizedOutput& y, void* workspace, void* stream);

/// As probquant::concat; `inputs` and `channels` are host arrays. More than 64 inputs throw.
PROBQUANT_API void concat(const QuantizedInput* inputs, const int64_t* channels, int64_t input_count, int64_t samples, int64_t positions,
                          const RangeArguments& range, const QuantizedOutput& y, void* workspace, void* stream);

/// As probquant::upsample_nearest2d.
PROBQUANT_API void upsample_nearest2d(int64_t batch, int64_t in_height, int64_t in_width, int64_t channels, int64_t factor_height, int64_t factor_width,
                                      const QuantizedInput& x, const QuantizedOutput& y, void* workspace, void* stream);

// ---------------------------------------------------------------------------------------------------------------------
// Pools

/// As probquant::pool2d, with the workspace of add.
PROBQUANT_API void pool2d(Pool kind, const Conv2dShape& shape, bool count_include_pad, const QuantizedInput& x, const RangeArguments& range,
                          const QuantizedOutput& y, void* workspace, void* stream);

/// As probquant::adaptive_average_pool2d, with the workspace of pool2d.
PROBQUANT_API void adaptive_average_pool2d(int64_t batch, int64_t in_height, int64_t in_width, int64_t channels, int64_t out_height,
                                           int64_t out_width, const QuantizedInput& x, const RangeArguments& range, const QuantizedOutput& y,
                                           void* workspace, void* stream);

// ---------------------------------------------------------------------------------------------------------------------
// Transformers

/// As probquant::layer_norm. Rows of more than 2,097,152 channels throw.
PROBQUANT_API void layer_norm(int64_t rows, int64_t channels, const LayerNormArguments& arguments, void* stream);

/// Workspace of attention: its operands in the order of the tensor cores' fragments, and its output in float32 until a token's range is
/// known. About 4 bytes per value of query, key and value, and 4 per value of the output.
PROBQUANT_API int64_t attention_workspace_bytes(const AttentionShape& shape);

/// As probquant::attention; arguments.workspace needs attention_workspace_bytes bytes, aligned to 16.
PROBQUANT_API void attention(const AttentionShape& shape, const AttentionArguments& arguments, void* stream);

}  // namespace probquant::cuda
