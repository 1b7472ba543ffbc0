// The ops on a GPU: the same bytes as ops.h gives on the CPU. All data pointers are device pointers; `stream` is a
// cudaStream_t (null: the default stream) of the calling thread's current device. Every function only enqueues work: it never
// waits, allocates or reads a device value on the host, so all of them can be captured in a CUDA graph.
// Wrong arguments, a missing driver or device and refused launches throw Error. In a build without CUDA kernels
// (build_info().cuda) every function throws Error.
#pragma once
#include <probquant/ops.h>
#include <probquant/types.h>

namespace probquant::cuda {

/// Bytes of device memory that quantize needs beside its output: partial ranges, when no parameters are given. It looks at
/// the sizes only.
PROBQUANT_API int64_t quantize_workspace_bytes(const FloatView& x, bool parameters_given);

/// As probquant::quantize; `scale` and `zero_point` are device pointers to one value each, or null. `workspace` needs
/// quantize_workspace_bytes bytes, 8-byte aligned, and is free again when the stream has passed.
PROBQUANT_API void quantize(const FloatView& x, const float* scale, const int32_t* zero_point, const QuantizedOutput& y, void* workspace,
                            void* stream);

/// As probquant::dequantize.
PROBQUANT_API void dequantize(const QuantizedInput& x, int64_t samples, int64_t count, DType dtype, void* y, void* stream);

/// As probquant::moments.
PROBQUANT_API void moments(const uint8_t* q, int64_t samples, int64_t count, int64_t channels, bool channel_stats, int64_t* stats,
                           void* stream);

}  // namespace probquant::cuda
