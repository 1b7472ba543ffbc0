// Integer and floating-point instructions as nvcc's PTX runs them here, against what the C++ language and the host versions in NVIDIA's
// own headers (half precision) say. Exit status 0 if every result is the same.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>

namespace {

constexpr int kCount = 4096, kResults = 37;
int wrong = 0;

__global__ void integers(const uint32_t* in, uint64_t* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t a = in[3 * i], b = in[3 * i + 1], c = in[3 * i + 2];
  const auto sa = static_cast<int32_t>(a), sb = static_cast<int32_t>(b);
  uint64_t* r = out + kResults * i;
  *r++ = __popc(a);
  *r++ = __clz(sa);
  *r++ = __ffs(sa);
  *r++ = __brev(a);
  uint32_t t;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(t) : "r"(a), "r"(b), "r"(c));  // __byte_perm leaves out the signs
  *r++ = t;
  *r++ = __funnelshift_l(a, b, c);
  *r++ = __funnelshift_r(a, b, c);
  *r++ = __funnelshift_lc(a, b, c);
  *r++ = __funnelshift_rc(a, b, c);
  *r++ = __umulhi(a, b);
  *r++ = static_cast<uint32_t>(__mulhi(sa, sb));
  *r++ = static_cast<uint64_t>(__mul64hi(static_cast<int64_t>(a) << 32 | b, static_cast<int64_t>(c) << 32 | a));
  *r++ = static_cast<uint32_t>(__dp4a(sa, sb, static_cast<int32_t>(c)));
  *r++ = __dp4a(a, b, c);
  *r++ = __dp2a_lo(a, b, c);
  *r++ = __dp2a_hi(a, b, c);
  *r++ = static_cast<uint32_t>(__dp2a_hi(sa, sb, static_cast<int32_t>(c)));
  *r++ = static_cast<uint64_t>(static_cast<int64_t>(sa) * sb);
  *r++ = a / (b | 1u);
  *r++ = a % (b | 1u);
  *r++ = static_cast<uint32_t>(sa / (sb >> 16 | 1));
  *r++ = static_cast<uint32_t>(sa % (sb >> 16 | 1));
  *r++ = static_cast<uint32_t>(sa >> (b & 31));
  *r++ = a >> (c & 31) << (b & 31);
  *r++ = (static_cast<uint64_t>(a) << 32 | b) / (static_cast<uint64_t>(c) << 3 | 1);
  *r++ = (a & b) | (~a & c);
  *r++ = (a ^ b ^ c) & (a | ~b);
  asm("bfe.u32 %0, %1, %2, %3;" : "=r"(t) : "r"(a), "r"(b & 63), "r"(c & 63));
  *r++ = t;
  asm("bfe.s32 %0, %1, %2, %3;" : "=r"(t) : "r"(a), "r"(b & 31), "r"(c & 31));
  *r++ = t;
  asm("bfi.b32 %0, %1, %2, %3, %4;" : "=r"(t) : "r"(a), "r"(c), "r"(b & 31), "r"(c & 31));
  *r++ = t;
  asm("cvt.sat.u8.s32 %0, %1;" : "=r"(t) : "r"(sa >> 20));
  *r++ = t;
  asm("cvt.sat.s8.s32 %0, %1;" : "=r"(t) : "r"(sa >> 20));
  *r++ = t;
  asm("lop3.b32 %0, %1, %2, %3, 0xe8;" : "=r"(t) : "r"(a), "r"(b), "r"(c));  // majority
  *r++ = t;
  *r++ = min(sa, sb) > max(static_cast<int32_t>(c), 5);
  *r++ = static_cast<uint32_t>(abs(sa));
  *r++ = static_cast<uint64_t>(llabs(static_cast<long long>(sa) << 20));
  *r++ = a < b ? c : ~c;
}

uint64_t field(uint32_t a, uint32_t position, uint32_t length, bool is_signed) {
  uint64_t wide = is_signed ? static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(a))) : a;  // bits beyond the 31st
  wide = position > 63 ? 0 : is_signed ? static_cast<uint64_t>(static_cast<int64_t>(wide) >> position) : wide >> position;
  if (length == 0) return 0;
  if (length > 31) return static_cast<uint32_t>(wide);
  const uint32_t value = static_cast<uint32_t>(wide) & ((1u << length) - 1);
  return is_signed && value >> (length - 1) & 1 ? static_cast<uint32_t>(value | ~0u << length) : value;
}

void reference(uint32_t a, uint32_t b, uint32_t c, uint64_t* r) {
  const auto sa = static_cast<int32_t>(a), sb = static_cast<int32_t>(b);
  const uint64_t pair = static_cast<uint64_t>(b) << 32 | a;
  int leading = 0, first = 0;
  while (leading < 32 && !(a >> (31 - leading) & 1)) ++leading;
  while (first < 32 && !(a >> first & 1)) ++first;
  uint32_t reversed = 0, permuted = 0;
  int population = 0, dot_signed = 0, dot_unsigned = 0;
  for (int i = 0; i < 32; ++i) reversed |= (a >> i & 1) << (31 - i), population += static_cast<int>(a >> i & 1);
  for (int i = 0; i < 4; ++i) {
    permuted |= static_cast<uint32_t>(pair >> 8 * (c >> 4 * i & 7) & 255) << 8 * i;
    if (c >> 4 * i & 8) permuted = (permuted & ~(255u << 8 * i)) | (permuted >> (8 * i + 7) & 1 ? 255u << 8 * i : 0);
    dot_signed += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
    dot_unsigned += static_cast<uint8_t>(a >> 8 * i) * static_cast<uint8_t>(b >> 8 * i);
  }
  const uint32_t wrapped = c & 31, clamped = c < 32 ? c : 32;
  *r++ = static_cast<uint64_t>(population);
  *r++ = static_cast<uint64_t>(leading);
  *r++ = a == 0 ? 0 : static_cast<uint64_t>(first) + 1;
  *r++ = reversed;
  *r++ = permuted;
  *r++ = static_cast<uint32_t>(pair << wrapped >> 32);
  *r++ = static_cast<uint32_t>(pair >> wrapped);
  *r++ = static_cast<uint32_t>(pair << clamped >> 32);
  *r++ = static_cast<uint32_t>(pair >> clamped);
  *r++ = static_cast<uint64_t>(a) * b >> 32;
  *r++ = static_cast<uint32_t>(static_cast<int64_t>(sa) * sb >> 32);
  *r++ = static_cast<uint64_t>(static_cast<__int128>(static_cast<int64_t>(a) << 32 | b) * (static_cast<int64_t>(c) << 32 | a) >> 64);
  *r++ = static_cast<uint32_t>(dot_signed) + c;
  *r++ = static_cast<uint32_t>(dot_unsigned) + c;
  *r++ = (a & 0xffffu) * (b & 0xffu) + (a >> 16) * (b >> 8 & 0xffu) + c;
  *r++ = (a & 0xffffu) * (b >> 16 & 0xffu) + (a >> 16) * (b >> 24) + c;
  *r++ = static_cast<uint32_t>(static_cast<int16_t>(a) * static_cast<int8_t>(b >> 16) + static_cast<int16_t>(a >> 16) * static_cast<int8_t>(b >> 24)) + c;
  *r++ = static_cast<uint64_t>(static_cast<int64_t>(sa) * sb);
  *r++ = a / (b | 1u);
  *r++ = a % (b | 1u);
  *r++ = static_cast<uint32_t>(static_cast<int64_t>(sa) / (sb >> 16 | 1));
  *r++ = static_cast<uint32_t>(static_cast<int64_t>(sa) % (sb >> 16 | 1));
  *r++ = static_cast<uint32_t>(sa >> (b & 31));
  *r++ = a >> (c & 31) << (b & 31);
  *r++ = (static_cast<uint64_t>(a) << 32 | b) / (static_cast<uint64_t>(c) << 3 | 1);
  *r++ = (a & b) | (~a & c);
  *r++ = (a ^ b ^ c) & (a | ~b);
  *r++ = field(a, b & 63, c & 63, false);
  *r++ = field(a, b & 31, c & 31, true);
  const uint32_t mask = static_cast<uint32_t>((uint64_t{1} << (c & 31)) - 1) << (b & 31);
  *r++ = (c & ~mask) | (a << (b & 31) & mask);
  const int small = sa >> 20;
  *r++ = static_cast<uint64_t>(small < 0 ? 0 : small > 255 ? 255 : small);
  *r++ = static_cast<uint32_t>(small < -128 ? -128 : small > 127 ? 127 : small);
  *r++ = (a & b) | (b & c) | (a & c);
  *r++ = (sa < sb ? sa : sb) > (static_cast<int32_t>(c) > 5 ? static_cast<int32_t>(c) : 5);
  *r++ = sa < 0 ? 0u - a : a;
  *r++ = static_cast<uint64_t>(sa < 0 ? -static_cast<int64_t>(sa) : sa) << 20;
  *r++ = a < b ? c : ~c;
}

__global__ void floats(const float* in, float* out, int32_t* whole, uint16_t* halves) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float a = in[3 * i], b = in[3 * i + 1], c = in[3 * i + 2];
  float* r = out + 8 * i;
  *r++ = __fadd_rn(a, b);
  *r++ = __fmul_rn(a, b);
  *r++ = __fmaf_rn(a, b, c);
  *r++ = __fdiv_rn(a, b);
  *r++ = __fsqrt_rn(a);
  *r++ = fminf(a, b);
  *r++ = fmaxf(a, b);
  *r++ = rintf(a);
  int32_t* w = whole + 4 * i;
  *w++ = __float2int_rn(a);
  *w++ = __float2int_rd(a);
  *w++ = static_cast<int32_t>(__float2uint_rz(a));
  *w++ = static_cast<int32_t>(__float2ll_ru(a));
  halves[2 * i] = __half_as_ushort(__float2half_rn(a));
  halves[2 * i + 1] = __bfloat16_as_ushort(__float2bfloat16_rn(a));
}
__global__ void widen_half(float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = __half2float(__ushort_as_half(static_cast<unsigned short>(i)));
}

template <class T>
T* device(int count) {
  void* data = nullptr;
  cudaMalloc(&data, count * sizeof(T));
  return static_cast<T*>(data);
}

/// NaN equals NaN: which one is the hardware's affair.
void compare(const char* what, int i, float got, float wanted) {
  if (std::memcmp(&got, &wanted, 4) == 0 || (got != got && wanted != wanted)) return;
  if (++wrong <= 20) std::printf("%s %d: got %g, wanted %g\n", what, i, static_cast<double>(got), static_cast<double>(wanted));
}
void compare_bits(const char* what, int i, int64_t got, int64_t wanted) {
  if (got != wanted && ++wrong <= 20) std::printf("%s %d: got %#llx, wanted %#llx\n", what, i, static_cast<unsigned long long>(got), static_cast<unsigned long long>(wanted));
}

int64_t clamped(double value, double low, double high) { return static_cast<int64_t>(value < low ? low : value > high ? high : value); }

}  // namespace

int main() {
  std::mt19937 random(1);
  auto* words = device<uint32_t>(3 * kCount);
  auto* results = device<uint64_t>(kResults * kCount);
  for (int i = 0; i < 3 * kCount; ++i) words[i] = random() % 8 == 0 ? random() % 70 : random() % 8 == 0 ? 0x80000000u : static_cast<uint32_t>(random());
  integers<<<kCount / 128, 128>>>(words, results);
  for (int i = 0; i < kCount; ++i) {
    uint64_t wanted[kResults];
    reference(words[3 * i], words[3 * i + 1], words[3 * i + 2], wanted);
    for (int j = 0; j < kResults; ++j) compare_bits("integer result", j, static_cast<int64_t>(results[kResults * i + j]), static_cast<int64_t>(wanted[j]));
  }

  auto* in = device<float>(3 * kCount);
  auto* out = device<float>(8 * kCount);
  auto* whole = device<int32_t>(4 * kCount);
  auto* halves = device<uint16_t>(2 * kCount);
  const float special[] = {0.0f, -0.0f, 1.0f, -1.5f, 2.5f, 65504.0f, 65519.9f, 65520.0f, 6e-8f, 5.96e-8f, 2.98e-8f, 1e-40f, 3e38f, -3e9f, 3e9f,
                           std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()};
  for (int i = 0; i < 3 * kCount; ++i) {
    const auto bits = static_cast<uint32_t>(random());
    std::memcpy(in + i, &bits, 4);
    if (random() % 3 == 0) in[i] = special[random() % (sizeof special / sizeof *special)];
    if (random() % 3 == 0) in[i] = static_cast<float>(static_cast<int32_t>(random())) / 1e6f;
  }
  floats<<<kCount / 128, 128>>>(in, out, whole, halves);
  for (int i = 0; i < kCount; ++i) {
    const float a = in[3 * i], b = in[3 * i + 1], c = in[3 * i + 2], *r = out + 8 * i;
    compare("add", i, r[0], a + b);
    compare("mul", i, r[1], a * b);
    compare("fma", i, r[2], std::fma(a, b, c));
    compare("div", i, r[3], a / b);
    compare("sqrt", i, r[4], std::sqrt(a));
    const bool one_is_nan = (a != a) != (b != b);  // the number counts; the C library makes an exception for signaling NaNs
    if (one_is_nan) compare("min", i, r[5], a != a ? b : a), compare("max", i, r[6], a != a ? b : a);
    if (!one_is_nan && (a != 0 || b != 0)) compare("min", i, r[5], std::fmin(a, b)), compare("max", i, r[6], std::fmax(a, b));
    compare("rint", i, r[7], std::nearbyint(a));
    const bool nan = a != a;
    compare_bits("to int, nearest", i, whole[4 * i], nan ? 0 : clamped(std::nearbyint(double{a}), -2147483648.0, 2147483647.0));
    compare_bits("to int, down", i, whole[4 * i + 1], nan ? 0 : clamped(std::floor(double{a}), -2147483648.0, 2147483647.0));
    compare_bits("to uint, to zero", i, static_cast<uint32_t>(whole[4 * i + 2]), nan ? 0 : clamped(std::trunc(double{a}), 0.0, 4294967295.0));
    if (std::fabs(a) < 1e18f) compare_bits("to 64 bits, up", i, whole[4 * i + 3], static_cast<int32_t>(static_cast<int64_t>(std::ceil(double{a}))));
    if (!nan) compare_bits("half", i, halves[2 * i], __half_as_ushort(__float2half_rn(a)));  // the header's host version
    if (!nan) compare_bits("bfloat16", i, halves[2 * i + 1], __bfloat16_as_ushort(__float2bfloat16_rn(a)));
  }
  auto* wide = device<float>(65536);
  widen_half<<<512, 128>>>(wide);
  for (int i = 0; i < 65536; ++i) compare("half to float", i, wide[i], __half2float(__ushort_as_half(static_cast<unsigned short>(i))));
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
