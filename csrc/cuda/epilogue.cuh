// From a layer's int32 accumulators to what it stores: the one rounding, residual, activation, moments and clip counts, or
// floats, or the range of the values. No accumulator leaves the multiprocessor.
//
// A lane owns `width` neighbouring channels and walks over rows (output positions) of one sample, whose sums stay in registers. Before
// the first of them a block needs the parameters of its samples' outputs (output_qparams). Integer sums and minima have no order. A lane's constants
// of its channels are read one by one, every 8th or 16th byte of a sector at a time: once per tile, the rest from L1.
#pragma once
#include "../core/probe.h"
#include "launch.h"
#include "parts.cuh"
#include "predict.cuh"

namespace probquant::cuda {

/// `width` neighbouring codes, accumulators and floats of one lane.
template <int width>
struct Vector;
template <>
struct Vector<2> {
  using Codes = uint16_t;
  using Ints = int2;
  using Floats = float2;
  static __device__ float2 floats(const float (&v)[2]) { return {v[0], v[1]}; }
};
template <>
struct Vector<4> {
  using Codes = uint32_t;
  using Ints = int4;
  using Floats = float4;
  static __device__ float4 floats(const float (&v)[4]) { return {v[0], v[1], v[2], v[3]}; }
};

/// The output position that comes i-th of those that a layer kernel visits: rows_per_sample of the sample's `rows` (visited_rows).
__device__ inline int32_t visited_position(int32_t i, int32_t rows_per_sample, int32_t rows) {
  if (rows_per_sample == rows) return i;
  return static_cast<int32_t>(probe_segment(rows, i / kProbeRows).begin) + i % kProbeRows;
}

/// Constants of a sample with these parameters of the output, whose floats and ranges are those of an output scale of 1.
__device__ inline SampleEpilogue sample_epilogue(const LayerArguments& a, LayerOutput output, SampleEpilogue inputs, QParams y) {
  if (output == LayerOutput::codes) set_output(inputs, y, a.activation_min, a.activation_max);
  if (output == LayerOutput::range) set_output(inputs, {1.0f, 0}, a.activation_min, a.activation_max);
  return inputs;
}

/// The parameters of a sample's output, by one thread: found here, from `measured` where that takes a range, and written by whom it behoves, or
/// those that a launch in front has written.
__device__ inline QParams output_qparams(const LayerArguments& a, const LayerPlan& plan, int64_t sample, const SampleEpilogue& inputs, Range measured, bool writes) {
  if (!plan.predicts) return {a.y.scale[sample], a.y.zero_point[sample]};
  QParams y = simple_qparams(plan.problem, a, sample, inputs, measured);
  y.zero_point = clamp_zero_point(y.zero_point);
  const bool valid = inputs.valid && valid_scale(y.scale);
  if (writes) a.y.scale[sample] = valid ? y.scale : kNan, a.y.zero_point[sample] = valid ? y.zero_point : 0;
  return y;
}

template <int width>
class WarpEpilogue {
 public:
  /// `weights`: header of the block of 64 channels that has the lane's, `in_block` the first of them there. `channel`: the same in
  /// the layer; `count` of the lane's channels exist. `vectors`: every row of y and of the residual is aligned to `width` values.
  __device__ WarpEpilogue(const LayerArguments& a, LayerOutput output, int32_t out_channels, const BlockHeader& weights, int32_t in_block,
                          int32_t channel, int32_t count, bool vectors)
      : a_(a), output_(output), out_channels_(out_channels), channel_(channel), count_(count), vectors_(vectors && count >= width) {
#pragma unroll
    for (int v = 0; v < width; ++v) {
      weight_sum_[v] = weights.weight_sum[in_block + v];
      channels_[v] = {weights.scale[in_block + v], weights.bias[in_block + v], weights.profile[in_block + v], weights.inverse_profile[in_block + v]};
    }
    reset();
  }

  /// Stores one row of the sample. Its codes, 0 for channels that do not exist.
  __device__ uint32_t store(int64_t row, const SampleEpilogue& e, const int32_t (&accumulators)[width]) {
    const int64_t at = row * out_channels_ + channel_;
    const bool has_residual = a_.residual.q != nullptr;
    uint8_t residual[width] = {}, codes[width] = {};
    float values[width] = {};
    if (has_residual) load(a_.residual.q + at, residual);
#pragma unroll
    for (int v = 0; v < width; ++v) {
      if (v >= count_) break;
      const int32_t accumulator = accumulators[v] - e.x_zero_point * weight_sum_[v];
      const int32_t shortcut = has_residual ? residual[v] - e.residual_zero_point : 0;
      if (output_ == LayerOutput::codes) {
        const Code code = requantize(accumulator, channels_[v], shortcut, e, a_.activation, has_residual);
        codes[v] = code.q;
        moments[v].add(code.q);
        moments[v].clipped += code.clipped;
      } else if (output_ == LayerOutput::floats) {
        const float value = layer_value(accumulator, channels_[v], shortcut, e, a_.activation, a_.activation_min, a_.activation_max, has_residual);
        values[v] = e.valid ? value : kNan;
      } else {
        const float value = output_value(accumulator, channels_[v], shortcut, e, a_.activation, has_residual);
        range.lo = min_f(value, range.lo);
        range.hi = max_f(value, range.hi);
      }
    }
    if (output_ == LayerOutput::codes) store_codes(a_.y.q + at, codes);
    if (output_ == LayerOutput::floats) store_floats(a_.y_float + at, values);
    return joined(codes);
  }

  /// What the rows stored since the last reset had.
  Moments moments[width];
  Range range;
  __device__ void reset() {
    for (Moments& m : moments) m = Moments{};
    range = {kInfinity, -kInfinity};
  }

 private:
  static __device__ uint32_t joined(const uint8_t (&codes)[width]) {
    uint32_t all = 0;
#pragma unroll
    for (int v = 0; v < width; ++v) all |= static_cast<uint32_t>(codes[v]) << 8 * v;
    return all;
  }

  __device__ void load(const uint8_t* from, uint8_t (&codes)[width]) const {
    if (vectors_) {
      const auto all = *reinterpret_cast<const typename Vector<width>::Codes*>(from);
#pragma unroll
      for (int v = 0; v < width; ++v) codes[v] = static_cast<uint8_t>(all >> 8 * v);
    } else {
#pragma unroll
      for (int v = 0; v < width; ++v)
        if (v < count_) codes[v] = from[v];
    }
  }

  __device__ void store_codes(uint8_t* to, const uint8_t (&codes)[width]) const {
    if (vectors_) {
      *reinterpret_cast<typename Vector<width>::Codes*>(to) = static_cast<typename Vector<width>::Codes>(joined(codes));
    } else {
#pragma unroll
      for (int v = 0; v < width; ++v)
        if (v < count_) to[v] = codes[v];
    }
  }

  __device__ void store_floats(float* to, const float (&values)[width]) const {
    if (vectors_) {
      *reinterpret_cast<typename Vector<width>::Floats*>(to) = Vector<width>::floats(values);
    } else {
#pragma unroll
      for (int v = 0; v < width; ++v)
        if (v < count_) to[v] = values[v];
    }
  }

  const LayerArguments& a_;
  const LayerOutput output_;
  const int32_t out_channels_, channel_, count_;
  const bool vectors_;
  int32_t weight_sum_[width];
  ChannelEpilogue channels_[width];
};

}  // namespace probquant::cuda
