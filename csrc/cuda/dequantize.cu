// dequantize: y = scale * (q - zero_point), narrowed half to even.
//
// Launch: Partition::blocks() blocks of up to 256 threads, at most 32 registers (8 blocks per multiprocessor), no shared
// memory. A warp reads one sector of codes and writes whole sectors of floats. Bound by memory.
#include "place.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

template <DType dtype>
__global__ void __launch_bounds__(kMaxThreads)
    dequantize_kernel(const Partition p, const uint8_t* q, const float* scales, const int32_t* zero_points, typename Element<dtype>::Storage* y) {
  using Type = Element<dtype>;
  const Place place(p);
  const float scale = scales[place.sample];
  const bool valid = valid_scale(scale);
  const int32_t zero_point = clamp_zero_point(zero_points[place.sample]);
  q += place.sample * p.positions;
  y += place.sample * p.positions;
#pragma unroll 4
  for (int64_t i = place.position; i < place.end; i += p.position_lanes)
    y[i] = valid ? Type::narrow(scale * static_cast<float>(q[i] - zero_point)) : Type::not_a_number();
}

template <DType dtype>
void launch_as(const Partition& p, const QuantizedInput& x, void* y, void* stream) {
  launch("dequantize", dequantize_kernel<dtype>, {p.blocks(), p.threads}, stream, p, x.q, x.scale, x.zero_point,
         static_cast<typename Element<dtype>::Storage*>(y));
}

}  // namespace

void launch_dequantize(const Partition& p, const QuantizedInput& x, DType dtype, void* y, void* stream) {
  switch (dtype) {
    case DType::float16: return launch_as<DType::float16>(p, x, y, stream);
    case DType::bfloat16: return launch_as<DType::bfloat16>(p, x, y, stream);
    case DType::float32: return launch_as<DType::float32>(p, x, y, stream);
  }
}

}  // namespace probquant::cuda
