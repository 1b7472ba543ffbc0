// The kernel tables that the fuzzers compare with the reference: those of every instruction set that this machine has, and the
// emulated ones that were built (PROBQUANT_EMULATE_AVX512; AMX always).
#pragma once
#include <vector>

#include "cpu/features.h"
#include "cpu/kernels.h"

namespace probquant {

#if defined(PROBQUANT_EMULATED_AVX512)
/// install_avx512vnni of csrc/cpu/avx512vnni, compiled against emulated_avx512/immintrin.h.
void install_avx512vnni_emulated(Kernels& table);
#endif
#if defined(PROBQUANT_EMULATED_AMX)
/// install_amx of csrc/cpu/amx, compiled against emulated_amx/emulated_tiles.h, and against emulated_avx512/immintrin.h where that is built.
void install_amx_emulated(Kernels& table);
#endif

/// As dispatch.cpp overlays them. `name` tells them apart.
inline std::vector<Kernels> tables() {
  std::vector<Kernels> all;
  Kernels table = kReferenceKernels;
#if defined(PROBQUANT_HAVE_AVX2)
  if (detected_isa() >= Isa::avx2) {
    install_avx2(table);
    all.push_back(table);
  }
#endif
#if defined(PROBQUANT_EMULATED_AVX512)
  if (detected_isa() >= Isa::avx2) {  // for which it was compiled
    all.push_back(table);
    install_avx512vnni_emulated(all.back());
    all.back().name = "avx512vnni_emulated";
  }
#endif
#if defined(PROBQUANT_HAVE_AVX512VNNI)
  if (detected_isa() >= Isa::avx512vnni) {
    install_avx512vnni(table);
    all.push_back(table);
  }
#endif
#if defined(PROBQUANT_EMULATED_AMX)
#if defined(PROBQUANT_EMULATED_AVX512)
  constexpr Isa compiled_for = Isa::avx2;
#else
  constexpr Isa compiled_for = Isa::avx512vnni;
#endif
  if (detected_isa() >= compiled_for) {
    all.push_back(table);
    install_amx_emulated(all.back());
    all.back().name = "amx_emulated";
  }
#endif
#if defined(PROBQUANT_HAVE_AMX)
  if (detected_isa() >= Isa::amx) {
    install_amx(table);
    all.push_back(table);
  }
#endif
  return all;
}

}  // namespace probquant
