// Linear layers and convolutions, AVX-512 VNNI.
//
// Register tile: 6 rows x 4 blocks of 16 channels, 8 x 3 and 12 x 2 for what is narrower: 24 accumulators, 4 (3, 2)
// weights and a broadcast activation of 32 registers. A step (4 inputs) is 24 vpdpbusd on 10 (11, 14) loads: 12 clocks
// where two of each run at once. Accumulators start at the zero point's correction, and vpdpbusd takes unsigned
// activations and signed weights as they are, so nothing else is in the loop.
// L1: a panel's weights stream through, 256 (192, 128) bytes per step, past the tile's rows of x; when they exceed L1, they
// come from L2 at 21 (24, 11) bytes per clock. dense_driver.h has the order of the loops and the budget of L2.
//
// The epilogue takes 24 (behind a ReLU) to 28 vector instructions per 64 outputs, moments and clip counts included: see dense_epilogue.h.
#include "dense_epilogue.h"

namespace probquant {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Register tiles

/// Rows whose pointers stay in registers; the others' are loaded in every step. Left to itself, GCC keeps those in vector
/// registers, and every address then waits for the vector units.
constexpr int kPointerRegisters = 8;

/// Four bytes of a row whose pointer is in memory, in every dword. As for dot(), plain code serves other targets.
template <int ahead>
__attribute__((always_inline)) inline __m512i broadcast_from_memory(const uint8_t* const& row, int64_t at) {
  __m512i v;
#if defined(__AVX512VNNI__)
  const uint8_t* pointer;
  asm("mov %2, %1\n\tvpbroadcastd %c4(%1, %3), %0" : "=v"(v), "=&r"(pointer) : "m"(row), "r"(at), "i"(ahead));
#else
  int32_t four;
  __builtin_memcpy(&four, row + at + ahead, 4);
  v = _mm512_set1_epi32(four);
#endif
  return v;
}

template <int ahead, int kRows, int kBlocks>
__attribute__((always_inline)) inline void step(__m512i (&acc)[kRows][kBlocks], const uint8_t* (&x)[kRows], const uint8_t* (&x_memory)[kRows], int64_t at,
                                                const uint8_t* weights, int64_t block_bytes) {
  __m512i w[kBlocks];
#pragma GCC unroll 4
  for (int j = 0; j < kBlocks; ++j) w[j] = _mm512_loadu_si512(weights + j * block_bytes);
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    __m512i v;
    if (i < kPointerRegisters) {
      int32_t four;
      __builtin_memcpy(&four, x[i] + at + ahead, 4);
      v = _mm512_set1_epi32(four);
    } else {
      v = broadcast_from_memory<ahead>(x_memory[i], at);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kBlocks; ++j) dot(acc[i][j], v, w[j]);
  }
}

template <int kRows, int kBlocks>
__attribute__((always_inline)) inline void start(const TileInput& in, __m512i (&acc)[kRows][kBlocks]) {
  __m512i sums[kBlocks];
#pragma GCC unroll 4
  for (int j = 0; j < kBlocks; ++j)
    sums[j] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(in.weight_sums + j * in.sums_step));
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kBlocks; ++j)
      acc[i][j] = i > 0 && in.one_zero_point ? acc[0][j] : _mm512_mullo_epi32(sums[j], _mm512_set1_epi32(in.zero_points[i]));
  if (!in.partial) return;
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kBlocks; ++j) acc[i][j] = _mm512_loadu_si512(in.partial + (i * kBlocks + j) * kBlockChannels);
}

template <int kRows, int kBlocks>
__attribute__((always_inline)) inline void multiply(const TileInput& in, __m512i (&acc)[kRows][kBlocks]) {
  start(in, acc);
  for (int s = 0; s < in.segment_count; ++s) {
    const TileInput* again = &in;  // read anew for every segment, rather than kept where the pointers should be
    asm("" : "+r"(again));
    const Segment& segment = again->segments[s];
    const uint8_t* const* rows = again->rows + s * again->row_step;
    const uint8_t *x[kRows], *x_memory[kRows];
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      x[i] = rows[i] + segment.x_offset;
      if (i >= kPointerRegisters) x_memory[i] = x[i];
    }
    const uint8_t* w = again->weights + segment.weight_offset;
    const int64_t block_bytes = again->block_bytes;
    int64_t at = 0;
    const int64_t end = 4 * segment.steps;
    for (; at + 16 <= end; at += 16, w += 4 * kStreamBytes) {
      step<0>(acc, x, x_memory, at, w, block_bytes);
      step<4>(acc, x, x_memory, at, w + kStreamBytes, block_bytes);
      step<8>(acc, x, x_memory, at, w + 2 * kStreamBytes, block_bytes);
      step<12>(acc, x, x_memory, at, w + 3 * kStreamBytes, block_bytes);
    }
    for (; at < end; at += 4, w += kStreamBytes) step<0>(acc, x, x_memory, at, w, block_bytes);
  }
}

/// Stores the accumulators, [blocks * 16] per row.
template <int kRows, int kBlocks>
__attribute__((noinline)) void tile_accumulators(const TileInput& in, int32_t* out) {
  __m512i acc[kRows][kBlocks];
  multiply(in, acc);
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kBlocks; ++j) _mm512_storeu_si512(out + (i * kBlocks + j) * kBlockChannels, acc[i][j]);
}

template <bool kOneSample, bool kResidual, Clamp kClamp, int kRows, int kBlocks>
__attribute__((always_inline)) inline void requantize_tile(const TileOutput& out, int64_t block_bytes, const __m512i (&acc)[kRows][kBlocks]) {
  Requantizer<kOneSample, kResidual, kClamp, kBlocks> to(out, block_bytes);
  to.template rows<0>(acc);
  if constexpr (kRows > 4) to.template rows<4>(acc);
  if constexpr (kRows > 8) to.template rows<8>(acc);
  to.finish(kRows);
}

/// Requantizes at once; the samples are plain.
template <int kRows, int kBlocks>
__attribute__((noinline)) void tile_codes(const TileInput& in, const TileOutput& out) {
  __m512i acc[kRows][kBlocks];
  multiply(in, acc);
  if (!out.residual && out.samples[0]->relu) requantize_tile<true, false, Clamp::relu>(out, in.block_bytes, acc);
  else if (!out.residual && out.samples[0]->open) requantize_tile<true, false, Clamp::open>(out, in.block_bytes, acc);
  else requantize_tile<true, true, Clamp::any>(out, in.block_bytes, acc);
}
template <int kRows, int kBlocks>
__attribute__((noinline)) void tile_codes_of_samples(const TileInput& in, const TileOutput& out) {
  __m512i acc[kRows][kBlocks];
  multiply(in, acc);
  requantize_tile<false, true, Clamp::any>(out, in.block_bytes, acc);
}

using AccumulatorsTile = void (*)(const TileInput&, int32_t*);
using CodesTile = void (*)(const TileInput&, const TileOutput&);

#define PROBQUANT_TILES_6(tile, blocks) tile<1, blocks>, tile<2, blocks>, tile<3, blocks>, tile<4, blocks>, tile<5, blocks>, tile<6, blocks>
#define PROBQUANT_TILES_8(tile, blocks) PROBQUANT_TILES_6(tile, blocks), tile<7, blocks>, tile<8, blocks>
#define PROBQUANT_TILES_12(tile, blocks) PROBQUANT_TILES_8(tile, blocks), tile<9, blocks>, tile<10, blocks>, tile<11, blocks>, tile<12, blocks>
/// [blocks - 1][rows - 1]
constexpr AccumulatorsTile kAccumulatorsTiles[kPanelBlocks][kTileRows] = {
    {PROBQUANT_TILES_12(tile_accumulators, 1)}, {PROBQUANT_TILES_12(tile_accumulators, 2)},
    {PROBQUANT_TILES_8(tile_accumulators, 3)}, {PROBQUANT_TILES_6(tile_accumulators, 4)}};
constexpr CodesTile kCodesTiles[kPanelBlocks][kTileRows] = {
    {PROBQUANT_TILES_12(tile_codes, 1)}, {PROBQUANT_TILES_12(tile_codes, 2)},
    {PROBQUANT_TILES_8(tile_codes, 3)}, {PROBQUANT_TILES_6(tile_codes, 4)}};
constexpr CodesTile kCodesOfSamplesTiles[kPanelBlocks][kTileRows] = {
    {PROBQUANT_TILES_12(tile_codes_of_samples, 1)}, {PROBQUANT_TILES_12(tile_codes_of_samples, 2)},
    {PROBQUANT_TILES_8(tile_codes_of_samples, 3)}, {PROBQUANT_TILES_6(tile_codes_of_samples, 4)}};

/// Runs the layer: chooses the register tile.
class DenseKernel : public DenseEpilogue {
 public:
  static constexpr bool kPrefetches = false;    ///< the next panel's weights, by itself
  static constexpr int64_t weights_together = 0;  ///< bytes of panels that a tile meets one after the other
  static constexpr int64_t weights_in_cache = 256 << 10;
  static constexpr int64_t kInputInCache = 640 << 10;
  static int64_t max_rows(int64_t blocks) { return blocks >= 4 ? 6 : blocks == 3 ? 8 : 12; }
  static int panel_blocks(int64_t left) { return left >= 4 && left != 5 ? 4 : left >= 3 ? 3 : static_cast<int>(left); }

  using DenseEpilogue::DenseEpilogue;

  void run(DenseDriver& driver, const Tile& tile, const Panel& panel) {
    int32_t* const sums = held ? held : driver.partial;
    const auto compute = [&](const TileInput& in, bool last) {
      if (!last || !at_once) return kAccumulatorsTiles[panel.blocks - 1][tile.rows - 1](in, last ? sums : driver.partial);
      const TileOutput out{panel.block, tile.one_sample ? panel_constants(panel) : nullptr, panel.channels, tile.row, channels, p.y + panel.channel,
                           p.residual ? p.residual + panel.channel : nullptr, samples, &current, row_counters};
      (tile.one_sample ? kCodesTiles : kCodesOfSamplesTiles)[panel.blocks - 1][tile.rows - 1](in, out);
    };
    if (output == Output::codes && held) {
      if (at_once) compute(known_sums(panel, sums, p.layout.block_bytes), true);
    } else {
      driver.accumulate(tile, panel, compute);
    }
    if (held) held += tile.rows * panel.blocks * kBlockChannels;
    if (output == Output::range) return widen_ranges({tile.rows, tile.one_sample, tile.row, tile.sample}, panel, sums);
    if (!at_once) finish(tile.row, tile.sample, tile.rows, sums, panel.blocks * kBlockChannels, panel);
    if (p.channel_stats && output == Output::codes) add_channel_stats(tile.row, tile.sample, tile.rows, panel);
  }

 private:
  /// Sums that are held, as what a register tile goes on from.
  static TileInput known_sums(const Panel& panel, const int32_t* sums, int64_t block_bytes) {
    static constexpr int32_t zero = 0;
    return {nullptr, 0, nullptr, 0, nullptr, block_bytes, panel.block + offsetof(BlockHeader, weight_sum), block_bytes, &zero, true, sums};
  }
};

void run(const LayerProblem& p, const LayerRange& range, Output output) {
  int32_t* const held = output == Output::floats ? nullptr : held_of(p, range);
  DenseDriver driver(p, !(held && output == Output::codes));
  DenseKernel kernel(p, output, held);
  driver.run(range, kernel);
}

void quantized(const LayerProblem& p, const LayerRange& range) { run(p, range, Output::codes); }
void to_float(const LayerProblem& p, const LayerRange& range) { run(p, range, Output::floats); }
void find_range(const LayerProblem& p, const LayerRange& range) { run(p, range, Output::range); }

}  // namespace

void install_dense_avx512vnni(Kernels& table) {
  table.dense = {quantized, to_float, find_range};
  table.macs_per_clock = 128;
}

}  // namespace probquant
