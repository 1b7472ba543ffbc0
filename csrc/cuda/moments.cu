// moments: sums and sums of squares of codes, per sample and on request per channel.
//
// Launch: Partition::blocks() blocks of up to 256 threads, at most 64 registers (4 blocks per multiprocessor), 2,244 bytes of static
// shared memory. Reads every code once; a sector per block for the last one to add up, with channel stats 8 bytes per channel of its tile in
// addition (parts.cuh). Bound by memory.
#include "parts.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

__global__ void __launch_bounds__(kMaxThreads) moments_kernel(const Partition p, const uint8_t* q, const QuantizedOutput y, const Parts parts) {
  const Place place(p);
  q += place.sample * p.positions * p.channels + place.channel;
  Moments moments[1];
#pragma unroll 4
  for (int64_t position = place.position; position < place.end; position += p.position_lanes) moments[0].add(q[position * p.channels]);
  write_stats(p, place, moments, y, p.channels, parts);
}

}  // namespace

void launch_moments(const Partition& p, const uint8_t* q, const QuantizedOutput& y, const Parts& parts, void* stream) {
  launch("moments", moments_kernel, {p.blocks(), p.threads}, stream, p, q, y, parts);
}

}  // namespace probquant::cuda
