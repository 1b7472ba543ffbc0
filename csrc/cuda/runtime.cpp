// Errors of the CUDA runtime in words, and the signatures of launches. The library links the static run-time library: it loads
// on machines without a driver, where the first call of the runtime gives the error.
#include "runtime.h"

#include <atomic>
#include <random>

#include "launch.h"

namespace probquant::cuda {
namespace {

std::string cuda_version(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

/// What a user can do about it; empty where CUDA's own text says it.
std::string advice(cudaError_t error) {
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver is installed on this machine";
    return "the NVIDIA driver knows CUDA up to " + cuda_version(driver) + ", these kernels were built with CUDA " + cuda_version(CUDART_VERSION);
  }
  if (error == cudaErrorNoDevice) return "this machine has no CUDA device, or none is visible to this process";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    return "the kernels were not built for this device's architecture; build_info().cuda_archs lists those that were";
  return "";
}

}  // namespace

void throw_cuda_error(const char* what, cudaError_t error) {
  cudaGetLastError();  // an error that was thrown must not be found again by the next caller of the runtime
  const std::string reason = advice(error);
  throw Error(std::string(what) + ": " + (reason.empty() ? "" : reason + " (") + cudaGetErrorName(error) + ": " + cudaGetErrorString(error) +
              (reason.empty() ? "" : ")"));
}

Parts PartsLayout::at(void* workspace) const {
  // Steps from a random place, mixed by the finalizer of SplitMix64 (Steele et al., OOPSLA 2014), which is a bijection: never the same twice.
  static std::atomic<uint64_t> launches{uint64_t{std::random_device{}()} << 32 | std::random_device{}()};
  uint64_t signature = 0;
  while (signature == 0) {  // is for parts that were taken
    signature = launches.fetch_add(0x9e3779b97f4a7c15u, std::memory_order_relaxed);
    signature = (signature ^ signature >> 30) * 0xbf58476d1ce4e5b9u;
    signature = (signature ^ signature >> 27) * 0x94d049bb133111ebu;
    signature ^= signature >> 31;
  }
  auto* first = static_cast<uint8_t*>(workspace);
  return {reinterpret_cast<Part*>(first), reinterpret_cast<uint64_t*>(first + part_bytes()), static_cast<int32_t>(count), static_cast<int32_t>(rows), signature};
}

}  // namespace probquant::cuda
