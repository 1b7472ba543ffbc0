// The AMX entries of the kernel table.
#include "../kernels.h"

namespace probquant {

void install_attention_amx(Kernels& table);
void install_dense_amx(Kernels& table);

void install_amx(Kernels& table) {
  table.name = "amx";
  install_attention_amx(table);
  install_dense_amx(table);
}

}  // namespace probquant
