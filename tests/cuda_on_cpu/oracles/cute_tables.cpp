// Prints, from CuTe's own traits, where every (lane, value) of a fragment lies: lines "<table> <lane> <value> <offset>". Offsets of
// mma are row + rows * column (A: m, k; B: n, k; C: m, n), those of ldmatrix are bits. Of CUTLASS it needs the headers.
#include <cstdio>
#include <string>

#include <cute/layout.hpp>

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

namespace {

template <class Layout>
void print(const std::string& name, Layout layout) {
  for (int lane = 0; lane < cute::size<0>(layout); ++lane)
    for (int value = 0; value < cute::size<1>(layout); ++value) std::printf("%s %d %d %d\n", name.c_str(), lane, value, static_cast<int>(layout(lane, value)));
}

template <class Operation>
void print_mma(const std::string& name) {
  using Traits = cute::MMA_Traits<Operation>;
  print(name + ".A", typename Traits::ALayout{});
  print(name + ".B", typename Traits::BLayout{});
  print(name + ".C", typename Traits::CLayout{});
}

template <class Operation>
void print_copy(const std::string& name) {
  using Traits = cute::Copy_Traits<Operation>;
  print(name + ".from", typename Traits::SrcLayout{});
  print(name + ".to", typename Traits::DstLayout{});
}

}  // namespace

int main() {
  print_mma<cute::SM75_8x8x16_S32S8S8S32_TN>("m8n8k16");
  print_mma<cute::SM80_16x8x16_S32U8S8S32_TN>("m16n8k16");
  print_mma<cute::SM80_16x8x32_S32U8S8S32_TN>("m16n8k32");
  print_copy<cute::SM75_U32x1_LDSM_N>("ldmatrix.x1");
  print_copy<cute::SM75_U32x2_LDSM_N>("ldmatrix.x2");
  print_copy<cute::SM75_U32x4_LDSM_N>("ldmatrix.x4");
  print_copy<cute::SM75_U16x2_LDSM_T>("ldmatrix.x1.trans");
  print_copy<cute::SM75_U16x8_LDSM_T>("ldmatrix.x4.trans");
}
