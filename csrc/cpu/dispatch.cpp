// Chooses the kernel table once: the reference, overlaid by every ISA up to the selected one.
#include "features.h"
#include "kernels.h"

namespace probquant {
namespace {

Kernels build_table(Isa isa) {
  Kernels table = kReferenceKernels;
#if defined(PROBQUANT_HAVE_AVX2)
  if (isa >= Isa::avx2) install_avx2(table);
#endif
#if defined(PROBQUANT_HAVE_AVX512VNNI)
  if (isa >= Isa::avx512vnni) install_avx512vnni(table);
#endif
#if defined(PROBQUANT_HAVE_AMX)
  if (isa >= Isa::amx) install_amx(table);
#endif
  (void)isa;
  return table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels table = build_table(selected_isa());
  return table;
}

}  // namespace probquant
