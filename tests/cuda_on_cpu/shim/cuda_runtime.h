// Stands for CUDA's cuda_runtime.h when a kernel's source is compiled for the CPU (see fibers.h): the part of the language
// and of the run-time library that csrc/cuda uses. What is missing here does not compile.
#pragma once
#include <cstdint>
#include <cstring>
#include <tuple>

#include "../fibers.h"

// ---------------------------------------------------------------------------------------------------------------------
// Language

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

inline const ::cuda_on_cpu::Size &threadIdx = ::cuda_on_cpu::current.thread, &blockIdx = ::cuda_on_cpu::current.block,
                                 &blockDim = ::cuda_on_cpu::current.block_size, &gridDim = ::cuda_on_cpu::current.grid_size;

#define CUDA_ON_CPU_SITE ::cuda_on_cpu::Site site = {__builtin_FILE(), __builtin_LINE()}

inline void __syncthreads(CUDA_ON_CPU_SITE) { ::cuda_on_cpu::block_barrier(site); }

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, CUDA_ON_CPU_SITE) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const unsigned source = ::cuda_on_cpu::current.lane ^ static_cast<unsigned>(lane_mask);
  const uint64_t* of_all = ::cuda_on_cpu::warp_exchange(mask, bits, site);
  std::memcpy(&value, of_all + source % 32, sizeof value);
  return value;
}

inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// ---------------------------------------------------------------------------------------------------------------------
// Run-time library. Streams run at once; device memory is memory.

#define CUDART_VERSION 13000

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
};
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the CPU's stand-in for CUDA"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

struct dim3 : ::cuda_on_cpu::Size {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : Size{x, y, z} {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x == 0 || grid.x > 0x7fffffffu || block.x == 0 || block.x > 1024 || config->dynamicSmemBytes != 0) return cudaErrorInvalidConfiguration;
  const std::tuple<Parameters...> values(arguments...);
  ::cuda_on_cpu::run_grid("kernel", grid, block, [&] { std::apply(kernel, values); });
  return cudaSuccess;
}
