// Linear layers and convolutions, AMX-INT8.
//
// Register tile: 2 parts of up to 16 rows x 2 blocks of 16 channels. Of the 8 tiles, 4 hold sums, 2 hold rows of x (16 x 64 bytes) and 2
// hold weights: the packed stream is what TDPBUSD wants, 16 steps of 4 inputs x 16 channels. A step of 64 inputs is 4 TDPBUSD, of as
// many clocks as a part has rows, on 4 loads, which take 8 clocks each: 64 clocks on 32, so that 2 KB of weights may come from L2.
// All rows of a call fit the same configuration: a part has as many rows as the longest in the range, those beyond its own being ignored.
// x is loaded from where it lies when the rows of a part are equally far apart; other rows (ends of short lines, segments that are not a
// multiple of a tile's bytes) are first gathered, kGatheredBytes of each, which L1 holds beside the weights. A kernel row of 3 channels is a tile
// of its own, if mostly empty: 64 clocks of products hide behind the epilogue, the vector units' gathering does not (7x7x3: 216 us, gathered 296).
// A layer with padding works on copies of its input that have it (input_copies.h), which costs less than to gather its borders' rows; where lines of
// 7 positions would fill 7 rows of a part, on copies whose positions follow each other.
// Groups of whole blocks are walked as one: the two blocks of a step may belong to different groups, and then take 2 loads more of x, of few bytes
// per row. 9 taps of 16 inputs are 36 TDPBUSD for 32 rows x 32 channels, 576 clocks, beside an epilogue of 250; vectors take 1280.
// Weights beyond half of L2 are taken a few panels at a time: a tile of x comes to L1 once for all of these, and they from L2.
// L3 gives a core 29 GB/s, so that weights which come when they are read take as long as the products of 100 rows: those of the next panels, and
// the next layer's where the caller knows it, come to L2 meanwhile (Stream).
// Sums start at the zero point's correction. Weights that lie beyond the end of a segment meet zeros.
//
// A tile of 32 x 32 sums takes 64 clocks per step, but its epilogue takes 200 to 250 (see avx512vnni/epilogue.h): the sums go to memory among
// the next tile's first products (see begin), and the vector units finish them among the others, 4 rows at a time (see steps), curved
// activations included. While TDPBUSD runs, 512-bit multiplications, conversions and minima start once per clock instead of twice; float
// additions, integer ones and logic still twice. So 4 rows per step are free, and 32 rows beside one step take 400 clocks with it.
#define PROBQUANT_TILE_ROWS 32
#include "../avx512vnni/dense_epilogue.h"
#include "../input_copies.h"
#include "tiles.h"

#include <type_traits>

namespace probquant {
namespace {

constexpr int kTileBlocks = 2;
constexpr int kRowSums = kTileBlocks * kBlockChannels;  ///< sums of a row
constexpr int64_t kPartRows = 16;                       ///< of a tile, at most
constexpr int64_t kTileSteps = 16;                      ///< of 4 inputs, in a tile
constexpr int64_t kGatheredBytes = 768;                 ///< of each row
constexpr int64_t kGatheredStride = kGatheredBytes + 64;  ///< whose rows do not compete for the same sets of L1
constexpr int kStepsWithoutStore = 16;                    ///< of a tile: see steps()

/// [blocks - 1]
template <bool kOneSample, bool kResidual, Clamp kClamp>
constexpr RowsEpilogue kRowsEpilogues[kTileBlocks] = {requantize_rows<kOneSample, kResidual, kClamp, 1>, requantize_rows<kOneSample, kResidual, kClamp, 2>};

/// Which epilogue the products of the next tile take along: those of two blocks, of one sample but for `samples` and `curved`.
enum class Along { none, open, relu, positive, any, residual, residual_positive, samples, curved, extremes };
constexpr int kAlongKinds = 10;

/// A tile whose sums are known and whose codes are not all written.
struct Pending {
  int left = 0;  ///< rows
  Along along;
  RowsEpilogue epilogue;
  int64_t block_bytes;
  const int32_t* sums;  ///< [blocks * 16] per row
  TileOutput out;
  int64_t row[2][kTileRows];  ///< of this tile, and of the one that is being multiplied
  const SampleConstants* samples[kTileRows];
  int64_t* counters[kTileRows];
  __m512i lo[kTileBlocks], hi[kTileBlocks];  ///< extreme sums (Along::extremes)

  /// Writes the codes of the rows that are left.
  void finish() {
    if (left == 0) return;
    epilogue(out, block_bytes, sums, left);
    left = 0;
  }
};

/// Rows of a pending tile, four at a time.
template <Along kAlong>
class PendingRows {
 public:
  __attribute__((always_inline)) explicit PendingRows(Pending& pending) : pending_(pending), from_{{pending.out, pending.block_bytes}, pending.sums}, left_(pending.left) {}
  __attribute__((always_inline)) void four() {
    if (left_ < 4) return;
    from_.template next<4>();
    left_ -= 4;
  }
  __attribute__((always_inline)) void stop() {
    const int done = pending_.left - left_;
    from_.to.finish(done);
    pending_.left = left_;
    pending_.sums += done * kTileBlocks * kBlockChannels;
    pending_.out.row += done;
    if (kOneSample) return;
    pending_.out.samples += done;
    pending_.out.counters += done;
  }

 private:
  static constexpr bool kOneSample = kAlong != Along::samples;
  static constexpr bool kResidual = kAlong == Along::residual || kAlong == Along::residual_positive || kAlong == Along::samples;
  static constexpr Clamp kClamp = kAlong == Along::open                                                 ? Clamp::open
                                  : kAlong == Along::relu                                               ? Clamp::relu
                                  : kAlong == Along::positive || kAlong == Along::residual_positive ? Clamp::positive
                                                                                                        : Clamp::any;
  Pending& pending_;
  RowsFromMemory<kOneSample, kResidual, kClamp, kTileBlocks> from_;
  int left_;
};
template <>
class PendingRows<Along::extremes> {
 public:
  __attribute__((always_inline)) explicit PendingRows(Pending& pending)
      : pending_(pending), sums_(pending.sums), left_(pending.left), lo_{pending.lo[0], pending.lo[1]}, hi_{pending.hi[0], pending.hi[1]} {}
  __attribute__((always_inline)) void four() {
    if (left_ < 4) return;
#pragma GCC unroll 8
    for (int i = 0; i < 4 * kTileBlocks; ++i) {
      const __m512i v = _mm512_loadu_si512(sums_ + i * kBlockChannels);
      lo_[i % kTileBlocks] = _mm512_min_epi32(lo_[i % kTileBlocks], v);
      hi_[i % kTileBlocks] = _mm512_max_epi32(hi_[i % kTileBlocks], v);
    }
    sums_ += 4 * kRowSums;
    left_ -= 4;
  }
  __attribute__((always_inline)) void stop() {
    pending_.left = left_;
    pending_.sums = sums_;
    for (int j = 0; j < kTileBlocks; ++j) pending_.lo[j] = lo_[j], pending_.hi[j] = hi_[j];
  }

 private:
  Pending& pending_;
  const int32_t* sums_;
  int left_;
  __m512i lo_[kTileBlocks], hi_[kTileBlocks];
};
template <>
class PendingRows<Along::curved> {
 public:
  explicit PendingRows(Pending& pending) : pending_(pending) {}
  void four() {
    if (pending_.left < 4) return;
    pending_.epilogue(pending_.out, pending_.block_bytes, pending_.sums, 4);
    pending_.left -= 4;
    pending_.sums += 4 * kRowSums;
    pending_.out.row += 4;
    pending_.out.samples += 4;
    pending_.out.counters += 4;
  }
  void stop() {}

 private:
  Pending& pending_;
};
template <>
class PendingRows<Along::none> {
 public:
  explicit PendingRows(Pending&) {}
  void four() {}
  void stop() {}
};

/// Memory that is brought to L2, some lines with every step of products, and no more than L3 gives in that time: prefetches beyond keep L1's fill
/// buffers from the tiles. What is left then comes when it is read.
struct Stream {
  static constexpr int64_t kMostLines = 4;
  const uint8_t *next = nullptr, *end = nullptr;
  int lines = 0;

  Stream() = default;
  Stream(const uint8_t* begin, int64_t bytes, int64_t steps)
      : next(begin), end(begin + bytes), lines(static_cast<int>(min_i(kMostLines, ceil_div(bytes, 64 * steps)))) {}
  void step() {
    for (int i = 0; i < lines && next < end; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

/// How many steps of 4 inputs a tile of weights holds, of segments of so many: all of it, an equal share, or what leaves a rest.
int64_t steps_of_tile(int64_t steps) {
  const int64_t least = ceil_div(steps, kTileSteps);
  for (int64_t tiles = least; 4 * tiles <= 5 * least + 1; ++tiles)
    if (steps % tiles == 0) return steps / tiles;
  return kTileSteps;
}

/// Bytes that a row gives to a vector of gathered ones.
struct Piece {
  const uint8_t* const* rows;
  int64_t offset;  ///< from a row's pointer to what would come into lane 0
  __mmask64 lanes;
};

/// Writes one vector of every row.
template <int kPieces>
void copy_pieces(const Piece* pieces, int rows, uint8_t* to) {
  for (int i = 0; i < rows; ++i, to += kGatheredStride) {
    __m512i v = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int k = 0; k < kPieces; ++k) v = _mm512_mask_loadu_epi8(v, pieces[k].lanes, pieces[k].rows[i] + pieces[k].offset);
    _mm512_store_si512(to, v);
  }
}
using CopyPieces = void (*)(const Piece*, int, uint8_t*);
constexpr int kMostPieces = 16;  ///< of 4 bytes
constexpr CopyPieces kCopies[kMostPieces + 1] = {nullptr,        copy_pieces<1>,  copy_pieces<2>,  copy_pieces<3>,  copy_pieces<4>,  copy_pieces<5>,
                                                 copy_pieces<6>, copy_pieces<7>,  copy_pieces<8>,  copy_pieces<9>,  copy_pieces<10>, copy_pieces<11>,
                                                 copy_pieces<12>, copy_pieces<13>, copy_pieces<14>, copy_pieces<15>, copy_pieces<16>};

class AmxKernel : public DenseEpilogue {
 public:
  static constexpr bool kPrefetches = true;
  static constexpr int64_t kInputInCache = 640 << 10;
  static constexpr int64_t weights_in_cache = 1 << 20;    ///< up to which tiles are outside of panels: half of L2
  static constexpr int64_t weights_together = 384 << 10;  ///< bytes of panels that a tile meets one after the other, beyond that
  const bool whole_tiles;   ///< a packed segment is, where its rows lie in x as they are
  const bool spans_groups;  ///< where no tile needs gathered rows, which blocks of several groups would not share
  static int64_t max_rows(int64_t) { return kTileRows; }
  static int panel_blocks(int64_t left) { return static_cast<int>(min_i(left, kTileBlocks)); }

  AmxKernel(const DenseDriver& owner, Output kind, int64_t longest_part, const LayerRange& range)
      : DenseEpilogue(owner.p, kind, kind == Output::floats ? nullptr : held_of(owner.p, range)),
        whole_tiles(owner.p.layout.segment_steps % steps_of_tile(owner.p.layout.segment_steps) == 0),
        spans_groups(whole_tiles && owner.p.layout.whole_groups() && owner.parts_are_lines(range)),
        held_end(held ? held + held_values(owner.p, range) : nullptr),
        driver(owner),
        part_rows(longest_part),
        tile_steps(steps_of_tile(owner.p.layout.segment_steps)),
        gathered_steps(kGatheredBytes / 4 / tile_steps * tile_steps),
        rows_along(static_cast<int>(ceil_div(kTileRows / 4, max_i(1, owner.p.layout.steps / tile_steps)))) {
    TileConfiguration tiles;
    for (int tile = 0; tile < 4; ++tile) tiles.set(tile, part_rows, kTileBytes);
    for (int tile = 4; tile < 6; ++tile) tiles.set(tile, part_rows, 4 * tile_steps);
    for (int tile = 6; tile < 8; ++tile) tiles.set(tile, tile_steps, kTileBytes);
    configure_tiles(tiles);
    if (kind == Output::range) return;
    const int64_t panels = ceil_div(block_of(p.layout, range.channel_end - 1) + 1 - block_of(p.layout, range.channel_begin), kTileBlocks);
    upcoming = {static_cast<const uint8_t*>(p.upcoming.data), min_i(p.upcoming.bytes, kUpcomingBytes), steps_of(range.row_end - range.row_begin, panels)};
  }
  AmxKernel(const AmxKernel&) = delete;
  AmxKernel& operator=(const AmxKernel&) = delete;
  ~AmxKernel() { release_tiles(); }  // a configuration left behind would be saved with every switch of the thread

  /// The next panels' weights come from L3 or memory while these multiply, a share in each step.
  void start_weights(const uint8_t* block, int64_t panel_blocks, int64_t rows, bool) {
    const int64_t bytes = panel_blocks * p.layout.block_bytes, left = p.packed_weight + p.layout.trailer_offset() - (block + bytes);
    ahead = {block + bytes, min_i(bytes, left), steps_of(rows, ceil_div(panel_blocks, kTileBlocks))};
  }

  void start_tile(const Tile& tile) {
    if (tile.one_sample ? tile.sample[0] != current_sample || current.values >= kFlushAfter : output == Output::range) finish_pending();
    DenseEpilogue::start_tile(tile);
    rows_of = 1 - rows_of;
    __builtin_memcpy(pending.row[rows_of], tile.row, sizeof pending.row[0]);
    kept = 0;
    stride[0] = stride[1] = tile.apart;
    strided = part_stride(tile, 0, tile.part, stride[0]) && part_stride(tile, tile.part, tile.rows, stride[1]);
  }

  void run(DenseDriver& segments, const Tile& tile, const Panel& panel) {
    parts = tile.rows > tile.part ? 2 : 1;
    second_row = parts > 1 ? tile.part : 0;
    blocks = panel.blocks;
    const BlockConstants* const constants = (at_once || curved || output == Output::range) && tile.one_sample ? panel_constants(panel) : nullptr;
    int32_t* const sums = held ? held : segments.partial;
    if (!held || output != Output::codes) {
      segments.accumulate(tile, panel, [&](const TileInput& in, bool last) {
        segments_complete = last && !in.partial;
        if (!in.partial) find_start(in, tile, constants);
        multiply(in, tile, panel);
      });
      if (start.now) begin_without_products();
      finish_pending();
      unsaved = {sums, tile.part * blocks * kBlockChannels, parts, blocks};
      if (held || p.channel_stats || !(output == Output::range || at_once || curved)) save_sums(tile, segments.partial);
    }
    if (held) held += tile.rows * panel.blocks * kBlockChannels;
    if (output == Output::range) return start_range(tile, panel, sums);
    const bool writes_codes = output == Output::codes;
    if (at_once || curved) {
      start_pending(tile, panel, sums);
      if (!p.channel_stats && !held) return;
      finish_pending();
    } else {
      finish(tile.row, tile.sample, tile.rows, sums, panel.blocks * kBlockChannels, panel);
    }
    if (p.channel_stats && writes_codes) add_channel_stats(tile.row, tile.sample, tile.rows, panel);
  }

  void end_chunk() {
    finish_pending();
    DenseEpilogue::end_chunk();
  }

 private:
  /// Steps of products, about.
  int64_t steps_of(int64_t rows, int64_t panels) const { return max_i(1, rows / (2 * part_rows)) * max_i(1, p.layout.steps / tile_steps) * panels; }

  /// Bytes between the rows [begin, end) of a tile, where they are not known, if they are the same for all of them and all rows of a part can be read
  /// from there.
  bool part_stride(const Tile& tile, int begin, int end, int64_t& bytes) const {
    if (bytes == 0) {
      bytes = end - begin > 1 ? tile.x[begin + 1] - tile.x[begin] : 0;
      int64_t differences = 0;
      for (int i = begin + 1; i < end; ++i) differences |= tile.x[i] - tile.x[i - 1] - bytes;
      if (differences != 0) return false;
    }
    return end - begin == part_rows || end == begin || tile.x[begin] + (part_rows - 1) * bytes + driver.reach(tile) <= driver.end_of_x();
  }

  /// Accumulators start at the zero point's correction, which a tile of all taps finds among a sample's constants: a tile's load waits for
  /// everything that was stored before it to its bytes.
  void find_start(const TileInput& in, const Tile& tile, const BlockConstants* constants) {
    start.now = true;
    start.zero = in.one_zero_point && in.zero_points[0] == 0;
    start.bytes = 0;
    if (start.zero) return;
    if (constants && in.sums_step == p.layout.block_bytes) {
      for (int k = 0; k < 4; ++k) start.rows[k] = constants[k % 2 < blocks ? k % 2 : 0].correction;
      return;
    }
    const int count = in.one_zero_point ? 1 : tile.rows;
    for (int j = 0; j < blocks; ++j) {
      const __m512i sums = _mm512_loadu_si512(in.weight_sums + j * in.sums_step);
      for (int i = 0; i < count; ++i)
        _mm512_store_si512(correction[i] + j * kBlockChannels, _mm512_mullo_epi32(sums, _mm512_set1_epi32(-in.zero_points[i])));
    }
    if (!in.one_zero_point) start.bytes = sizeof correction[0];
    for (int k = 0; k < 4; ++k)
      start.rows[k] = correction[in.one_zero_point || k < 2 ? 0 : tile.part] + k % 2 * kBlockChannels;
  }

  /// The last tile's sums to memory, and the start of this one's, of one register: it waits for its last product, for the store and for the
  /// load. One after the other among the products of the others, that takes 30 clocks a tile; all four at once take 100.
  template <int kTile>
  __attribute__((always_inline)) void begin() {
    if (unsaved.to) store_tile<kTile>(unsaved.at(kTile), unsaved.row_bytes());
    if (start.zero) zero_tile<kTile>();
    else load_tile<kTile>(start.rows[kTile], start.bytes);
  }

  /// A tile all of whose taps lie in the padding.
  void begin_without_products() {
    save_sums();
    begin<0>();
    if (blocks > 1) begin<1>();
    if (parts > 1) begin<2>();
    if (parts > 1 && blocks > 1) begin<3>();
    start.now = false;
  }

  /// Rows beyond a part's own are overwritten by the next part, or nobody's.
  void save_sums() {
    if (!unsaved.to) return;
    store_tile<0>(unsaved.at(0), unsaved.row_bytes());
    if (unsaved.blocks > 1) store_tile<1>(unsaved.at(1), unsaved.row_bytes());
    if (unsaved.parts > 1) store_tile<2>(unsaved.at(2), unsaved.row_bytes());
    if (unsaved.parts > 1 && unsaved.blocks > 1) store_tile<3>(unsaved.at(3), unsaved.row_bytes());
    unsaved.to = nullptr;
  }

  /// The same at once. What is held overwrites the next tile's place, and where that is another range's, sums take a detour.
  void save_sums(const Tile& tile, int32_t* detour) {
    int32_t* const to = unsaved.to;
    const int64_t width = blocks * kBlockChannels;
    const bool beyond = held && to + (second_row + part_rows) * width > held_end;
    if (beyond) unsaved.to = detour;
    save_sums();
    if (beyond) __builtin_memcpy(to, detour, static_cast<size_t>(tile.rows * width) * sizeof(int32_t));
  }

  void multiply(const TileInput& in, const Tile& tile, const Panel& panel) {
    if (kept > 0) {  // the rows that the panel before met
      return multiply_run(gathered_rows[0], gathered_rows[second_row], kGatheredStride, kGatheredStride, in, gathered_offset, kept);
    }
    const bool direct = strided && in.row_step == 0;
    if (direct && of_whole_tiles(in)) {
      const int64_t x = group_offset(panel, 0);
      return multiply_steps({in.rows[0] + x, in.rows[second_row] + x, stride[0], stride[1], group_offset(panel, panel.blocks - 1) - x, in.weights, in.block_bytes,
                             in.segments, in.segment_count, in.segments[0].steps});
    }
    bool all_gathered = true;
    for (int i = 0; i < in.segment_count; ++i) {
      const Segment& segment = in.segments[i];
      const uint8_t* const* rows = in.rows + i * in.row_step;
      const int64_t whole = direct ? segment.steps / tile_steps : 0, done = whole * tile_steps;
      if (whole > 0) {
        multiply_gathered(in, tile);
        multiply_run(rows[0] + segment.x_offset, rows[second_row] + segment.x_offset, stride[0], stride[1], in, segment.weight_offset, whole);
        all_gathered = false;
      }
      if (done < segment.steps)
        all_gathered &= gather(in, tile, rows, segment.x_offset + 4 * done, segment.weight_offset + done * kStreamBytes, segment.steps - done);
    }
    const int64_t tiles = multiply_gathered(in, tile);
    if (all_gathered && segments_complete) kept = tiles;
  }

  /// Whether segments are whole tiles, as many each. A segment is one of the packed ones, or a few.
  bool of_whole_tiles(const TileInput& in) const {
    int64_t differences = whole_tiles && in.segment_count > 0 ? 0 : 1;
    for (int i = 1; i < in.segment_count; ++i) differences |= in.segments[i].steps - in.segments[0].steps;
    return differences == 0;
  }

  /// Where the inputs of a block begin, from a row's pointer on.
  int64_t group_offset(const Panel& panel, int64_t block) const {
    return spans_groups ? (panel.index + block) / p.layout.group_blocks * p.layout.inputs : 0;
  }

  /// Notes what rows have for `steps` steps of the stream, and multiplies before that what does not fit beside it. Whether all fits.
  bool gather(const TileInput& in, const Tile& tile, const uint8_t* const* rows, int64_t x_offset, int64_t weight_offset, int64_t steps) {
    bool fits = true;
    while (steps > 0) {
      if (gathered == gathered_steps || (gathered > 0 && weight_offset != gathered_offset + gathered * kStreamBytes)) {
        multiply_gathered(in, tile);
        fits = false;
      }
      if (gathered == 0) gathered_offset = weight_offset;
      const int64_t lane = 4 * gathered % 64, take = min_i(min_i(steps, gathered_steps - gathered), (64 - lane) / 4);
      if (lane == 0) vector_pieces[4 * gathered / 64] = 0;
      Piece& piece = pieces[4 * gathered / 64][vector_pieces[4 * gathered / 64]++];
      piece = {rows, x_offset - lane, first_lanes64(4 * take) << lane};
      gathered += take;
      steps -= take;
      x_offset += 4 * take;
      weight_offset += take * kStreamBytes;
    }
    return fits;
  }

  /// Copies the rows' pieces together, with zeros behind the last one, and multiplies them. Returns how many tiles that took.
  int64_t multiply_gathered(const TileInput& in, const Tile& tile) {
    if (gathered == 0) return 0;
    const int64_t tiles = ceil_div(gathered, tile_steps), vectors = ceil_div(4 * gathered, 64);
    for (int64_t i = 0; i < vectors; ++i) kCopies[vector_pieces[i]](pieces[i], tile.rows, gathered_rows[0] + 64 * i);
    if (64 * vectors < 4 * tiles * tile_steps)
      for (int i = 0; i < tile.rows; ++i) _mm512_store_si512(gathered_rows[i] + 64 * vectors, _mm512_setzero_si512());
    multiply_run(gathered_rows[0], gathered_rows[second_row], kGatheredStride, kGatheredStride, in, gathered_offset, tiles);
    gathered = 0;
    return tiles;
  }

  /// Products of a tile: segments of so many steps each, which are whole tiles.
  struct Products {
    const uint8_t *x, *x_second;  ///< of the two parts' first rows
    int64_t x_stride, x_second_stride;
    int64_t x_between;  ///< from what the first block reads to what the second one does: not 0 if their groups differ
    const uint8_t* weights;
    int64_t block_bytes;
    const Segment* segments;
    int64_t count, steps;
  };

  void multiply_steps(const Products& of) {
    if (start.now && (unsaved.parts != parts || unsaved.blocks != blocks)) save_sums();
    const Along along = pending.left < 4 ? Along::none : pending.along;
    if (along == Along::none) finish_pending();
    (this->*kSteps[parts - 1][blocks - 1][static_cast<int>(along)])(of);
  }
  /// `tiles` that follow each other, in x from the rows on.
  void multiply_run(const uint8_t* x, const uint8_t* x_second, int64_t x_stride, int64_t x_second_stride, const TileInput& in, int64_t weight_offset, int64_t tiles) {
    const Segment one{0, weight_offset, tiles * tile_steps};
    multiply_steps({x, x_second, x_stride, x_second_stride, 0, in.weights, in.block_bytes, &one, 1, one.steps});
  }

  /// Every product of a tile takes 16 clocks; the processor sees 512 instructions ahead, and the epilogue of 32 rows has more: so some of it
  /// stands behind each product. 4 rows per step take no time of their own, more do: it is spread over all steps of a tile.
  template <int kParts, int kBlocks, Along kAlong>
  __attribute__((noinline)) void steps(const Products& of) {
    const int64_t x_step = 4 * tile_steps, weights_step = tile_steps * kStreamBytes, x_between = of.x_between;
    const Segment* segment = of.segments;
    const uint8_t *x, *x_second, *weights, *weights_second;
    const auto enter = [&]() __attribute__((always_inline)) {
      x = of.x + segment->x_offset, x_second = of.x_second + segment->x_offset;
      weights = of.weights + segment->weight_offset, weights_second = weights + of.block_bytes;
    };
    enter();
    PendingRows<kAlong> rows(pending);
    const auto some_rows = [&](int fours) __attribute__((always_inline)) {
#pragma GCC unroll 1
      for (int i = 0; i < fours; ++i) rows.four();
    };
    int64_t left = of.steps * of.count, in_segment = of.steps;
    const auto advance = [&]() __attribute__((always_inline)) {
      x += x_step, x_second += x_step, weights += weights_step, weights_second += weights_step;
      in_segment -= tile_steps;
      if (in_segment == 0 && left > 0) {
        ++segment;
        enter();
        in_segment = of.steps;
      }
      ahead.step();
      upcoming.step();
    };
    if (start.now) {
      load_tile<4>(x, of.x_stride);
      load_tile<6>(weights, kStreamBytes);
      begin<0>();
      multiply_tiles<0, 4, 6>();
      if (kBlocks > 1) {
        load_tile<7>(weights_second, kStreamBytes);
        if (x_between != 0) load_tile<4>(x + x_between, of.x_stride);
        begin<1>();
        multiply_tiles<1, 4, 7>();
      }
      if (kParts > 1) {
        load_tile<5>(x_second, of.x_second_stride);
        begin<2>();
        multiply_tiles<2, 5, 6>();
      }
      if (kParts > 1 && kBlocks > 1) {
        if (x_between != 0) load_tile<5>(x_second + x_between, of.x_second_stride);
        begin<3>();
        multiply_tiles<3, 5, 7>();
      }
      start.now = false;
      unsaved.to = nullptr;
      since_store = 0;
      left -= tile_steps;
      advance();
      some_rows(rows_along);
    }
    const int later = (rows_along + 1) / 2, early = rows_along / 2;
    while (left > 0) {
      left -= tile_steps;
      load_tile<4>(x, of.x_stride);
      load_tile<6>(weights, kStreamBytes);
      multiply_tiles<0, 4, 6>();
      if (kBlocks > 1) {
        load_tile<7>(weights_second, kStreamBytes);
        if (x_between != 0) load_tile<4>(x + x_between, of.x_stride);
        multiply_tiles<1, 4, 7>();
      }
      some_rows(early);
      if (kParts > 1) {
        load_tile<5>(x_second, of.x_second_stride);
        multiply_tiles<2, 5, 6>();
      }
      if (kParts > 1 && kBlocks > 1) {
        if (x_between != 0) load_tile<5>(x_second + x_between, of.x_second_stride);
        multiply_tiles<3, 5, 7>();
      }
      advance();
      some_rows(later);
      if (++since_store == kStepsWithoutStore) {  // measured: the first store of a tile in some 2000 clocks takes 1000 longer, so there is none
        store_tile<0>(nothing, 0);
        since_store = 0;
      }
    }
    rows.stop();
  }

  using Steps = void (AmxKernel::*)(const Products&);
#define PROBQUANT_STEPS(parts, blocks) \
  {&AmxKernel::steps<parts, blocks, Along::none>, &AmxKernel::steps<parts, blocks, Along::open>, &AmxKernel::steps<parts, blocks, Along::relu>, \
   &AmxKernel::steps<parts, blocks, Along::positive>, &AmxKernel::steps<parts, blocks, Along::any>, &AmxKernel::steps<parts, blocks, Along::residual>, \
   &AmxKernel::steps<parts, blocks, Along::residual_positive>, \
   &AmxKernel::steps<parts, blocks, Along::samples>, &AmxKernel::steps<parts, blocks, Along::curved>, &AmxKernel::steps<parts, blocks, Along::extremes>}
  static constexpr Steps kSteps[2][kTileBlocks][kAlongKinds] = {{PROBQUANT_STEPS(1, 1), PROBQUANT_STEPS(1, 2)}, {PROBQUANT_STEPS(2, 1), PROBQUANT_STEPS(2, 2)}};
#undef PROBQUANT_STEPS

  void start_pending(const Tile& tile, const Panel& panel, const int32_t* sums) {
    pending.left = tile.rows;
    pending.block_bytes = p.layout.block_bytes;
    pending.sums = sums;
    const SampleConstants& first = *samples[0];
    const Along kind = p.residual       ? first.positive ? Along::residual_positive : Along::residual
                       : first.positive ? Along::positive
                       : first.relu     ? Along::relu
                       : first.open     ? Along::open
                                        : Along::any;
    const bool own_samples = !tile.one_sample || curved;
    pending.along = panel.blocks < kTileBlocks ? Along::none : curved ? Along::curved : tile.one_sample ? kind : Along::samples;
    pending.epilogue = (curved                         ? kCurvedEpilogues
                        : !tile.one_sample             ? kRowsEpilogues<false, true, Clamp::any>
                        : kind == Along::residual      ? kRowsEpilogues<true, true, Clamp::any>
                        : kind == Along::residual_positive ? kRowsEpilogues<true, true, Clamp::positive>
                        : kind == Along::positive      ? kRowsEpilogues<true, false, Clamp::positive>
                        : kind == Along::relu          ? kRowsEpilogues<true, false, Clamp::relu>
                        : kind == Along::open          ? kRowsEpilogues<true, false, Clamp::open>
                                                       : kRowsEpilogues<true, false, Clamp::any>)[panel.blocks - 1];
    if (own_samples) {
      __builtin_memcpy(pending.samples, samples, sizeof samples[0] * static_cast<size_t>(tile.rows));
      __builtin_memcpy(pending.counters, row_counters, sizeof row_counters[0] * static_cast<size_t>(tile.rows));
    }
    pending.samples[0] = samples[0];
    pending.out = {panel.block, tile.one_sample ? panel_constants(panel) : nullptr, panel.channels, pending.row[rows_of], channels, p.y + panel.channel, p.residual ? p.residual + panel.channel : nullptr,
                   pending.samples, &current, own_samples ? pending.counters : nullptr, p.activation, held != nullptr};
  }

  /// Whose ranges are pending. Sums of a channel are compared along the products of the next tile, everything else behind them.
  void start_range(const Tile& tile, const Panel& panel, int32_t* sums) {
    pending.left = tile.rows;
    pending.sums = sums;
    pending.along = tile.one_sample && p.activation == Activation::clamp && !p.residual && panel.blocks == kTileBlocks ? Along::extremes : Along::none;
    for (int j = 0; j < kTileBlocks; ++j) pending.lo[j] = _mm512_set1_epi32(INT32_MAX), pending.hi[j] = _mm512_set1_epi32(INT32_MIN);
    range_rows = {tile.rows, tile.one_sample, pending.row[rows_of], range_samples};
    __builtin_memcpy(range_samples, tile.sample, sizeof(int64_t) * static_cast<size_t>(tile.rows));
    range_panel = panel;
    range_sums = sums;
  }

  void finish_range() {
    if (!range_sums) return;
    if (pending.along == Along::extremes) {
      for (; pending.left > 0; --pending.left, pending.sums += kRowSums)
        for (int j = 0; j < kTileBlocks; ++j) {
          const __m512i v = _mm512_loadu_si512(pending.sums + j * kBlockChannels);
          pending.lo[j] = _mm512_min_epi32(pending.lo[j], v);
          pending.hi[j] = _mm512_max_epi32(pending.hi[j], v);
        }
      for (int j = 0; j < kTileBlocks; ++j) widen_channels(range_samples[0], range_panel, j, pending.lo[j], pending.hi[j]);
    } else {
      widen_ranges(range_rows, range_panel, range_sums);
      pending.left = 0;
    }
    range_sums = nullptr;
  }

  void finish_pending() {
    save_sums();
    output == Output::range ? finish_range() : pending.finish();
  }

  int32_t* const held_end;
  const DenseDriver& driver;
  const int64_t part_rows;
  const int64_t tile_steps, gathered_steps;
  const int rows_along;  ///< fours of a pending tile's rows with each step
  bool strided = false;
  int64_t stride[2];
  int parts = 1, blocks = 1, second_row = 0;
  /// Where the sums of a tile start, before its first product.
  struct {
    bool now = false;
    bool zero;      ///< at 0, or at
    int64_t bytes;  ///< from row to row
    const int32_t* rows[4];
  } start;
  /// Sums that are in registers still, of the tile that is pending.
  struct {
    int32_t* to = nullptr;  ///< null: none are
    int64_t second;         ///< from there to those of the second part
    int parts, blocks;

    int32_t* at(int tile) const { return to + tile / 2 * second + tile % 2 * kBlockChannels; }
    int64_t row_bytes() const { return blocks * kBlockChannels * static_cast<int64_t>(sizeof(int32_t)); }
  } unsaved;
  Pending pending;
  OutputRows range_rows;  ///< these and the following: of a tile whose range is pending
  int64_t range_samples[kTileRows];
  Panel range_panel;
  int32_t* range_sums = nullptr;  ///< null: of none
  Stream ahead, upcoming;  ///< weights of the next panels, and what comes behind this layer
  int rows_of = 0;  ///< of pending.row, the tile's
  int since_store = 0;                             ///< steps since the last store of a tile
  alignas(64) uint8_t nothing[kTileBytes];

  int64_t gathered = 0, gathered_offset = 0;  ///< steps that are noted, and where their weights begin
  int64_t kept = 0;                           ///< tiles of gathered rows that are all that this tile's panels need
  bool segments_complete = false;             ///< the call has all of the tile's
  int vector_pieces[kGatheredBytes / 64];
  Piece pieces[kGatheredBytes / 64][kMostPieces];
  alignas(64) int32_t correction[kTileRows][kRowSums];
  alignas(64) uint8_t gathered_rows[kTileRows][kGatheredStride];
};

void run_unpadded(const LayerProblem& p, const LayerRange& range, Output output) {
  DenseDriver driver(p, !(p.held && output == Output::codes));
  const int64_t longest_part = driver.make_parts(range);
  AmxKernel kernel(driver, output, longest_part, range);
  driver.run(range, kernel);
}

/// Tiles load x from where it lies.
void run(const LayerProblem& p, const LayerRange& range, Output output) {
  run_on_copies(p, range, kPartRows, !(p.held && output == Output::codes), [&](const LayerProblem& q, const LayerRange& part) { run_unpadded(q, part, output); });
}

void quantized(const LayerProblem& p, const LayerRange& range) { run(p, range, Output::codes); }
void to_float(const LayerProblem& p, const LayerRange& range) { run(p, range, Output::floats); }
void find_range(const LayerProblem& p, const LayerRange& range) { run(p, range, Output::range); }

}  // namespace

void install_dense_amx(Kernels& table) {
  table.dense = {quantized, to_float, find_range};
  table.grouped_inputs = 0;  // tiles take less than vectors, the zeros between joined groups included
  table.macs_per_clock = 1024;
}

}  // namespace probquant
