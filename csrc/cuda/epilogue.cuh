// From a layer's int32 accumulators to what it stores: the one rounding, residual, activation, moments and clip counts, or
// floats, or the range of the values. No accumulator leaves the multiprocessor.
//
// A lane owns `width` neighbouring channels and walks over rows (output positions). The lanes of a warp are in the same sample
// at any time; its sums stay in registers until the sample changes: then one atomic per column and warp. Integer sums and
// minima have no order.
#pragma once
#include "../core/probe.h"
#include "launch.h"
#include "reduce.cuh"

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

/// Constants of a sample. Reads the output's scale and zero point where codes are wanted; a range is that of an output scale of 1.
__device__ inline SampleEpilogue sample_epilogue(const LayerArguments& a, LayerOutput output, int64_t sample) {
  const bool residual = a.residual.q != nullptr;
  SampleEpilogue e = sample_inputs(a.x.scale[sample], a.x.zero_point[sample], residual ? a.residual.scale[sample] : 1.0f,
                                   residual ? a.residual.zero_point[sample] : 0);
  if (output == LayerOutput::codes) set_output(e, {a.y.scale[sample], a.y.zero_point[sample]}, a.activation_min, a.activation_max);
  if (output == LayerOutput::range) set_output(e, {1.0f, 0}, a.activation_min, a.activation_max);
  return e;
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
  }

  /// The rows that follow belong to this sample. All lanes of the warp call together.
  __device__ void start_sample(int64_t sample) {
    if (sample == sample_) return;
    flush();
    sample_ = sample;
  }

  /// Stores one row of the sample.
  __device__ void store(int64_t row, const SampleEpilogue& e, const int32_t (&accumulators)[width]) {
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
        moments_[v].add(code.q);
        clipped_ += code.clipped;
      } else if (output_ == LayerOutput::floats) {
        const float value = layer_value(accumulator, channels_[v], shortcut, e, a_.activation, a_.activation_min, a_.activation_max, has_residual);
        values[v] = e.valid ? value : kNan;
      } else {
        const float value = output_value(accumulator, channels_[v], shortcut, e, a_.activation, has_residual);
        range_.lo = min_f(value, range_.lo);
        range_.hi = max_f(value, range_.hi);
      }
    }
    if (output_ == LayerOutput::codes) store_codes(a_.y.q + at, codes);
    if (output_ == LayerOutput::floats) store_floats(a_.y_float + at, values);
  }

  /// Adds what was seen since the sample began to the sample's row of stats, or to its range. All lanes of the warp call together,
  /// at the end.
  __device__ void flush() {
    if (sample_ >= 0 && output_ == LayerOutput::codes) add_moments();
    if (sample_ >= 0 && output_ == LayerOutput::range) widen_range();
    for (Moments& m : moments_) m = Moments{};
    clipped_ = 0;
    range_ = {kInfinity, -kInfinity};
  }

 private:
  using Sum = unsigned long long;

  __device__ void add_moments() {
    const auto add = [](Sum a, Sum b) { return a + b; };
    auto* row = reinterpret_cast<Sum*>(stats_row(a_.y, sample_, out_channels_));
    Sum sum = 0, squares = 0;
#pragma unroll
    for (int v = 0; v < width; ++v) {
      sum += moments_[v].sum;
      squares += moments_[v].squares;
      if (a_.y.channel_stats && v < count_) {
        atomicAdd(row + kStatsSample + channel_ + v, Sum{moments_[v].sum});
        atomicAdd(row + kStatsSample + out_channels_ + channel_ + v, Sum{moments_[v].squares});
      }
    }
    sum = warp_reduce(sum, add);
    squares = warp_reduce(squares, add);
    const Sum clipped = warp_reduce(Sum{clipped_}, add);
    if (threadIdx.x % 32 != 0) return;
    atomicAdd(row + kStatsSum, sum);
    atomicAdd(row + kStatsSquares, squares);
    if (clipped > 0) atomicAdd(row + kStatsClipped, clipped);
  }

  __device__ void widen_range() {
    const uint32_t lo = range_key(-warp_reduce(range_.lo, [](float a, float b) { return min_f(a, b); }));
    const uint32_t hi = range_key(warp_reduce(range_.hi, [](float a, float b) { return max_f(a, b); }));
    if (threadIdx.x % 32 != 0) return;
    auto* keys = static_cast<RangeKeys*>(a_.workspace) + sample_;
    atomicMax(&keys->minus_lo, lo);
    atomicMax(&keys->hi, hi);
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
      uint32_t all = 0;
#pragma unroll
      for (int v = 0; v < width; ++v) all |= static_cast<uint32_t>(codes[v]) << 8 * v;
      *reinterpret_cast<typename Vector<width>::Codes*>(to) = static_cast<typename Vector<width>::Codes>(all);
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
  int64_t sample_ = -1;
  Moments moments_[width];
  uint32_t clipped_ = 0;
  Range range_{kInfinity, -kInfinity};
};

}  // namespace probquant::cuda
