// Nearest upsampling: a thread reads each of its codes once and writes the block of equal pixels that it becomes. The partition is that of
// the input, the moments are the input's, counted once per copy.
//
// Launch: Partition::blocks() blocks of up to 256 threads, at most 64 registers (4 blocks per multiprocessor), 2,244 bytes of static
// shared memory. Neighbouring threads write neighbouring channels: whole sectors. Bound by memory: one division per pixel, not per copy.
#include "parts.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

__global__ void __launch_bounds__(kMaxThreads) upsample_kernel(const Partition p, const Upsample s, const QuantizedInput x, const QuantizedOutput y,
                                                               const Parts parts) {
  const Place place(p);
  const float scale = x.scale[place.sample];
  const bool valid = valid_scale(scale);
  start_output(place, y, p.channels, valid, scale, clamp_zero_point(x.zero_point[place.sample]));
  const int64_t out_row = s.in_width * s.factor_width * p.channels, copies = s.factor_height * s.factor_width;
  const uint8_t* from = x.q + place.sample * p.positions * p.channels + place.channel;
  uint8_t* to = y.q + place.sample * p.positions * copies * p.channels + place.channel;
  Moments moments[1];
  for (int64_t position = place.position; position < place.end; position += p.position_lanes) {
    const int64_t row = position / s.in_width, column = position - row * s.in_width;
    const uint8_t code = valid ? from[position * p.channels] : 0;
    uint8_t* const block = to + row * s.factor_height * out_row + column * s.factor_width * p.channels;
    for (int64_t i = 0; i < s.factor_height; ++i)
      for (int64_t j = 0; j < s.factor_width; ++j) block[i * out_row + j * p.channels] = code;
    moments[0].add(code);
  }
  if (valid) write_stats(p, place, moments, y, p.channels, parts, copies);
}

}  // namespace

void launch_upsample(const Partition& p, const Upsample& s, const QuantizedInput& x, const QuantizedOutput& y, const Parts& parts, void* stream) {
  launch("upsample_nearest2d", upsample_kernel, {p.blocks(), p.threads}, stream, p, s, x, y, parts);
}

}  // namespace probquant::cuda
