// How the depthwise kernels of every ISA cut a range of output positions: into bands whose input stays in the L2 cache
// while all channel groups pass over it, and a band into rectangles of one sample. Everything has internal linkage.
#pragma once
#include "kernels.h"

namespace probquant {
namespace {

constexpr int64_t kBandBytes = 256 * 1024;  // of input; half of a small L2, so that prefetched and written lines fit beside it

/// Output rows [y_begin, y_end) times columns [x_begin, x_end) of one sample.
struct Rectangle {
  int64_t sample, y_begin, y_end, x_begin, x_end;
};

/// Calls visit(rectangle) for positions [begin, end): whole image rows together, partial first and last rows alone.
template <class Visit>
inline void for_each_rectangle(const LayerProblem& p, int64_t begin, int64_t end, Visit visit) {
  const int64_t width = p.out_width;
  while (begin < end) {
    const int64_t sample = begin / p.rows_per_sample, position = begin - sample * p.rows_per_sample;
    const int64_t y = position / width, x = position - y * width;
    const int64_t sample_end = (sample + 1) * p.rows_per_sample, count = (end < sample_end ? end : sample_end) - begin;
    if (x == 0 && count >= width) {
      const int64_t rows = count / width;
      visit(Rectangle{sample, y, y + rows, 0, width});
      begin += rows * width;
    } else {
      const int64_t columns = count < width - x ? count : width - x;
      visit(Rectangle{sample, y, y + 1, x, x + columns});
      begin += columns;
    }
  }
}

/// Calls visit(begin, end) for bands of output positions; a band ends at a multiple of `row_multiple` image rows.
template <class Visit>
inline void for_each_band(const LayerProblem& p, int64_t begin, int64_t end, int64_t row_multiple, Visit visit) {
  const int64_t row_bytes = p.shape.in_width * p.shape.in_channels * p.shape.stride_height;
  const int64_t strips = kBandBytes / (row_bytes * row_multiple), sample_strips = (p.out_height + row_multiple - 1) / row_multiple;
  int64_t band = (strips > 0 ? strips : 1) * row_multiple * p.out_width;
  if (strips >= sample_strips) band = strips / sample_strips * p.rows_per_sample;
  while (begin < end) {
    // counted from the sample's first row, so that a band of part of a sample never reaches into the next
    const int64_t sample_begin = begin / p.rows_per_sample * p.rows_per_sample;
    int64_t stop = sample_begin + ((begin - sample_begin) / band + 1) * band;
    if (band < p.rows_per_sample && stop > sample_begin + p.rows_per_sample) stop = sample_begin + p.rows_per_sample;
    if (stop > end) stop = end;
    visit(begin, stop);
    begin = stop;
  }
}

}  // namespace
}  // namespace probquant
