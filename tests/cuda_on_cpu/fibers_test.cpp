// That the fiber run-time sees what it promises to see: each kernel below breaks one rule.
//
//   fibers_test              exit status 0 if every violation is reported, and a clean kernel is not
//   fibers_test overrun      reads shared memory past its end: for a build with AddressSanitizer, which must stop it
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <string>

namespace {

int failures = 0;

template <class... Parameters, class... Arguments>
void expect(const char* wanted, unsigned threads, void (*kernel)(Parameters...), const Arguments&... arguments) {
  cudaLaunchConfig_t config;
  config.gridDim = dim3(2);
  config.blockDim = dim3(threads);
  std::string report;
  try {
    cudaLaunchKernelEx(&config, kernel, arguments...);
  } catch (const cuda_on_cpu::Violation& violation) {
    report = violation.what();
  }
  const bool right = *wanted == 0 ? report.empty() : report.find(wanted) != std::string::npos;
  if (!right) std::printf("wanted '%s', got '%s'\n", wanted, report.c_str());
  failures += !right;
}

__global__ void clean(int* sum) {
  __shared__ int of_warp[2];
  int value = static_cast<int>(threadIdx.x);
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) sum[blockIdx.x] = of_warp[0] + of_warp[1];
}

__global__ void halves_of_a_warp(int* results) {
  const uint32_t mask = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
  results[threadIdx.x] = __shfl_xor_sync(mask, static_cast<int>(threadIdx.x), 1);
}

__global__ void divergent_barrier() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void thread_leaves_before_barrier() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void lane_leaves_before_shuffle(int* results) {
  if (threadIdx.x == 5) return;
  results[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void not_in_its_own_mask(int* results) { results[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1, 1); }

__global__ void names_lanes_that_do_not_exist(int* results) { results[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1); }

__global__ void waits_for_each_other(int* results) {
  if (threadIdx.x < 16) {
    results[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
  } else {
    __syncthreads();
  }
}

__global__ void shared_overrun(int* results, int index) {
  __shared__ int values[32];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  results[threadIdx.x] = values[threadIdx.x + static_cast<unsigned>(index)];
}

}  // namespace

int main(int argument_count, char** arguments) {
  int memory[64] = {};
  int* const results = memory;
  if (argument_count > 1 && std::strcmp(arguments[1], "overrun") == 0) {
    expect("", 32, shared_overrun, results, 1);
    return failures;
  }
  for (const auto order : {cuda_on_cpu::Order::forward, cuda_on_cpu::Order::backward, cuda_on_cpu::Order::random}) {
    cuda_on_cpu::options().order = order;
    expect("", 64, clean, results);
    if (results[0] != 64 * 63 / 2 || results[1] != results[0]) std::printf("wrong sum %d\n", results[0]), ++failures;
    expect("", 32, halves_of_a_warp, results);
    for (int i = 0; i < 32; ++i)
      if (results[i] != (i ^ 1)) std::printf("lane %d got %d\n", i, results[i]), ++failures;
    expect("barrier in divergent code", 64, divergent_barrier);
    expect(" end", 64, thread_leaves_before_barrier);
    expect(" end", 32, lane_leaves_before_shuffle, results);
    expect("is not in its own mask", 32, not_in_its_own_mask, results);
    expect("names lane 17, which has ended or does not exist", 17, names_lanes_that_do_not_exist, results);
    expect("deadlock", 32, waits_for_each_other, results);
  }
  std::printf("%d failures\n", failures);
  return failures;
}
