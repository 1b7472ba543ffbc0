// quantize: every block finds its sample's parameters (from the partial ranges, which all blocks of the sample read, or
// from the given ones), writes its codes and leaves their moments for the last block to add up.
//
// Launch: Partition::blocks() blocks of up to 256 threads, at most 64 registers (4 blocks per multiprocessor), 2,308 bytes of static
// shared memory. A block reads its values and the sample's partials once and writes a byte per value; a sector per block for the last one to
// add up, with channel stats 8 bytes per channel of its tile in addition (parts.cuh).
// Bound by memory. Sectors are used fully where channels are dense (NHWC, rows) or there are fewer than 8 of them per
// pixel; NCHW with many channels reads a sector per value and leaves the rest to the L1 cache.
#include "parts.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

template <DType dtype>
__global__ void __launch_bounds__(kMaxThreads)
    quantize_kernel(const Partition p, const FloatSteps x, const Range* partials, const float* scale, const int32_t* zero_point,
                    const QuantizedOutput y, const Parts parts) {
  const Place place(p);
  QParams qparams;
  if (scale != nullptr) {
    qparams = {*scale, clamp_zero_point(*zero_point)};
  } else {
    const Range r = sample_range(p, place, partials);
    qparams = qparams_from_range(r.lo, r.hi);
  }
  const bool valid = valid_scale(qparams.scale);
  start_output(place, y, p.channels, valid, qparams.scale, qparams.zero_point);
  uint8_t* q = y.q + place.sample * p.positions * p.channels + place.channel;
  if (!valid) {
    for (int64_t position = place.position; position < place.end; position += p.position_lanes) q[position * p.channels] = 0;
    return;
  }
  const float inverse_scale = 1.0f / qparams.scale;
  Moments moments[1];
  for_each_value<dtype>(p, place, x, [&](int64_t position, float value) {
    const Code code = round_to_code(value * inverse_scale, qparams.zero_point);
    q[position * p.channels] = code.q;
    moments[0].add(code.q);
    moments[0].clipped += code.clipped;
  });
  write_stats(p, place, moments, y, p.channels, parts);
}

}  // namespace

void launch_quantize(const Partition& p, const FloatSource& x, const Range* partials, const float* scale, const int32_t* zero_point,
                     const QuantizedOutput& y, const Parts& parts, void* stream) {
  const auto kernel = x.dtype == DType::float16    ? quantize_kernel<DType::float16>
                      : x.dtype == DType::bfloat16 ? quantize_kernel<DType::bfloat16>
                                                   : quantize_kernel<DType::float32>;
  launch("quantize", kernel, {p.blocks(), p.threads}, stream, p, FloatSteps(p, x), partials, scale, zero_point, y, parts);
}

}  // namespace probquant::cuda
