// First pass of quantize without given parameters: the range of what each block saw.
//
// Launch: Partition::blocks() blocks of up to 256 threads, at most 34 registers (6 blocks per multiprocessor), 64 bytes of static
// shared memory. Reads every value once; writes 8 bytes per block, so nothing needs clearing. Bound by memory.
#include "reduce.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

template <DType dtype>
__global__ void __launch_bounds__(kMaxThreads) range_kernel(const Partition p, const FloatSteps x, Range* partials) {
  const Place place(p);
  Range r{0.0f, 0.0f};
  for_each_value<dtype>(p, place, x, [&](int64_t, float value) {
    r.lo = is_finite(value) ? min_f(value, r.lo) : -kInfinity;
    r.hi = max_f(value, r.hi);
  });
  r = block_range(r);
  if (threadIdx.x == 0) partials[blockIdx.x] = r;
}

}  // namespace

void launch_range(const Partition& p, const FloatSource& x, Range* partials, void* stream) {
  const auto kernel = x.dtype == DType::float16    ? range_kernel<DType::float16>
                      : x.dtype == DType::bfloat16 ? range_kernel<DType::bfloat16>
                                                   : range_kernel<DType::float32>;
  launch("quantize", kernel, {p.blocks(), p.threads}, stream, p, FloatSteps(p, x), partials);
}

}  // namespace probquant::cuda
