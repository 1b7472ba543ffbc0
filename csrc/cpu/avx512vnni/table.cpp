// The AVX-512 VNNI entries of the kernel table.
#include "../kernels.h"

namespace probquant {

void install_attention_avx512vnni(Kernels& table);
void install_dense_avx512vnni(Kernels& table);
void install_depthwise_avx512vnni(Kernels& table);
void install_elementwise_avx512vnni(Kernels& table);
void install_layer_norm_avx512vnni(Kernels& table);
void install_patch_sums_avx512vnni(Kernels& table);
void install_quantize_avx512vnni(Kernels& table);

void install_avx512vnni(Kernels& table) {
  table.name = "avx512vnni";
  install_attention_avx512vnni(table);
  install_dense_avx512vnni(table);
  install_depthwise_avx512vnni(table);
  install_elementwise_avx512vnni(table);
  install_layer_norm_avx512vnni(table);
  install_patch_sums_avx512vnni(table);
  install_quantize_avx512vnni(table);
}

}  // namespace probquant
