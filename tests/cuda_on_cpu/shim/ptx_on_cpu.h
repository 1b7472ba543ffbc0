// C++ bodies of csrc/cuda/ptx.cuh. Copies have arrived at once here, and shared memory is not shadowed: that a kernel waits for
// its copies and never reads what nobody wrote is for the PTX leg to see.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "../memory.h"

namespace probquant::cuda {

inline uint8_t* dynamic_shared() { return ::cuda_on_cpu::shared_memory(); }

inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - ::cuda_on_cpu::shared_memory()); }

/// Bytes that must lie, aligned, in the block's dynamic shared memory.
inline uint8_t* shared_bytes(uint32_t address, uint32_t bytes, const ::cuda_on_cpu::Site& site) {
  if (address % bytes != 0 || address + bytes > ::cuda_on_cpu::dynamic_shared_bytes())
    ::cuda_on_cpu::violate("shared memory: " + ::cuda_on_cpu::text(site) + " touches " + std::to_string(bytes) + " bytes at " + std::to_string(address));
  return ::cuda_on_cpu::shared_memory() + address;
}

template <int bytes>
void cp_async(uint32_t shared, const void* global, CUDA_ON_CPU_SITE) {
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) ::cuda_on_cpu::violate("misaligned: " + ::cuda_on_cpu::text(site));
  std::memcpy(shared_bytes(shared, bytes, site), global, bytes);
}
inline void cp_async_commit() {}
template <int pending>
void cp_async_wait() {}

inline void ldmatrix_x4(uint32_t (&matrices)[4], uint32_t row, CUDA_ON_CPU_SITE) {
  struct Record {
    const uint8_t* row;
    uint32_t* matrices;
  } record{shared_bytes(row, 16, site), matrices};
  ::cuda_on_cpu::warp_collective(0xffffffffu, &record, site, [](uint32_t, void* const* records) {
    for (size_t lane = 0; lane < 32; ++lane)
      for (size_t matrix = 0; matrix < 4; ++matrix)
        std::memcpy(static_cast<Record*>(records[lane])->matrices + matrix, static_cast<Record*>(records[matrix * 8 + lane / 4])->row + lane % 4 * 4, 4);
  });
}

template <class B>
void mma_m16n8k32(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, CUDA_ON_CPU_SITE) {
  ::cuda_on_cpu::MmaFragments<16, 8, 32> fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}, {}};
  for (size_t i = 0; i < 4; ++i) fragments.c[i] = static_cast<uint32_t>(c[i]);
  const auto result = ::cuda_on_cpu::mma<16, 8, 32>({false, std::is_signed_v<B>}, fragments, site);
  for (size_t i = 0; i < 4; ++i) c[i] = static_cast<int32_t>(result[i]);
}

inline int32_t dp4a_u8_s8(uint32_t a, uint32_t b, int32_t c) {
  auto sum = static_cast<uint32_t>(c);
  for (unsigned i = 0; i < 4; ++i) sum += static_cast<uint32_t>(static_cast<uint8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i));
  return static_cast<int32_t>(sum);
}

}  // namespace probquant::cuda
