// Patch sums of the convolution surrogate, AVX2: integer sums of q and q^2 over sampled receptive fields, centred on the
// zero point afterwards: sum (q - z) = S1 - n z, sum (q - z)^2 = S2 - 2 z S1 + n z^2 over the n values inside the image.
// Dense and grouped fields run along the contiguous bytes of a kernel row, depthwise ones along 8 channels, or along 16 when
// the channels' sums are wanted together.
#include "../patch_geometry.h"
#include "epilogue.h"

namespace probquant {
namespace {

constexpr int64_t kVector = 32, kChannels = 8;

/// Adds `count` contiguous codes.
inline void add_segment(CodeSums& sums, const uint8_t* q, int64_t count) {
  for (; count > 0; count -= kVector, q += kVector) sums.add(load_bytes32(q, count));
}

/// Sums of dwords in 64 bits, of even and odd lanes apart.
struct WideSums {
  __m256i even = _mm256_setzero_si256(), odd = _mm256_setzero_si256();

  void add(__m256i v) {  // not negative
    even = _mm256_add_epi64(even, _mm256_and_si256(v, _mm256_set1_epi64x(0xffffffff)));
    odd = _mm256_add_epi64(odd, _mm256_srli_epi64(v, 32));
  }
  void add_square(__m256i v) {
    even = _mm256_add_epi64(even, _mm256_mul_epi32(v, v));
    const __m256i shifted = _mm256_srli_epi64(v, 32);
    odd = _mm256_add_epi64(odd, _mm256_mul_epi32(shifted, shifted));
  }
  void store(int64_t (&out)[kChannels]) const {
    alignas(32) int64_t lanes[2][4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes[0]), even);
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes[1]), odd);
    for (int64_t i = 0; i < kChannels; ++i) out[i] = lanes[i % 2][i / 2];
  }
};

void depthwise(const FieldGeometry& g, const uint8_t* x, int32_t zero_point, int64_t gamma, bool per_group, PatchSums* out) {
  const Conv2dShape& s = g.s;
  const int64_t fields = ((g.out_height + gamma - 1) / gamma) * ((g.out_width + gamma - 1) / gamma);
  for (int64_t channel = 0; channel < s.in_channels; channel += kChannels) {
    const int64_t present = s.in_channels - channel < kChannels ? s.in_channels - channel : kChannels;
    // of sum (q - z) + largest, which is not negative; of sum (q - z)^2; of (sum (q - z))^2
    const int64_t largest = 255 * s.kernel_height * s.kernel_width;
    const __m256i shift = _mm256_set1_epi32(static_cast<int32_t>(largest));
    WideSums shifted_sums, squares, squared_sums;
    for (int64_t oy = 0; oy < g.out_height; oy += gamma) {
      const FieldAxis rows = g.rows(oy);
      for (int64_t ox = 0; ox < g.out_width; ox += gamma) {
        const FieldAxis columns = g.columns(ox);
        __m256i s1 = _mm256_setzero_si256(), s2 = s1;
        for (int64_t ky = rows.begin; ky < rows.end; ++ky) {
          const uint8_t* row = x + (rows.first + ky * s.dilation_height) * s.in_width * s.in_channels + channel;
          for (int64_t kx = columns.begin; kx < columns.end; ++kx) {
            const uint8_t* at = row + (columns.first + kx * s.dilation_width) * s.in_channels;
            const __m256i code = _mm256_cvtepu8_epi32(load_bytes16(at, present));
            s1 = _mm256_add_epi32(s1, code);
            s2 = _mm256_add_epi32(s2, _mm256_madd_epi16(code, code));
          }
        }
        const __m256i n_z = _mm256_set1_epi32(static_cast<int32_t>(rows.count() * columns.count()) * zero_point), z = _mm256_set1_epi32(zero_point);
        // S2 - 2 z S1 + n z^2 = S2 - z (2 S1 - n z)
        s2 = _mm256_sub_epi32(s2, _mm256_mullo_epi32(z, _mm256_sub_epi32(_mm256_add_epi32(s1, s1), n_z)));
        s1 = _mm256_sub_epi32(s1, n_z);
        shifted_sums.add(_mm256_add_epi32(s1, shift));
        squares.add(s2);
        squared_sums.add_square(s1);
      }
    }
    int64_t t1[kChannels], t2[kChannels], t1_squared[kChannels];
    shifted_sums.store(t1);
    squares.store(t2);
    squared_sums.store(t1_squared);
    for (int64_t i = 0; i < present; ++i) {
      PatchSums& p = out[per_group ? channel + i : 0];
      p.count += fields;
      p.sum += t1[i] - fields * largest;
      p.squares += t2[i];
      p.sum_of_squared += t1_squared[i];
    }
  }
}

/// What depthwise_together() takes: sums of a field in 16 bits, sums of squares of a row of fields in 32.
bool fields_are_small(const FieldGeometry& g, int64_t gamma) {
  const int64_t taps = g.s.kernel_height * g.s.kernel_width, fields = (g.out_width + gamma - 1) / gamma;
  return taps <= 64 && taps * fields <= 33000;
}

/// Depthwise fields, the sums of all channels in one: 16 channels at a time, squares of two channels joined at once.
void depthwise_together(const FieldGeometry& g, const uint8_t* x, int32_t zero_point, int64_t gamma, PatchSums& out) {
  constexpr int64_t kWords = 16;
  const Conv2dShape& s = g.s;
  const __m256i ones = _mm256_set1_epi16(1);
  int64_t sum = 0, squares = 0, values = 0, fields = 0;
  WideSums squared_sums;
  for (int64_t channel = 0; channel < s.in_channels; channel += kWords) {
    const int64_t present = s.in_channels - channel < kWords ? s.in_channels - channel : kWords;
    const __m256i exists = keep_bytes(_mm256_set1_epi8(-1), 2 * present);
    for (int64_t oy = 0; oy < g.out_height; oy += gamma) {
      const FieldAxis rows = g.rows(oy);
      __m256i row_sums = _mm256_setzero_si256(), row_squares = row_sums;  // of q - z, of q^2
      for (int64_t ox = 0; ox < g.out_width; ox += gamma) {
        const FieldAxis columns = g.columns(ox);
        const int64_t taps = rows.count() * columns.count();
        __m256i codes = _mm256_setzero_si256();
        for (int64_t ky = rows.begin; ky < rows.end; ++ky) {
          const uint8_t* at = x + ((rows.first + ky * s.dilation_height) * s.in_width + columns.first + columns.begin * s.dilation_width) * s.in_channels + channel;
          for (int64_t kx = columns.begin; kx < columns.end; ++kx, at += s.dilation_width * s.in_channels) {
            const __m256i code = _mm256_cvtepu8_epi16(load_bytes16(at, present));
            codes = _mm256_add_epi16(codes, code);
            row_squares = _mm256_add_epi32(row_squares, _mm256_madd_epi16(code, code));
          }
        }
        const __m256i centred = _mm256_and_si256(_mm256_sub_epi16(codes, _mm256_set1_epi16(static_cast<int16_t>(taps * zero_point))), exists);
        row_sums = _mm256_add_epi32(row_sums, _mm256_madd_epi16(centred, ones));
        squared_sums.add(_mm256_madd_epi16(centred, centred));
        values += taps * present;
        fields += present;
      }
      sum += sum_epi64(_mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(row_sums)), _mm256_cvtepi32_epi64(_mm256_extracti128_si256(row_sums, 1))));
      squares += sum_epu32(row_squares);
    }
  }
  const int64_t z = zero_point;
  out.count += fields;
  out.sum += sum;
  out.squares += squares - 2 * z * sum - z * z * values;  // sum of q is sum + z * values
  out.sum_of_squared += sum_epi64(_mm256_add_epi64(squared_sums.even, squared_sums.odd));
}

void patch_sums(const Conv2dShape& shape, const uint8_t* x, int32_t zero_point, int64_t gamma, bool per_group, PatchSums* sums) {
  const FieldGeometry g(shape);
  const int64_t taps = shape.kernel_height * shape.kernel_width;
  if (taps * ((g.inputs + kVector - 1) / kVector) >= CodeSums::kFlushAfter)
    return kReferenceKernels.patch_sums(shape, x, zero_point, gamma, per_group, sums);
  if (g.inputs == 1 && !per_group && fields_are_small(g, gamma)) depthwise_together(g, x, zero_point, gamma, sums[0]);
  else if (g.inputs == 1) depthwise(g, x, zero_point, gamma, per_group, sums);
  else sum_grouped_fields<CodeSums>(g, x, zero_point, gamma, per_group, sums, add_segment);
}

}  // namespace

void install_patch_sums_avx2(Kernels& table) { table.patch_sums = patch_sums; }

}  // namespace probquant
