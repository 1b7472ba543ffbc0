// Copies of a layer's input that suit tiles of rows which lie in x as it is. Everything has internal linkage.
//
// They have the layer's padding: tables of pointers for the rows of an image's borders cost more. Where lines of the output are short
// besides, so that a tile of `part` equally distant rows would be left half empty at the end of each, positions are copied with all that they
// meet, and then follow each other across lines: with each kernel row's pixels where lines of the input are a line apart, with all of
// the kernel's otherwise. 7x7 positions of 512 channels meet 2.4 MB of weights, half as often for a copy of 97 KB.
#pragma once
#include "dense_driver.h"

namespace probquant {
namespace {

thread_local Scratch copy_scratch;  ///< a thread keeps it

constexpr int64_t kPaddedBytes = 256 << 10, kPatchesBytes = 512 << 10;  ///< of a copy, at most: it stays in L2 beside the weights
constexpr int64_t kPatchesPay = 8;  ///< bytes of weights that are not read again, per byte of such a copy: measured (6.5 gain nothing, 16 take 0.84)

/// A layer that reads copies: what they hold, line by line.
struct CopyLayout {
  enum class Kind { none, lines, kernel_rows, patches } kind = Kind::none;
  const Conv2dShape* shape;
  int64_t line = 0;               ///< bytes
  int64_t step = 1, overlap = 0;  ///< lines from one of the output's to the next, and those that the last one needs beyond
  int64_t most = 0;               ///< bytes of a copy

  /// `part`: the equally distant rows that a tile takes at once, two times; 0: rows may lie anywhere.
  CopyLayout(const LayerProblem& p, int64_t part) : shape(&p.shape) {
    const Conv2dShape& s = *shape;
    const bool padded = s.padding_top + s.padding_bottom + s.padding_left + s.padding_right > 0;
    if (padded) use(Kind::lines, s.in_width + s.padding_left + s.padding_right, kPaddedBytes);
    if (part == 0 || p.layout.segment_taps > 1 || (!padded && p.out_width * s.stride_width == s.stride_height * s.in_width)) return;
    CopyLayout joined = *this;
    if (s.stride_height == 1) joined.use(Kind::kernel_rows, p.out_width * s.kernel_width, kPatchesBytes);
    else joined.use(Kind::patches, p.out_width * s.kernel_width * s.kernel_height, kPatchesBytes);
    const int64_t tiles = (p.out_height * ceil_div(p.out_width, part) - ceil_div(p.rows_per_sample, part)) / 2;  // that it saves
    const bool gathered = p.layout.whole_groups() && p.out_width < kShortLine;  // rows of short lines, which groups would not share
    if (tiles * p.layout.trailer_offset() < kPatchesPay * joined.line * joined.lines(p.out_height) && !gathered) return;
    *this = joined;
  }

  /// Lines for so many of the output's.
  int64_t lines(int64_t of_output) const { return of_output * step + overlap; }

  /// What of the shape a layer on copies for so many lines of so many samples sees differently.
  void set(Conv2dShape& q, int64_t samples, int64_t of_output, int64_t out_width) const {
    const Conv2dShape& s = *shape;
    q.batch = samples;
    q.padding_top = q.padding_bottom = q.padding_left = q.padding_right = 0;
    q.in_height = lines(of_output);
    if (kind == Kind::lines) {
      q.in_width = line / s.in_channels;
      return;
    }
    q.in_width = out_width * s.kernel_width;
    q.stride_width = s.kernel_width;
    q.dilation_width = 1;
    if (kind == Kind::kernel_rows) return;
    q.in_height = of_output * out_width * s.kernel_height;  // every position is an image of its own, in a column of these
    q.in_width = s.kernel_width;
    q.stride_height = s.kernel_height;
    q.stride_width = q.dilation_height = 1;
  }

 private:
  void use(Kind what, int64_t pixels, int64_t bytes) {
    kind = what;
    line = pixels * shape->in_channels;
    most = bytes;
    step = what == Kind::patches ? 1 : shape->stride_height;
    overlap = what == Kind::patches ? 0 : (shape->kernel_height - 1) * shape->dilation_height + 1 - step;
  }
};

/// Copies what lines [first, last) of a sample's output meet.
uint8_t* copy_lines(const LayerProblem& p, const CopyLayout& layout, int64_t sample, int64_t first, int64_t last, uint8_t* to) {
  const Conv2dShape& s = p.shape;
  const uint8_t* const x = p.x + sample * s.in_height * s.in_width * s.in_channels;
  const int zero_point = p.samples[sample].x_zero_point;
  /// `count` neighbours from (y, begin) on, which may lie outside of the image.
  const auto pixels = [&](int64_t y, int64_t begin, int64_t count) {
    const int64_t lo = y < 0 || y >= s.in_height ? count : clamp_i(-begin, 0, count), hi = clamp_i(s.in_width - begin, lo, count);
    __builtin_memset(to, zero_point, static_cast<size_t>(lo * s.in_channels));
    if (hi > lo) __builtin_memcpy(to + lo * s.in_channels, x + (y * s.in_width + begin + lo) * s.in_channels, static_cast<size_t>((hi - lo) * s.in_channels));
    __builtin_memset(to + hi * s.in_channels, zero_point, static_cast<size_t>((count - hi) * s.in_channels));
    to += count * s.in_channels;
  };
  const auto kernel_row = [&](int64_t y, int64_t ox) {
    const int64_t ix = ox * s.stride_width - s.padding_left;
    if (s.dilation_width == 1) return pixels(y, ix, s.kernel_width);
    for (int64_t kx = 0; kx < s.kernel_width; ++kx) pixels(y, ix + kx * s.dilation_width, 1);
  };
  if (layout.kind == CopyLayout::Kind::patches) {
    for (int64_t oy = first; oy < last; ++oy)
      for (int64_t ox = 0; ox < p.out_width; ++ox)
        for (int64_t ky = 0; ky < s.kernel_height; ++ky) kernel_row(oy * s.stride_height - s.padding_top + ky * s.dilation_height, ox);
    return to;
  }
  const int64_t begin = first * s.stride_height - s.padding_top, end = begin + layout.lines(last - first);
  for (int64_t y = begin; y < end; ++y) {
    if (layout.kind == CopyLayout::Kind::lines) pixels(y, -s.padding_left, s.padding_left + s.in_width + s.padding_right);
    else for (int64_t ox = 0; ox < p.out_width; ++ox) kernel_row(y, ox);
  }
  return to;
}

/// Rows [begin, end) of the layer, which are whole samples or lie in one, on a copy of their input.
template <class Run>
void run_on_copy(const LayerProblem& p, const CopyLayout& layout, const LayerRange& range, bool reads_x, Run run) {
  const Conv2dShape& s = p.shape;
  const int64_t rows = p.rows_per_sample, sample = range.row_begin / rows, samples = ceil_div(range.row_end, rows) - sample;
  const int64_t first = samples > 1 ? 0 : range.row_begin % rows / p.out_width;
  const int64_t last = samples > 1 ? p.out_height : ceil_div(range.row_end - sample * rows, p.out_width);  // lines [first, last) of the output
  LayerProblem q = p;
  layout.set(q.shape, samples, last - first, p.out_width);
  if (reads_x) {
    uint8_t* to = copy_scratch.at_least(samples * q.shape.in_height * q.shape.in_width * s.in_channels);
    q.x = to;
    for (int64_t n = sample; n < sample + samples; ++n) to = copy_lines(p, layout, n, first, last, to);
  }
  q.out_height = last - first;
  q.rows_per_sample = q.out_height * p.out_width;
  if (layout.kind == CopyLayout::Kind::patches) q.out_height = q.rows_per_sample, q.out_width = 1;
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

/// Calls run(problem, range) for parts of a range that have no padding, and no short lines if the kernel asks for it (CopyLayout's `part`): as it
/// is, or on copies of a few samples, or of some lines of one.
template <class Run>
void run_on_copies(const LayerProblem& p, const LayerRange& range, int64_t part_rows, bool reads_x, Run run) {
  const CopyLayout layout(p, part_rows);
  if (layout.kind == CopyLayout::Kind::none || range.row_begin >= range.row_end) return run(p, range);
  const int64_t rows = p.rows_per_sample;
  for (int64_t row = range.row_begin; row < range.row_end;) {
    const int64_t left_samples = (range.row_end - row) / rows, fitting_samples = min_i(layout.most / (layout.line * layout.lines(p.out_height)), left_samples);
    int64_t end;
    if (row % rows == 0 && fitting_samples > 0) {
      end = row + rows * fitting_samples;
    } else {  // lines of one sample
      const int64_t most = max_i(1, (layout.most / layout.line - layout.overlap) / layout.step);
      end = min_i(row / rows * rows + min_i(rows, (row % rows / p.out_width + most) * p.out_width), range.row_end);
    }
    const LayerRange part{row, end, range.channel_begin, range.channel_end};
    LayerProblem q = p;
    q.upcoming = part_of(p.upcoming, row - range.row_begin, end - range.row_begin, range.row_end - range.row_begin);
    run_on_copy(q, layout, part, reads_x, run);
    row = end;
  }
}

}  // namespace
}  // namespace probquant
