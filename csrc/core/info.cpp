// Owns build_info() and cpu_info(). CMakeLists.txt passes what only the build knows.
#include <probquant/info.h>

#include "../cpu/features.h"

namespace probquant {

BuildInfo build_info() {
  BuildInfo info;
  info.version = PROBQUANT_VERSION;
#if defined(PROBQUANT_HAVE_CUDA)
  info.cuda = true;
#endif
  info.cuda_archs = PROBQUANT_CUDA_ARCHS;
  info.cuda_compiler = PROBQUANT_CUDA_COMPILER;
  info.compiler = PROBQUANT_COMPILER;
  info.build_type = PROBQUANT_BUILD_TYPE;
  info.isas.emplace_back(isa_name(Isa::reference));
#if defined(PROBQUANT_HAVE_AVX2)
  info.isas.emplace_back(isa_name(Isa::avx2));
#endif
#if defined(PROBQUANT_HAVE_AVX512VNNI)
  info.isas.emplace_back(isa_name(Isa::avx512vnni));
#endif
#if defined(PROBQUANT_HAVE_AMX)
  info.isas.emplace_back(isa_name(Isa::amx));
#endif
  return info;
}

CpuInfo cpu_info() {
  const CpuFeatures& f = cpu_features();
  CpuInfo info;
  info.model = cpu_model_name();
  info.isa_detected = isa_name(detected_isa());
  info.isa_compiled = isa_name(compiled_isa());
  info.isa_used = isa_name(selected_isa());
  info.features = {{"avx2", f.avx2},         {"fma", f.fma},           {"f16c", f.f16c},
                   {"avx_vnni", f.avx_vnni}, {"avx512f", f.avx512f},   {"avx512bw", f.avx512bw},
                   {"avx512dq", f.avx512dq}, {"avx512vl", f.avx512vl}, {"avx512_vnni", f.avx512_vnni},
                   {"amx_tile", f.amx_tile}, {"amx_int8", f.amx_int8}};
  return info;
}

}  // namespace probquant
