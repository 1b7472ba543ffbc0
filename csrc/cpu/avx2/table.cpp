// The AVX2 entries of the kernel table.
#include "../kernels.h"

namespace probquant {

void install_attention_avx2(Kernels& table);
void install_dense_avx2(Kernels& table);
void install_depthwise_avx2(Kernels& table);
void install_elementwise_avx2(Kernels& table);
void install_layer_norm_avx2(Kernels& table);
void install_patch_sums_avx2(Kernels& table);
void install_quantize_avx2(Kernels& table);

void install_avx2(Kernels& table) {
  table.name = "avx2";
  install_attention_avx2(table);
  install_dense_avx2(table);
  install_depthwise_avx2(table);
  install_elementwise_avx2(table);
  install_layer_norm_avx2(table);
  install_patch_sums_avx2(table);
  install_quantize_avx2(table);
}

}  // namespace probquant
