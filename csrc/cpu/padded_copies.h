// Copies of a layer's input that have its padding, kPaddedBytes at a time, for kernels whose tiles then lie in x as it is: tables of pointers for
// the rows of its borders cost more. Everything has internal linkage.
#pragma once
#include "dense_driver.h"

#include <cstdlib>
#include <new>

namespace probquant {
namespace {

/// Memory that a thread keeps.
struct Scratch {
  uint8_t* data = nullptr;
  int64_t bytes = 0;

  ~Scratch() { std::free(data); }
  uint8_t* at_least(int64_t wanted) {
    if (wanted <= bytes) return data;
    std::free(data);
    bytes = 0;
    data = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(ceil_div(wanted, 64) * 64)));
    if (!data) throw std::bad_alloc();
    bytes = wanted;
    return data;
  }
};
thread_local Scratch padded_scratch;

constexpr int64_t kPaddedBytes = 256 << 10;  ///< of a copy: it stays in L2 beside the weights

/// Copies lines [begin, end) of a sample, which may lie outside of it, with its padding.
uint8_t* copy_padded(const LayerProblem& p, int64_t sample, int64_t begin, int64_t end, uint8_t* to) {
  const Conv2dShape& s = p.shape;
  const int64_t left = s.padding_left * s.in_channels, inside = s.in_width * s.in_channels, right = s.padding_right * s.in_channels;
  const int zero_point = p.samples[sample].x_zero_point;
  const auto fill = [&](int64_t bytes) {
    __builtin_memset(to, zero_point, static_cast<size_t>(bytes));
    to += bytes;
  };
  for (int64_t y = begin; y < end; ++y) {
    if (y < 0 || y >= s.in_height) {
      fill(left + inside + right);
      continue;
    }
    fill(left);
    __builtin_memcpy(to, p.x + (sample * s.in_height + y) * inside, static_cast<size_t>(inside));
    to += inside;
    fill(right);
  }
  return to;
}

/// Rows [begin, end) of the layer, which are whole samples or lie in one, on a copy of their input that has its padding.
template <class Run>
void run_padded(const LayerProblem& p, const LayerRange& range, bool reads_x, Run run) {
  const Conv2dShape& s = p.shape;
  const int64_t rows = p.rows_per_sample, sample = range.row_begin / rows, samples = ceil_div(range.row_end, rows) - sample;
  const int64_t first = samples > 1 ? 0 : range.row_begin % rows / p.out_width;
  const int64_t last = samples > 1 ? p.out_height : ceil_div(range.row_end - sample * rows, p.out_width);  // lines [first, last) of the output
  const int64_t y0 = first * s.stride_height - s.padding_top, y1 = (last - 1) * s.stride_height - s.padding_top + (s.kernel_height - 1) * s.dilation_height + 1;
  LayerProblem q = p;
  q.shape.batch = samples;
  q.shape.in_height = y1 - y0;
  q.shape.in_width = s.in_width + s.padding_left + s.padding_right;
  q.shape.padding_top = q.shape.padding_bottom = q.shape.padding_left = q.shape.padding_right = 0;
  if (reads_x) {
    uint8_t* to = padded_scratch.at_least(samples * q.shape.in_height * q.shape.in_width * s.in_channels);
    q.x = to;
    for (int64_t n = sample; n < sample + samples; ++n) to = copy_padded(p, n, y0, y1, to);
  }
  q.out_height = last - first;
  q.rows_per_sample = q.out_height * p.out_width;
  const int64_t before = sample * rows + first * p.out_width, values = before * s.out_channels;  // rows before the first of q's
  q.samples += sample;
  if (q.y) q.y += values;
  if (q.stats) q.stats = p.stats_row(sample);
  if (q.y_float) q.y_float += values;
  if (q.range) q.range += 2 * sample;
  if (q.held) q.held += before * p.layout.columns();
  if (q.residual) q.residual += values;
  run(q, LayerRange{range.row_begin - before, range.row_end - before, range.channel_begin, range.channel_end});
}

/// What rows [begin, end) of so many bring to the cache.
Upcoming part_of(const Upcoming& upcoming, int64_t begin, int64_t end, int64_t rows) {
  const int64_t bytes = min_i(upcoming.bytes, kUpcomingBytes), from = bytes * begin / rows, to = bytes * end / rows;
  return {static_cast<const uint8_t*>(upcoming.data) + from, to - from};
}

/// Calls run(problem, range) for parts of a range that have no padding: where the layer has some, on copies of a few samples, or of some lines of one.
template <class Run>
void run_on_padded_copies(const LayerProblem& p, const LayerRange& range, bool reads_x, Run run) {
  const Conv2dShape& s = p.shape;
  const bool padded = s.padding_top + s.padding_bottom + s.padding_left + s.padding_right > 0;
  if (!padded || range.row_begin >= range.row_end) return run(p, range);
  const int64_t line = (s.in_width + s.padding_left + s.padding_right) * s.in_channels, rows = p.rows_per_sample;
  const int64_t lines = (p.out_height - 1) * s.stride_height + (s.kernel_height - 1) * s.dilation_height + 1;
  for (int64_t row = range.row_begin; row < range.row_end;) {
    const int64_t left_samples = (range.row_end - row) / rows, fitting_samples = min_i(kPaddedBytes / (line * lines), left_samples);
    int64_t end;
    if (row % rows == 0 && fitting_samples > 0) {
      end = row + rows * fitting_samples;
    } else {  // lines of one sample
      const int64_t most = max_i(1, (kPaddedBytes / line - (s.kernel_height - 1) * s.dilation_height - 1) / s.stride_height + 1);
      end = min_i(row / rows * rows + min_i(rows, (row % rows / p.out_width + most) * p.out_width), range.row_end);
    }
    const LayerRange part{row, end, range.channel_begin, range.channel_end};
    LayerProblem q = p;
    q.upcoming = part_of(p.upcoming, row - range.row_begin, end - range.row_begin, range.row_end - range.row_begin);
    run_padded(q, part, reads_x, run);
    row = end;
  }
}

}  // namespace
}  // namespace probquant
