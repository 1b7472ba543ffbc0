// The receptive fields of a convolution and the walk over dense and grouped ones, shared by the patch sums of every ISA.
// Everything has internal linkage.
#pragma once
#include "kernels.h"

namespace probquant {
namespace {

/// The part of a kernel axis that lies inside the input: taps [begin, end), tap t at first + t * dilation.
struct FieldAxis {
  int64_t first, begin, end;
  FieldAxis(int64_t position, int64_t stride, int64_t padding, int64_t dilation, int64_t kernel, int64_t size)
      : first(position * stride - padding) {
    begin = first < 0 ? divide_up(-first, dilation) : 0;
    end = first >= size ? 0 : divide_up(size - first, dilation);
    if (end > kernel) end = kernel;
    if (begin > end) begin = end;
  }
  int64_t count() const { return end - begin; }

 private:
  static int64_t divide_up(int64_t n, int64_t dilation) { return dilation == 1 ? n : (n + dilation - 1) / dilation; }
};

inline int64_t output_size(int64_t padded, int64_t kernel, int64_t stride, int64_t dilation) { return (padded - dilation * (kernel - 1) - 1) / stride + 1; }

struct FieldGeometry {
  const Conv2dShape& s;
  int64_t out_height, out_width, inputs;
  explicit FieldGeometry(const Conv2dShape& shape)
      : s(shape),
        out_height(output_size(s.in_height + s.padding_top + s.padding_bottom, s.kernel_height, s.stride_height, s.dilation_height)),
        out_width(output_size(s.in_width + s.padding_left + s.padding_right, s.kernel_width, s.stride_width, s.dilation_width)),
        inputs(s.in_channels / s.groups) {}
  FieldAxis rows(int64_t oy) const { return FieldAxis(oy, s.stride_height, s.padding_top, s.dilation_height, s.kernel_height, s.in_height); }
  FieldAxis columns(int64_t ox) const { return FieldAxis(ox, s.stride_width, s.padding_left, s.dilation_width, s.kernel_width, s.in_width); }
};

/// Dense and grouped fields: add_segment(sums, q, count) adds contiguous codes to an ISA's CodeSums.
template <class CodeSums, class AddSegment>
inline void sum_grouped_fields(const FieldGeometry& g, const uint8_t* x, int32_t zero_point, int64_t gamma, bool per_group, PatchSums* out,
                               AddSegment add_segment) {
  const Conv2dShape& s = g.s;
  const bool joined_columns = s.groups == 1 && s.dilation_width == 1;  // a kernel row is contiguous
  for (int64_t oy = 0; oy < g.out_height; oy += gamma) {
    const FieldAxis rows = g.rows(oy);
    for (int64_t ox = 0; ox < g.out_width; ox += gamma) {
      const FieldAxis columns = g.columns(ox);
      for (int64_t group = 0; group < s.groups; ++group) {
        CodeSums sums;
        for (int64_t ky = rows.begin; ky < rows.end; ++ky) {
          const uint8_t* row = x + (rows.first + ky * s.dilation_height) * s.in_width * s.in_channels + group * g.inputs;
          if (joined_columns) {
            add_segment(sums, row + (columns.first + columns.begin) * s.in_channels, columns.count() * s.in_channels);
          } else {
            for (int64_t kx = columns.begin; kx < columns.end; ++kx)
              add_segment(sums, row + (columns.first + kx * s.dilation_width) * s.in_channels, g.inputs);
          }
        }
        int64_t sum = 0, squares = 0;
        sums.flush(sum, squares);
        const int64_t z = zero_point, n = rows.count() * columns.count() * g.inputs, centred = sum - n * z;
        PatchSums& p = out[per_group ? group : 0];
        p.count += 1;
        p.sum += centred;
        p.squares += squares - 2 * z * sum + n * z * z;
        p.sum_of_squared += centred * centred;
      }
    }
  }
}

}  // namespace
}  // namespace probquant
