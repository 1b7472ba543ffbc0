// Owns what is known of this machine's processor, and which instruction set the kernels use.
//
// Three things are kept apart: what this build contains (compiled_isa), what the processor and the operating system
// offer (detected_isa), and what is used (selected_isa: the lesser of the two, or lower still on request).
#pragma once
#include <string>

namespace probquant {

/// Kernel families, each a superset of the one before.
enum class Isa {
  reference,   ///< portable C++
  avx2,        ///< AVX2, FMA, F16C
  avx512vnni,  ///< AVX-512 F, BW, DQ, VL and VNNI
  amx,         ///< and AMX-INT8
};

const char* isa_name(Isa isa);

/// Usable features: the processor has them and the operating system saves their registers. All false elsewhere than x86-64.
struct CpuFeatures {
  bool avx2 = false, fma = false, f16c = false, avx_vnni = false;
  bool avx512f = false, avx512bw = false, avx512dq = false, avx512vl = false, avx512_vnni = false;
  bool amx_tile = false, amx_int8 = false;  ///< and the operating system lets this process use the tiles' registers
};

const CpuFeatures& cpu_features();

/// The processor's own name, or "unknown".
std::string cpu_model_name();

Isa compiled_isa();
Isa detected_isa();

/// min(compiled_isa(), detected_isa()), lowered by the environment variable PROBQUANT_ISA (reference, avx2, avx512vnni or amx),
/// which can never raise it. Read at the first call; throws Error for any other value.
Isa selected_isa();

}  // namespace probquant
