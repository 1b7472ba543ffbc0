// CUB's BlockReduce and BlockScan, all algorithms, against a loop. Exit status 0 if every result is right.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

namespace {

constexpr int kThreads = 128, kItems = 3;

template <cub::BlockReduceAlgorithm algorithm, class T>
__global__ void reduce(const T* in, T* out, int valid) {
  using Reduce = cub::BlockReduce<T, kThreads, algorithm>;
  __shared__ typename Reduce::TempStorage storage;
  const T value = in[blockIdx.x * kThreads + threadIdx.x];
  const T sum = Reduce(storage).Sum(value, valid);
  __syncthreads();
  const T most = Reduce(storage).Reduce(value, [](T a, T b) { return a > b ? a : b; });
  if (threadIdx.x == 0) out[2 * blockIdx.x] = sum, out[2 * blockIdx.x + 1] = most;
}

template <cub::BlockScanAlgorithm algorithm, class T>
__global__ void scan(const T* in, T* out) {
  using Scan = cub::BlockScan<T, kThreads, algorithm>;
  __shared__ typename Scan::TempStorage storage;
  T items[kItems];
  const int first = (blockIdx.x * kThreads + threadIdx.x) * kItems;
  for (int i = 0; i < kItems; ++i) items[i] = in[first + i];
  Scan(storage).InclusiveSum(items, items);
  for (int i = 0; i < kItems; ++i) out[first + i] = items[i];
}

int wrong = 0;

template <class T>
std::vector<T> values(int count) {
  std::vector<T> result(count);
  for (int i = 0; i < count; ++i) result[i] = static_cast<T>((i * 2654435761u >> 7) % 1000);
  return result;
}

template <class T>
T* device(const std::vector<T>& from) {
  void* data = nullptr;
  cudaMalloc(&data, from.size() * sizeof(T));
  std::memcpy(data, from.data(), from.size() * sizeof(T));
  return static_cast<T*>(data);
}

template <cub::BlockReduceAlgorithm algorithm, class T>
void check_reduce(int valid) {
  const std::vector<T> in = values<T>(2 * kThreads);
  T* const out = device(std::vector<T>(4));
  reduce<algorithm, T><<<2, kThreads>>>(device(in), out, valid);
  for (int block = 0; block < 2; ++block) {
    T sum = 0, most = 0;
    for (int i = 0; i < kThreads; ++i) {
      const T value = in[block * kThreads + i];
      if (i < valid) sum += value;
      if (value > most) most = value;
    }
    wrong += out[2 * block] != sum || out[2 * block + 1] != most;
  }
}

template <cub::BlockScanAlgorithm algorithm, class T>
void check_scan() {
  const std::vector<T> in = values<T>(2 * kThreads * kItems);
  T* const out = device(in);
  scan<algorithm, T><<<2, kThreads>>>(device(in), out);
  T sum = 0;
  for (int i = 0; i < 2 * kThreads * kItems; ++i) {
    sum = (i == kThreads * kItems ? 0 : sum) + in[i];
    wrong += out[i] != sum;
  }
}

}  // namespace

int main() {
  for (const int valid : {kThreads, 77}) {
    check_reduce<cub::BLOCK_REDUCE_RAKING, int>(valid);
    check_reduce<cub::BLOCK_REDUCE_RAKING_COMMUTATIVE_ONLY, uint64_t>(valid);
    check_reduce<cub::BLOCK_REDUCE_WARP_REDUCTIONS, int>(valid);
    check_reduce<cub::BLOCK_REDUCE_WARP_REDUCTIONS, uint64_t>(valid);
  }
  check_scan<cub::BLOCK_SCAN_RAKING, int>();
  check_scan<cub::BLOCK_SCAN_RAKING_MEMOIZE, uint64_t>();
  check_scan<cub::BLOCK_SCAN_WARP_SCANS, int>();
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
