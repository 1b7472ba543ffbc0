// Max and average pools: a thread takes one channel and walks over output positions. An average is an exact integer sum and rounds
// once; its range is found by a first pass that computes the same sums and stores 8 bytes per block.
//
// Launch: Partition::blocks() blocks of up to 256 threads, at most 64 registers (4 blocks per multiprocessor), 2,308 bytes of static
// shared memory. Neighbouring threads read neighbouring channels; windows that overlap come from the L1 cache. Bound by memory.
#include "../core/windows.h"
#include "parts.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

__global__ void __launch_bounds__(kMaxThreads) max_pool_kernel(const Partition p, const MaxPool s, const QuantizedInput x, const QuantizedOutput y,
                                                               const Parts parts) {
  const Place place(p);
  const float scale = x.scale[place.sample];
  const bool valid = valid_scale(scale);
  start_output(place, y, p.channels, valid, scale, clamp_zero_point(x.zero_point[place.sample]));
  const int64_t row = s.in_width * p.channels;
  const uint8_t* image = x.q + place.sample * s.in_height * row + place.channel;
  uint8_t* q = y.q + place.sample * p.positions * p.channels + place.channel;
  Moments moments[1];
  for (int64_t position = place.position; position < place.end; position += p.position_lanes) {
    const MaxTaps v(position / s.out_width, s.stride_height, s.padding_top, s.dilation_height, s.kernel_height, s.in_height);
    const MaxTaps h(position % s.out_width, s.stride_width, s.padding_left, s.dilation_width, s.kernel_width, s.in_width);
    uint8_t largest = 0;
    if (valid) {
      for (int64_t i = 0; i < v.count; ++i)
#pragma unroll 1
        for (int64_t j = 0; j < h.count; ++j) {
          const uint8_t code = image[(v.first + i * s.dilation_height) * row + (h.first + j * s.dilation_width) * p.channels];
          largest = code > largest ? code : largest;
        }
    }
    q[position * p.channels] = largest;
    moments[0].add(largest);
  }
  if (valid) write_stats(p, place, moments, y, p.channels, parts);
}

/// Calls visit(position, accumulator, share) for the thread's averages: share * accumulator in codes, the zero point taken off.
template <class Visit>
__device__ void for_each_average(const Partition& p, const Place& place, const AverageWindows& windows, const uint8_t* x, int32_t zero_point, Visit visit) {
  const int64_t row = windows.in_width * p.channels;
  const uint8_t* image = x + place.sample * windows.in_height * row + place.channel;
  for (int64_t position = place.position; position < place.end; position += p.position_lanes) {
    const Window w = windows.at(position / windows.out_width, position % windows.out_width);
    int32_t sum = 0;
    for (int64_t i = w.y_begin; i < w.y_end; ++i)
#pragma unroll 2
      for (int64_t j = w.x_begin; j < w.x_end; ++j) sum += image[i * row + j * p.channels];
    const auto pixels = static_cast<int32_t>((w.y_end - w.y_begin) * (w.x_end - w.x_begin));
    visit(position, sum - pixels * zero_point, 1.0f / static_cast<float>(w.divisor));
  }
}

__global__ void __launch_bounds__(kMaxThreads)
    average_range_kernel(const Partition p, const AverageWindows windows, const QuantizedInput x, Range* partials) {
  const Place place(p);
  const SampleEpilogue e = sample_inputs(x.scale[place.sample], x.zero_point[place.sample], 1.0f, 0);
  Range r{kInfinity, -kInfinity};
  for_each_average(p, place, windows, x.q, e.x_zero_point, [&](int64_t, int32_t accumulator, float share) {
    const float value = layer_value(accumulator, {share, 0.0f}, 0, e, Activation::clamp, -kInfinity, kInfinity, false);
    r = join({value, value}, r);
  });
  r = block_range(r);
  if (threadIdx.x == 0) partials[blockIdx.x] = r;
}

__global__ void __launch_bounds__(kMaxThreads) average_kernel(const Partition p, const AverageWindows windows, const QuantizedInput x, const Range* partials,
                                                              const float* predictor, const QuantizedOutput y, const Parts parts) {
  const Place place(p);
  SampleEpilogue e = sample_inputs(x.scale[place.sample], x.zero_point[place.sample], 1.0f, 0);
  QParams qparams;
  if (predictor != nullptr) {
    qparams = fixed_qparams(predictor);
  } else {
    const Range r = sample_range(p, place, partials);
    qparams = qparams_from_range(r.lo, r.hi);
  }
  set_output(e, qparams, -kInfinity, kInfinity);
  start_output(place, y, p.channels, e.valid, qparams.scale, e.y_zero_point);
  uint8_t* q = y.q + place.sample * p.positions * p.channels + place.channel;
  Moments moments[1];
  for_each_average(p, place, windows, x.q, e.x_zero_point, [&](int64_t position, int32_t accumulator, float share) {
    const Code code = requantize(accumulator, {share, 0.0f}, 0, e, Activation::clamp, false);
    q[position * p.channels] = code.q;
    moments[0].add(code.q);
    moments[0].clipped += code.clipped;
  });
  if (e.valid) write_stats(p, place, moments, y, p.channels, parts);
}

}  // namespace

void launch_max_pool(const Partition& p, const MaxPool& s, const QuantizedInput& x, const QuantizedOutput& y, const Parts& parts, void* stream) {
  launch("pool2d", max_pool_kernel, {p.blocks(), p.threads}, stream, p, s, x, y, parts);
}

void launch_average_pool(const Partition& p, const AverageWindows& windows, const QuantizedInput& x, const float* predictor, Range* partials,
                         const QuantizedOutput& y, const Parts& parts, void* stream) {
  if (predictor == nullptr) launch("average pool", average_range_kernel, {p.blocks(), p.threads}, stream, p, windows, x, partials);
  launch("average pool", average_kernel, {p.blocks(), p.threads}, stream, p, windows, x, partials, predictor, y, parts);
}

}  // namespace probquant::cuda
