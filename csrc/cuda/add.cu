// add: y = clamp(a + b). Dynamic: a first pass finds the range of the sum and stores 8 bytes per block; fixed and gaussian know it
// before, the latter from both inputs' stats in a few flops that every block repeats.
//
// Launch: Partition::blocks() blocks of up to 256 threads, at most 64 registers (4 blocks per multiprocessor), 2,304 bytes of static
// shared memory. Neighbouring threads read and write neighbouring channels: whole sectors. About 25 instructions per value for 3 bytes of
// traffic: an A100 issues them as fast as its memory brings the bytes.
#include "../core/elementwise.h"
#include "reduce.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

/// Calls visit(position, code of a, code of b) for the thread's values.
template <class Visit>
__device__ void for_each_pair(const Partition& p, const Place& place, const AddArguments& s, Visit visit) {
  const int64_t at = place.sample * p.positions * p.channels + place.channel;
  const uint8_t *a = s.a.q + at, *b = s.b.q + at;
#pragma unroll 4
  for (int64_t position = place.position; position < place.end; position += p.position_lanes)
    visit(position, a[position * p.channels], b[position * p.channels]);
}

__device__ SampleEpilogue inputs_of(const AddArguments& s, int64_t sample) {
  return sample_inputs(s.a.scale[sample], s.a.zero_point[sample], s.b.scale[sample], s.b.zero_point[sample]);
}

__global__ void __launch_bounds__(kMaxThreads) add_range_kernel(const Partition p, const AddArguments s, Range* partials) {
  const Place place(p);
  const SampleEpilogue e = inputs_of(s, place.sample);
  Range r{kInfinity, -kInfinity};
  for_each_pair(p, place, s, [&](int64_t, uint8_t a, uint8_t b) {
    const float value = add_value(a, b, e, s.activation_min, s.activation_max);
    r = join({value, value}, r);
  });
  r = block_range(r);
  if (threadIdx.x == 0) partials[blockIdx.x] = r;
}

__global__ void __launch_bounds__(kMaxThreads)
    add_kernel(const Partition p, const AddArguments s, const Strategy strategy, const float* predictor, const Range* partials, const QuantizedOutput y) {
  const Place place(p);
  SampleEpilogue e = inputs_of(s, place.sample);
  QParams qparams{kNan, 0};
  if (strategy == Strategy::fixed) {
    qparams = fixed_qparams(predictor);
  } else if (p.positions == 0) {
    qparams = qparams_from_range(0.0f, 0.0f);
  } else if (strategy == Strategy::dynamic) {
    const Range r = sample_range(p, place, partials);
    qparams = qparams_from_range(r.lo, r.hi);
  } else if (e.valid) {
    qparams = add_law_qparams(s.a.stats + place.sample * s.a.stats_stride, s.b.stats + place.sample * s.b.stats_stride, p.positions * p.channels, e, predictor,
                              s.activation_min, s.activation_max);
  }
  set_output(e, qparams, s.activation_min, s.activation_max);
  start_output(p, place, y, e.valid, qparams.scale, e.y_zero_point);
  uint8_t* q = y.q + place.sample * p.positions * p.channels + place.channel;
  Moments moments;
  for_each_pair(p, place, s, [&](int64_t position, uint8_t a, uint8_t b) {
    const Code code = add_code(a, b, e);
    q[position * p.channels] = code.q;
    moments.add(code.q);
    moments.clipped += code.clipped;
  });
  if (e.valid) add_to_stats(p, place, moments, y.channel_stats, stats_row(y, place.sample, p.channels));
}

}  // namespace

void launch_add(const Partition& p, const AddArguments& s, Strategy strategy, const float* predictor, Range* partials, const QuantizedOutput& y, void* stream) {
  const LaunchSize size{p.blocks(), p.threads};
  if (strategy == Strategy::dynamic && p.positions > 0) launch("add", add_range_kernel, size, stream, p, s, partials);
  launch("add", add_kernel, size, stream, p, s, strategy, predictor, partials, y);
}

}  // namespace probquant::cuda
