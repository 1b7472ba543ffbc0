// Linear layers and convolutions, AMX-INT8.
//
// Register tile: 2 parts of up to 16 rows x 2 blocks of 16 channels. Of the 8 tiles, 4 hold sums, 2 hold rows of x (16 x 64 bytes) and 2
// hold weights: the packed stream is what TDPBUSD wants, 16 steps of 4 inputs x 16 channels. A step of 64 inputs is 4 TDPBUSD, of as
// many clocks as a part has rows, on 4 loads, which take 8 clocks each: 64 clocks on 32, so that 2 KB of weights may come from L2.
// All rows of a call fit the same configuration: a part has as many rows as the longest in the range, those beyond its own being ignored.
// x is loaded from where it lies when the rows of a part are equally far apart; other rows (padding, ends of short lines, segments that
// are not a multiple of a tile's bytes) are first gathered, kGatheredBytes of each, which L1 holds beside the weights.
// Sums start at the zero point's correction. Weights that lie beyond the end of a segment meet zeros.
//
// A tile of 32 x 32 sums takes 64 clocks per step, but its epilogue takes 250 (see avx512vnni/dense.cpp): the sums go to memory, and while
// the next tile multiplies, the vector units finish them, 4 rows after each step, which out-of-order execution overlaps.
#define PROBQUANT_TILE_ROWS 32
#include "../avx512vnni/dense_epilogue.h"
#include "tiles.h"

namespace probquant {
namespace {

constexpr int64_t kPartRows = 16;
constexpr int kTileBlocks = 2;
constexpr int kRowSums = kTileBlocks * kBlockChannels;  ///< sums of a row
constexpr int64_t kTileSteps = 16;                      ///< of 4 inputs, in a tile
constexpr int64_t kGatheredBytes = 512;                 ///< of each row
constexpr int64_t kGatheredStride = kGatheredBytes + 64;  ///< whose rows do not compete for the same sets of L1

/// Codes of 4 rows, or less, from their sums in memory.
template <bool kOneSample, bool kResidual, Low kLow, int kRows, int kBlocks>
__attribute__((noinline)) void requantize_rows(const TileOutput& out, int64_t block_bytes, const int32_t* sums) {
  __m512i acc[kRows][kBlocks];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) acc[i][j] = _mm512_loadu_si512(sums + i * kRowSums + j * kBlockChannels);
  Requantizer<kOneSample, kResidual, kLow, kRows, kBlocks> to(out, block_bytes);
  to.template rows<0>(acc);
  to.finish();
}

using RowsEpilogue = void (*)(const TileOutput&, int64_t, const int32_t*);
struct RowsEpilogues {
  RowsEpilogue of[kTileBlocks][4];  ///< [blocks - 1][rows - 1]
};
template <bool kOneSample, bool kResidual, Low kLow>
constexpr RowsEpilogues kRowsEpilogues = {
    {{requantize_rows<kOneSample, kResidual, kLow, 1, 1>, requantize_rows<kOneSample, kResidual, kLow, 2, 1>,
      requantize_rows<kOneSample, kResidual, kLow, 3, 1>, requantize_rows<kOneSample, kResidual, kLow, 4, 1>},
     {requantize_rows<kOneSample, kResidual, kLow, 1, 2>, requantize_rows<kOneSample, kResidual, kLow, 2, 2>,
      requantize_rows<kOneSample, kResidual, kLow, 3, 2>, requantize_rows<kOneSample, kResidual, kLow, 4, 2>}}};

/// A tile whose sums are known and whose codes are not all written.
struct Pending {
  int left = 0;  ///< rows
  const RowsEpilogues* epilogues;
  int blocks;
  int64_t block_bytes;
  const int32_t* sums;
  TileOutput out;
  int64_t row[kTileRows];
  const SampleConstants* samples[kTileRows];
  int64_t* counters[kTileRows];

  /// Writes the codes of the next 4 rows.
  void finish_rows() {
    const int rows = left < 4 ? left : 4;
    epilogues->of[blocks - 1][rows - 1](out, block_bytes, sums);
    left -= rows;
    sums += rows * kRowSums;
    out.row += rows;
    if (!out.counters) return;
    out.samples += rows;
    out.counters += rows;
  }
};

/// How many steps of 4 inputs a tile of weights holds, of segments of so many: all of it, an equal share, or what leaves a rest.
int64_t steps_of_tile(int64_t steps) {
  const int64_t least = ceil_div(steps, kTileSteps);
  for (int64_t tiles = least; 4 * tiles <= 5 * least + 1; ++tiles)
    if (steps % tiles == 0) return steps / tiles;
  return kTileSteps;
}

class AmxKernel : public DenseEpilogue {
 public:
  static constexpr int64_t kWeightsInCache = 1 << 20;
  static constexpr int64_t kInputInCache = 1 << 20;
  static int64_t max_rows(int64_t) { return kTileRows; }
  static int panel_blocks(int64_t left) { return static_cast<int>(min_i(left, kTileBlocks)); }

  AmxKernel(const DenseDriver& owner, Output kind, int64_t longest_part)
      : DenseEpilogue(owner.p, kind),
        driver(owner),
        part_rows(longest_part),
        tile_steps(steps_of_tile(p.layout.segment_taps > 1 ? p.layout.steps : p.layout.segment_steps)),
        gathered_steps(kGatheredBytes / 4 / tile_steps * tile_steps) {
    TileConfiguration tiles;
    for (int tile = 0; tile < 4; ++tile) tiles.set(tile, part_rows, kTileBytes);
    for (int tile = 4; tile < 6; ++tile) tiles.set(tile, part_rows, 4 * tile_steps);
    for (int tile = 6; tile < 8; ++tile) tiles.set(tile, tile_steps, kTileBytes);
    configure_tiles(tiles);
  }
  AmxKernel(const AmxKernel&) = delete;
  AmxKernel& operator=(const AmxKernel&) = delete;
  ~AmxKernel() { release_tiles(); }  // a configuration left behind would be saved with every switch of the thread

  void start_tile(const Tile& tile) {
    if (!tile.one_sample || tile.sample[0] != current_sample || current.values >= kFlushAfter) finish_pending();
    DenseEpilogue::start_tile(tile);
    strided = part_stride(tile, 0, tile.part, stride[0]) && part_stride(tile, tile.part, tile.rows, stride[1]);
  }

  void run(DenseDriver& segments, const Tile& tile, const Panel& panel) {
    const int64_t steps = (tile.box.ky1 - tile.box.ky0) * (tile.box.kx1 - tile.box.kx0) * p.layout.inputs / (4 * tile_steps) + 1;
    rows_per_step = static_cast<int>(ceil_div(pending.left, 4 * steps));
    parts = tile.rows > tile.part ? 2 : 1;
    second_row = parts > 1 ? tile.part : 0;
    blocks = panel.blocks;
    segments.accumulate(tile, panel, [&](const TileInput& in, bool) {
      if (!in.partial) start_sums(in, tile);
      multiply(in, tile);
    });
    finish_pending();
    store_sums(tile, segments.partial);
    const bool writes_codes = output == Output::codes;
    if (at_once) {
      start_pending(tile, panel, segments.partial);
      if (!p.channel_stats) return;
      finish_pending();
    } else {
      finish(tile.row, tile.sample, tile.rows, segments.partial, kRowSums, panel);
    }
    if (p.channel_stats && writes_codes) add_channel_stats(tile.row, tile.sample, tile.rows, panel);
  }

  void end_chunk() {
    finish_pending();
    DenseEpilogue::end_chunk();
  }

 private:
  /// Bytes between the rows [begin, end) of a tile, if it is the same for all of them and all rows of a part can be read from there.
  bool part_stride(const Tile& tile, int begin, int end, int64_t& bytes) const {
    bytes = end - begin > 1 ? tile.x[begin + 1] - tile.x[begin] : 0;
    for (int i = begin + 1; i < end; ++i)
      if (tile.x[i] - tile.x[i - 1] != bytes) return false;
    return end - begin == part_rows || end == begin || tile.x[begin] + (part_rows - 1) * bytes + driver.reach(tile) <= driver.end_of_x();
  }

  /// Accumulators start at the zero point's correction.
  void start_sums(const TileInput& in, const Tile& tile) {
    if (in.one_zero_point) {
      for (int j = 0; j < blocks; ++j) {
        const __m512i sums = _mm512_loadu_si512(in.weight_sums + j * in.sums_step);
        _mm512_store_si512(correction[0] + j * kBlockChannels, _mm512_mullo_epi32(sums, _mm512_set1_epi32(-in.zero_points[0])));
      }
    } else {
      for (int j = 0; j < blocks; ++j) {
        const __m512i sums = _mm512_loadu_si512(in.weight_sums + j * in.sums_step);
        for (int i = 0; i < tile.rows; ++i)
          _mm512_store_si512(correction[i] + j * kBlockChannels, _mm512_mullo_epi32(sums, _mm512_set1_epi32(-in.zero_points[i])));
      }
    }
    const int64_t bytes = in.one_zero_point ? 0 : sizeof correction[0];
    const int32_t* second = correction[in.one_zero_point ? 0 : tile.part];
    load_tile<0>(correction[0], bytes);
    if (blocks > 1) load_tile<1>(correction[0] + kBlockChannels, bytes);
    if (parts > 1) load_tile<2>(second, bytes);
    if (parts > 1 && blocks > 1) load_tile<3>(second + kBlockChannels, bytes);
  }

  /// Rows beyond a part's own are overwritten by the next part, or nobody's.
  void store_sums(const Tile& tile, int32_t* to) const {
    constexpr int64_t bytes = kRowSums * sizeof(int32_t);
    int32_t* second = to + tile.part * kRowSums;
    store_tile<0>(to, bytes);
    if (blocks > 1) store_tile<1>(to + kBlockChannels, bytes);
    if (parts > 1) store_tile<2>(second, bytes);
    if (parts > 1 && blocks > 1) store_tile<3>(second + kBlockChannels, bytes);
  }

  void multiply(const TileInput& in, const Tile& tile) {
    const bool direct = strided && in.row_step == 0;
    for (int i = 0; i < in.segment_count; ++i) {
      const Segment& segment = in.segments[i];
      const uint8_t* const* rows = in.rows + i * in.row_step;
      const int64_t whole = direct ? segment.steps / tile_steps : 0, done = whole * tile_steps;
      if (whole > 0) {
        multiply_gathered(in);
        multiply_steps(rows[0] + segment.x_offset, rows[second_row] + segment.x_offset, stride[0], stride[1],
                       in.weights + segment.weight_offset, in.block_bytes, whole);
      }
      if (done < segment.steps) gather(in, rows, tile.rows, segment.x_offset + 4 * done, segment.weight_offset + done * kStreamBytes, segment.steps - done);
    }
    multiply_gathered(in);
  }

  /// Copies what rows have for `steps` steps of the stream, and multiplies what does not fit.
  void gather(const TileInput& in, const uint8_t* const* rows, int count, int64_t x_offset, int64_t weight_offset, int64_t steps) {
    while (steps > 0) {
      if (gathered == gathered_steps || (gathered > 0 && weight_offset != gathered_offset + gathered * kStreamBytes)) multiply_gathered(in);
      if (gathered == 0) gathered_offset = weight_offset;
      const int64_t take = min_i(steps, gathered_steps - gathered), bytes = 4 * take;
      for (int i = 0; i < count; ++i) {
        const uint8_t* from = rows[i] + x_offset;
        uint8_t* to = gathered_rows[i] + 4 * gathered;
        for (int64_t at = 0; at < bytes; at += 64) _mm512_storeu_si512(to + at, _mm512_maskz_loadu_epi8(first_lanes64(bytes - at), from + at));
      }
      gathered_count = count;
      gathered += take;
      steps -= take;
      x_offset += bytes;
      weight_offset += take * kStreamBytes;
    }
  }

  void multiply_gathered(const TileInput& in) {
    if (gathered == 0) return;
    if (gathered % tile_steps != 0)
      for (int i = 0; i < gathered_count; ++i) _mm512_storeu_si512(gathered_rows[i] + 4 * gathered, _mm512_setzero_si512());
    multiply_steps(gathered_rows[0], gathered_rows[second_row], kGatheredStride, kGatheredStride, in.weights + gathered_offset, in.block_bytes,
                   ceil_div(gathered, tile_steps));
    gathered = 0;
  }

  void multiply_steps(const uint8_t* x, const uint8_t* x_second, int64_t x_stride, int64_t x_second_stride, const uint8_t* weights, int64_t block_bytes,
                      int64_t tiles) {
    const auto run_steps = parts > 1 ? (blocks > 1 ? &AmxKernel::steps<2, 2> : &AmxKernel::steps<2, 1>) : blocks > 1 ? &AmxKernel::steps<1, 2> : &AmxKernel::steps<1, 1>;
    (this->*run_steps)(x, x_second, x_stride, x_second_stride, weights, weights + block_bytes, tiles);
  }

  template <int kParts, int kBlocks>
  __attribute__((noinline)) void steps(const uint8_t* x, const uint8_t* x_second, int64_t x_stride, int64_t x_second_stride, const uint8_t* weights,
                                       const uint8_t* weights_second, int64_t tiles) {
    const int64_t x_step = 4 * tile_steps, weights_step = tile_steps * kStreamBytes;
    for (int64_t at = 0, weights_at = 0; tiles > 0; --tiles, at += x_step, weights_at += weights_step) {
      load_tile<4>(x + at, x_stride);
      load_tile<6>(weights + weights_at, kStreamBytes);
      multiply_tiles<0, 4, 6>();
      if (kBlocks > 1) {
        load_tile<7>(weights_second + weights_at, kStreamBytes);
        multiply_tiles<1, 4, 7>();
      }
      if (kParts > 1) {
        load_tile<5>(x_second + at, x_second_stride);
        multiply_tiles<2, 5, 6>();
      }
      if (kParts > 1 && kBlocks > 1) multiply_tiles<3, 5, 7>();
      for (int i = 0; i < rows_per_step && pending.left > 0; ++i) pending.finish_rows();
    }
  }

  void start_pending(const Tile& tile, const Panel& panel, const int32_t* sums) {
    pending.left = tile.rows;
    pending.blocks = panel.blocks;
    pending.block_bytes = p.layout.block_bytes;
    pending.sums = sums;
    pending.epilogues = !tile.one_sample            ? &kRowsEpilogues<false, true, Low::either>
                        : p.residual                ? &kRowsEpilogues<true, true, Low::either>
                        : samples[0]->low_clips     ? &kRowsEpilogues<true, false, Low::compared>
                                                    : &kRowsEpilogues<true, false, Low::lifted>;
    const int rows = tile.one_sample ? 1 : tile.rows;
    __builtin_memcpy(pending.row, tile.row, sizeof(int64_t) * static_cast<size_t>(tile.rows));
    __builtin_memcpy(pending.samples, samples, sizeof samples[0] * static_cast<size_t>(rows));
    __builtin_memcpy(pending.counters, row_counters, sizeof row_counters[0] * static_cast<size_t>(rows));
    pending.out = {panel.block, panel.channels, pending.row, channels, p.y + panel.channel, p.residual ? p.residual + panel.channel : nullptr,
                   pending.samples, &current, tile.one_sample ? nullptr : pending.counters};
  }

  void finish_pending() {
    while (pending.left > 0) pending.finish_rows();
  }

  const DenseDriver& driver;
  const int64_t part_rows, tile_steps, gathered_steps;
  bool strided = false;
  int64_t stride[2];
  int parts = 1, blocks = 1, second_row = 0;
  Pending pending;
  int rows_per_step = 0;

  int64_t gathered = 0, gathered_offset = 0;
  int gathered_count = 0;
  alignas(64) int32_t correction[kTileRows][kRowSums];
  alignas(64) uint8_t gathered_rows[kTileRows][kGatheredStride];
};

void run(const LayerProblem& p, const LayerRange& range, Output output) {
  DenseDriver driver(p);
  const int64_t longest_part = driver.make_parts(range);
  AmxKernel kernel(driver, output, longest_part);
  driver.run(range, kernel);
}

void quantized(const LayerProblem& p, const LayerRange& range) { run(p, range, Output::codes); }
void to_float(const LayerProblem& p, const LayerRange& range) { run(p, range, Output::floats); }
void accumulate(const LayerProblem& p, const LayerRange& range) { run(p, range, Output::accumulators); }

}  // namespace

void install_dense_amx(Kernels& table) { table.dense = {quantized, to_float, accumulate}; }

}  // namespace probquant
