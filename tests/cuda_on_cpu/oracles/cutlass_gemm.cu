// NVIDIA's own int8 GEMM (CUTLASS, sm_80: cp.async pipeline of three stages, ldmatrix, mma m16n8k32) through its own host code, against a
// loop. Exit status 0 if every output is right.
//
//   cutlass_gemm M N K [unchecked]
//
// Where M or N is no multiple of 64, the pipeline reads rows of shared memory that it never filled (their results are not stored):
// the checker says so, which is why there is a way without it.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

#include <cutlass/gemm/device/gemm.h>

#include "fibers.h"

using Gemm = cutlass::gemm::device::Gemm<int8_t, cutlass::layout::RowMajor, int8_t, cutlass::layout::ColumnMajor, int32_t, cutlass::layout::RowMajor, int32_t,
                                         cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, cutlass::gemm::GemmShape<64, 64, 64>,
                                         cutlass::gemm::GemmShape<32, 32, 64>, cutlass::gemm::GemmShape<16, 8, 32>,
                                         cutlass::epilogue::thread::LinearCombination<int32_t, 4, int32_t, int32_t>,
                                         cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, 3>;

int main(int argument_count, char** arguments) try {
  if (argument_count < 4) return 2;
  cuda_on_cpu::options().check = argument_count == 4;
  const int m = std::atoi(arguments[1]), n = std::atoi(arguments[2]), k = std::atoi(arguments[3]);
  void *a_data = nullptr, *b_data = nullptr, *c_data = nullptr;
  cudaMalloc(&a_data, static_cast<size_t>(m) * k), cudaMalloc(&b_data, static_cast<size_t>(n) * k), cudaMalloc(&c_data, static_cast<size_t>(m) * n * 4);
  auto *a = static_cast<int8_t*>(a_data), *b = static_cast<int8_t*>(b_data);
  auto* c = static_cast<int32_t*>(c_data);
  std::mt19937 random(1);
  for (int i = 0; i < m * k; ++i) a[i] = static_cast<int8_t>(random());
  for (int i = 0; i < n * k; ++i) b[i] = static_cast<int8_t>(random());
  Gemm gemm;
  const cutlass::Status status = gemm({{m, n, k}, {a, k}, {b, k}, {c, n}, {c, n}, {1, 0}});
  if (status != cutlass::Status::kSuccess) {
    std::printf("%s\n", cutlassGetStatusString(status));
    return 1;
  }
  int64_t wrong = 0;
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      int32_t sum = 0;
      for (int l = 0; l < k; ++l) sum += a[i * k + l] * b[j * k + l];
      wrong += sum != c[i * n + j];
    }
  std::printf("%lld of %lld wrong\n", static_cast<long long>(wrong), static_cast<long long>(m) * n);
  return wrong != 0;
} catch (const cuda_on_cpu::Violation& violation) {
  std::printf("%s\n", violation.what());
  return 1;
}
