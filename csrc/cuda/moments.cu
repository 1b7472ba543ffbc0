// moments: sums and sums of squares of codes, per sample and on request per channel.
//
// Launch: Partition::blocks() blocks of up to 256 threads, at most 64 registers (4 blocks per multiprocessor), 2,240 bytes of static
// shared memory. Reads every code once; 3 atomics per block, with channel stats 2 more per channel of its tile. Bound by memory.
#include "reduce.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

__global__ void __launch_bounds__(kMaxThreads)
    moments_kernel(const Partition p, const uint8_t* q, const bool channel_stats, int64_t* stats, const int64_t columns) {
  const Place place(p);
  q += place.sample * p.positions * p.channels + place.channel;
  Moments moments;
#pragma unroll 4
  for (int64_t position = place.position; position < place.end; position += p.position_lanes) moments.add(q[position * p.channels]);
  add_to_stats(p, place, moments, channel_stats, stats + place.sample * columns);
}

}  // namespace

void launch_moments(const Partition& p, const uint8_t* q, bool channel_stats, int64_t* stats, void* stream) {
  launch("moments", moments_kernel, {p.blocks(), p.threads}, stream, p, q, channel_stats, stats, stats_columns(p.channels, channel_stats));
}

}  // namespace probquant::cuda
