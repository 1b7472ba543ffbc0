// Runs CUDA kernels on the CPU: a CUDA thread is a fiber, the threads of a block meet in barriers and warp collectives, and
// blocks run one after the other. On top of it stand memory.h (device memory and its checker), instructions.h (what warps do
// together) and two ways in: the shim headers, which give a kernel's source the names it expects under g++, and ptx_kernel.h, which
// the translation of nvcc's PTX includes.
//
// Reported here: barriers that not all threads of a block reach, or that they reach at different lines; warp collectives whose
// mask names lanes that are elsewhere, have ended or do not exist; deadlocks.
#pragma once
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace cuda_on_cpu {

/// In which order runnable threads go on, and blocks start. `random` is a function of the seed.
enum class Order { forward, backward, random };

struct Options {
  Order order = Order::forward;
  uint64_t seed = 1;
  bool check = true;     ///< shadow memory: races, uninitialised reads, asynchronous copies (bounds and alignment always)
  bool profile = false;  ///< lint: bank conflicts and sectors per access (memory.h)
};
Options& options();

struct Size {
  unsigned x = 1, y = 1, z = 1;
};

/// Who a thread is; `current` is the running one.
struct Identity {
  Size thread, block, block_size, grid_size;
  unsigned lane = 0, warp = 0;
};
extern Identity current;

/// Runs `thread` for every thread of the grid. A kernel that breaks the rules throws Violation: the first one counts.
void run_grid(const char* kernel, Size grid, Size block, const std::function<void()>& thread);

struct Violation : std::logic_error {
  using std::logic_error::logic_error;
};

/// A line of the kernel's source, and what stands there (an instruction, where known). The strings live for good.
struct Site {
  const char* file;
  int line;
  const char* what = "";
};
std::string text(const Site& site);

/// Ends the launch: run_grid throws Violation with this reason. For running threads.
[[noreturn]] void violate(const std::string& what);

/// __syncthreads.
void block_barrier(const Site& site);

/// __syncthreads_count: a barrier, and how many threads of the block brought true.
unsigned block_barrier_count(bool value, const Site& site);

/// What every warp collective is made of: all lanes of the mask meet here, each with a record of its own, and the last one calls
/// combine(mask, records by lane), which reads and writes them all. Lanes outside of the mask have null.
using Combine = void (*)(uint32_t mask, void* const* records);
void warp_collective(uint32_t mask, void* record, const Site& site, Combine combine);

/// Threads of the block, in total.
unsigned block_threads();

/// Where the running thread's stack lies.
struct Stack {
  const uint8_t *begin, *end;
};
Stack current_stack();

/// Launches and threads so far.
struct Counters {
  int64_t launches = 0, blocks = 0, threads = 0;
};
Counters& counters();

/// Of a state that it advances: the same numbers everywhere.
uint64_t next_random(uint64_t& state);

}  // namespace cuda_on_cpu
