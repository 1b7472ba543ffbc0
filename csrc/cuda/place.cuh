// Where a thread stands in a Partition, and how it walks over its values of a strided float tensor.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch.h"

namespace probquant::cuda {

/// The thread's sample, its positions [position, end) in steps of the partition's position_lanes, and its channel.
struct Place {
  int64_t sample, position, end;
  int64_t channel;
  int32_t channel_lane, position_lane;
  int32_t block, part;  ///< of the sample; of its positions
  bool first_block;     ///< of the sample

  __device__ explicit Place(const Partition& p) {
    const auto per_sample = static_cast<uint32_t>(p.blocks_per_sample()), tiles = static_cast<uint32_t>(p.channel_tiles);
    const uint32_t of_sample = blockIdx.x % per_sample, thread = threadIdx.x, lanes = static_cast<uint32_t>(p.channel_lanes);
    sample = blockIdx.x / per_sample;
    block = static_cast<int32_t>(of_sample);
    part = static_cast<int32_t>(of_sample / tiles);
    first_block = block == 0;
    channel_lane = static_cast<int32_t>(thread % lanes);
    position_lane = static_cast<int32_t>(thread / lanes);
    channel = static_cast<int64_t>(of_sample % tiles) * p.channel_lanes + channel_lane;
    const int64_t begin = static_cast<int64_t>(of_sample / tiles) * p.part_positions;
    position = begin + position_lane;
    end = begin + p.part_positions < p.positions ? begin + p.part_positions : p.positions;
    if (position_lane >= p.position_lanes || channel >= p.channels) end = position;  // idle, but there for the barriers
  }
};

/// Float elements in memory. Conversions are exact or round half to even, as in core/float_formats.h; not_a_number has
/// the bits that the CPU writes.
template <DType dtype>
struct Element;

template <>
struct Element<DType::float32> {
  using Storage = float;
  static __device__ float widen(float v) { return v; }
  static __device__ float narrow(float v) { return v; }
  static __device__ float not_a_number() { return __uint_as_float(0x7fc00000u); }
};

template <>
struct Element<DType::float16> {
  using Storage = __half;
  static __device__ float widen(__half v) { return __half2float(v); }
  static __device__ __half narrow(float v) { return __float2half_rn(v); }
  static __device__ __half not_a_number() { return __ushort_as_half(0x7e00); }
};

template <>
struct Element<DType::bfloat16> {
  using Storage = __nv_bfloat16;
  static __device__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
  static __device__ __nv_bfloat16 narrow(float v) { return __float2bfloat16_rn(v); }
  static __device__ __nv_bfloat16 not_a_number() { return __ushort_as_bfloat16(0x7fc0); }
};

/// A FloatSource with the steps of a walk over it, made on the host: no kernel divides per value.
struct FloatSteps {
  FloatSource x;
  int64_t step;          ///< offset of position_lanes positions ahead, when that stays in the row it leads to
  int64_t wrap;          ///< to be added when the column runs over the end of a row
  int64_t column_step;   ///< position_lanes % columns

  FloatSteps(const Partition& p, const FloatSource& source) : x(source), step(0), wrap(0), column_step(0) {
    if (x.columns == 0) return;
    column_step = p.position_lanes % x.columns;
    step = p.position_lanes / x.columns * x.stride[1] + column_step * x.stride[2];
    wrap = x.stride[1] - x.columns * x.stride[2];
  }
};

/// Calls visit(position, value) for every value of the thread.
template <DType dtype, class Visit>
__device__ void for_each_value(const Partition& p, const Place& place, const FloatSteps& steps, Visit visit) {
  using Type = Element<dtype>;
  if (place.position >= place.end) return;
  const FloatSource& x = steps.x;
  const int64_t row = place.position / x.columns;
  int64_t column = place.position - row * x.columns;
  const auto* at = static_cast<const typename Type::Storage*>(x.data) + place.sample * x.stride[0] + row * x.stride[1] + column * x.stride[2] +
                   place.channel * x.stride[3];
#pragma unroll 4
  for (int64_t position = place.position; position < place.end; position += p.position_lanes) {
    visit(position, Type::widen(*at));
    at += steps.step;
    column += steps.column_step;
    if (column >= x.columns) {
      at += steps.wrap;
      column -= x.columns;
    }
  }
}

}  // namespace probquant::cuda
