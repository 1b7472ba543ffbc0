// What api.cpp asks of the kernel files: checked problems in, kernels enqueued. No CUDA header. Every pointer is a device
// pointer, `stream` a cudaStream_t.
#pragma once
#include <probquant/ops.h>

#include "partition.h"

namespace probquant::cuda {

/// A strided float tensor [samples, rows, columns, channels] with positions = rows * columns.
struct FloatSource {
  const void* data;
  DType dtype;
  int64_t columns;
  int64_t stride[4];
};

/// Minimum and maximum of what one block saw, joined with 0; lo = -infinity where a value was not finite.
struct Range {
  float lo, hi;
};

/// range.cu: one Range per block, in the partition's order.
void launch_range(const Partition& partition, const FloatSource& x, Range* partials, void* stream);

/// quantize.cu: parameters from the partial ranges, or from `scale` and `zero_point` where these are not null; codes; stats,
/// which must be zero.
void launch_quantize(const Partition& partition, const FloatSource& x, const Range* partials, const float* scale, const int32_t* zero_point,
                     const QuantizedOutput& y, void* stream);

/// dequantize.cu: the partition has one channel.
void launch_dequantize(const Partition& partition, const QuantizedInput& x, DType dtype, void* y, void* stream);

/// moments.cu: adds to stats.
void launch_moments(const Partition& partition, const uint8_t* q, bool channel_stats, int64_t* stats, void* stream);

/// runtime.cpp: fills with zero bytes, on the stream; `op` names the caller in errors.
void clear(const char* op, void* data, int64_t bytes, void* stream);

}  // namespace probquant::cuda
