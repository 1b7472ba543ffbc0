// Runs CUDA kernels on the CPU: a CUDA thread is a fiber, the threads of a block meet in barriers and warp collectives, and
// blocks run one after the other. The shim headers (shim/) give a kernel's source the names it expects, on top of this.
//
// What it finds: barriers that not all threads of a block reach, or that they reach at different lines; warp collectives whose
// mask names lanes that are elsewhere, have ended or do not exist; deadlocks. Built with -fsanitize=address,undefined it
// also finds accesses outside of global memory, which is ordinary heap memory here, and of shared memory.
//
// What it does not find: races. A wrong kernel may give right results in the orders tried; run several (Options).
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

/// Runs `thread` for every thread of the grid. A kernel that breaks the rules throws Violation.
void run_grid(const char* kernel, Size grid, Size block, const std::function<void()>& thread);

struct Violation : std::logic_error {
  using std::logic_error::logic_error;
};

/// A line of the kernel's source.
struct Site {
  const char* file;
  int line;
};

/// __syncthreads.
void block_barrier(Site site);

/// What every warp collective is made of: all lanes of the mask meet here, each brings a value and gets those of all.
/// The values of lanes outside of the mask are 0. Valid until the lane's next collective.
const uint64_t* warp_exchange(uint32_t mask, uint64_t value, Site site);

/// Launches and threads so far.
struct Counters {
  int64_t launches = 0, blocks = 0, threads = 0;
};
Counters& counters();

}  // namespace cuda_on_cpu
