// Reductions over a warp and over a block. A block has whole warps, at most kMaxThreads threads, and all of them call.
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

/// Join of what all blocks of the block's sample found, in every thread. Once per kernel.
__device__ inline Range sample_range(const Partition& p, const Place& place, const Range* partials) {
  const Range* of_sample = partials + place.sample * p.blocks_per_sample();
  Range r{kInfinity, -kInfinity};
  for (int64_t i = threadIdx.x; i < p.blocks_per_sample(); i += blockDim.x) r = join(r, of_sample[i]);
  return block_range(r);
}

/// Whether this block is the last one of `count` that come here; in every thread, and once per kernel. What the others' atomics have added up
/// before is there then, for volatile reads. `arrived` starts at 0.
__device__ inline bool last_block(unsigned long long* arrived, int64_t count) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1ull) == static_cast<unsigned long long>(count - 1);
    __threadfence();
  }
  __syncthreads();
  return last;
}

/// A sample's row of stats: as stats_columns of types.h, which is host code.
__device__ inline int64_t* stats_row(const QuantizedOutput& y, int64_t sample, int64_t channels) {
  return y.stats + sample * (kStatsSample + (y.channel_stats ? 2 * channels : 0));
}

/// The sample's first block writes its parameters and marks an invalid sample, to whose stats no block may add.
__device__ inline void start_output(const Partition& p, const Place& place, const QuantizedOutput& y, bool valid, float scale, int32_t zero_point) {
  if (!place.first_block || threadIdx.x != 0) return;
  y.scale[place.sample] = valid ? scale : kNan;
  y.zero_point[place.sample] = valid ? zero_point : 0;
  if (!valid) stats_row(y, place.sample, p.channels)[kStatsClipped] = -1;
}

/// Moments of the codes one thread has seen, all of one channel, at most kMaxPerThread of them.
struct Moments {
  uint32_t sum = 0, squares = 0, clipped = 0;

  __device__ void add(uint32_t q) { sum += q, squares += q * q; }
};

/// Adds the block's moments to its sample's row of stats: one atomic per column and block. Integer sums do not depend on
/// the order. Each value counts `times` times. Once per kernel: it ends without a barrier.
__device__ inline void add_to_stats(const Partition& p, const Place& place, const Moments& moments, bool channel_stats, int64_t* stats_row,
                                    int64_t times = 1) {
  using Sum = unsigned long long;
  __shared__ Sum of_warp[kStatsSample][kMaxWarps];
  __shared__ uint32_t of_thread[2][kMaxThreads];  // by [position_lane][channel_lane]
  const auto add = [](Sum a, Sum b) { return a + b; };
  const Sum totals[kStatsSample] = {warp_reduce(Sum{moments.sum}, add), warp_reduce(Sum{moments.squares}, add),
                                    warp_reduce(Sum{moments.clipped}, add)};
  if (threadIdx.x % 32 == 0)
    for (int column = 0; column < kStatsSample; ++column) of_warp[column][threadIdx.x / 32] = totals[column];
  if (channel_stats) {
    of_thread[0][threadIdx.x] = moments.sum;
    of_thread[1][threadIdx.x] = moments.squares;
  }
  __syncthreads();
  auto* columns = reinterpret_cast<Sum*>(stats_row);
  if (threadIdx.x < kStatsSample) {
    Sum total = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += of_warp[threadIdx.x][warp];
    atomicAdd(columns + threadIdx.x, total * static_cast<Sum>(times));
  }
  if (channel_stats && place.position_lane == 0 && place.channel < p.channels) {
    Sum sum = 0, squares = 0;
    for (int lane = 0; lane < p.position_lanes; ++lane) {
      sum += of_thread[0][lane * p.channel_lanes + place.channel_lane];
      squares += of_thread[1][lane * p.channel_lanes + place.channel_lane];
    }
    atomicAdd(columns + kStatsSample + place.channel, sum * static_cast<Sum>(times));
    atomicAdd(columns + kStatsSample + p.channels + place.channel, squares * static_cast<Sum>(times));
  }
}

}  // namespace probquant::cuda
