// Memory accesses of one warp, and what the profile must count for each: sectors of 32 bytes in global memory, wavefronts in shared
// memory. test_checker.py compares its output with the comments.
#include <cuda_runtime.h>

#include "memory.h"

__global__ void accesses(const int* in, int* out) {
  extern __shared__ int tile[];  // 32 x 33
  const int t = threadIdx.x;
  int sum = 0;
  sum += in[t];                  // wanted: 4 of 4
  sum += in[8 * t];              // wanted: 32 of 4
  sum += in[t + 1];              // wanted: 5 of 4
  sum += in[t / 32];             // wanted: 1 of 1
  tile[t] = sum;                 // wanted: 1 of 1
  tile[32 * t + 32] = sum;       // wanted: 32 of 1
  __syncwarp();
  const int all = tile[t / 32];  // wanted: 1 of 1
  out[t] = all;                  // wanted: 4 of 4
  const int2 pair = reinterpret_cast<const int2*>(tile)[t];  // wanted: 2 of 2
  out[t + 32] = pair.x + pair.y;                            // wanted: 4 of 4
}

int main() {
  cuda_on_cpu::options().profile = true;
  cuda_on_cpu::options().check = false;
  void *in = nullptr, *out = nullptr;
  cudaMalloc(&in, 4096), cudaMalloc(&out, 4096);
  accesses<<<2, 32, 32 * 33 * sizeof(int)>>>(static_cast<const int*>(in), static_cast<int*>(out));
  cuda_on_cpu::print_profile(stdout);
}
