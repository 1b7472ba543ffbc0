// add and mul: y = clamp(a + b), y = a * b; the second factor may be one value per channel. Dynamic: a first pass finds the range of the
// result and stores 8 bytes per block; fixed and gaussian know it before, the latter from both inputs' stats in a few flops that every
// block repeats, in one thread.
//
// Launch: Partition::blocks() blocks of up to 256 threads, at most 64 registers (4 blocks per multiprocessor), 2,316 bytes of static
// shared memory. Neighbouring threads read and write neighbouring channels: whole sectors. About 50 instructions per value for 3 bytes of
// traffic, most of them the exact rounding, clamps and the clip count: bound by issuing them, at 60 % of what an A100's memory could bring.
#include "../core/elementwise.h"
#include "parts.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

struct Add {
  __device__ static SampleEpilogue inputs(const PairArguments& s, int64_t n) {
    return sample_inputs(s.a.scale[n], s.a.zero_point[n], s.b.scale[n], s.b.zero_point[n]);
  }
  __device__ static float value(uint8_t a, uint8_t b, const SampleEpilogue& e, const PairArguments& s) {
    return add_value(a, b, e, s.activation_min, s.activation_max);
  }
  __device__ static Code code(uint8_t a, uint8_t b, const SampleEpilogue& e) { return add_code(a, b, e); }
  __device__ static QParams exact(Range r, const SampleEpilogue&) { return qparams_from_range(r.lo, r.hi); }
  __device__ static QParams predicted(const PairArguments& s, int64_t n, int64_t count, int64_t, const SampleEpilogue& e, const float* predictor) {
    return add_law_qparams(s.a.stats + n * s.a.stats_stride, s.b.stats + n * s.b.stats_stride, count, e, predictor, s.activation_min, s.activation_max);
  }
};

struct Mul {
  __device__ static SampleEpilogue inputs(const PairArguments& s, int64_t n) {
    return mul_inputs(s.a.scale[n], s.a.zero_point[n], s.b.scale[n], s.b.zero_point[n]);
  }
  __device__ static float value(uint8_t a, uint8_t b, const SampleEpilogue& e, const PairArguments&) { return mul_value(a, b, e); }
  __device__ static Code code(uint8_t a, uint8_t b, const SampleEpilogue& e) { return mul_code(a, b, e); }
  __device__ static QParams exact(Range r, const SampleEpilogue& e) { return qparams_from_range(r.lo * e.x_scale, r.hi * e.x_scale); }
  __device__ static QParams predicted(const PairArguments& s, int64_t n, int64_t count, int64_t b_count, const SampleEpilogue& e, const float* predictor) {
    return mul_law_qparams(s.a.stats + n * s.a.stats_stride, count, s.a.scale[n], s.b.stats + n * s.b.stats_stride, b_count, s.b.scale[n], e, predictor);
  }
};

/// Calls visit(position, code of a, code of b) for the thread's values.
template <class Visit>
__device__ void for_each_pair(const Partition& p, const Place& place, const PairArguments& s, Visit visit) {
  const int64_t b_step = s.per_channel ? 0 : p.channels;
  const uint8_t* a = s.a.q + place.sample * p.positions * p.channels + place.channel;
  const uint8_t* b = s.b.q + place.sample * (s.per_channel ? 1 : p.positions) * p.channels + place.channel;
#pragma unroll 4
  for (int64_t position = place.position; position < place.end; position += p.position_lanes)
    visit(position, a[position * p.channels], b[position * b_step]);
}

template <class Function>
__global__ void __launch_bounds__(kMaxThreads) pair_range_kernel(const Partition p, const PairArguments s, Range* partials) {
  const Place place(p);
  const SampleEpilogue e = Function::inputs(s, place.sample);
  Range r{kInfinity, -kInfinity};
  for_each_pair(p, place, s, [&](int64_t, uint8_t a, uint8_t b) {
    const float value = Function::value(a, b, e, s);
    r = join({value, value}, r);
  });
  r = block_range(r);
  if (threadIdx.x == 0) partials[blockIdx.x] = r;
}

template <class Function>
__global__ void __launch_bounds__(kMaxThreads, 4)
    pair_kernel(const Partition p, const PairArguments s, const Strategy strategy, const float* predictor, const Range* partials, const QuantizedOutput y,
                const Parts parts) {
  __shared__ QParams predicted;  // by one thread: a law is in double, which many GPUs have a 64th of float32's units for
  const int64_t sample = blockIdx.x / static_cast<uint32_t>(p.blocks_per_sample());
  SampleEpilogue e = Function::inputs(s, sample);
  if (strategy == Strategy::gaussian && p.positions > 0) {
    if (threadIdx.x == 0 && e.valid)
      predicted = Function::predicted(s, sample, p.positions * p.channels, s.per_channel ? p.channels : p.positions * p.channels, e, predictor);
    __syncthreads();
  }
  const Place place(p);
  QParams qparams{kNan, 0};
  if (strategy == Strategy::fixed) {
    qparams = fixed_qparams(predictor);
  } else if (p.positions == 0) {
    qparams = qparams_from_range(0.0f, 0.0f);
  } else if (strategy == Strategy::dynamic) {
    qparams = Function::exact(sample_range(p, place, partials), e);
  } else if (e.valid) {
    qparams = predicted;
  }
  set_output(e, qparams, s.activation_min, s.activation_max);
  start_output(place, y, p.channels, e.valid, qparams.scale, e.y_zero_point);
  uint8_t* q = y.q + place.sample * p.positions * p.channels + place.channel;
  Moments moments[1];
  for_each_pair(p, place, s, [&](int64_t position, uint8_t a, uint8_t b) {
    const Code code = Function::code(a, b, e);
    q[position * p.channels] = code.q;
    moments[0].add(code.q);
    moments[0].clipped += code.clipped;
  });
  if (e.valid) write_stats(p, place, moments, y, p.channels, parts);
}

template <class Function>
void launch_pairs(const char* op, const Partition& p, const PairArguments& s, Strategy strategy, const float* predictor, Range* partials,
                  const QuantizedOutput& y, const Parts& parts, void* stream) {
  const LaunchSize size{p.blocks(), p.threads};
  if (strategy == Strategy::dynamic && p.positions > 0) launch(op, pair_range_kernel<Function>, size, stream, p, s, partials);
  launch(op, pair_kernel<Function>, size, stream, p, s, strategy, predictor, partials, y, parts);
}

}  // namespace

void launch_add(const Partition& p, const PairArguments& s, Strategy strategy, const float* predictor, Range* partials, const QuantizedOutput& y,
                const Parts& parts, void* stream) {
  launch_pairs<Add>("add", p, s, strategy, predictor, partials, y, parts, stream);
}

void launch_mul(const Partition& p, const PairArguments& s, Strategy strategy, const float* predictor, Range* partials, const QuantizedOutput& y,
                const Parts& parts, void* stream) {
  launch_pairs<Mul>("mul", p, s, strategy, predictor, partials, y, parts, stream);
}

}  // namespace probquant::cuda
