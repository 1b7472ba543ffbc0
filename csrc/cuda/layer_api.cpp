// The layers' public functions of cuda.h: checks, the choice of kernel and tile, launches. Host code only; the checks are those of
// the CPU front ends, and some for what a kernel counts in 32 bits.
#include <probquant/cuda.h>

#include <algorithm>

#include "../core/front_end.h"
#include "launch.h"

namespace probquant::cuda {
namespace {

constexpr int64_t kMax32 = 0x7fffffff;
constexpr int64_t kPackedAlignment = 16;

/// The same layer in the form that keeps a kernel's numbers small: a pointwise one sees a column of pixels, whatever the image's
/// shape was, and a dilation along an axis with one tap is 1. Only for the layer itself: a prediction samples rows and columns.
Conv2dShape normalized(Conv2dShape s) {
  if (s.kernel_height == 1) s.dilation_height = 1;
  if (s.kernel_width == 1) s.dilation_width = 1;
  const bool pointwise = s.kernel_height * s.kernel_width * s.stride_height * s.stride_width == 1 &&
                         s.padding_top + s.padding_bottom + s.padding_left + s.padding_right == 0;
  if (pointwise) s.in_height *= s.in_width, s.in_width = 1;
  return s;
}

/// What the kernels count in 32 bits: output positions, padded rows and columns, and the extent of a receptive field; and the reach of the
/// reciprocal that finds the tap of a byte.
void check_extents(const Conv2dShape& s) {
  constexpr int64_t kTail = 24;  // segments beyond the last tap that a walk along K may reach
  const double row = static_cast<double>(s.in_width) * static_cast<double>(s.in_channels);
  const double padded = static_cast<double>(s.in_width + s.padding_left + s.padding_right) * static_cast<double>(s.in_channels);
  const double field = static_cast<double>((s.kernel_height + kTail) * s.dilation_height) * row +
                       static_cast<double>((s.kernel_width + kTail) * s.dilation_width) * static_cast<double>(s.in_channels);
  const int64_t tap = s.in_channels / s.groups + kChunk;
  const double positions = static_cast<double>(s.batch) * static_cast<double>(s.out_height()) * static_cast<double>(s.out_width());
  const double limit = static_cast<double>(kMax32 - 1024);
  require(positions < limit, "conv2d: batch ", s.batch, " of ", s.out_height(), " x ", s.out_width(), " outputs, CUDA kernels take fewer than 2^31 positions");
  require(padded < limit && s.in_height + s.padding_top + s.padding_bottom < kMax32 - 1024, "conv2d: input [", s.in_height, ", ", s.in_width, ", ",
          s.in_channels, "] (H, W, C): a padded row or column of more than 2^31 bytes");
  require(s.kernel_width == 1 || static_cast<double>(s.kernel_width * tap) * static_cast<double>(tap) < 4294967296.0, "conv2d: ", s.in_channels / s.groups,
          " inputs per group and ", s.kernel_width, " kernel columns, CUDA kernels take fewer than 2^32 columns times squared inputs");
  require(field < limit, "conv2d: a receptive field of kernel (", s.kernel_height, ", ", s.kernel_width, "), dilation (", s.dilation_height, ", ",
          s.dilation_width, ") over rows of ", s.in_width * s.in_channels, " bytes spans more than 2^31 bytes");
}

bool finds_range_first(Strategy s) { return s == Strategy::dynamic || s == Strategy::probe; }

bool samples_fields(const Conv2dShape& s, Strategy strategy, int64_t gamma) { return is_gaussian(strategy) && gamma > 0 && !is_one_field(s); }

bool sums_per_group(const Conv2dShape& s, Strategy strategy) { return strategy == Strategy::gaussian_channel && s.groups > 1; }

PredictProblem predict_problem(const Conv2dShape& s, const LayerArguments& a) {
  const auto sampled = [&](int64_t size) { return a.gamma > 0 ? (size + a.gamma - 1) / a.gamma : size; };
  PredictProblem p{};
  p.positions = s.in_height * s.in_width;
  p.in_channels = s.in_channels;
  p.count = p.positions * p.in_channels;
  p.out_channels = s.out_channels;
  p.out_count = s.out_height() * s.out_width() * s.out_channels;
  p.laws = surrogate_laws(s, a.strategy);
  p.groups = s.groups;
  p.group_channels = s.out_channels / s.groups;
  p.taps = s.kernel_height * s.kernel_width;
  p.field_weights = field_weights(s);
  p.fields = sampled(s.out_height()) * sampled(s.out_width());
  p.one_field = is_one_field(s);
  p.sums_per_group = sums_per_group(s, a.strategy);
  p.probes_whole = probes_whole(s.out_height() * s.out_width());
  if (a.packed_weight != nullptr)  // a law alone needs no weight
    p.profile = &reinterpret_cast<const PackedTrailer*>(a.packed_weight + PackedLayout(weight_shape(s)).trailer_offset())->profile;
  return p;
}

/// Whether the layer's own launch finds y's parameters: given ones, those of a range that a first launch has measured, and those of one law for
/// all outputs that asks for stats alone.
bool predicts_itself(const Conv2dShape& s, const LayerArguments& a) {
  return a.strategy == Strategy::fixed || finds_range_first(a.strategy) || (a.strategy == Strategy::gaussian && !samples_fields(s, a.strategy, a.gamma));
}

/// y's parameters, or laws where that is not null: one launch.
void predict(const char* op, const Conv2dShape& s, const LayerArguments& a, float* laws, void* stream) {
  const PredictProblem problem = predict_problem(s, a);
  if (!samples_fields(s, a.strategy, a.gamma)) return laws == nullptr ? launch_predict(problem, a, s.batch, stream) : launch_law(problem, a, s.batch, laws, stream);
  const int64_t bytes = patch_workspace_bytes(s, patch_grid(s, a.gamma, problem.sums_per_group), problem.sums_per_group);
  require(a.workspace != nullptr || bytes == 0, op, ": workspace is null, want conv2d_workspace_bytes bytes");
  launch_patch_sums(s, problem, a, laws, stream);
}

PartsLayout layer_parts(const Conv2dShape& s, bool depthwise, bool channel_stats) {
  if (!depthwise) return dense_parts(s, channel_stats);
  return parts_layout(depthwise_partition(s, s.out_height() * s.out_width(), channel_stats), s.out_channels, channel_stats);
}

/// Ranges per sample that a first launch measures, with any tile.
int64_t most_ranges(const Conv2dShape& s, const LayerArguments& a, bool depthwise, int64_t rows) {
  if (depthwise) return depthwise_partition(s, rows, false).blocks_per_sample();
  int64_t most = 0;
  for (const DenseTile tile : {DenseTile::large, DenseTile::medium, DenseTile::small}) most = std::max(most, dense_range_count(s, a, rows, tile));
  return most;
}

void check_packed(const LayerArguments& a) {
  require(aligned(a.packed_weight, kPackedAlignment), "conv2d: packed_weight must be aligned to ", kPackedAlignment, " bytes");
}

}  // namespace

int64_t packed_weight_bytes(const WeightShape& shape) {
  check_weight(shape);
  return PackedLayout(shape).bytes();
}

void pack_weight(const WeightShape& shape, const int8_t* weight, const float* weight_scale, const float* bias, const float* output_profile,
                 uint8_t* packed, void* stream) {
  check_weight(shape);
  require(aligned(packed, kPackedAlignment), "pack_weight: packed must be aligned to ", kPackedAlignment, " bytes");
  launch_pack(PackedLayout(shape), weight, weight_scale, bias, output_profile, packed, stream);
}

int64_t conv2d_workspace_bytes(const Conv2dShape& shape, Strategy strategy, int64_t gamma, bool channel_stats) {
  check_layer_shape(shape);
  const bool depthwise = is_depthwise(weight_shape(shape));
  int64_t first = 0;  // what one launch leaves for the next, or needs itself
  if (finds_range_first(strategy)) {
    first = shape.batch * most_ranges(shape, {}, depthwise, visited_rows(shape, strategy, LayerOutput::range)) * static_cast<int64_t>(sizeof(Range));
  } else if (samples_fields(shape, strategy, gamma)) {
    const bool per_group = sums_per_group(shape, strategy);
    first = patch_workspace_bytes(shape, patch_grid(shape, gamma, per_group), per_group);
  }
  return first + (strategy == Strategy::none ? 0 : layer_parts(shape, depthwise, channel_stats).bytes());
}

void conv2d(const Conv2dShape& shape, const LayerArguments& arguments, void* stream) {
  check_layer(shape, arguments);
  check_packed(arguments);
  const Conv2dShape s = normalized(shape);
  check_extents(s);
  if (shape.batch == 0) return;
  const PackedLayout layout(weight_shape(s));
  LayerArguments a = arguments;
  const auto tile = [&](int64_t rows) { return choose_dense_tile(s.batch * rows, layout.group_channels, layout.groups, layout.k_blocks); };
  const auto run = [&](const LayerPlan& plan) {
    if (layout.depthwise) launch_depthwise(s, a, plan, stream);
    else launch_dense(s, a, plan, tile(visited_rows(s, a.strategy, plan.output)), stream);
  };
  LayerPlan plan{};
  plan.output = LayerOutput::floats;
  if (a.strategy == Strategy::none) return run(plan);
  const PartsLayout parts = layer_parts(s, layout.depthwise, a.y.channel_stats);
  require(a.workspace != nullptr || conv2d_workspace_bytes(shape, a.strategy, a.gamma, a.y.channel_stats) == 0,
          "conv2d: workspace is null, want conv2d_workspace_bytes bytes");
  require(parts.count <= kMax32, "conv2d: ", parts.count, " parts of a sample, CUDA kernels take fewer than 2^31");
  plan.parts = parts.at(a.workspace);
  a.workspace = static_cast<uint8_t*>(a.workspace) + parts.bytes();
  if (finds_range_first(a.strategy)) {
    // Dynamic: twice through the layer, instead of once with its output in 32 bits to memory and back. 8 bytes per output at an
    // A100's 2 TB/s are the time of a K of about 1,200 at its 624 TOP/s; most layers are shorter.
    const int64_t rows = visited_rows(s, a.strategy, LayerOutput::range);
    plan.output = LayerOutput::range;
    plan.ranges = static_cast<Range*>(a.workspace);
    plan.range_count = static_cast<int32_t>(layout.depthwise ? depthwise_partition(s, rows, false).blocks_per_sample() : dense_range_count(s, a, rows, tile(rows)));
    run(plan);
  }
  plan.output = LayerOutput::codes;
  plan.predicts = predicts_itself(shape, a);
  if (plan.predicts) plan.problem = predict_problem(shape, a);
  else predict("conv2d", shape, a, nullptr, stream);
  run(plan);
}

void surrogate_law(const Conv2dShape& shape, const LayerArguments& a, float* law, void* stream) {
  require(has_law(a.strategy), "surrogate_law: strategy ", static_cast<int64_t>(a.strategy), " has no law, want gaussian, gaussian_channel or channel");
  check_layer(shape, a);
  if (shape.batch == 0) return;
  predict("surrogate_law", shape, a, law, stream);
}

}  // namespace probquant::cuda
