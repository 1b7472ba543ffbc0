// Owns the stand-in libtorch_cpu.so that _torch_ops.so is linked against: the names of the functions, nothing behind
// them. It is never installed and never loaded; see CMakeLists.txt.
#include "stable_symbols.h"

#define DEFINE_NAME(result, name, parameters) \
  extern "C" void name() {}
PROBQUANT_TORCH_SYMBOLS(DEFINE_NAME)
