// Device memory, and what is known of every byte of it. Global memory is an arena of this process: a device pointer is a pointer.
// Shared memory is a second arena, addressed by offsets; blocks run one after the other and all use it.
//
// Every access is checked for bounds and alignment. With Options::check, shadow memory finds:
//   - shared memory that is read before this block has written it;
//   - races: two accesses to a byte, one of them a write, that no barrier orders, in shared or in global memory. Threads of a block are
//     ordered by __syncthreads, lanes of a warp by __syncwarp (not by shuffles and votes: the PTX ISA gives them no ordering),
//     blocks of a launch by nothing. Atomics do not race with atomics;
//   - memory read with ld.global.nc that the launch writes;
//   - bytes that an asynchronous copy is still to write: they hold garbage, and may be neither read nor written.
// An access that breaks a rule ends the launch with a Violation that names both places in the source.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>

#include "fibers.h"

namespace cuda_on_cpu {

/// `atomic` reads and writes; `strong_*` are volatile, relaxed, acquire or release: they do not race with atomics and each other.
enum class Access : uint8_t { read, write, atomic, strong_read, strong_write, constant_read };

/// The bytes behind an address of the given space, after all checks. A generic address may lie in either space or on the
/// thread's own stack.
uint8_t* global_at(uint64_t address, unsigned bytes, Access access, const Site& site);
uint8_t* shared_at(uint64_t offset, unsigned bytes, Access access, const Site& site);
uint8_t* local_at(uint64_t address, unsigned bytes, Access access, const Site& site);
uint8_t* generic_at(uint64_t address, unsigned bytes, Access access, const Site& site);

/// Shared memory of the running launch. A shared address is an offset; as a generic address it is shared_memory() + offset.
uint8_t* shared_memory();
constexpr unsigned kSharedArena = 256 * 1024;

/// What the next launches have: bytes of static and dynamic shared memory.
void set_shared_memory(unsigned static_bytes, unsigned dynamic_bytes);
unsigned dynamic_shared_bytes();

/// Kernel parameters, readable through generic addresses.
void set_parameters(const uint8_t* parameters, unsigned bytes);

/// The bytes of an asynchronous copy, from its issue to its end.
void begin_pending(uint64_t offset, unsigned bytes, const Site& site);
void end_pending(uint64_t offset, unsigned bytes);

/// Device memory, 256-byte aligned, full of garbage; null when there is no more. The bytes around it belong to nobody.
void* device_allocate(size_t bytes);
/// False if it is not the beginning of an allocation.
bool device_free(void* pointer);

// Called by fibers.cpp and instructions.cpp.
void memory_launch_begins();
void memory_block_begins(unsigned threads, uint64_t& random);
void memory_barrier();                                ///< of the block
void memory_warp_barrier(unsigned warp, uint32_t mask);  ///< __syncwarp

/// With Options::profile: a line per place in the source that accesses memory, over all warps of the blocks that were
/// profiled (the first of every launch): requests, 32-byte sectors in global memory or wavefronts in shared memory, the
/// least number of them that the bytes need, and the ratio.
void print_profile(std::FILE* file);

}  // namespace cuda_on_cpu
