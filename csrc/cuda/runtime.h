// The CUDA runtime as the kernel files use it: errors become probquant::Error, launches are typed.
#pragma once
#include <cuda_runtime.h>
#include <probquant/types.h>

#include <string>

namespace probquant::cuda {

/// Throws Error with the reason and, for the usual ones, what to do about it.
[[noreturn]] void throw_cuda_error(const char* what, cudaError_t error);

inline void check(const char* what, cudaError_t error) {
  if (error != cudaSuccess) throw_cuda_error(what, error);
}

/// A one-dimensional grid; shared_bytes is the dynamic shared memory, of which every device has 48 KiB without being asked.
struct LaunchSize {
  int64_t blocks;
  int threads;
  int shared_bytes = 0;
};

/// Enqueues one kernel; `name` stands in errors.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchSize& size, void* stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(size.blocks));
  config.blockDim = dim3(static_cast<unsigned>(size.threads));
  config.dynamicSmemBytes = static_cast<size_t>(size.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  check(name, cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace probquant::cuda
