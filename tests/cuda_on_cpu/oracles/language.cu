// What else nvcc makes PTX of: calls, jump tables, local and constant memory, module variables, every atomic and every warp-wide
// function, against loops on the host. Exit status 0 if every result is the same.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace {

constexpr int kThreads = 64;
int wrong = 0;

void expect(const char* what, int64_t got, int64_t wanted) {
  if (got != wanted && ++wrong <= 20) std::printf("%s: got %lld, wanted %lld\n", what, static_cast<long long>(got), static_cast<long long>(wanted));
}

template <class T>
T* device(std::vector<T> from) {
  void* data = nullptr;
  cudaMalloc(&data, from.size() * sizeof(T));
  std::memcpy(data, from.data(), from.size() * sizeof(T));
  return static_cast<T*>(data);
}

__constant__ int table[5] = {10, 20, 30, 40, 50};
__constant__ int from_host[4];
__device__ int counter = 7;

struct Pair {
  int first;
  long long second;
};
__device__ __noinline__ Pair twice(Pair p, int n) {
  if (n == 0) return p;
  return twice({p.first + n, p.second * 2}, n - 1);
}

__global__ void control(const int* in, long long* out) {
  const int t = threadIdx.x;
  int local[16];
  for (int i = 0; i < 16; ++i) local[i] = in[(t + i) % kThreads];
  for (int i = 0; i < 8; ++i) {  // indices that only run-time knows
    const int a = in[i] & 15, b = (in[t] + i) & 15, x = local[a];
    local[a] = local[b];
    local[b] = x + 1;
  }
  long long sum = 0;
  for (int i = 0; i < 16; ++i) sum = sum * 3 + local[i];
  switch (in[t] % 9) {
    case 0: sum += 5; break;
    case 1: sum ^= 0x55; break;
    case 2: sum *= 7; break;
    case 3: sum -= t; break;
    case 4: sum |= 1; break;
    case 5: sum = -sum; break;
    case 6: sum <<= 2; break;
    default: sum += table[t % 5] + from_host[t % 4];
  }
  const Pair p = twice({t, 3}, t % 6);
  out[t] = sum + p.first * p.second;
  if (t == 0) atomicAdd(&counter, 1);
}

void test_control() {
  const int numbers[4] = {-1, 5, 1000, 12};
  cudaMemcpyToSymbol(from_host, numbers, sizeof numbers);
  std::vector<int> in(kThreads);
  for (int i = 0; i < kThreads; ++i) in[i] = static_cast<int>(i * 2654435761u >> 20);
  long long* const out = device(std::vector<long long>(kThreads));
  control<<<1, kThreads>>>(device(in), out);
  const int constants[5] = {10, 20, 30, 40, 50};
  for (int t = 0; t < kThreads; ++t) {
    int local[16];
    for (int i = 0; i < 16; ++i) local[i] = in[(t + i) % kThreads];
    for (int i = 0; i < 8; ++i) {
      const int x = local[in[i] & 15];
      local[in[i] & 15] = local[(in[t] + i) & 15];
      local[(in[t] + i) & 15] = x + 1;
    }
    long long sum = 0;
    for (int i = 0; i < 16; ++i) sum = sum * 3 + local[i];
    const int kind = in[t] % 9;
    if (kind == 0) sum += 5;
    if (kind == 1) sum ^= 0x55;
    if (kind == 2) sum *= 7;
    if (kind == 3) sum -= t;
    if (kind == 4) sum |= 1;
    if (kind == 5) sum = -sum;
    if (kind == 6) sum *= 4;
    if (kind > 6) sum += constants[t % 5] + numbers[t % 4];
    const int n = t % 6;
    expect("control", out[t], sum + (t + n * (n + 1) / 2) * (3ll << n));
  }
}

__global__ void atomics(unsigned* u, int* s, unsigned long long* l, float* f) {
  const unsigned t = threadIdx.x;
  atomicAdd(u, t);
  atomicMax(u + 1, t * 7 % 64);
  atomicMin(u + 2, t * 7 % 64 + 3);
  atomicAnd(u + 3, ~(1u << t % 32));
  atomicOr(u + 4, 1u << t % 32);
  atomicXor(u + 5, t);
  atomicInc(u + 6, 9);
  atomicDec(u + 7, 9);
  unsigned seen = *const_cast<volatile unsigned*>(u + 8);
  for (unsigned before = ~seen; before != seen;) before = seen, seen = atomicCAS(u + 8, before, before + 2);
  atomicExch(u + 9, 5u);
  atomicMin(s, -static_cast<int>(t));
  atomicMax(s + 1, static_cast<int>(t) - 100);
  atomicAdd(l, 1ull << 33);
  atomicAdd(f, 0.5f);
}

void test_atomics() {
  unsigned* const u = device<unsigned>({1, 0, 1000, 0xffffffffu, 0, 3, 0, 4, 0, 0});
  int* const s = device<int>({0, -1000});
  auto* const l = device<unsigned long long>({1});
  float* const f = device<float>({1.0f});
  atomics<<<2, kThreads>>>(u, s, l, f);
  const unsigned wanted[] = {1 + 2 * (63 * 64 / 2), 63, 3, 0, 0xffffffffu, 3, 128 % 10, 0, 256, 5};
  for (int i = 0; i < 10; ++i)
    if (i != 7) expect("atomic", u[i], wanted[i]);
  expect("atomicDec", u[7], (4 + 10 * 13 - 128) % 10);
  expect("atomicMin", s[0], -63);
  expect("atomicMax", s[1], -37);
  expect("64-bit atomicAdd", static_cast<int64_t>(l[0]), 1 + (128ll << 33));
  expect("float atomicAdd", static_cast<int64_t>(f[0]), 65);
}

__global__ void warps(const int* in, int* out) {
  const unsigned all = 0xffffffffu;
  const int t = threadIdx.x, v = in[t];
  int* r = out + 20 * t;
  *r++ = __shfl_sync(all, v, 5);
  *r++ = __shfl_sync(all, v, t + 3, 8);
  *r++ = __shfl_up_sync(all, v, 3);
  *r++ = __shfl_up_sync(all, v, 1, 16);
  *r++ = __shfl_down_sync(all, v, 2);
  *r++ = __shfl_down_sync(all, v, 5, 8);
  *r++ = __shfl_xor_sync(all, v, 9);
  *r++ = static_cast<int>(__ballot_sync(all, v % 3 == 0));
  *r++ = __any_sync(all, v == in[7]);
  *r++ = __all_sync(all, v >= 0);
  *r++ = static_cast<int>(__match_any_sync(all, v % 4));
  int same = 0;
  *r++ = static_cast<int>(__match_all_sync(all, v, &same));
  *r++ = same;
  *r++ = __reduce_add_sync(all, v);
  *r++ = __reduce_min_sync(all, v - 500);
  *r++ = static_cast<int>(__reduce_max_sync(all, static_cast<unsigned>(v)));
  *r++ = static_cast<int>(__reduce_xor_sync(all, static_cast<unsigned>(v)));
  *r++ = __syncthreads_count(v % 2);
  *r++ = __syncthreads_or(v == in[60]);
  *r++ = __syncthreads_and(v > in[60]);
}

void test_warps() {
  std::vector<int> in(kThreads);
  for (int i = 0; i < kThreads; ++i) in[i] = static_cast<int>(i * 2654435761u >> 22);
  int* const out = device(std::vector<int>(20 * kThreads));
  warps<<<1, kThreads>>>(device(in), out);
  int odd = 0;
  bool above = true;
  for (const int v : in) odd += v % 2, above = above && v > in[60];
  for (int t = 0; t < kThreads; ++t) {
    const int *r = out + 20 * t, *warp = in.data() + t / 32 * 32, lane = t % 32;
    int ballot = 0, any = 0, match = 0, sum = 0, least = warp[0], most = warp[0], bits = 0;
    for (int i = 0; i < 32; ++i) {
      ballot |= static_cast<int>(static_cast<unsigned>(warp[i] % 3 == 0) << i), any |= warp[i] == in[7];
      match |= static_cast<int>(static_cast<unsigned>(warp[i] % 4 == warp[lane] % 4) << i);
      sum += warp[i], least = std::min(least, warp[i]), most = std::max(most, warp[i]), bits ^= warp[i];
    }
    const int wanted[20] = {warp[5], warp[lane / 8 * 8 + (t + 3) % 8], warp[lane < 3 ? lane : lane - 3], warp[lane % 16 == 0 ? lane : lane - 1],
                            warp[lane + 2 > 31 ? lane : lane + 2], warp[lane % 8 > 2 ? lane : lane + 5], warp[lane ^ 9], ballot, any, 1, match, 0, 0,
                            sum, least - 500, most, bits, odd, 1, above};
    for (int i = 0; i < 20; ++i) expect(("warp function " + std::to_string(i)).c_str(), i > 17 ? r[i] != 0 : r[i], wanted[i]);
  }
}

}  // namespace

int main() {
  test_control();
  test_atomics();
  test_warps();
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
