// Patch sums of the convolution surrogate, AVX-512: integer sums of q and q^2 over sampled receptive fields, centred on the
// zero point afterwards: sum (q - z) = S1 - n z, sum (q - z)^2 = S2 - 2 z S1 + n z^2 over the n values inside the image.
// Dense and grouped fields run along the contiguous bytes of a kernel row, depthwise ones along 16 channels.
#include "../patch_geometry.h"
#include "epilogue.h"

namespace probquant {
namespace {

constexpr int64_t kVector = 64, kChannels = 16;

/// Adds `count` contiguous codes.
inline void add_segment(CodeSums& sums, const uint8_t* q, int64_t count) {
  for (; count >= kVector; count -= kVector, q += kVector) sums.add(_mm512_loadu_si512(q));
  if (count > 0) sums.add(_mm512_maskz_loadu_epi8(first_lanes64(count), q));
}

/// Sums of dwords in 64 bits, of even and odd lanes apart.
struct WideSums {
  __m512i even = _mm512_setzero_si512(), odd = _mm512_setzero_si512();

  void add(__m512i v) {  // not negative
    even = _mm512_add_epi64(even, _mm512_and_si512(v, _mm512_set1_epi64(0xffffffff)));
    odd = _mm512_add_epi64(odd, _mm512_srli_epi64(v, 32));
  }
  void add_square(__m512i v) {
    even = _mm512_add_epi64(even, _mm512_mul_epi32(v, v));
    const __m512i shifted = _mm512_srli_epi64(v, 32);
    odd = _mm512_add_epi64(odd, _mm512_mul_epi32(shifted, shifted));
  }
  void store(int64_t (&out)[kChannels]) const {
    alignas(64) int64_t lanes[2][8];
    _mm512_store_si512(lanes[0], even);
    _mm512_store_si512(lanes[1], odd);
    for (int64_t i = 0; i < kChannels; ++i) out[i] = lanes[i % 2][i / 2];
  }
};

void depthwise(const FieldGeometry& g, const uint8_t* x, int32_t zero_point, int64_t gamma, bool per_group, PatchSums* out) {
  const Conv2dShape& s = g.s;
  const int64_t fields = ((g.out_height + gamma - 1) / gamma) * ((g.out_width + gamma - 1) / gamma);
  for (int64_t channel = 0; channel < s.in_channels; channel += kChannels) {
    const __mmask16 mask = first_lanes16(s.in_channels - channel);
    // of sum (q - z) + largest, which is not negative; of sum (q - z)^2; of (sum (q - z))^2
    const int64_t largest = 255 * s.kernel_height * s.kernel_width;
    const __m512i shift = _mm512_set1_epi32(static_cast<int32_t>(largest));
    WideSums shifted_sums, squares, squared_sums;
    for (int64_t oy = 0; oy < g.out_height; oy += gamma) {
      const FieldAxis rows = g.rows(oy);
      for (int64_t ox = 0; ox < g.out_width; ox += gamma) {
        const FieldAxis columns = g.columns(ox);
        __m512i s1 = _mm512_setzero_si512(), s2 = s1;
        for (int64_t ky = rows.begin; ky < rows.end; ++ky) {
          const uint8_t* row = x + (rows.first + ky * s.dilation_height) * s.in_width * s.in_channels + channel;
          for (int64_t kx = columns.begin; kx < columns.end; ++kx) {
            const uint8_t* at = row + (columns.first + kx * s.dilation_width) * s.in_channels;
            const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, at));
            s1 = _mm512_add_epi32(s1, code);
            s2 = _mm512_add_epi32(s2, _mm512_madd_epi16(code, code));
          }
        }
        const __m512i n_z = _mm512_set1_epi32(static_cast<int32_t>(rows.count() * columns.count()) * zero_point), z = _mm512_set1_epi32(zero_point);
        // S2 - 2 z S1 + n z^2 = S2 - z (2 S1 - n z)
        s2 = _mm512_sub_epi32(s2, _mm512_mullo_epi32(z, _mm512_sub_epi32(_mm512_add_epi32(s1, s1), n_z)));
        s1 = _mm512_sub_epi32(s1, n_z);
        shifted_sums.add(_mm512_add_epi32(s1, shift));
        squares.add(s2);
        squared_sums.add_square(s1);
      }
    }
    int64_t t1[kChannels], t2[kChannels], t1_squared[kChannels];
    shifted_sums.store(t1);
    squares.store(t2);
    squared_sums.store(t1_squared);
    for (int64_t i = 0; i < kChannels && channel + i < s.in_channels; ++i) {
      PatchSums& p = out[per_group ? channel + i : 0];
      p.count += fields;
      p.sum += t1[i] - fields * largest;
      p.squares += t2[i];
      p.sum_of_squared += t1_squared[i];
    }
  }
}

void patch_sums(const Conv2dShape& shape, const uint8_t* x, int32_t zero_point, int64_t gamma, bool per_group, PatchSums* sums) {
  const FieldGeometry g(shape);
  const int64_t taps = shape.kernel_height * shape.kernel_width;
  if (taps * ((g.inputs + kVector - 1) / kVector) >= CodeSums::kFlushAfter)
    return kReferenceKernels.patch_sums(shape, x, zero_point, gamma, per_group, sums);
  if (g.inputs == 1) depthwise(g, x, zero_point, gamma, per_group, sums);
  else sum_grouped_fields<CodeSums>(g, x, zero_point, gamma, per_group, sums, add_segment);
}

}  // namespace

void install_patch_sums_avx512vnni(Kernels& table) { table.patch_sums = patch_sums; }

}  // namespace probquant
