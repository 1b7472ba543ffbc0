// Linear layers and convolutions, AVX-512 VNNI.
//
// Register tile: 6 rows x 4 blocks of 16 channels, 8 x 3 and 12 x 2 for what is narrower: 24 accumulators, 4 (3, 2)
// weights and a broadcast activation of 32 registers. A step (4 inputs) is 24 vpdpbusd on 10 (11, 14) loads: 12 clocks
// where two of each run at once, of which the loop loses 1 to 3 %. Accumulators start at the zero point's correction, and vpdpbusd takes
// unsigned activations and signed weights as they are, so nothing else is in the loop.
// L1: a panel's weights stream through, 256 (192, 128) bytes per step, past the tile's rows of x; when they exceed L1, they
// come from L2 at 21 (24, 11) bytes per clock. dense_driver.h has the order of the loops and the budget of L2. The next panel's weights are
// prefetched into L2 beside the products, 128 bytes per 4 steps: 2.7 bytes per clock, where L3 gives 8.
//
// The driver's tile is several register tiles of the same panel, one after the other. They leave their sums in memory (6 KB, in L1; stores
// and loads take no part in what the products wait for), and one epilogue finishes them all: what a tile costs besides, its walk, its
// constants, its calls, about 100 clocks, comes once for 24 rows, and the epilogues are a few functions instead of one per register tile.
// The epilogue takes 24 (behind a ReLU) to 28 vector instructions per 64 outputs, moments and clip counts included: see dense_epilogue.h.
#define PROBQUANT_TILE_ROWS 24
#include "../input_copies.h"
#include "dense_epilogue.h"
#include "grouped.h"

namespace probquant {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Register tiles

constexpr int kStreamingRows = 2;         ///< tiles of so few rows wait for their weights,
constexpr int64_t kStreamedAhead = 1024;  ///< which they prefetch so many bytes ahead

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
  for (int j = 0; j < kBlocks; ++j) {
    w[j] = _mm512_loadu_si512(weights + j * block_bytes);
    if (kRows <= kStreamingRows) __builtin_prefetch(weights + j * block_bytes + kStreamedAhead);
  }
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

/// Computes the accumulators of a register tile and stores them, [blocks * 16] per row. `ahead` bytes from these weights lie others, of
/// which every 4 steps bring 2 lines to L2.
template <int kRows, int kBlocks>
__attribute__((noinline)) void multiply(const TileInput& in, int64_t ahead, int32_t* out) {
  __m512i acc[kRows][kBlocks];
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
      if (kRows > kStreamingRows) {
        __builtin_prefetch(w + ahead, 0, 2);
        __builtin_prefetch(w + ahead + kStreamBytes, 0, 2);
      }
    }
    for (; at < end; at += 4, w += kStreamBytes) step<0>(acc, x, x_memory, at, w, block_bytes);
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kBlocks; ++j) _mm512_storeu_si512(out + (i * kBlocks + j) * kBlockChannels, acc[i][j]);
}

using RegisterTile = void (*)(const TileInput&, int64_t ahead, int32_t*);
#define PROBQUANT_TILES_6(blocks) multiply<1, blocks>, multiply<2, blocks>, multiply<3, blocks>, multiply<4, blocks>, multiply<5, blocks>, multiply<6, blocks>
#define PROBQUANT_TILES_8(blocks) PROBQUANT_TILES_6(blocks), multiply<7, blocks>, multiply<8, blocks>
#define PROBQUANT_TILES_12(blocks) PROBQUANT_TILES_8(blocks), multiply<9, blocks>, multiply<10, blocks>, multiply<11, blocks>, multiply<12, blocks>
/// [blocks - 1][rows - 1]
constexpr RegisterTile kRegisterTiles[kPanelBlocks][12] = {{PROBQUANT_TILES_12(1)}, {PROBQUANT_TILES_12(2)}, {PROBQUANT_TILES_8(3)}, {PROBQUANT_TILES_6(4)}};
constexpr int kRegisterRows[kPanelBlocks] = {12, 12, 8, 6};

/// [blocks - 1]
template <bool kOneSample, bool kResidual, Clamp kClamp>
constexpr RowsEpilogue kRowsEpilogues[kPanelBlocks] = {
    requantize_rows<kOneSample, kResidual, kClamp, 1>, requantize_rows<kOneSample, kResidual, kClamp, 2>,
    requantize_rows<kOneSample, kResidual, kClamp, 3>, requantize_rows<kOneSample, kResidual, kClamp, 4>};

/// What happens to a tile's sums.
class VectorKernel : public DenseEpilogue {
 public:
  static constexpr int64_t weights_in_cache = 256 << 10;
  static constexpr int64_t weights_together = 0;  ///< bytes of panels that a tile meets one after the other
  static constexpr int64_t kInputInCache = 640 << 10;
  static int64_t max_rows(int64_t) { return kTileRows; }

  using DenseEpilogue::DenseEpilogue;

 protected:
  /// multiply(in, sums) leaves them in memory.
  template <class Multiply>
  void run(DenseDriver& driver, const Tile& tile, const Panel& panel, Multiply multiply) {
    int32_t* const sums = held ? held : driver.partial;
    if (!(output == Output::codes && held)) driver.accumulate(tile, panel, [&](TileInput& in, bool last) { multiply(in, last ? sums : driver.partial); });
    if (held) held += tile.rows * panel.blocks * kBlockChannels;
    if (output == Output::range) return widen_ranges({tile.rows, tile.one_sample, tile.row, tile.sample}, panel, sums);
    if (at_once) {
      const TileOutput out{panel.block, tile.one_sample ? panel_constants(panel) : nullptr, panel.channels, tile.row, channels, p.y + panel.channel,
                           p.residual ? p.residual + panel.channel : nullptr, samples, &current, row_counters};
      rows_epilogue(tile.one_sample)[panel.blocks - 1](out, p.layout.block_bytes, sums, tile.rows);
    } else {
      finish(tile.row, tile.sample, tile.rows, sums, panel.blocks * kBlockChannels, panel);
    }
    if (p.channel_stats && output == Output::codes) add_channel_stats(tile.row, tile.sample, tile.rows, panel);
  }

 private:
  const RowsEpilogue* rows_epilogue(bool one_sample) const {
    if (!one_sample) return kRowsEpilogues<false, true, Clamp::any>;
    if (p.residual) return samples[0]->relu ? kRowsEpilogues<true, true, Clamp::relu> : kRowsEpilogues<true, true, Clamp::any>;
    return samples[0]->relu ? kRowsEpilogues<true, false, Clamp::relu> : samples[0]->open ? kRowsEpilogues<true, false, Clamp::open> : kRowsEpilogues<true, false, Clamp::any>;
  }
};

/// Chooses the register tiles.
class DenseKernel : public VectorKernel {
 public:
  static constexpr bool kPrefetches = true, spans_groups = false;
  static bool on_copies(const Conv2dShape&) { return false; }
  static int panel_blocks(int64_t left) { return left >= 4 && left != 5 ? 4 : left >= 3 ? 3 : static_cast<int>(left); }

  using VectorKernel::VectorKernel;

  /// The next blocks come after these; behind the last panel, or where these are all, comes what is read behind the layer.
  void start_weights(const uint8_t* block, int64_t blocks, int64_t, bool last) {
    const int64_t bytes = blocks * p.layout.block_bytes;
    next = block + bytes;
    next_parts = 2 * blocks;
    if (blocks <= kPanelBlocks && next < p.packed_weight + p.layout.trailer_offset()) return;
    next = static_cast<const uint8_t*>(p.upcoming.data);
    next_parts = !last ? 0 : 2 * ceil_div(min_i(p.upcoming.bytes, kUpcomingBytes), p.layout.block_bytes);
  }

  void run(DenseDriver& driver, const Tile& tile, const Panel& panel) {
    VectorKernel::run(driver, tile, panel, [&](TileInput& in, int32_t* sums) { multiply(in, tile.rows, panel, sums); });
  }

 private:
  /// Register tiles one after the other. They read `in` itself, changed on the way, and not a copy, whose loads wait for the stores before.
  void multiply(TileInput& in, int rows, const Panel& panel, int32_t* out) {
    const TileInput whole = in;
    if (in.segment_count >= kManySegments && in.segments[0].steps <= kShortSteps) join(in, rows);
    const int most = kRegisterRows[panel.blocks - 1], parts = (rows + most - 1) / most;
    for (int i = 0, row = 0; i < parts; ++i) {
      const int end = rows * (i + 1) / parts, count = end - row;
      int64_t ahead = 0;
      if (next_parts) {  // every other two lines of a block
        --next_parts;
        ahead = next - panel.block + next_parts / 2 * p.layout.block_bytes + next_parts % 2 * 2 * kStreamBytes;
      }
      kRegisterTiles[panel.blocks - 1][count - 1](in, ahead, out);
      const int64_t done = count * panel.blocks * kBlockChannels;
      out += done;
      in.rows += count;
      if (!in.one_zero_point) in.zero_points += count;
      if (in.partial) in.partial += done;
      row = end;
    }
    in = whole;
  }

  /// Many short segments that follow each other in the weights are copied to follow each other in x: the pointers of one take as long as its products.
  void join(TileInput& in, int rows) {
    const int64_t steps = in.segments[0].steps, total = steps * in.segment_count;
    if (total * 4 > kJoinedBytes) return;
    for (int s = 1; s < in.segment_count; ++s)
      if (in.segments[s].steps != steps || in.segments[s].weight_offset != in.segments[0].weight_offset + s * steps * kStreamBytes) return;
    const __mmask16 lanes = first_lanes16(steps);
    const __mmask32 bytes = static_cast<__mmask32>(first_lanes64(4 * steps));
    const Segment *const first = in.segments, *const end = first + in.segment_count;
    const int64_t row_step = in.row_step;
    for (int i = 0; i < rows; ++i) {
      uint8_t* to = joined_rows[i] = joined + i * (kJoinedBytes + 64);
      const uint8_t* const* row = in.rows + i;
      for (const Segment* segment = first; segment != end; ++segment, to += 4 * steps, row += row_step) {
        const uint8_t* const from = *row + segment->x_offset;
        if (steps <= 8) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_loadu_epi8(bytes, from));
        else _mm512_storeu_si512(to, _mm512_maskz_loadu_epi32(lanes, from));
      }
    }
    joined_segment = {0, in.segments[0].weight_offset, total};
    in.segments = &joined_segment;
    in.segment_count = 1;
    in.rows = joined_rows;
    in.row_step = 0;
  }

  static constexpr int kManySegments = 5;  ///< copies of 3 take as long as their pointers
  static constexpr int64_t kShortSteps = 16, kJoinedBytes = 512;

  const uint8_t* next = nullptr;  ///< what is read behind this panel
  int64_t next_parts = 0;         ///< of it that no tile has brought to L2: half of as many bytes as a block has
  Segment joined_segment;
  uint8_t* joined_rows[kTileRows];
  alignas(64) uint8_t joined[kTileRows * (kJoinedBytes + 64)];
};

/// Layers of narrow groups: grouped.h has the register tiles.
class GroupedKernel : public VectorKernel {
 public:
  static constexpr bool kPrefetches = false, spans_groups = true;
  /// Of small inputs much is border. A stride leaves more to copy for as many rows.
  static bool on_copies(const Conv2dShape& s) { return s.stride_height * s.stride_width == 1 && s.in_height * s.in_width * s.in_channels <= kPaddedBytes; }
  static int panel_blocks(int64_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

  GroupedKernel(const LayerProblem& problem, Output kind, int32_t* of_range)
      : VectorKernel(problem, kind, of_range),
        lanes(lanes_of(problem.layout)),
        own_steps(problem.layout.taps * problem.layout.own_inputs / 4) {}

  void start_weights(const uint8_t* block, int64_t blocks, int64_t, bool) {
    if (lanes == GroupLanes::same) return;
    const PackedLayout& layout = p.layout;
    weights_of = block;
    if (!weights) weights.reset(new SpreadStep[static_cast<size_t>(layout.trailer_offset() / layout.block_bytes * own_steps)]);
    for (int64_t i = 0; i < blocks; ++i) spread_weights(lanes, block + i * layout.block_bytes + sizeof(BlockHeader), layout.taps, weights.get() + i * own_steps);
  }

  void run(DenseDriver& driver, const Tile& tile, const Panel& panel) {
    VectorKernel::run(driver, tile, panel, [&](TileInput& in, int32_t* sums) { multiply(in, tile.rows, panel, sums); });
  }

 private:
  /// Pairs of blocks, or the two sums of a block, one after the other.
  void multiply(const TileInput& in, int rows, const Panel& panel, int32_t* sums) const {
    const PackedLayout& layout = p.layout;
    const int64_t block_bytes = layout.block_bytes, first = panel.index, row_sums = panel.blocks * kBlockChannels;
    const int parts = (rows + kGroupRows - 1) / kGroupRows, together = panel.blocks > 1 && lanes != GroupLanes::of_8 ? 2 : 1;
    for (int j = 0; j < panel.blocks; j += together) {
      const int last = j + together - 1;
      GroupInput of;
      of.segments = in.segments;
      of.segment_count = in.segment_count;
      of.row_step = in.row_step;
      of.x_offset = (first + j) / layout.group_blocks * layout.inputs;
      of.x_second = (first + last) / layout.group_blocks * layout.inputs - of.x_offset;
      if (lanes == GroupLanes::same) {
        of.weights = in.weights + j * block_bytes;
        of.weights_second = (last - j) * block_bytes;
      } else {
        of.weights = weights[((panel.block - weights_of) / block_bytes + j) * own_steps].weights;
        of.weights_second = layout.taps * kStreamBytes;  // to the block's other sum, or the next block
      }
      of.weight_sums[0] = in.weight_sums + j * in.sums_step;
      of.weight_sums[1] = in.weight_sums + last * in.sums_step;
      of.one_zero_point = in.one_zero_point;
      of.row_sums = row_sums;
      for (int i = 0, row = 0; i < parts; ++i) {
        const int end = rows * (i + 1) / parts;
        of.rows = in.rows + row;
        of.zero_points = in.zero_points + (in.one_zero_point ? 0 : row);
        of.partial = in.partial ? in.partial + row * row_sums + j * kBlockChannels : nullptr;
        of.out = sums + row * row_sums + j * kBlockChannels;
        kGroupTiles[static_cast<int>(lanes)][together - 1][end - row - 1](of);
        row = end;
      }
    }
  }

  const GroupLanes lanes;
  const int64_t own_steps;  ///< of a block, when spread
  const uint8_t* weights_of = nullptr;  ///< the block that they begin with
  std::unique_ptr<SpreadStep[]> weights;  ///< of those blocks, spread
};

template <class Kernel>
void run_unpadded(const LayerProblem& p, const LayerRange& range, Output output) {
  int32_t* const held = output == Output::floats ? nullptr : held_of(p, range);
  DenseDriver driver(p, !(held && output == Output::codes));
  Kernel kernel(p, output, held);
  driver.run(range, kernel);
}

template <class Kernel>
void run(const LayerProblem& p, const LayerRange& range, Output output) {
  if (!Kernel::on_copies(p.shape)) return run_unpadded<Kernel>(p, range, output);
  run_on_copies(p, range, 0, !(p.held && output == Output::codes), [&](const LayerProblem& q, const LayerRange& part) { run_unpadded<Kernel>(q, part, output); });
}

template <class Kernel>
void quantized(const LayerProblem& p, const LayerRange& range) { run<Kernel>(p, range, Output::codes); }
template <class Kernel>
void to_float(const LayerProblem& p, const LayerRange& range) { run<Kernel>(p, range, Output::floats); }
template <class Kernel>
void find_range(const LayerProblem& p, const LayerRange& range) { run<Kernel>(p, range, Output::range); }

}  // namespace

void install_dense_avx512vnni(Kernels& table) {
  table.dense = {quantized<DenseKernel>, to_float<DenseKernel>, find_range<DenseKernel>};
  table.grouped = {quantized<GroupedKernel>, to_float<GroupedKernel>, find_range<GroupedKernel>};
  table.grouped_inputs = 2 * kBlockChannels;
  table.macs_per_clock = 128;
}

}  // namespace probquant
