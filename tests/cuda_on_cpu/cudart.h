// A CUDA runtime library without a driver: host code of csrc/cuda links against cudart.cpp, and its launches run on fibers
// at once. The device is what Device says. Everything that would be enqueued is noted, with its stream.
#pragma once
#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "fibers.h"

namespace cuda_on_cpu {

/// What host code can ask of the device: an A100 (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
struct Device {
  int major = 8, minor = 0;
  int multiprocessors = 108;
  int shared_per_block = 48 * 1024, shared_per_block_optin = 163 * 1024, shared_per_multiprocessor = 164 * 1024;
  int error = 0;  ///< cudaError_t of every launch and memset, if not 0: a machine without a device, say
};
Device& device();

/// A launch or memset.
struct Enqueued {
  std::string what;  ///< a kernel, by name where known, or "memset"
  void* stream;
  Size grid, block;
  size_t dynamic_shared_bytes = 0;
  std::function<void()> again;  ///< runs a launch once more, with the parameters that it had
};
std::vector<Enqueued>& enqueued();

/// Runs all launches from enqueued()[first] on once more: what the replay of a CUDA graph does that has captured them.
void replay(size_t first);

/// Calls that a CUDA graph cannot capture: allocations, synchronization, copies that wait.
int& uncapturable_calls();

/// Checks the configuration as CUDA does and runs the grid; a cudaError_t. `key` is what cudaFuncSetAttribute names the kernel by. `thread` owns its
/// parameters.
int launch(const char* name, const void* key, Size grid, Size block, unsigned most_threads, unsigned static_shared_bytes, size_t dynamic_shared_bytes,
           void* stream, const std::function<void()>& thread);

}  // namespace cuda_on_cpu
