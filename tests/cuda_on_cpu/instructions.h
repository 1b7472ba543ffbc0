// What the threads of a warp do together, and asynchronous copies: the semantics of the PTX instructions, for both ways in (fibers.h).
// Fragment layouts are those of the PTX ISA, "Matrix Fragments for mma.m8n8k16 / m16n8k16 / m16n8k32" and "ldmatrix".
#pragma once
#include <array>
#include <cstdint>

#include "fibers.h"

namespace cuda_on_cpu {

/// bar.warp.sync
void warp_barrier(uint32_t mask, const Site& site);

/// shfl.sync: `b` is the lane or distance, `c` clamp and segment mask as in the PTX ISA.
enum class Shuffle { up, down, bfly, idx };
struct Shuffled {
  uint32_t value;
  bool in_range;
};
Shuffled shuffle(Shuffle mode, uint32_t mask, uint32_t value, uint32_t b, uint32_t c, const Site& site);

/// vote.sync.ballot
uint32_t ballot(uint32_t mask, bool value, const Site& site);

/// match.sync: lanes of the mask with the same value; with `all`, the mask if all are the same and else 0.
uint32_t match(uint32_t mask, uint64_t value, bool all, const Site& site);

/// activemask: the caller alone. CUDA promises no more.
inline uint32_t active_mask() { return 1u << current.lane; }

/// redux.sync
enum class Reduction { add, min, max, and_, or_, xor_ };
template <class T>
T reduce(Reduction operation, uint32_t mask, T value, const Site& site);

/// mma.sync.aligned.<M, N, K>.row.col.s32.{u8,s8}.{u8,s8}.s32: the thread's fragment of A * B + C.
struct MmaTypes {
  bool a_signed, b_signed, saturate = false;
};
template <int m, int n, int k>
struct MmaFragments {
  uint32_t a[m * k / 128], b[n * k / 128], c[m * n / 32];
};
template <int m, int n, int k>
std::array<uint32_t, m * n / 32> mma(MmaTypes types, const MmaFragments<m, n, k>& fragments, const Site& site);

/// ldmatrix.sync.aligned.m8n8.x<count>.b16: lane 8 i + j names row j of matrix i.
std::array<uint32_t, 4> load_matrix(int count, bool transposed, uint32_t address, const Site& site);

/// cp.async: `bytes` bytes to shared memory, of which `read_bytes` are read and the rest zero. Until the thread waits, nobody
/// may touch them: they hold garbage, or already what is copied, as the order of the launch decides.
void copy_async(uint32_t to, uint64_t from, unsigned bytes, uint32_t read_bytes, const Site& site);
void commit_copies();
/// cp.async.wait_group: until at most `groups` of the committed groups are under way.
void wait_copies(uint32_t groups);

// Called by fibers.cpp.
void copies_block_begins(unsigned threads);
void copies_thread_ends();

}  // namespace cuda_on_cpu
