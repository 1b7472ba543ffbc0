// Errors of the CUDA runtime in words, and memory cleared on a stream. The library links the static run-time library: it loads
// on machines without a driver, where the first call of the runtime gives the error.
#include "runtime.h"

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

void clear(const char* op, void* data, int64_t bytes, void* stream) {
  if (bytes > 0) check(op, cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)));
}

}  // namespace probquant::cuda
