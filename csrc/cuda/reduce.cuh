// Reductions over a warp and over a block. A block has whole warps, at most kMaxThreads threads, and all of them call. What a launch before has
// left of a sample's ranges is read once per block, 8 bytes a lane, by as many lanes as there are: seldom whole sectors.
#pragma once
#include "place.cuh"

namespace probquant::cuda {

inline constexpr int kMaxWarps = kMaxThreads / 32;

/// combine(...) of the warp's values, in every lane.
template <class T, class Combine>
__device__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

__device__ inline Range join(Range a, Range b) { return {min_f(a.lo, b.lo), max_f(a.hi, b.hi)}; }

/// Range of the block's values, in every thread. Once per kernel: it ends without a barrier.
__device__ inline Range block_range(Range r) {
  __shared__ Range of_warp[kMaxWarps];
  r.lo = warp_reduce(r.lo, [](float a, float b) { return min_f(a, b); });
  r.hi = warp_reduce(r.hi, [](float a, float b) { return max_f(a, b); });
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = r;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) r = join(r, of_warp[warp]);
  return r;
}

/// Of a float that is not NaN, and back. Key 0 gives a NaN.
__device__ inline uint32_t range_key(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ inline float key_value(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

/// Join of what `count` blocks of a launch before this one found, in every thread. Once per kernel.
__device__ inline Range sample_range(const Range* of_sample, int64_t count) {
  Range r{kInfinity, -kInfinity};
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) r = join(r, of_sample[i]);
  return block_range(r);
}
__device__ inline Range sample_range(const Partition& p, const Place& place, const Range* partials) {
  return sample_range(partials + place.sample * p.blocks_per_sample(), p.blocks_per_sample());
}

/// Moments of the codes one thread has seen, all of one channel, at most kMaxPerThread of them.
struct Moments {
  uint32_t sum = 0, squares = 0, clipped = 0;

  __device__ void add(uint32_t q) { sum += q, squares += q * q; }
};

/// A sample's row of stats: as stats_columns of types.h, which is host code.
__device__ inline int64_t* stats_row(const QuantizedOutput& y, int64_t sample, int64_t channels) {
  return y.stats + sample * (kStatsSample + (y.channel_stats ? 2 * channels : 0));
}

}  // namespace probquant::cuda
