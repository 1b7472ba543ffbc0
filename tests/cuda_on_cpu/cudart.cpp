#include "cudart.h"

#include <cuda_runtime.h>
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>

#include "memory.h"
#include "ptx_kernel.h"

namespace cuda_on_cpu {
namespace {

cudaError_t last_error = cudaSuccess;

cudaError_t note(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

/// cudaFuncAttributeMaxDynamicSharedMemorySize by kernel.
std::map<const void*, int>& most_dynamic_shared() {
  static std::map<const void*, int> result;
  return result;
}

}  // namespace

Device& device() {
  static Device result;
  return result;
}

std::vector<Enqueued>& enqueued() {
  static std::vector<Enqueued> result;
  return result;
}

int& uncapturable_calls() {
  static int result = 0;
  return result;
}

namespace {

/// The kernels that have run under the checker. At exit their addresses go into the file that CUDA_ON_CPU_LAUNCHES names, behind the address
/// of cudaGetLastError, which says where the program lies.
struct Checked {
  std::set<const void*> kernels;

  ~Checked() {
    const char* path = std::getenv("CUDA_ON_CPU_LAUNCHES");
    std::FILE* file = path == nullptr ? nullptr : std::fopen(path, "w");
    if (file == nullptr) return;
    std::fprintf(file, "%p\n", reinterpret_cast<const void*>(&cudaGetLastError));
    for (const void* kernel : kernels) std::fprintf(file, "%p\n", kernel);
    std::fclose(file);
  }
} checked;

}  // namespace

int launch(const char* name, const void* key, Size grid, Size block, unsigned most_threads, unsigned static_shared_bytes, size_t dynamic_shared_bytes,
           void* stream, const std::function<void()>& thread) {
  enqueued().push_back({name, stream, grid, block, dynamic_shared_bytes, {}});
  if (device().error != 0) return note(static_cast<cudaError_t>(device().error));
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || threads == 0 || threads > 1024 || block.z > 64)
    return note(cudaErrorInvalidConfiguration);
  if (threads > most_threads) return note(cudaErrorInvalidValue);
  const auto asked = most_dynamic_shared().find(key);
  const size_t most = asked == most_dynamic_shared().end() ? static_cast<size_t>(device().shared_per_block) - static_shared_bytes : static_cast<size_t>(asked->second);
  if (dynamic_shared_bytes > most) return note(cudaErrorInvalidValue);
  enqueued().back().again = [=, kernel = std::string(name)] {
    set_shared_memory(static_shared_bytes, static_cast<unsigned>(dynamic_shared_bytes));
    run_grid(kernel.c_str(), grid, block, thread);
  };
  enqueued().back().again();
  if (options().check) checked.kernels.insert(key);
  return cudaSuccess;
}

void replay(size_t first) {
  for (size_t i = first; i < enqueued().size(); ++i) enqueued()[i].again();
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

// ---------------------------------------------------------------------------------------------------------------------
// Runtime library. Streams run at once.

extern "C" {

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the CPU's stand-in for CUDA"; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, size_t bytes) {
  ++uncapturable_calls();
#if defined(__SANITIZE_ADDRESS__)
  return posix_memalign(data, 256, bytes) == 0 ? cudaSuccess : note(cudaErrorMemoryAllocation);
#else
  *data = device_allocate(bytes);
  return *data != nullptr ? cudaSuccess : note(cudaErrorMemoryAllocation);
#endif
}
cudaError_t cudaFree(void* data) {
  ++uncapturable_calls();
#if defined(__SANITIZE_ADDRESS__)
  std::free(data);
  return cudaSuccess;
#else
  return data == nullptr || device_free(data) ? cudaSuccess : note(cudaErrorInvalidValue);
#endif
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  ++uncapturable_calls();
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
  enqueued().push_back({"memset", stream, {}, {}, 0, [=] { std::memset(data, value, bytes); }});
  if (device().error != 0) return note(static_cast<cudaError_t>(device().error));
  std::memset(data, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  ++uncapturable_calls();
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = device().major; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = device().minor; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = device().multiprocessors; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = device().shared_per_block; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device().shared_per_block_optin; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = device().shared_per_multiprocessor; return cudaSuccess;
    default: return note(cudaErrorInvalidValue);
  }
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > device().shared_per_block_optin) return note(cudaErrorInvalidValue);
  most_dynamic_shared()[kernel] = value;
  return cudaSuccess;
}

}  // extern "C"

#if defined(__CUDA_RUNTIME_API_H__)  // the toolkit's header: nvcc has compiled the host code, and its kernels are in the tables of ptx.py

// ---------------------------------------------------------------------------------------------------------------------
// Kernels of the PTX leg: nvcc's host code registers a function's address with its mangled name, ptx.py's code that name with
// what to run.

namespace {

std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> result;
  return result;
}
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> result;
  return result;
}
std::map<std::string, Variable>& variables() {
  static std::map<std::string, Variable> result;
  return result;
}
std::map<const void*, std::string>& variable_names() {
  static std::map<const void*, std::string> result;
  return result;
}

struct CallConfiguration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
} call_configuration;

/// Without the parameters.
std::string readable(const char* mangled) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(mangled, nullptr, nullptr, &status), std::free);
  if (status != 0) return mangled;
  const std::string name = text.get(), prefix = "(anonymous namespace)::";
  const size_t begin = name.rfind(prefix);
  return name.substr(begin == std::string::npos ? 0 : begin + prefix.size(), name.rfind('(') - (begin == std::string::npos ? 0 : begin + prefix.size()));
}

Size size(dim3 d) { return {d.x, d.y, d.z}; }

cudaError_t launch_by_address(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared_bytes, cudaStream_t stream) {
  const auto name = names().find(function);
  const auto found = name == names().end() ? kernels().end() : kernels().find(name->second);
  if (found == kernels().end()) return note(cudaErrorInvalidDeviceFunction);
  const Kernel& kernel = found->second;
  const auto parameters = std::make_shared<std::vector<uint8_t>>(kernel.parameter_bytes + 16);
  for (unsigned i = 0; i < kernel.parameter_count; ++i)
    std::memcpy(parameters->data() + kernel.parameters[i].offset, arguments[i], kernel.parameters[i].bytes);
  const auto thread = [parameters, &kernel] {
    set_parameters(parameters->data(), kernel.parameter_bytes);
    kernel.run(parameters->data());
  };
  return static_cast<cudaError_t>(cuda_on_cpu::launch(readable(kernel.name).c_str(), function, size(grid), size(block), kernel.most_threads, kernel.static_shared_bytes,
                                                      shared_bytes, stream, thread));
}

}  // namespace

namespace cuda_on_cpu {

void register_module(const Kernel* table, size_t count, const Variable* variable) {
  for (size_t i = 0; i < count; ++i) kernels()[table[i].name] = table[i];
  for (; variable->name != nullptr; ++variable) {
    *variable->where = static_cast<uint8_t*>(device_allocate(variable->bytes));
    std::memcpy(*variable->where, variable->initial, variable->bytes);
    variables()[variable->name] = *variable;
  }
}

}  // namespace cuda_on_cpu

extern "C" {

cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset, cudaMemcpyKind) {
  const auto name = variable_names().find(symbol);
  if (name == variable_names().end() || variables().count(name->second) == 0) return note(cudaErrorInvalidSymbol);
  const Variable& variable = variables()[name->second];
  if (offset + bytes > variable.bytes) return note(cudaErrorInvalidValue);
  std::memcpy(*variable.where + offset, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared_bytes, cudaStream_t stream) {
  return launch_by_address(function, grid, block, arguments, shared_bytes, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  if (config->numAttrs != 0) return note(cudaErrorNotSupported);
  return launch_by_address(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream);
}

// What the code that nvcc adds to a host file calls (crt/host_runtime.h of the toolkit).
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes, cudaStream_t stream) {
  return launch_by_address(kernel, grid, block, arguments, shared_bytes, stream);
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream) {
  call_configuration = {grid, block, shared_bytes, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  *grid = call_configuration.grid, *block = call_configuration.block, *shared_bytes = call_configuration.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = call_configuration.stream;
  return cudaSuccess;
}
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host_function, char*, const char* device_name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  names()[host_function] = device_name;
}
void __cudaRegisterVar(void**, char* host_variable, char*, const char* device_name, int, size_t, int, int) { variable_names()[host_variable] = device_name; }

}  // extern "C"

#endif
