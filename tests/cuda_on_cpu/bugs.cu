// Seeded bugs: every kind of mistake that the checker is for, in a small kernel, and the same kernel without it. The program
// fails if the checker misses one, in any order, or reports a clean kernel. For the PTX leg.
//
//   bugs [name]        all of them, or one
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <iterator>
#include <string>
#include <vector>

#include "fibers.h"

namespace {

constexpr int kThreads = 64, kBlocks = 3;

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ void copy_async(void* to, const int* from, int read_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(read_bytes) : "memory");
}
__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// ---- bounds and alignment

template <bool bug>
__global__ void global_read(int* out, const int* in) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  out[i] = in[i + (bug ? 1 : 0)];
}
template <bool bug>
__global__ void global_write(int* out, const int* in) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  out[i - (bug ? 1 : 0)] = in[i];
}
template <bool bug>
__global__ void global_alignment(int* out, const int* in) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i % 4 == 0) *reinterpret_cast<int4*>(out + i) = *reinterpret_cast<const int4*>(in + i - (bug && i > 0 ? 1 : 0));
}
template <bool bug>
__global__ void host_pointer(int* out, const int* in) {
  const int* const from = bug ? reinterpret_cast<const int*>(0x1234560) : in;
  out[blockIdx.x * kThreads + threadIdx.x] = *from;
}
template <bool bug>
__global__ void shared_bounds(int* out, const int* in) {
  extern __shared__ int dynamic[];  // kThreads of them
  const int t = threadIdx.x;
  dynamic[t + (bug ? 1 : 0)] = in[t];
  __syncthreads();
  out[blockIdx.x * kThreads + t] = dynamic[t == 0 ? 1 : t];
}
template <bool bug>
__global__ void shared_alignment(int* out, const int* in) {
  __shared__ alignas(16) int values[kThreads + 4];
  const int t = threadIdx.x;
  values[t] = in[t];
  if (t < 4) values[kThreads + t] = 0;
  __syncthreads();
  const int4 four = *reinterpret_cast<const int4*>(values + t / 4 * 4 + (bug ? 2 : 0));
  out[blockIdx.x * kThreads + t] = four.x + four.w;
}
template <bool bug>
__global__ void matrix_alignment(int* out, const int* in) {
  __shared__ alignas(16) int values[kThreads + 4];
  const int t = threadIdx.x;
  values[t] = in[t];
  if (t < 4) values[kThreads + t] = 0;
  __syncthreads();
  uint32_t result;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(result) : "r"(shared_address(values + t % 8 * 4 + (bug ? 1 : 0))) : "memory");
  out[blockIdx.x * kThreads + t] = static_cast<int>(result);
}

// ---- shared memory

template <bool bug>
__global__ void uninitialised(int* out, const int* in) {
  __shared__ int values[kThreads];
  const int t = threadIdx.x;
  if (!bug || t > 0) values[t] = in[t];
  __syncthreads();
  out[blockIdx.x * kThreads + t] = values[kThreads - 1 - t];
}
template <bool bug>
__global__ void read_after_write(int* out, const int* in) {
  __shared__ int values[kThreads];
  const int t = threadIdx.x;
  values[t] = in[t];
  __syncthreads();
  values[t] += 1;
  if (!bug) __syncthreads();
  out[blockIdx.x * kThreads + t] = values[kThreads - 1 - t];
}
template <bool bug>
__global__ void write_after_read(int* out, const int* in) {
  __shared__ int values[kThreads];
  const int t = threadIdx.x;
  values[t] = in[t];
  __syncthreads();
  const int other = values[kThreads - 1 - t];
  if (!bug) __syncthreads();
  values[t] = other;
  out[blockIdx.x * kThreads + t] = values[t];
}
template <bool bug>
__global__ void write_after_write(int* out, const int* in) {
  __shared__ int values[kThreads];
  const int t = threadIdx.x;
  values[bug ? t / 2 : t] = in[t];
  if (bug && t >= kThreads / 2) values[t] = 0;
  __syncthreads();
  out[blockIdx.x * kThreads + t] = values[t];
}
template <bool bug>
__global__ void same_value_written(int* out, const int* in) {
  __shared__ int value;
  if (bug || threadIdx.x == 0) value = in[blockIdx.x];
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = value;
}
template <bool bug>
__global__ void warp_read_after_write(int* out, const int* in) {
  __shared__ int values[kThreads];
  const int t = threadIdx.x;
  values[t] = 0;
  __syncthreads();
  values[t] = in[t];
  if (!bug) __syncwarp();
  out[blockIdx.x * kThreads + t] = values[t ^ 1];
}
template <bool bug>
__global__ void warp_write_after_read(int* out, const int* in) {
  __shared__ int values[kThreads];
  const int t = threadIdx.x;
  values[t] = in[t];
  __syncwarp();
  const int other = values[t ^ 1];
  if (!bug) __syncwarp();
  values[t] = other;
  out[blockIdx.x * kThreads + t] = values[t];
}
template <bool bug>
__global__ void syncwarp_of_others(int* out, const int* in) {  // the halves of a warp wait among themselves
  __shared__ int values[kThreads];
  const int t = threadIdx.x;
  values[t] = 0;
  __syncthreads();
  values[t] = in[t];
  __syncwarp(t % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  out[blockIdx.x * kThreads + t] = values[t ^ (bug ? 16 : 1)];
}
template <bool bug>
__global__ void shuffle_is_no_barrier(int* out, const int* in) {
  __shared__ int values[kThreads];
  const int t = threadIdx.x;
  values[t] = in[t];
  const int zero = __shfl_xor_sync(0xffffffffu, 0, 1);
  if (!bug) __syncwarp();
  out[blockIdx.x * kThreads + t] = values[t ^ 1] + zero;
}
template <bool bug>
__global__ void shared_counter(int* out, const int*) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (bug) {
    ++count;
  } else {
    atomicAdd(&count, 1);
  }
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = count;
}
template <bool bug>
__global__ void atomic_and_plain(int* out, const int*) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1);
  if (!bug) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = count;
}

// ---- global memory

template <bool bug>
__global__ void blocks_write_after_write(int* out, const int* in) { out[(bug ? 0 : blockIdx.x * kThreads) + threadIdx.x] = in[threadIdx.x]; }
template <bool bug>
__global__ void blocks_read_and_write(int* out, const int* in) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  out[i] = in[i];
  if (bug) out[i] += *const_cast<volatile int*>(out + (i + kThreads) % (kBlocks * kThreads));
}
template <bool bug>
__global__ void global_counter(int* out, const int*) {
  if (bug) {
    out[0] += 1;
  } else {
    atomicAdd(out, 1);
  }
}
template <bool bug>
__global__ void threads_through_global(int* out, const int* in) {
  const int first = blockIdx.x * kThreads, t = threadIdx.x;
  out[first + t] = in[t];
  if (!bug) __syncthreads();
  const int other = *const_cast<volatile int*>(out + first + kThreads - 1 - t);
  __syncthreads();
  out[first + t] = other;
}
template <bool bug>
__global__ void blocks_read_parts(int* out, const int* in) {  // left for whichever block comes last
  if (threadIdx.x != 0) return;
  const unsigned block = blockIdx.x, other = (block + 1) % kBlocks;
  *const_cast<volatile int*>(out + block) = in[block];
  __threadfence();
  int seen;  // no conditional expression: one of a plain and a volatile int is volatile
  if constexpr (bug) seen = out[other];
  else seen = *const_cast<volatile int*>(out + other);
  if (seen < 0) *const_cast<volatile int*>(out + block) = 0;
}
template <bool bug>
__global__ void read_only_is_written(int* out, const int* in) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (bug) out[i] = 1;
  out[i] = __ldg(bug ? out + i : in + i) + 1;
}

// ---- asynchronous copies

template <bool bug>
__global__ void copy_without_wait(int* out, const int* in) {
  __shared__ alignas(16) int values[4 * kThreads];
  const int t = threadIdx.x;
  copy_async(values + 4 * t, in + 4 * (t % 16));
  commit();
  if (!bug) wait<0>();
  out[blockIdx.x * kThreads + t] = values[4 * t];
}
template <bool bug>
__global__ void copy_waits_for_too_few(int* out, const int* in) {
  __shared__ alignas(16) int values[2][4 * kThreads];
  const int t = threadIdx.x;
  for (int stage = 0; stage < 2; ++stage) {
    copy_async(values[stage] + 4 * t, in + 4 * (t % 16));
    commit();
  }
  wait<1>();
  int sum = values[0][4 * t];
  if (!bug) wait<0>();
  sum += values[1][4 * t];
  wait<0>();
  out[blockIdx.x * kThreads + t] = sum;
}
template <bool bug>
__global__ void copy_wait_without_barrier(int* out, const int* in) {
  __shared__ alignas(16) int values[4 * kThreads];
  const int t = threadIdx.x;
  values[4 * t] = 0;
  __syncthreads();
  copy_async(values + 4 * t, in + 4 * (t % 16));
  commit();
  wait<0>();
  if (!bug) __syncthreads();
  out[blockIdx.x * kThreads + t] = values[4 * (kThreads - 1 - t)];
}
template <bool bug>
__global__ void copy_into_what_is_read(int* out, const int* in) {
  __shared__ alignas(16) int values[4 * kThreads];
  const int t = threadIdx.x;
  copy_async(values + 4 * t, in + 4 * (t % 16));
  commit();
  wait<0>();
  __syncthreads();
  const int other = values[4 * (kThreads - 1 - t)];
  if (!bug) __syncthreads();
  copy_async(values + 4 * t, in + 4 * (t % 16));
  commit();
  wait<0>();
  out[blockIdx.x * kThreads + t] = other + values[4 * t];
}
template <bool bug>
__global__ void copy_never_awaited(int* out, const int* in) {
  __shared__ alignas(16) int values[4 * kThreads];
  const int t = threadIdx.x;
  copy_async(values + 4 * t, in + 4 * (t % 16));
  commit();
  if (!bug) wait<0>();
  out[blockIdx.x * kThreads + t] = in[t];
}
template <bool bug>
__global__ void copy_beyond_the_end(int* out, const int* in) {
  __shared__ alignas(16) int values[4 * kThreads];
  const int t = threadIdx.x, i = 4 * t;
  const int left = kBlocks * kThreads - i;
  copy_async(values + i, in + i, bug ? 16 : left >= 4 ? 16 : left > 0 ? 4 * left : 0);
  commit();
  wait<0>();
  out[blockIdx.x * kThreads + t] = values[i];
}
template <bool bug>
__global__ void copy_alignment(int* out, const int* in) {
  __shared__ alignas(16) int values[4 * kThreads];
  const int t = threadIdx.x;
  copy_async(values + 4 * t, in + t % 16 * (bug ? 1 : 4));
  commit();
  wait<0>();
  out[blockIdx.x * kThreads + t] = values[4 * t];
}

// ---- threads together

template <bool bug>
__global__ void divergent_barrier(int* out, const int* in) {
  const int t = threadIdx.x;
  out[blockIdx.x * kThreads + t] = in[t];
  if (bug && t < 32) {
    __syncthreads();
    out[blockIdx.x * kThreads + t] = 1;
  } else {
    __syncthreads();
  }
}
template <bool bug>
__global__ void leaves_before_barrier(int* out, const int* in) {
  const int t = threadIdx.x;
  if (bug && t == 5) return;
  __syncthreads();
  out[blockIdx.x * kThreads + t] = in[t];
}
template <bool bug>
__global__ void not_in_its_own_mask(int* out, const int*) {
  const int t = threadIdx.x;
  out[blockIdx.x * kThreads + t] = __shfl_xor_sync(bug ? 0x0000ffffu : t % 32 < 16 ? 0x0000ffffu : 0xffff0000u, t, 1);
}
template <bool bug>
__global__ void mask_names_an_ended_lane(int* out, const int*) {
  const int t = threadIdx.x;
  if (t == 63) return;
  out[blockIdx.x * kThreads + t] = __ballot_sync(bug || t < 32 ? 0xffffffffu : 0x7fffffffu, t > 2) != 0;
}
template <bool bug>
__global__ void shuffle_from_outside(int* out, const int*) {
  const int t = threadIdx.x;
  if (t % 32 < 16) out[blockIdx.x * kThreads + t] = __shfl_xor_sync(0x0000ffffu, t, bug ? 16 : 8);
}
template <bool bug>
__global__ void waits_for_each_other(int* out, const int*) {
  const int t = threadIdx.x;
  if (!bug || t % 32 < 16) out[blockIdx.x * kThreads + t] = __shfl_xor_sync(0xffffffffu, t, 1);
  __syncthreads();
}
template <bool bug>
__global__ void division_by_zero(int* out, const int* in) { out[blockIdx.x * kThreads + threadIdx.x] = 100 / (in[threadIdx.x] - (bug ? 0x01010101 : 0)); }

using Body = void (*)(int*, const int*);
struct Case {
  const char* name;
  const char* report;  ///< what the checker must say
  Body buggy, clean;
};
#define CASE(kernel, report) {#kernel, report, kernel<true>, kernel<false>}
const Case kCases[] = {
    CASE(global_read, "out of bounds: ld.global"),
    CASE(global_write, "out of bounds: st.global"),
    CASE(global_alignment, "misaligned: "),
    CASE(host_pointer, "not device memory"),
    CASE(shared_bounds, "out of bounds: st.shared"),
    CASE(shared_alignment, "misaligned: ld.shared"),
    CASE(matrix_alignment, "misaligned: ldmatrix"),
    CASE(uninitialised, "uninitialised shared memory: ld.shared"),
    CASE(read_after_write, "a race ("),
    CASE(write_after_read, "a race ("),
    CASE(write_after_write, "a race (write after write)"),
    CASE(same_value_written, "a race (write after write)"),
    CASE(warp_read_after_write, "a race ("),
    CASE(warp_write_after_read, "a race ("),
    CASE(syncwarp_of_others, "a race ("),
    CASE(shuffle_is_no_barrier, "a race (read after write)"),
    CASE(shared_counter, "a race ("),
    CASE(atomic_and_plain, "a race ("),
    CASE(blocks_write_after_write, "and another block, which writes"),
    CASE(blocks_read_and_write, "and another block, which"),
    CASE(global_counter, "a race ("),
    CASE(threads_through_global, "a race ("),
    CASE(blocks_read_parts, "and another block, which"),
    CASE(read_only_is_written, "read-only data: ld.global.nc"),
    CASE(copy_without_wait, "asynchronous copy: ld.shared"),
    CASE(copy_waits_for_too_few, "asynchronous copy: ld.shared"),
    CASE(copy_wait_without_barrier, "a race ("),
    CASE(copy_into_what_is_read, "cp.async.cg.shared.global at"),
    CASE(copy_never_awaited, "ends without waiting for its copies"),
    CASE(copy_beyond_the_end, "out of bounds: cp.async"),
    CASE(copy_alignment, "misaligned: cp.async"),
    CASE(divergent_barrier, "a barrier in divergent code"),
    CASE(leaves_before_barrier, " end"),
    CASE(not_in_its_own_mask, "is not in its own mask"),
    CASE(mask_names_an_ended_lane, " end"),
    CASE(shuffle_from_outside, "which is not in the mask"),
    CASE(waits_for_each_other, "deadlock"),
    CASE(division_by_zero, "division by zero"),
};

/// What the checker says of a launch, or nothing.
std::string run(Body body) {
  const size_t bytes = kBlocks * kThreads * sizeof(int);
  void *out = nullptr, *in = nullptr;
  cudaMalloc(&out, bytes), cudaMalloc(&in, bytes);
  std::memset(out, 0, bytes), std::memset(in, 1, bytes);
  std::string report;
  try {
    body<<<kBlocks, kThreads, kThreads * sizeof(int)>>>(static_cast<int*>(out), static_cast<const int*>(in));
    if (cudaGetLastError() != cudaSuccess) report = "the launch was refused";
  } catch (const cuda_on_cpu::Violation& violation) {
    report = violation.what();
  }
  cudaFree(out), cudaFree(in);
  return report;
}

}  // namespace

int main(int argument_count, char** arguments) {
  int failures = 0;
  for (const auto order : {cuda_on_cpu::Order::forward, cuda_on_cpu::Order::backward, cuda_on_cpu::Order::random})
    for (uint64_t seed = 1; seed <= (order == cuda_on_cpu::Order::random ? 4 : 1); ++seed)
      for (const Case& c : kCases) {
        if (argument_count > 1 && std::strcmp(arguments[1], c.name) != 0) continue;
        cuda_on_cpu::options().order = order;
        cuda_on_cpu::options().seed = seed;
        const std::string clean = run(c.clean), buggy = run(c.buggy);
        const bool right = clean.empty() && buggy.find(c.report) != std::string::npos;
        if (!right || argument_count > 1) std::printf("%s: wanted '%s', got '%s'; without the bug '%s'\n", c.name, c.report, buggy.c_str(), clean.c_str());
        failures += !right;
      }
  std::printf("%zu bugs, %d failures\n", std::size(kCases), failures);
  return failures == 0 ? 0 : 1;
}
