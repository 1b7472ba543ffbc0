// activation: a table of 256 entries per sample, which every block makes for itself, one entry per thread. Dynamic: a first pass
// finds the range of the codes that occur, 8 bytes per block; gaussian takes all codes, which the block just evaluated.
//
// Launch: Partition::blocks() blocks of up to 256 threads, at most 64 registers (4 blocks per multiprocessor), 2,820 bytes of static
// shared memory. Neighbouring threads read and write neighbouring channels: whole sectors. The table's 128 (codes) or 256 words (values)
// share the 32 banks, and codes pick them at random: a look-up takes 3 to 4 turns, still a fraction of the 40 instructions of a GELU.
#include "../core/elementwise.h"
#include "parts.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

constexpr int32_t kCodes = 256;

/// Calls visit(code) for this thread's share of all codes.
template <class Visit>
__device__ void for_each_code(Visit visit) {
  for (auto q = static_cast<int32_t>(threadIdx.x); q < kCodes; q += static_cast<int32_t>(blockDim.x)) visit(q);
}

__device__ SampleEpilogue inputs_of(const ActivationArguments& s, int64_t sample) { return sample_inputs(s.x.scale[sample], s.x.zero_point[sample], 1.0f, 0); }

__global__ void __launch_bounds__(kMaxThreads) activation_range_kernel(const Partition p, const ActivationArguments s, Range* partials) {
  __shared__ float values[kCodes];
  const Place place(p);
  const SampleEpilogue e = inputs_of(s, place.sample);
  for_each_code([&](int32_t q) { values[q] = activation_value(q, e, s.kind, s.activation_min, s.activation_max); });
  __syncthreads();
  Range r{kInfinity, -kInfinity};
  const uint8_t* x = s.x.q + place.sample * p.positions * p.channels + place.channel;
#pragma unroll 4
  for (int64_t position = place.position; position < place.end; position += p.position_lanes) {
    const float value = values[x[position * p.channels]];
    r = join({value, value}, r);
  }
  r = block_range(r);
  if (threadIdx.x == 0) partials[blockIdx.x] = r;
}

__global__ void __launch_bounds__(kMaxThreads, 4) activation_kernel(const Partition p, const ActivationArguments s, const float* fixed, const Range* partials,
                                                                 const QuantizedOutput y, const Parts parts) {
  __shared__ uint16_t codes[kCodes];  // the code, and above it whether it is clipped
  const Place place(p);
  SampleEpilogue e = inputs_of(s, place.sample);
  QParams qparams;
  if (fixed != nullptr) {
    qparams = fixed_qparams(fixed);
  } else {
    Range r{kInfinity, -kInfinity};
    if (partials == nullptr) {
      for_each_code([&](int32_t q) {
        const float value = activation_value(q, e, s.kind, s.activation_min, s.activation_max);
        r = join({value, value}, r);
      });
      r = block_range(r);
    } else {
      r = sample_range(p, place, partials);
    }
    qparams = qparams_from_range(r.lo, r.hi);
  }
  set_output(e, qparams, s.activation_min, s.activation_max);
  start_output(place, y, p.channels, e.valid, qparams.scale, e.y_zero_point);
  for_each_code([&](int32_t q) {
    const Code code = value_to_code(activation_value(q, e, s.kind, s.activation_min, s.activation_max), e);
    codes[q] = static_cast<uint16_t>(code.q | code.clipped << 8);
  });
  __syncthreads();
  const int64_t at = place.sample * p.positions * p.channels + place.channel;
  const uint8_t* x = s.x.q + at;
  uint8_t* out = y.q + at;
  Moments moments[1];
#pragma unroll 4
  for (int64_t position = place.position; position < place.end; position += p.position_lanes) {
    const uint32_t entry = codes[x[position * p.channels]], q = entry & 0xffu;
    out[position * p.channels] = static_cast<uint8_t>(q);
    moments[0].add(q);
    moments[0].clipped += entry >> 8;
  }
  if (e.valid) write_stats(p, place, moments, y, p.channels, parts);
}

}  // namespace

void launch_activation(const Partition& p, const ActivationArguments& s, const float* fixed, Range* partials, const QuantizedOutput& y,
                       const Parts& parts, void* stream) {
  const LaunchSize size{p.blocks(), p.threads};
  if (fixed == nullptr && partials != nullptr) launch("activation", activation_range_kernel, size, stream, p, s, partials);
  launch("activation", activation_kernel, size, stream, p, s, fixed, partials, y, parts);
}

}  // namespace probquant::cuda
