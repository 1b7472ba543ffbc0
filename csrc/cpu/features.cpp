// Owns CPU feature detection: CPUID for what the processor has, XGETBV for what the operating system saves, and the permission
// to use AMX, which Linux gives a process on request.
#include "features.h"

#include <probquant/types.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace probquant {
namespace {

#if defined(__x86_64__)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

/// All zero for a leaf that the processor does not have.
Registers cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

constexpr bool bit(uint64_t word, int index) { return (word >> index & 1) != 0; }

/// The register states that the operating system saves and restores (XCR0).
uint64_t saved_states() {
  if (!bit(cpuid(1).ecx, 27)) return 0;  // OSXSAVE: XGETBV may be used
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

/// Asks the kernel for the tiles' 8 KB of registers, for every thread of this process, those that run already among them. Without it the
/// first tile instruction is a SIGILL. Refused by kernels before 5.16, by sandboxes, and where a thread's alternate signal stack is too
/// small for the larger frame. (https://docs.kernel.org/arch/x86/xstate.html; elsewhere than on Linux the tier is left out)
bool amx_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

CpuFeatures detect_features() {
  constexpr uint64_t kTiles = 0x60000;  // tile configuration and tile data
  constexpr uint64_t kYmm = 0x06;  // XMM and the upper halves of YMM
  constexpr uint64_t kZmm = 0xe6;  // and opmask, the upper halves of ZMM, ZMM16 to ZMM31
  const uint64_t saved = saved_states();
  const bool ymm = (saved & kYmm) == kYmm, zmm = (saved & kZmm) == kZmm;
  const Registers leaf1 = cpuid(1), leaf7 = cpuid(7, 0);
  const Registers leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : Registers{};

  CpuFeatures features;
  features.fma = ymm && bit(leaf1.ecx, 12);
  features.f16c = ymm && bit(leaf1.ecx, 29);
  features.avx2 = ymm && bit(leaf7.ebx, 5);
  features.avx_vnni = ymm && bit(leaf7_1.eax, 4);
  features.avx512f = zmm && bit(leaf7.ebx, 16);
  features.avx512dq = zmm && bit(leaf7.ebx, 17);
  features.avx512bw = zmm && bit(leaf7.ebx, 30);
  features.avx512vl = zmm && bit(leaf7.ebx, 31);
  features.avx512_vnni = zmm && bit(leaf7.ecx, 11);
  const bool tiles = (saved & kTiles) == kTiles && bit(leaf7.edx, 24) && amx_permitted();
  features.amx_tile = tiles;
  features.amx_int8 = tiles && bit(leaf7.edx, 25);
  return features;
}

#else

CpuFeatures detect_features() { return {}; }

#endif

Isa lowered_by_environment(Isa best) {
  const char* value = std::getenv("PROBQUANT_ISA");
  if (value == nullptr || *value == '\0') return best;
  for (const Isa isa : {Isa::reference, Isa::avx2, Isa::avx512vnni, Isa::amx}) {
    if (std::strcmp(value, isa_name(isa)) == 0) return std::min(best, isa);
  }
  throw Error(std::string("the environment variable PROBQUANT_ISA is '") + value +
              "', wanted reference, avx2, avx512vnni or amx");
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx: return "amx";
    case Isa::avx512vnni: return "avx512vnni";
    case Isa::avx2: return "avx2";
    case Isa::reference: break;
  }
  return "reference";
}

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect_features();
  return features;
}

std::string cpu_model_name() {
#if defined(__x86_64__)
  constexpr uint32_t kFirstLeaf = 0x80000002, kLastLeaf = 0x80000004;
  if (__get_cpuid_max(0x80000000, nullptr) >= kLastLeaf) {
    std::string name;
    for (uint32_t leaf = kFirstLeaf; leaf <= kLastLeaf; ++leaf) {
      const Registers part = cpuid(leaf);
      name.append(reinterpret_cast<const char*>(&part), sizeof part);
    }
    name.resize(std::strlen(name.c_str()));
    const size_t begin = name.find_first_not_of(' ');
    if (begin != std::string::npos) return name.substr(begin, name.find_last_not_of(' ') + 1 - begin);
  }
#endif
  return "unknown";
}

Isa compiled_isa() {
#if defined(PROBQUANT_HAVE_AMX)
  return Isa::amx;
#elif defined(PROBQUANT_HAVE_AVX512VNNI)
  return Isa::avx512vnni;
#elif defined(PROBQUANT_HAVE_AVX2)
  return Isa::avx2;
#else
  return Isa::reference;
#endif
}

Isa detected_isa() {
  const CpuFeatures& f = cpu_features();
  if (!(f.avx2 && f.fma && f.f16c)) return Isa::reference;
  if (!(f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl && f.avx512_vnni)) return Isa::avx2;
  return f.amx_tile && f.amx_int8 ? Isa::amx : Isa::avx512vnni;
}

Isa selected_isa() {
  static const Isa isa = lowered_by_environment(std::min(compiled_isa(), detected_isa()));
  return isa;
}

}  // namespace probquant
