// All inline PTX of the library. Every wrapper names its instruction and why it is needed: what C++ can say is not here.
// Without nvcc (tests/cuda_on_cpu) the same functions have C++ bodies.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#if !defined(__CUDACC__)
#include <ptx_on_cpu.h>
#else

namespace probquant::cuda {

/// The block's dynamic shared memory, as large as the launch asked for.
__device__ inline uint8_t* dynamic_shared() {
  extern __shared__ __align__(128) uint8_t storage[];
  return storage;
}

/// A shared-memory address as PTX has it, in 32 bits: half the arithmetic of a pointer.
__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

/// cp.async (sm_80): 16 or 8 bytes from global to shared memory without a register and without waiting: what a pipeline of
/// stages is made of. 16 with .cg, past the L1 cache: a tile's bytes are used once per block; 8 know .ca alone. On sm_75 a load and a
/// store.
template <int bytes>
__device__ void cp_async(uint32_t shared, const void* global) {
  static_assert(bytes == 16 || bytes == 8, "units of a copy");
#if __CUDA_ARCH__ >= 800
  if constexpr (bytes == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(global) : "memory");
#else
  if constexpr (bytes == 16) {
    const uint4 v = *static_cast<const uint4*>(global);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
  } else {
    const uint2 v = *static_cast<const uint2*>(global);
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(shared), "r"(v.x), "r"(v.y) : "memory");
  }
#endif
}

/// cp.async.commit_group: closes a group of copies that cp_async_wait counts.
__device__ inline void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// cp.async.wait_group: waits until at most `pending` of this thread's latest groups are under way. Other threads' copies
/// are visible behind the __syncthreads that follows.
template <int pending>
__device__ inline void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

/// ldmatrix.x4 (sm_75): four 8 x 16 byte matrices from shared memory into the fragment order of mma, one instruction instead
/// of 16 loads. Lane l gives the address of row l % 8 of matrix l / 8 and receives bytes 4 (l % 4) .. + 3 of row l / 4 of
/// every matrix.
__device__ inline void ldmatrix_x4(uint32_t (&matrices)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row)
               : "memory");
}

/// c[16 x 8] += a[16 x 32] b[32 x 8] on the tensor cores, uint8 times B (int8_t or uint8_t) in int32: mma.m16n8k32 (sm_80), exact and
/// wrapping.
/// Lane l holds, with g = l / 4 and t = l % 4:  a: rows g, g + 8 (k = 4t..), rows g, g + 8 (k = 16 + 4t..);
/// b: column g, k = 4t.. and 16 + 4t..;  c: row g, columns 2t, 2t + 1, then row g + 8.
/// sm_75 has mma.m8n8k16 only: four of them, on the same fragments.
template <class B>
__device__ void mma_m16n8k32(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
#define PROBQUANT_MMA(type)                                                                                                                         \
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8." type ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                                                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_signed_v<B>) PROBQUANT_MMA("s8");
  else PROBQUANT_MMA("u8");
#else
#define PROBQUANT_MMA(type)                                                                   \
  asm("mma.sync.aligned.m8n8k16.row.col.s32.u8." type ".s32 {%0, %1}, {%2}, {%3}, {%0, %1};" \
      : "+r"(c[2 * half]), "+r"(c[2 * half + 1])                                             \
      : "r"(a[2 * k + half]), "r"(k == 0 ? b0 : b1))
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if constexpr (std::is_signed_v<B>) PROBQUANT_MMA("s8");
      else PROBQUANT_MMA("u8");
    }
#endif
#undef PROBQUANT_MMA
}

/// dp4a.u32.s32: sum of four products of unsigned with signed bytes; __dp4a has only equal signs.
__device__ inline int32_t dp4a_u8_s8(uint32_t a, uint32_t b, int32_t c) {
  asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(c) : "r"(a), "r"(b));
  return c;
}

}  // namespace probquant::cuda
#endif
