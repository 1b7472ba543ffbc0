// What the public functions (api.cpp, layer_api.cpp) ask of the kernel files: checked problems in, kernels enqueued. No CUDA header.
// Every pointer is a device pointer, `stream` a cudaStream_t.
#pragma once
#include <probquant/ops.h>

#include "../core/probe.h"
#include "../core/surrogate.h"
#include "../core/windows.h"
#include "attention_layout.h"
#include "heuristics.h"
#include "packed_weight.h"
#include "partition.h"

namespace probquant::cuda {

/// A strided float tensor [samples, rows, columns, channels] with positions = rows * columns.
struct FloatSource {
  const void* data;
  DType dtype;
  int64_t columns;
  int64_t stride[4];
};

/// Minimum and maximum of what one block saw, joined with 0; lo = -infinity where a value was not finite.
struct Range {
  float lo, hi;
};

/// range.cu: one Range per block, in the partition's order.
void launch_range(const Partition& partition, const FloatSource& x, Range* partials, void* stream);

/// What one block has seen of a sample, in the workspace: one sector. The launch's signature, written last, says that it is there (parts.cuh).
struct Part {
  uint64_t sum, squares, clipped, signature;
};

/// Where the blocks of a launch leave what they have seen of every sample, for the last of them to add up. Nothing needs to be cleared: what
/// memory held before has not the launch's signature.
struct Parts {
  Part* parts;         ///< [samples][count]
  uint64_t* channels;  ///< [samples][rows][channels]: sums of squares of codes, times 2^32, plus sums of codes; null where channels have no stats
  int32_t count;       ///< of a sample, at most
  int32_t rows;        ///< of them along the positions
  uint64_t signature;
};

/// Parts of the blocks of a partition, or of a dense layer with any tile.
struct PartsLayout {
  int64_t samples, count, rows, channels;  ///< 0 channels: without stats of their own

  constexpr int64_t part_bytes() const { return count > 1 ? samples * count * static_cast<int64_t>(sizeof(Part)) : 0; }
  constexpr int64_t bytes() const { return part_bytes() + (rows > 1 ? samples * rows * channels * static_cast<int64_t>(sizeof(uint64_t)) : 0); }
  /// With the signature of a new launch.
  Parts at(void* workspace) const;
};
constexpr PartsLayout parts_layout(const Partition& p, int64_t channels, bool channel_stats) {
  return {p.samples, p.blocks_per_sample(), p.position_parts, channel_stats ? channels : 0};
}

/// quantize.cu: parameters from the partial ranges, or from `scale` and `zero_point` where these are not null; codes; stats.
void launch_quantize(const Partition& partition, const FloatSource& x, const Range* partials, const float* scale, const int32_t* zero_point,
                     const QuantizedOutput& y, const Parts& parts, void* stream);

/// dequantize.cu: the partition has one channel.
void launch_dequantize(const Partition& partition, const QuantizedInput& x, DType dtype, void* y, void* stream);

/// moments.cu: y's stats.
void launch_moments(const Partition& partition, const uint8_t* q, const QuantizedOutput& y, const Parts& parts, void* stream);

/// pack.cu: writes every byte of the packed weight.
void launch_pack(const PackedLayout& layout, const int8_t* weight, const float* weight_scale, const float* bias, const float* output_profile,
                 uint8_t* packed, void* stream);

/// What a layer kernel makes of its values: y's codes with their stats, y_float, or nothing but the range of what every block sees of a sample.
enum class LayerOutput : int32_t { codes, floats, range };

/// Output positions of a sample that a layer kernel visits: all, or those of the probe where it looks for a range.
inline int64_t visited_rows(const Conv2dShape& s, Strategy strategy, LayerOutput output) {
  const int64_t rows = s.out_height() * s.out_width();
  return strategy == Strategy::probe && output == LayerOutput::range ? probe_segments(rows) * probe_segment_rows(rows) : rows;
}

inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0; }

/// Output positions that a prediction samples, and how warps share them out: each has one of `chunks` shares of the fields of a unit, which is
/// a group or 32 of them.
struct PatchGrid {
  int64_t gamma, columns, fields;         ///< sampled fields of a group, and per output row
  int64_t units, chunks, chunk_fields;
  int64_t parts;                          ///< blocks per sample
};

/// Sizes that a prediction needs.
struct PredictProblem {
  int64_t positions, in_channels, count;  ///< of an input sample: pixels, and pixels times channels
  int64_t out_channels, out_count, laws;
  int64_t groups, group_channels;         ///< output channels per group
  int64_t taps, field_weights, fields;    ///< of a kernel; weights per output; sampled fields of a group
  bool one_field, sums_per_group, probes_whole;
  const ProfileSpan* profile;             ///< of the packed weight
};

/// A layer's launch, and what it finds in the workspace.
struct LayerPlan {
  LayerOutput output;
  bool predicts;  ///< y's parameters are not there yet: every block finds those of its samples, the first of a sample writes them
  Range* ranges;  ///< [samples][range_count]: written (range), or, by the dynamic strategy and the probe, read
  int32_t range_count;
  Parts parts;             ///< codes
  PredictProblem problem;  ///< where it predicts
};

/// dense.cu: a layer with a weight that is not depthwise, with this tile of heuristics.h.
void launch_dense(const Conv2dShape& shape, const LayerArguments& arguments, const LayerPlan& plan, DenseTile tile, void* stream);
/// Parts of a dense layer, at most, whatever its tile; and Ranges per sample of one that visits so many rows of it with this tile.
PartsLayout dense_parts(const Conv2dShape& shape, bool channel_stats);
int64_t dense_range_count(const Conv2dShape& shape, const LayerArguments& arguments, int64_t rows_per_sample, DenseTile tile);

/// depthwise.cu: the same, with a depthwise weight.
void launch_depthwise(const Conv2dShape& shape, const LayerArguments& arguments, const LayerPlan& plan, void* stream);
Partition depthwise_partition(const Conv2dShape& shape, int64_t rows_per_sample, bool channel_stats);

/// predict.cu: y.scale and y.zero_point.
void launch_predict(const PredictProblem& problem, const LayerArguments& arguments, int64_t samples, void* stream);
/// The laws themselves: as probquant::surrogate_law.
void launch_law(const PredictProblem& problem, const LayerArguments& arguments, int64_t samples, float* law, void* stream);

/// Sums of a field's T1, T2 and T1^2 (surrogate.h) over several fields.
struct FieldSums {
  int64_t sum, squares, sum_of_squared;
};

/// patch_sums.cu: one of these two behind patch sums, in one launch: the laws, or the rest where `laws` is null.
PatchGrid patch_grid(const Conv2dShape& shape, int64_t gamma, bool sums_per_group);
int64_t patch_workspace_bytes(const Conv2dShape& shape, const PatchGrid& grid, bool sums_per_group);
void launch_patch_sums(const Conv2dShape& shape, const PredictProblem& problem, const LayerArguments& arguments, float* laws, void* stream);

/// Geometry of a max pool, in pixels.
struct MaxPool {
  int64_t in_height, in_width, out_width;
  int64_t kernel_height, kernel_width, stride_height, stride_width, padding_top, padding_left, dilation_height, dilation_width;
};

/// pool.cu: the partition is that of the output. An average takes y's parameters from `predictor` [scale, zero_point]
/// or, where that is null, from the exact range, through one Range per block in `partials`.
void launch_max_pool(const Partition& partition, const MaxPool& pool, const QuantizedInput& x, const QuantizedOutput& y, const Parts& parts, void* stream);
void launch_average_pool(const Partition& partition, const AverageWindows& windows, const QuantizedInput& x, const float* predictor, Range* partials,
                         const QuantizedOutput& y, const Parts& parts, void* stream);

/// pairs.cu: the partition is that of a sample's values. The dynamic strategy goes through one Range per block in
/// `partials`.
struct PairArguments {
  QuantizedInput a, b;
  float activation_min, activation_max;  ///< infinite for a product
  bool per_channel;                      ///< b is [samples, channels]
};
void launch_add(const Partition& partition, const PairArguments& arguments, Strategy strategy, const float* predictor, Range* partials,
                const QuantizedOutput& y, const Parts& parts, void* stream);
void launch_mul(const Partition& partition, const PairArguments& arguments, Strategy strategy, const float* predictor, Range* partials,
                const QuantizedOutput& y, const Parts& parts, void* stream);

/// activation.cu: the same; parameters are those of `fixed`, or from the codes that occur, through `partials`, or, where both are null,
/// from all codes.
struct ActivationArguments {
  QuantizedInput x;
  Activation kind;
  float activation_min, activation_max;
};
void launch_activation(const Partition& partition, const ActivationArguments& arguments, const float* fixed, Range* partials, const QuantizedOutput& y,
                       const Parts& parts, void* stream);

/// concat.cu: the partition is that of the output. As many inputs as a kernel's 4 KiB of parameters have room for.
inline constexpr int64_t kMaxConcatInputs = 64;
struct ConcatArguments {
  struct Input {
    const uint8_t* q;
    const float* scale;
    const int32_t* zero_point;
  };
  int32_t count;
  Input inputs[kMaxConcatInputs];
  int64_t channels[kMaxConcatInputs];
};
void launch_concat(const Partition& partition, const ConcatArguments& arguments, const float* fixed, const QuantizedOutput& y, const Parts& parts, void* stream);

/// upsample.cu: the partition is that of the input.
struct Upsample {
  int64_t in_width, factor_height, factor_width;
};
void launch_upsample(const Partition& partition, const Upsample& upsample, const QuantizedInput& x, const QuantizedOutput& y, const Parts& parts, void* stream);

/// layer_norm.cu
void launch_layer_norm(int64_t rows, int64_t channels, const LayerNormArguments& arguments, void* stream);

/// attention.cu
void launch_attention(const AttentionLayout& layout, const AttentionArguments& arguments, void* stream);

}  // namespace probquant::cuda
