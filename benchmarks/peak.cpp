// What one core can do at best: multiply-accumulates per second by instruction, and bytes per second by memory level.
// peak.py compiles this file into a shared library and calls the two functions at its end.
//
// A compute kernel is an asm block of 24 instructions over 12 accumulators, enough to hide every latency: nothing
// but the arithmetic units limits it. Threads start every burst together; a burst's rate is all the work over the time
// from the first start to the last end. The best burst counts.
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::vector<int> allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof set, &set);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  return cpus;
}

void pin(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

// work(thread) does a burst and returns how much it did. Best rate of all bursts that fit into `seconds`, at least three.
double best_rate(int threads, double seconds, const std::function<double(int)>& work) {
  if (threads == 1) {
    work(0);
    double best = 0;
    const double deadline = now() + seconds;
    for (int burst = 0; burst < 3 || now() < deadline; ++burst) {
      const double start = now();
      const double done = work(0);
      best = std::max(best, done / (now() - start));
    }
    return best;
  }
  const std::vector<int> cpus = allowed_cpus();
  std::vector<double> start(threads), end(threads), done(threads);
  std::atomic<int> arrived{0};
  std::atomic<bool> stop{false};
  double best = 0;
  auto barrier = [&](int& own) {
    ++arrived;
    ++own;
    while (arrived.load() < threads * own) std::this_thread::yield();
  };
  auto body = [&](int thread) {
    pin(cpus[thread % cpus.size()]);
    work(thread);
    int own = 0;
    const double deadline = now() + seconds;
    for (int burst = 0;; ++burst) {
      barrier(own);
      start[thread] = now();
      done[thread] = work(thread);
      end[thread] = now();
      barrier(own);
      if (thread == 0) {
        double sum = 0;
        for (double part : done) sum += part;
        best = std::max(best, sum / (*std::max_element(end.begin(), end.end()) - *std::min_element(start.begin(), start.end())));
        stop = burst >= 2 && now() > deadline;
      }
      barrier(own);
      if (stop) return;
    }
  };
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread) pool.emplace_back(body, thread);
  for (std::thread& thread : pool) thread.join();
  return best;
}

#if defined(__x86_64__)

#define TWELVE "0,1,2,3,4,5,6,7,8,9,10,11"
#define CLOBBERS_LOW \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
// Runs `body` (in it, \r is the accumulator) 24 times per turn.
#define KERNEL(name, features, body)                                                                           \
  __attribute__((target(features), noinline)) void name(int64_t turns) {                                       \
    asm volatile(                                                                                              \
        "vpxor %%xmm12,%%xmm12,%%xmm12\n vpxor %%xmm13,%%xmm13,%%xmm13\n"                                      \
        "vpxor %%xmm14,%%xmm14,%%xmm14\n vpxor %%xmm15,%%xmm15,%%xmm15\n"                                      \
        ".irp r," TWELVE "\n vpxor %%xmm\\r,%%xmm\\r,%%xmm\\r\n .endr\n"                                       \
        "1:\n .irp r," TWELVE "\n" body "\n .endr\n .irp r," TWELVE "\n" body "\n .endr\n dec %0\n jnz 1b\n"   \
        "vzeroupper\n"                                                                                         \
        : "+r"(turns)                                                                                          \
        :                                                                                                      \
        : "memory", "cc", CLOBBERS_LOW);                                                                       \
  }

KERNEL(vnni_zmm, "avx512f", "vpdpbusd %%zmm12,%%zmm13,%%zmm\\r")
KERNEL(vnni_ymm_evex, "avx2", "vpdpbusd %%ymm12,%%ymm13,%%ymm\\r")
KERNEL(vnni_ymm_vex, "avx2", "%{vex%} vpdpbusd %%ymm12,%%ymm13,%%ymm\\r")
KERNEL(int16_ymm, "avx2", "vpmaddwd %%ymm12,%%ymm13,%%ymm14\n vpaddd %%ymm14,%%ymm\\r,%%ymm\\r")
KERNEL(int8_ymm, "avx2", "vpmaddubsw %%ymm12,%%ymm13,%%ymm14\n vpmaddwd %%ymm15,%%ymm14,%%ymm14\n vpaddd %%ymm14,%%ymm\\r,%%ymm\\r")
KERNEL(bf16_zmm, "avx512f", "vdpbf16ps %%zmm12,%%zmm13,%%zmm\\r")
KERNEL(fma_zmm, "avx512f", "vfmadd231ps %%zmm12,%%zmm13,%%zmm\\r")
KERNEL(fma_ymm, "avx2,fma", "vfmadd231ps %%ymm12,%%ymm13,%%ymm\\r")

// 4 tiles of sums hide a product's latency, as a product takes 16 clocks.
__attribute__((noinline)) void amx_tiles(int64_t turns) {
  alignas(64) unsigned char shapes[64] = {1};  // palette 1, 16 rows of 64 bytes each
  for (int tile = 0; tile < 8; ++tile) shapes[16 + 2 * tile] = 64, shapes[48 + tile] = 16;
  asm volatile(
      "ldtilecfg %1\n"
      "1:\n .rept 6\n tdpbusd %%tmm7,%%tmm6,%%tmm0\n tdpbusd %%tmm7,%%tmm6,%%tmm1\n tdpbusd %%tmm7,%%tmm6,%%tmm2\n tdpbusd %%tmm7,%%tmm6,%%tmm3\n .endr\n"
      "dec %0\n jnz 1b\n tilerelease\n"
      : "+r"(turns)
      : "m"(shapes)
      : "memory", "cc");
}

bool amx_permitted() {  // the system call arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

struct Kernel {
  void (*run)(int64_t turns);
  int macs;  // per instruction (or group of instructions)
};

// features: what /proc/cpuinfo says, one word between blanks each.
Kernel find_kernel(const std::string& kind, const std::string& features) {
  auto has = [&](const char* feature) { return (" " + features + " ").find(std::string(" ") + feature + " ") != std::string::npos; };
  if (kind == "amx_tile" && has("amx_int8") && amx_permitted()) return {amx_tiles, 16384};
  if (kind == "vnni_zmm" && has("avx512_vnni")) return {vnni_zmm, 64};
  if (kind == "vnni_ymm" && has("avx512_vnni") && has("avx512vl")) return {vnni_ymm_evex, 32};
  if (kind == "vnni_ymm" && has("avx_vnni")) return {vnni_ymm_vex, 32};
  if (kind == "int16_ymm" && has("avx2")) return {int16_ymm, 16};
  if (kind == "int8_ymm" && has("avx2")) return {int8_ymm, 32};
  if (kind == "bf16_zmm" && has("avx512_bf16")) return {bf16_zmm, 32};
  if (kind == "fma_zmm" && has("avx512f")) return {fma_zmm, 16};
  if (kind == "fma_ymm" && has("fma")) return {fma_ymm, 8};
  return {nullptr, 0};
}

#define FOR_THIS_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
void stream(char* p, size_t bytes) {  // stores that go past the caches
  for (size_t i = 0; i < bytes; i += 64)
    asm volatile("movntdq %%xmm0,(%0)\n movntdq %%xmm0,16(%0)\n movntdq %%xmm0,32(%0)\n movntdq %%xmm0,48(%0)\n" : : "r"(p + i) : "memory");
  asm volatile("sfence" : : : "memory");
}

#else

struct Kernel {
  void (*run)(int64_t turns);
  int macs;
};
Kernel find_kernel(const std::string&, const std::string&) { return {nullptr, 0}; }
#define FOR_THIS_CPU
void stream(char* p, size_t bytes) { std::memset(p, 3, bytes); }

#endif

typedef uint64_t Line __attribute__((vector_size(64)));  // one cache line

FOR_THIS_CPU void read_all(const char* p, size_t bytes) {
  const Line* lines = reinterpret_cast<const Line*>(p);
  Line a{}, b{}, c{}, d{};
  for (size_t i = 0; i < bytes / 64; i += 4) {
    a |= lines[i];
    b |= lines[i + 1];
    c |= lines[i + 2];
    d |= lines[i + 3];
  }
  volatile uint64_t sink = (a | b | c | d)[0];
  (void)sink;
}

FOR_THIS_CPU void write_all(char* p, size_t bytes) {
  Line* lines = reinterpret_cast<Line*>(p);
  const Line value = {3, 3, 3, 3, 3, 3, 3, 3};
  for (size_t i = 0; i < bytes / 64; ++i) {
    lines[i] = value;
    asm volatile("" : : : "memory");  // not to become a call to memset
  }
}

FOR_THIS_CPU void copy_half(char* p, size_t bytes) {
  const Line* from = reinterpret_cast<const Line*>(p);
  Line* to = reinterpret_cast<Line*>(p + bytes / 2);
  for (size_t i = 0; i < bytes / 128; ++i) {
    to[i] = from[i];
    asm volatile("" : : : "memory");  // not to become a call to memcpy
  }
}

}  // namespace

// Multiply-accumulates per second; -1 if this CPU lacks the instruction. The caller pins itself when threads is 1.
extern "C" double probquant_peak_macs(const char* kind, const char* features, int threads, double seconds) {
  const Kernel kernel = find_kernel(kind, features);
  if (!kernel.run) return -1;
  const int64_t turns = kernel.macs > 64 ? 1000 : 20000;  // 0.1 ms or so
  return best_rate(threads, seconds, [&](int) {
    kernel.run(turns);
    return 24.0 * kernel.macs * double(turns);
  });
}

// Bytes per second, every thread on a buffer of its own; a copy counts what is read and what is written.
extern "C" double probquant_peak_bytes(const char* mode, int64_t bytes_per_thread, int threads, double seconds) {
  const std::string name = mode;
  const size_t bytes = std::max<size_t>(4096, size_t(bytes_per_thread) / 4096 * 4096);
  std::vector<char*> buffers(threads);
  for (char*& buffer : buffers) {
    buffer = static_cast<char*>(std::aligned_alloc(4096, bytes));
    std::memset(buffer, 1, bytes);
  }
  const int repeats = int(std::max<size_t>(1, (size_t(4) << 20) / bytes));
  const double rate = best_rate(threads, seconds, [&](int thread) {
    for (int i = 0; i < repeats; ++i) {
      char* buffer = buffers[thread];
      asm volatile("" : : "r"(buffer) : "memory");
      if (name == "read") read_all(buffer, bytes);
      else if (name == "write") write_all(buffer, bytes);
      else if (name == "stream") stream(buffer, bytes);
      else copy_half(buffer, bytes);
    }
    return double(bytes) * repeats;
  });
  for (char* buffer : buffers) std::free(buffer);
  return rate;
}
