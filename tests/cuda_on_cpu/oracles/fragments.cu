// Checks mma and ldmatrix, as nvcc's PTX runs them here, against tables of fragment layouts on standard input (cute_tables.cpp,
// tinygrad_tables.py). Nothing here knows a layout. Exit status 0 if every value is where the tables say.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace {

struct M8n8k16 {
  static constexpr int m = 8, n = 8, k = 16;
  static __device__ void run(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* d) {
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%4, %5};" : "=r"(d[0]), "=r"(d[1]) : "r"(a[0]), "r"(b[0]), "r"(c[0]), "r"(c[1]));
  }
};
struct M16n8k16 {
  static constexpr int m = 16, n = 8, k = 16;
  static __device__ void run(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* d) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  }
};
struct M16n8k32 {
  static constexpr int m = 16, n = 8, k = 32;
  static __device__ void run(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* d) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  }
};

template <class Shape>
__global__ void multiply(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* d) {
  constexpr int kA = Shape::m * Shape::k / 128, kB = Shape::n * Shape::k / 128, kC = Shape::m * Shape::n / 32;
  Shape::run(a + kA * threadIdx.x, b + kB * threadIdx.x, c + kC * threadIdx.x, d + kC * threadIdx.x);
}

template <int count, bool transposed>
__global__ void load(const uint4* rows, uint32_t* out) {
  __shared__ uint4 shared[32];
  shared[threadIdx.x] = rows[threadIdx.x];
  __syncwarp();
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared + threadIdx.x % (8 * count)));
  uint32_t r[4] = {};
  if constexpr (count == 1 && !transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  if constexpr (count == 2 && !transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
  if constexpr (count == 4 && !transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
  if constexpr (count == 1 && transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  if constexpr (count == 4 && transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
  for (int i = 0; i < count; ++i) out[count * threadIdx.x + i] = r[i];
}

using Table = std::map<std::pair<int, int>, int>;  // lane and value to offset
std::map<std::string, Table> tables;
std::mt19937 random_bits(1);
int wrong = 0;

void conclude(const std::string& name, int mistakes, size_t of) {
  std::printf("%s: %d of %zu wrong\n", name.c_str(), mistakes, of);
  wrong += mistakes;
}

template <class T>
T* device(const std::vector<T>& values) {
  void* data = nullptr;
  cudaMalloc(&data, values.size() * sizeof(T));
  std::memcpy(data, values.data(), values.size() * sizeof(T));
  return static_cast<T*>(data);
}

template <class Shape>
void check_mma(const std::string& name) {
  if (tables.count(name + ".A") == 0) return;
  constexpr int m = Shape::m, n = Shape::n, k = Shape::k;
  const Table &ta = tables[name + ".A"], &tb = tables[name + ".B"], &tc = tables[name + ".C"];
  if (ta.size() != m * k || tb.size() != n * k || tc.size() != m * n) return conclude(name + ", incomplete tables", 1, 1);
  int mistakes = 0;
  for (int repetition = 0; repetition < 8; ++repetition) {
    std::vector<uint8_t> a(m * k), fragment_a(m * k);
    std::vector<int8_t> b(n * k), fragment_b(n * k);
    std::vector<int32_t> c(m * n), fragment_c(m * n), zero(m * n);
    for (auto& x : a) x = static_cast<uint8_t>(random_bits());
    for (auto& x : b) x = static_cast<int8_t>(random_bits());
    for (auto& x : c) x = static_cast<int32_t>(random_bits());
    for (const auto& [place, offset] : ta) fragment_a[place.first * (m * k / 32) + place.second] = a[offset];
    for (const auto& [place, offset] : tb) fragment_b[place.first * (n * k / 32) + place.second] = b[offset];
    for (const auto& [place, offset] : tc) fragment_c[place.first * (m * n / 32) + place.second] = c[offset];
    int32_t* const d = device(zero);
    multiply<Shape><<<1, 32>>>(reinterpret_cast<uint32_t*>(device(fragment_a)), reinterpret_cast<uint32_t*>(device(fragment_b)),
                               reinterpret_cast<uint32_t*>(device(fragment_c)), reinterpret_cast<uint32_t*>(d));
    for (const auto& [place, offset] : tc) {
      auto sum = static_cast<uint32_t>(c[offset]);
      for (int i = 0; i < k; ++i) sum += static_cast<uint32_t>(a[offset % m + m * i] * b[offset / m + n * i]);
      mistakes += static_cast<uint32_t>(d[place.first * (m * n / 32) + place.second]) != sum;
    }
  }
  conclude(name, mistakes, 8 * tc.size());
}

bool bit(const void* data, int i) { return static_cast<const uint8_t*>(data)[i / 8] >> i % 8 & 1; }

template <int count, bool transposed>
void check_ldmatrix(const std::string& name) {
  if (tables.count(name + ".to") == 0) return;
  std::vector<uint8_t> memory(512), rows(512);
  for (auto& x : memory) x = static_cast<uint8_t>(random_bits());
  for (const auto& [place, offset] : tables[name + ".from"])
    if (place.first < 8 * count) rows[place.first * 16 + place.second / 8] |= static_cast<uint8_t>(bit(memory.data(), offset) << place.second % 8);
  uint32_t* const out = device(std::vector<uint32_t>(32 * count));
  load<count, transposed><<<1, 32>>>(reinterpret_cast<const uint4*>(device(rows)), out);
  int mistakes = 0;
  for (const auto& [place, offset] : tables[name + ".to"]) mistakes += bit(out + place.first * count, place.second) != bit(memory.data(), offset);
  conclude(name, mistakes, tables[name + ".to"].size());
}

}  // namespace

int main() {
  std::string name;
  for (int lane, value, offset; std::cin >> name >> lane >> value >> offset;) tables[name][{lane, value}] = offset;
  check_mma<M8n8k16>("m8n8k16");
  check_mma<M16n8k16>("m16n8k16");
  check_mma<M16n8k32>("m16n8k32");
  check_ldmatrix<1, false>("ldmatrix.x1");
  check_ldmatrix<2, false>("ldmatrix.x2");
  check_ldmatrix<4, false>("ldmatrix.x4");
  check_ldmatrix<1, true>("ldmatrix.x1.trans");
  check_ldmatrix<4, true>("ldmatrix.x4.trans");
  return wrong != 0;
}
