// Stands for CUDA's cuda_runtime.h when a kernel's source is compiled for the CPU (see fibers.h): the part of the language
// and of the run-time library that csrc/cuda uses. What is missing here does not compile.
#pragma once
#include <cstdint>
#include <cstring>
#include <tuple>

#include "../cudart.h"
#include "../instructions.h"

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
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 or 8 bytes");
  uint32_t words[sizeof(T) / 4];
  std::memcpy(words, &value, sizeof value);
  for (uint32_t& word : words) word = ::cuda_on_cpu::shuffle(::cuda_on_cpu::Shuffle::bfly, mask, word, static_cast<uint32_t>(lane_mask), 31, site).value;
  std::memcpy(&value, words, sizeof value);
  return value;
}

inline bool __all_sync(uint32_t mask, bool value, CUDA_ON_CPU_SITE) { return ::cuda_on_cpu::ballot(mask, value, site) == mask; }
inline bool __any_sync(uint32_t mask, bool value, CUDA_ON_CPU_SITE) { return ::cuda_on_cpu::ballot(mask, value, site) != 0; }
inline void __syncwarp(uint32_t mask = 0xffffffffu, CUDA_ON_CPU_SITE) { ::cuda_on_cpu::warp_barrier(mask, site); }

inline unsigned long long atomicCAS(unsigned long long* at, unsigned long long wanted, unsigned long long value) {
  __atomic_compare_exchange_n(at, &wanted, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return wanted;
}
inline unsigned atomicAdd(unsigned* at, unsigned value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }

inline unsigned atomicMax(unsigned* at, unsigned value) {
  unsigned seen = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (seen < value && !__atomic_compare_exchange_n(at, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (unsigned i = 0; i < 4; ++i) result |= static_cast<uint32_t>(static_cast<uint8_t>(bytes >> 8 * (selector >> 4 * i & 7u))) << 8 * i;
  return result;
}

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31u));
}

inline void __threadfence() {}

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// ---------------------------------------------------------------------------------------------------------------------
// Run-time library: cudart.cpp

#define CUDART_VERSION 13000

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
using cudaStream_t = struct CUstream_st*;

extern "C" {
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaMalloc(void** data, size_t bytes);
cudaError_t cudaFree(void* data);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaGetDevice(int* index);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
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
  const std::tuple<Parameters...> values(arguments...);
  return static_cast<cudaError_t>(::cuda_on_cpu::launch("kernel", reinterpret_cast<const void*>(kernel), config->gridDim, config->blockDim, 1024, 0,
                                                        config->dynamicSmemBytes, config->stream, [=] { std::apply(kernel, values); }));
}
