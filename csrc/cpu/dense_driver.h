// Walks a dense layer: which rows form a register tile, which taps it needs, where they lie. Shared by the ISA files, which
// own the register tiles; everything here has internal linkage, because it is compiled with their flags.
//
// Order of the loops: group (or all of them, as one, where the kernel spans groups), chunk of rows, then panels of blocks outside tiles of rows, or the other way round. Tiles are
// outside while all weights stay in the kernel's share of L2 (they are built once, rows of y are written at once); otherwise panels are
// outside, a panel's weights come from L1 or L2, the input of a chunk from L2, and weights are read once per chunk. A kernel may take
// several panels together, between which it comes back to the same tile.
//
// Implicit GEMM: a tile holds the address of each row's first tap, and every tap is an offset from it that all rows share.
// The output image falls into five regions (interior, top, bottom, left, right) so that tiles of the interior see no
// padding, and the others leave out the taps that lie in the padding for all of their rows. What padding remains in a tile
// (corners, mostly), and reads past the end of x, go through a table of pointers: into x, to a run of zero points, or to a copy.
#pragma once
#include "kernels.h"
#include "scratch.h"

#include <cstddef>

#ifndef PROBQUANT_TILE_ROWS  // most rows of a register tile; the file that includes this may say otherwise
#define PROBQUANT_TILE_ROWS 12
#endif

namespace probquant {
namespace {

constexpr int kTileRows = PROBQUANT_TILE_ROWS;
constexpr int kPanelBlocks = 4;          // most blocks of a register tile
constexpr int kStraddledRows = 6;        // tiles straddle samples of fewer rows
constexpr int kCallSegments = 16;        // segments that one call of a register tile takes, at most
constexpr int64_t kShortLine = 7;        // lines of fewer positions are not worth parts of their own
constexpr int64_t kPieceBytes = 256;     // longest segment of a table
constexpr int64_t kChunkSamples = 128;   // whose constants and counters a thread holds
constexpr int64_t kUpcomingBytes = 1 << 20;  // of what comes behind the layer, brought to L2: half of it
constexpr int64_t kChunkRows = 16384;    // keeps 32-bit partial moments far from overflow

constexpr int64_t min_i(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_i(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t clamp_i(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : x > hi ? hi : x; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : 0; }

/// Index of the block of a channel.
inline int64_t block_of(const PackedLayout& layout, int64_t channel) {
  return channel / layout.group_channels * layout.group_blocks + channel % layout.group_channels / kBlockChannels;
}

/// What is held of a range, in an order of the kernel's own. Ranges that form a grid do not overlap.
inline int32_t* held_of(const LayerProblem& p, const LayerRange& r) {
  if (!p.held) return nullptr;
  return p.held + r.row_begin * p.layout.columns() + (r.row_end - r.row_begin) * block_of(p.layout, r.channel_begin) * kBlockChannels;
}
/// How much that is.
inline int64_t held_values(const LayerProblem& p, const LayerRange& r) {
  return (r.row_end - r.row_begin) * (block_of(p.layout, r.channel_end - 1) + 1 - block_of(p.layout, r.channel_begin)) * kBlockChannels;
}

/// Input bytes that follow each other for every row of a tile, and the weights they meet.
struct Segment {
  int64_t x_offset;       ///< from the row's pointer
  int64_t weight_offset;  ///< in a block's stream
  int64_t steps;          ///< of 4 inputs
};

/// Taps [ky0, ky1) x [kx0, kx1).
struct Box {
  int64_t ky0, ky1, kx0, kx1;
};

/// Output positions that a register tile computes together.
struct Tile {
  int rows;
  int part;         ///< rows of the first of two parts (see make_parts)
  int64_t apart;    ///< bytes from row to row of either part, if that is known; 0: it is not
  bool pure;        ///< no row has padding inside the box
  bool one_sample;
  Box box;          ///< the taps that some row needs
  const uint8_t* x[kTileRows];  ///< where tap (0, 0) is, or would be
  int64_t row[kTileRows], sample[kTileRows];
  int64_t iy[kTileRows], ix[kTileRows];  ///< position of tap (0, 0); set where a table may be needed
};

/// Neighbouring blocks, of one group unless the kernel spans groups.
struct Panel {
  const uint8_t* block;
  int64_t index;     ///< the first one's, among all
  int blocks;
  int64_t channel;   ///< the first one's
  int64_t channels;  ///< that exist: blocks * 16, or less
};

/// What a register tile needs to compute its accumulators.
struct TileInput {
  const Segment* segments;
  int segment_count;
  const uint8_t* const* rows;  ///< row i of segment s: rows[s * row_step + i] + x_offset
  int64_t row_step;
  const uint8_t* weights;      ///< stream of the panel's first block
  int64_t block_bytes;
  const uint8_t* weight_sums;  ///< of the segments that the tile meets, int32 [16] per block
  int64_t sums_step;           ///< bytes from block to block
  const int32_t* zero_points;  ///< of x: accumulators start at -zero point * sum
  bool one_zero_point;         ///< it is the same for all rows
  const int32_t* partial;      ///< where the accumulators stand, [blocks * 16] per row, after the first call
};

class DenseDriver {
 public:
  /// `reads_x`: not where the kernel has all sums already.
  explicit DenseDriver(const LayerProblem& problem, bool reads_x)
      : p(problem),
        s(problem.shape),
        layout(problem.layout),
        reads_x(reads_x),
        x_end(p.x + s.batch * s.in_height * s.in_width * s.in_channels),
        tap_y(s.dilation_height * s.in_width * s.in_channels),
        tap_x(s.dilation_width * s.in_channels),
        joined(layout.segment_taps > 1),
        contiguous(s.dilation_width == 1 && (joined || (layout.groups == 1 && layout.inputs % 4 == 0))),
        places_rows((joined ? layout.inputs * s.kernel_width : layout.inputs) % 4 != 0 || (joined && !contiguous)),
        full{0, s.kernel_height, 0, s.kernel_width} {
    for (int32_t& z : zero_run_value) z = -1;
    interior_y0 = min_i(ceil_div(s.padding_top, s.stride_height), p.out_height);
    interior_x0 = min_i(ceil_div(s.padding_left, s.stride_width), p.out_width);
    interior_y1 = interior_end(s.in_height, s.padding_top, s.kernel_height, s.stride_height, s.dilation_height, interior_y0, p.out_height);
    interior_x1 = interior_end(s.in_width, s.padding_left, s.kernel_width, s.stride_width, s.dilation_width, interior_x0, p.out_width);
  }

  /// From now on a tile consists of two parts, and the rows of a part lie at the same distance from each other in x wherever the image
  /// has lines of positions that are long enough. Returns the most rows of a part that the range has, up to 16.
  int64_t make_parts(const LayerRange& range) {
    part_rows = 1;
    const auto tiles_of = [&](int64_t count) {
      const int64_t rows = count > 0 ? ceil_div(count, ceil_div(count, 32)) : 0;
      part_rows = max_i(part_rows, rows > 16 ? ceil_div(rows, 2) : rows);
    };
    const auto region = [&](int64_t height, int64_t width) {
      const int64_t line = line_length(width, height);
      if (line < kShortLine) tiles_of(width * height);
      else if (height > 0) part_rows = max_i(part_rows, ceil_div(line, ceil_div(line, 16)));
    };
    if (p.rows_per_sample < kStraddledRows && s.batch > 1) {
      tiles_of(range.row_end - range.row_begin);
    } else {
      region(interior_y0, p.out_width);
      region(interior_y1 - interior_y0, interior_x0);
      region(interior_y1 - interior_y0, interior_x1 - interior_x0);
      region(interior_y1 - interior_y0, p.out_width - interior_x1);
      region(p.out_height - interior_y1, p.out_width);
    }
    return part_rows;
  }

  /// Whether the rows of every part lie at the same distance from each other, and x has as many of them as the longest part takes.
  bool parts_are_lines(const LayerRange& range) const {
    const int64_t line = line_length(p.out_width, p.out_height);
    if (s.padding_top + s.padding_bottom + s.padding_left + s.padding_right > 0 || line < kShortLine) return false;
    return range.row_begin % line == 0 || range.row_begin + part_rows <= s.batch * p.rows_per_sample;  // or the first part is a piece of x's last
  }

  /// Where kernel.spans_groups, all groups, whose blocks are full, are walked as one: tiles lie at the first's inputs, and the kernel adds its blocks'.
  /// Calls kernel.run(tile, panel) over the range, kernel.start_weights(first block, blocks, rows, whether for the last time) before
  /// the tiles that meet those weights, and kernel.end_chunk() where no more than kChunkSamples samples were met.
  template <class Kernel>
  void run(const LayerRange& range, Kernel& kernel) {
    if (range.row_begin >= range.row_end || range.channel_begin >= range.channel_end) return;
    const int64_t first_block = block_of(layout, range.channel_begin), last_block = block_of(layout, range.channel_end - 1);
    const int64_t together = kernel.spans_groups ? layout.groups : 1;
    group_blocks = together * layout.group_blocks;
    group_channels = together * layout.group_channels;
    for (group = first_block / group_blocks; group <= last_block / group_blocks; ++group) {
      const int64_t base = group * group_blocks;
      const int64_t b0 = max_i(first_block - base, 0), b1 = min_i(last_block - base + 1, group_blocks);
      const int64_t max_rows = part_rows ? 2 * part_rows : Kernel::max_rows(b1 - b0);
      const bool tiles_outside = (b1 - b0) * layout.block_bytes <= kernel.weights_in_cache && !p.channel_stats;
      const bool brings = !Kernel::kPrefetches && reads_x, last_group = group == last_block / group_blocks;
      const int64_t rows = range.row_end - range.row_begin, most = chunk_rows<Kernel>(tiles_outside), chunk = ceil_div(rows, ceil_div(rows, most));
      Ahead behind_all = tiles_outside && brings && last_group ? behind_layer(rows, max_rows) : Ahead();
      for (int64_t begin = range.row_begin; begin < range.row_end; begin += chunk) {
        const int64_t end = min_i(begin + chunk, range.row_end);
        kernel.start_chunk(begin, end);
        if (tiles_outside) {
          if (begin == range.row_begin) kernel.start_weights(p.packed_weight + (base + b0) * layout.block_bytes, b1 - b0, rows, true);
          for_each_tile(begin, end, max_rows, [&](const Tile& tile) {
            behind_all.bring();
            kernel.start_tile(tile);
            for_each_panel<Kernel>(b0, b1, [&](const Panel& panel) { kernel.run(*this, tile, panel); });
          });
        } else {
          const int64_t together = p.channel_stats ? 0 : kernel.weights_together / layout.block_bytes / Kernel::panel_blocks(b1) * Kernel::panel_blocks(b1);
          for (int64_t b = b0; b < b1;) {
            const int64_t blocks = min_i(b1 - b, max_i(Kernel::panel_blocks(b1 - b), together)), bytes = blocks * layout.block_bytes;
            const uint8_t* const block = p.packed_weight + (base + b) * layout.block_bytes;
            Ahead ahead;
            if (brings && b + blocks < b1) ahead = Ahead(block + bytes, bytes, end - begin, max_rows);
            else if (brings && last_group && end == range.row_end) ahead = behind_layer(end - begin, max_rows);
            kernel.start_weights(block, blocks, end - begin, end == range.row_end);
            for_each_tile(begin, end, max_rows, [&](const Tile& tile) {
              ahead.bring();
              kernel.start_tile(tile);
              for_each_panel<Kernel>(b, b + blocks, [&](const Panel& panel) { kernel.run(*this, tile, panel); });
            });
            kernel.end_panel();
            b += blocks;
          }
        }
        kernel.end_chunk();
      }
    }
  }

  /// Calls compute(input, last) until all segments of the tile are done. Unless `last`, it leaves the accumulators in `partial`.
  template <class Compute>
  void accumulate(const Tile& tile, const Panel& panel, Compute compute) {
    input.weights = panel.block + sizeof(BlockHeader);
    input.partial = nullptr;
    set_weight_sums(tile, panel);
    if (one_call) return compute(input, true);
    Cursor at{tile.box.ky0, tile.box.kx0, 0};
    bool more;
    do {
      more = next(tile, at);
      compute(input, !more);
      input.partial = partial;
    } while (more);
  }

  /// Bytes from the address of a row's first tap to the end of the last byte that the tile reads.
  int64_t reach(const Tile& tile) const {
    const Box& b = tile.box;
    return (b.ky1 - 1) * tap_y + (joined ? 0 : (b.kx1 - 1) * tap_x) + layout.segment_steps * 4;
  }
  const uint8_t* end_of_x() const { return x_end; }

  const LayerProblem& p;
  const Conv2dShape& s;
  const PackedLayout& layout;
  const bool reads_x;
  alignas(64) int32_t partial[kTileRows * kPanelBlocks * kBlockChannels];

 private:
  /// Bytes that the tiles of so many rows bring to L2, each its share.
  struct Ahead {
    const uint8_t *at = nullptr, *end = nullptr;
    int64_t share = 0;

    Ahead() = default;
    Ahead(const uint8_t* from, int64_t bytes, int64_t rows, int64_t tile_rows)
        : at(from), end(from + bytes), share(ceil_div(bytes * tile_rows, rows * 64) * 64) {}
    void bring() {
      for (const uint8_t* const to = at + min_i(share, end - at); at < to; at += 64) __builtin_prefetch(at, 0, 2);
    }
  };
  Ahead behind_layer(int64_t rows, int64_t tile_rows) const {
    return Ahead(static_cast<const uint8_t*>(p.upcoming.data), min_i(p.upcoming.bytes, kUpcomingBytes), rows, tile_rows);
  }

  /// Next tap, and byte of it, to hand out.
  struct Cursor {
    int64_t ky, kx, byte;
  };

  static int64_t interior_end(int64_t in, int64_t padding, int64_t kernel, int64_t stride, int64_t dilation, int64_t begin, int64_t out) {
    const int64_t room = in + padding - (dilation * (kernel - 1) + 1);
    return room < 0 ? begin : clamp_i(room / stride + 1, begin, out);
  }

  /// Rows between two ends of a chunk: their input, a panel and what is written stay in L2.
  template <class Kernel>
  int64_t chunk_rows(bool tiles_outside) const {
    const int64_t most = min_i(kChunkRows, kChunkSamples * p.rows_per_sample);
    if (tiles_outside) return most;
    const int64_t bytes = s.in_channels * min_i(s.stride_height, s.kernel_height) * min_i(s.stride_width, s.kernel_width);
    return clamp_i(Kernel::kInputInCache / bytes, 48, most);
  }

  template <class Kernel, class Visit>
  void for_each_panel(int64_t b0, int64_t b1, Visit visit) {
    for (int64_t b = b0; b < b1;) {
      Panel panel;
      panel.blocks = Kernel::panel_blocks(b1 - b);
      panel.index = group * group_blocks + b;
      panel.block = p.packed_weight + panel.index * layout.block_bytes;
      panel.channel = group * group_channels + b * kBlockChannels;
      panel.channels = min_i(panel.blocks * kBlockChannels, group_channels - b * kBlockChannels);
      b += panel.blocks;
      visit(panel);
    }
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Tiles

  template <class Visit>
  void for_each_tile(int64_t begin, int64_t end, int64_t max_rows, Visit visit) {
    Tile tile;
    const bool padded = s.padding_top + s.padding_bottom + s.padding_left + s.padding_right > 0;
    if (p.rows_per_sample < kStraddledRows && s.batch > 1) {  // tiles over several samples
      const int64_t tiles = ceil_div(end - begin, max_rows);
      for (int64_t t = 0; t < tiles; ++t) {
        start_tile(tile);
        const int64_t to = begin + (end - begin) * (t + 1) / tiles;
        for (int64_t row = begin + (end - begin) * t / tiles; row < to; ++row) {
          const int64_t sample = row / p.rows_per_sample, in_sample = row % p.rows_per_sample;
          add_row(tile, sample, in_sample / p.out_width, in_sample % p.out_width, padded);
        }
        if (!padded) tile.box = full;
        finish_tile(tile);
        visit(tile);
      }
      return;
    }
    for (int64_t sample = begin / p.rows_per_sample; sample * p.rows_per_sample < end; ++sample) {
      const int64_t first = max_i(begin - sample * p.rows_per_sample, 0), last = min_i(end - sample * p.rows_per_sample, p.rows_per_sample);
      const auto region = [&](int64_t y0, int64_t y1, int64_t x0, int64_t x1, bool inside) {
        const int64_t width = x1 - x0, from = positions_before(first, y0, y1, x0, x1), count = positions_before(last, y0, y1, x0, x1) - from;
        if (count == 0) return;
        const auto add = [&](Tile& tile, int64_t& oy, int64_t& ox, int64_t rows) {
          while (rows > 0) {
            const int64_t in_line = min_i(rows, x1 - ox);
            add_rows(tile, sample, oy, ox, in_line, !inside);
            rows -= in_line;
            ox += in_line;
            if (ox == x1) ox = x0, ++oy;
          }
        };
        if (part_rows && line_length(width, y1 - y0) >= kShortLine) {
          const int64_t line = line_length(width, y1 - y0), parts = ceil_div(line, part_rows);
          int64_t at = from, oy = y0 + at / width, ox = x0 + at % width;
          int64_t in_line = at % line, index = in_line * parts / line, part_end = line * index / parts;  // of the part that `at` is in
          while (part_end <= in_line) part_end = line * ++index / parts;
          while (at < from + count) {
            start_tile(tile);
            for (int part = 0; part < 2 && at < from + count; ++part) {
              const int64_t rows = min_i(part_end - in_line, from + count - at);
              add(tile, oy, ox, rows);
              at += rows;
              in_line = part_end;
              if (index == parts) in_line = index = 0;
              part_end = line * ++index / parts;
              if (part == 0) tile.part = tile.rows;
            }
            tile.apart = (width == 1 ? s.stride_height * s.in_width : s.stride_width) * s.in_channels;
            if (inside) tile.box = full;
            finish_tile(tile);
            visit(tile);
          }
          return;
        }
        const int64_t tiles = ceil_div(count, max_rows);
        int64_t oy = y0 + from / width, ox = x0 + from % width;
        for (int64_t t = 0; t < tiles; ++t) {
          start_tile(tile);
          add(tile, oy, ox, count * (t + 1) / tiles - count * t / tiles);
          if (inside) tile.box = full;
          finish_tile(tile);
          visit(tile);
        }
      };
      region(0, interior_y0, 0, p.out_width, false);
      region(interior_y0, interior_y1, 0, interior_x0, false);
      region(interior_y0, interior_y1, interior_x0, interior_x1, true);
      region(interior_y0, interior_y1, interior_x1, p.out_width, false);
      region(interior_y1, p.out_height, 0, p.out_width, false);
    }
  }

  /// Positions of a region, `width` wide, that lie at the same distance from each other in x: a row of it, or all of it.
  int64_t line_length(int64_t width, int64_t height) const {
    return width == 1 || width * s.stride_width == s.stride_height * s.in_width ? width * height : width;
  }

  /// Positions of the region [y0, y1) x [x0, x1) among the first `rows` rows of a sample.
  int64_t positions_before(int64_t rows, int64_t y0, int64_t y1, int64_t x0, int64_t x1) const {
    const int64_t y = rows / p.out_width;
    if (y < y0) return 0;
    if (y >= y1) return (y1 - y0) * (x1 - x0);
    return (y - y0) * (x1 - x0) + clamp_i(rows % p.out_width - x0, 0, x1 - x0);
  }

  void start_tile(Tile& tile) const {
    tile.rows = tile.part = 0;
    tile.apart = 0;
    tile.pure = true;
    tile.box = {s.kernel_height, 0, s.kernel_width, 0};
  }

  /// Taps of one axis that lie inside the image: [lo, hi).
  static void valid_taps(int64_t first, int64_t extent, int64_t dilation, int64_t kernel, int64_t& lo, int64_t& hi) {
    lo = min_i(ceil_div(-first, dilation), kernel);
    hi = clamp_i(ceil_div(extent - first, dilation), lo, kernel);
  }

  Box valid_box(int64_t iy, int64_t ix) const {
    Box b;
    valid_taps(iy, s.in_height, s.dilation_height, s.kernel_height, b.ky0, b.ky1);
    valid_taps(ix, s.in_width, s.dilation_width, s.kernel_width, b.kx0, b.kx1);
    return b;
  }

  /// Neighbours in a row of the output.
  void add_rows(Tile& tile, int64_t sample, int64_t oy, int64_t ox, int64_t count, bool near_border) const {
    if (near_border) {
      for (int64_t i = 0; i < count; ++i) add_row(tile, sample, oy, ox + i, true);
      return;
    }
    const int first = tile.rows;
    const int64_t iy = oy * s.stride_height - s.padding_top, ix = ox * s.stride_width - s.padding_left, step = s.stride_width * s.in_channels;
    const uint8_t* x = p.x + (((sample * s.in_height + iy) * s.in_width + ix) * s.in_channels + group * layout.inputs);
    const int64_t row = sample * p.rows_per_sample + oy * p.out_width + ox;
    for (int64_t i = 0; i < count; ++i) {
      tile.x[first + i] = x + i * step;
      tile.row[first + i] = row + i;
      tile.sample[first + i] = sample;
    }
    for (int64_t i = 0; places_rows && i < count; ++i) {
      tile.iy[first + i] = iy;
      tile.ix[first + i] = ix + i * s.stride_width;
    }
    tile.rows += static_cast<int>(count);
  }

  void add_row(Tile& tile, int64_t sample, int64_t oy, int64_t ox, bool near_border) const {
    const int i = tile.rows++;
    const int64_t iy = oy * s.stride_height - s.padding_top, ix = ox * s.stride_width - s.padding_left;
    tile.x[i] = p.x + (((sample * s.in_height + iy) * s.in_width + ix) * s.in_channels + group * layout.inputs);
    tile.row[i] = sample * p.rows_per_sample + oy * p.out_width + ox;
    tile.sample[i] = sample;
    tile.iy[i] = iy;
    tile.ix[i] = ix;
    if (!near_border) return;
    const Box b = valid_box(iy, ix);
    if (b.ky0 == b.ky1 || b.kx0 == b.kx1) {
      tile.pure = false;
      return;
    }
    if (i > 0 && (b.ky0 != tile.box.ky0 || b.ky1 != tile.box.ky1 || b.kx0 != tile.box.kx0 || b.kx1 != tile.box.kx1)) tile.pure = false;
    tile.box = {min_i(b.ky0, tile.box.ky0), max_i(b.ky1, tile.box.ky1), min_i(b.kx0, tile.box.kx0), max_i(b.kx1, tile.box.kx1)};
  }

  void finish_tile(Tile& tile) {
    tile.one_sample = tile.sample[0] == tile.sample[tile.rows - 1];
    if (tile.part == 0) tile.part = tile.rows > part_rows ? (tile.rows + 1) / 2 : tile.rows;
    Box& b = tile.box;
    if (b.ky0 >= b.ky1 || b.kx0 >= b.kx1) b = {0, 0, 0, 0}, tile.pure = true;  // padding only
    if (joined && (b.kx0 != 0 || b.kx1 != s.kernel_width)) b.kx0 = 0, b.kx1 = s.kernel_width, tile.pure = tile.pure && b.ky0 == b.ky1;
    if (joined && !contiguous) tile.pure = tile.pure && b.ky0 == b.ky1;
    prepare(tile);
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Segments

  /// First index of the packed segment of a tap, and how many segments a kernel row has.
  int64_t packed_segment(int64_t ky, int64_t kx) const { return joined ? ky : ky * s.kernel_width + kx; }

  bool reads_past_end(const Tile& tile) const {
    const int64_t bytes = joined ? layout.inputs * s.kernel_width : layout.inputs;
    if (bytes % 4 == 0 || tile.box.ky0 == tile.box.ky1) return false;
    const int64_t last = (tile.box.ky1 - 1) * tap_y + (joined ? 0 : (tile.box.kx1 - 1) * tap_x);
    return tile.x[tile.rows - 1] + last + layout.segment_steps * 4 > x_end;
  }

  /// Fills `segments` from a position on. True: there is more.
  bool next(const Tile& tile, Cursor& at) { return direct ? next_segments(tile, at) : next_table(tile, at); }

  /// With what every row reads at the same offset.
  bool next_segments(const Tile& tile, Cursor& at) {
    const Box& b = tile.box;
    int& count = input.segment_count = 0;
    const int64_t taps = joined ? s.kernel_width : contiguous ? b.kx1 - b.kx0 : 1;
    const int64_t steps = joined ? layout.segment_steps : taps * layout.segment_steps;
    while (at.ky < b.ky1) {
      if (count == kCallSegments) return true;
      segments[count++] = {at.ky * tap_y + at.kx * tap_x, packed_segment(at.ky, at.kx) * layout.segment_steps * kStreamBytes, steps};
      at.kx += taps;
      if (at.kx >= b.kx1) at.kx = b.kx0, ++at.ky;
    }
    return false;
  }

  /// With `table`: a pointer per segment and row.
  bool next_table(const Tile& tile, Cursor& at) {
    const Box& b = tile.box;
    const int64_t bytes = layout.inputs * layout.segment_taps;
    int& count = input.segment_count = 0;
    int64_t copied = 0;
    while (at.ky < b.ky1) {
      const int64_t piece = min_i(bytes - at.byte, kPieceBytes), steps = (piece + 3) / 4;
      if (count == kCallSegments || copied + tile.rows * steps * 4 > kCopyBytes) return true;
      for (int i = 0; i < tile.rows; ++i) table[count * kTileRows + i] = table_entry(tile, i, at, piece, copied);
      segments[count++] = {0, (packed_segment(at.ky, at.kx) * layout.segment_steps + at.byte / 4) * kStreamBytes, steps};
      at.byte += piece;
      if (at.byte < bytes) continue;
      at.byte = 0;
      at.kx += layout.segment_taps;
      if (at.kx >= b.kx1) at.kx = b.kx0, ++at.ky;
    }
    return false;
  }

  const uint8_t* table_entry(const Tile& tile, int i, const Cursor& at, int64_t piece, int64_t& copied) {
    const int64_t iy = tile.iy[i] + at.ky * s.dilation_height, ix = tile.ix[i] + at.kx * s.dilation_width;
    int64_t lo = 0, hi = 1;
    if (joined) valid_taps(tile.ix[i], s.in_width, s.dilation_width, s.kernel_width, lo, hi);
    else if (ix < 0 || ix >= s.in_width) hi = 0;
    const int slot = tile.one_sample ? 0 : i;
    const int32_t zero_point = p.samples[tile.sample[i]].x_zero_point;
    if (iy < 0 || iy >= s.in_height || lo == hi) {  // padding
      const int64_t run_bytes = max_i(kPieceBytes, s.in_channels);
      uint8_t* const run = zero_runs.at_least(kTileRows * run_bytes) + slot * run_bytes;
      if (zero_run_value[slot] != zero_point) {
        __builtin_memset(run, zero_point, static_cast<size_t>(run_bytes));
        zero_run_value[slot] = zero_point;
      }
      return run;
    }
    const uint8_t* x = tile.x[i] + at.ky * tap_y + at.kx * tap_x + at.byte;
    const int64_t padded = (piece + 3) / 4 * 4;
    const bool whole = !joined || (contiguous && lo == 0 && hi == s.kernel_width);
    if (whole && x_end - x >= padded) return x;
    uint8_t* copy = copies + copied;
    copied += padded;
    if (whole) {
      __builtin_memcpy(copy, x, static_cast<size_t>(piece));
    } else {
      __builtin_memset(copy, zero_point, static_cast<size_t>(piece));
      if (contiguous) __builtin_memcpy(copy + lo * layout.inputs, x + lo * layout.inputs, static_cast<size_t>((hi - lo) * layout.inputs));
      else for (int64_t kx = lo; kx < hi; ++kx) __builtin_memcpy(copy + kx * layout.inputs, x + kx * tap_x, static_cast<size_t>(layout.inputs));
    }
    return copy;
  }

  /// What all panels of a tile share.
  void prepare(const Tile& tile) {
    if (!reads_x) return;
    const Box& b = tile.box;
    const bool as_before = direct && one_call && b.ky0 == prepared.ky0 && b.ky1 == prepared.ky1 && b.kx0 == prepared.kx0 && b.kx1 == prepared.kx1;
    direct = tile.pure && !reads_past_end(tile);
    input.segments = segments;
    input.rows = direct ? tile.x : table;
    input.row_step = direct ? 0 : kTileRows;
    input.block_bytes = layout.block_bytes;
    input.zero_points = zero_points;
    input.one_zero_point = tile.one_sample;
    for (int i = 0; i < (tile.one_sample ? 1 : tile.rows); ++i) zero_points[i] = p.samples[tile.sample[i]].x_zero_point;
    if (direct && as_before) return;
    Cursor at{b.ky0, b.kx0, 0};
    one_call = !next(tile, at);
    prepared = b;
  }

  /// Sums of the weights that the tile will meet.
  void set_weight_sums(const Tile& tile, const Panel& panel) {
    const Box& b = tile.box;
    if (b.ky1 - b.ky0 == s.kernel_height && b.kx1 - b.kx0 == s.kernel_width) {
      input.weight_sums = panel.block + offsetof(BlockHeader, weight_sum);
      input.sums_step = layout.block_bytes;
      return;
    }
    input.weight_sums = reinterpret_cast<const uint8_t*>(box_sums);
    input.sums_step = kBlockChannels * 4;
    for (int64_t j = 0; j < panel.blocks; ++j) {
      const auto* sums = reinterpret_cast<const int32_t*>(panel.block + j * layout.block_bytes + layout.sums_offset);
      int32_t* to = box_sums + j * kBlockChannels;
      for (int64_t c = 0; c < kBlockChannels; ++c) to[c] = 0;
      for (int64_t ky = b.ky0; ky < b.ky1; ++ky)
        for (int64_t kx = b.kx0; kx < b.kx1; kx += layout.segment_taps)
          for (int64_t c = 0; c < kBlockChannels; ++c) to[c] += sums[packed_segment(ky, kx) * kBlockChannels + c];
    }
  }

  static constexpr int64_t kCopyBytes = kTileRows * 400;  // of a call: all of 7x7x3 or 11x11x3 where a tile's rows need copies

  const uint8_t* const x_end;
  const int64_t tap_y, tap_x;    // bytes between taps
  const bool joined;             // packed segments are kernel rows
  const bool contiguous;         // the bytes of neighbouring taps follow each other, and so do their weights
  const bool places_rows;        // tiles inside of the image may need a table, too
  const Box full;
  int64_t part_rows = 0;         // of a part, at most; 0: tiles have no parts
  int64_t interior_y0, interior_y1, interior_x0, interior_x1;  // output positions whose taps all lie inside
  int64_t group = 0, group_blocks = 0, group_channels = 0;  ///< of the loop

  TileInput input;
  bool direct = true;    ///< the tile reads x itself
  bool one_call = true;  ///< its segments all fit
  Box prepared{-1, -1, -1, -1};  ///< whose segments these are
  alignas(64) int32_t box_sums[kPanelBlocks * kBlockChannels];
  int32_t zero_points[kTileRows];
  Segment segments[kCallSegments];
  const uint8_t* table[kCallSegments * kTileRows];
  int32_t zero_run_value[kTileRows];
  Scratch zero_runs;  ///< of as many bytes as all groups have, of each row; from the first padding on
  uint8_t copies[kCopyBytes];
};

}  // namespace
}  // namespace probquant
