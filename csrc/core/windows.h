// Which part of the input each output of a pooling layer sees. CPU and CUDA share it.
#pragma once
#include <probquant/ops.h>

#include "numerics.h"

namespace probquant {

/// One window of an average pool, cut to the input, and what its sum is divided by.
struct Window {
  int64_t y_begin, y_end, x_begin, x_end;
  int64_t divisor;
};

/// The windows of an average pool: of `shape`, or (adaptive) those that cut the input into shape's output size as torch does.
struct AverageWindows {
  int64_t in_height, in_width, out_height, out_width;
  int64_t kernel_height, kernel_width, stride_height, stride_width;
  int64_t padding_top, padding_bottom, padding_left, padding_right;
  bool adaptive, count_include_pad;

  PROBQUANT_HOST_DEVICE Window at(int64_t oy, int64_t ox) const {
    if (adaptive) {
      Window w{oy * in_height / out_height, ((oy + 1) * in_height + out_height - 1) / out_height, ox * in_width / out_width,
               ((ox + 1) * in_width + out_width - 1) / out_width, 0};
      w.divisor = (w.y_end - w.y_begin) * (w.x_end - w.x_begin);
      return w;
    }
    const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
    const int64_t top = oy * stride_height - padding_top, left = ox * stride_width - padding_left;
    const int64_t bottom = smaller(top + kernel_height, in_height + padding_bottom), right = smaller(left + kernel_width, in_width + padding_right);
    Window w{top > 0 ? top : 0, smaller(bottom, in_height), left > 0 ? left : 0, smaller(right, in_width), 0};
    w.divisor = count_include_pad ? (bottom - top) * (right - left) : (w.y_end - w.y_begin) * (w.x_end - w.x_begin);
    return w;
  }
};

inline AverageWindows average_windows(const Conv2dShape& s, bool count_include_pad) {
  return {s.in_height,     s.in_width,       s.out_height(),   s.out_width(),    s.kernel_height, s.kernel_width,   s.stride_height,
          s.stride_width,  s.padding_top,    s.padding_bottom, s.padding_left,   s.padding_right, false,            count_include_pad};
}

inline AverageWindows adaptive_windows(int64_t in_height, int64_t in_width, int64_t out_height, int64_t out_width) {
  AverageWindows w{};
  w.in_height = in_height, w.in_width = in_width, w.out_height = out_height, w.out_width = out_width;
  w.adaptive = true;
  return w;
}

/// The taps of a max pool along one axis that lie inside the input: `count` of them, the first at `first`.
struct MaxTaps {
  int64_t first, count;

  PROBQUANT_HOST_DEVICE MaxTaps(int64_t position, int64_t stride, int64_t padding, int64_t dilation, int64_t kernel, int64_t size) {
    const int64_t start = position * stride - padding;
    const int64_t begin = start < 0 ? (-start + dilation - 1) / dilation : 0, inside = (size - start + dilation - 1) / dilation;
    const int64_t end = kernel < inside ? kernel : inside;
    first = start + begin * dilation;
    count = end > begin ? end - begin : 0;
  }
};

}  // namespace probquant
