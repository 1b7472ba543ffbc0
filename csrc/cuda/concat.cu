// concat along the channels, one launch whatever the number of inputs: the partition is that of the output, a thread finds the input
// that its channel comes from, and requantizes that channel to the union of the inputs' code ranges.
//
// Launch: Partition::blocks() blocks of up to 256 threads, at most 64 registers (4 blocks per multiprocessor), 2,244 bytes of static
// shared memory. The lanes of a warp share out the inputs' parameters, of one sample: a sector each,
// once per block. Neighbouring threads read and write neighbouring channels: whole
// sectors but at the seams. No table: two multiplications and a rounding cost less than a look-up with bank conflicts.
#include "../core/elementwise.h"
#include "parts.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

/// Parameters of the sample's output, and whether all inputs are valid. All lanes of a warp call together.
__device__ QParams concat_qparams(const ConcatArguments& s, int64_t sample, const float* fixed, bool& valid) {
  const QParams first{s.inputs[0].scale[sample], s.inputs[0].zero_point[sample]};
  ConcatInputs all;
  for (auto i = static_cast<int32_t>(threadIdx.x % 32); i < s.count; i += 32) all.add(s.inputs[i].scale[sample], s.inputs[i].zero_point[sample], first);
  const uint32_t flags = warp_reduce((all.valid ? 1u : 0u) | (all.equal ? 2u : 0u), [](uint32_t a, uint32_t b) { return a & b; });
  all.valid = valid = (flags & 1u) != 0;
  all.equal = (flags & 2u) != 0;
  all.lo = warp_reduce(all.lo, [](float a, float b) { return min_f(a, b); });
  all.hi = warp_reduce(all.hi, [](float a, float b) { return max_f(a, b); });
  return all.qparams(first, fixed);
}

__global__ void __launch_bounds__(kMaxThreads) concat_kernel(const Partition p, const ConcatArguments s, const float* fixed, const QuantizedOutput y,
                                                             const Parts parts) {
  const Place place(p);
  bool valid;
  const QParams qparams = concat_qparams(s, place.sample, fixed, valid);
  int32_t input = 0;
  int64_t channel = place.channel;  // of the input
  while (input < s.count - 1 && channel >= s.channels[input]) channel -= s.channels[input++];
  const int64_t channels = s.channels[input];
  const SampleEpilogue e = concat_epilogue(s.inputs[input].scale[place.sample], s.inputs[input].zero_point[place.sample], valid, qparams);
  start_output(place, y, p.channels, e.valid, qparams.scale, e.y_zero_point);
  const uint8_t* x = s.inputs[input].q + place.sample * p.positions * channels + channel;
  uint8_t* out = y.q + place.sample * p.positions * p.channels + place.channel;
  Moments moments[1];
#pragma unroll 4
  for (int64_t position = place.position; position < place.end; position += p.position_lanes) {
    const Code code = value_to_code(code_value(x[position * channels], e), e);
    out[position * p.channels] = code.q;
    moments[0].add(code.q);
    moments[0].clipped += code.clipped;
  }
  if (e.valid) write_stats(p, place, moments, y, p.channels, parts);
}

}  // namespace

void launch_concat(const Partition& p, const ConcatArguments& s, const float* fixed, const QuantizedOutput& y, const Parts& parts, void* stream) {
  launch("concat", concat_kernel, {p.blocks(), p.threads}, stream, p, s, fixed, y, parts);
}

}  // namespace probquant::cuda
