// The AMX entries of the kernel table.
#include "../kernels.h"

namespace probquant {

void install_dense_amx(Kernels& table);

void install_amx(Kernels& table) {
  table.name = "amx";
  install_dense_amx(table);
}

}  // namespace probquant
