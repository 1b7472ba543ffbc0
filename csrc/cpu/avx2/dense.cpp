// Linear layers and convolutions, AVX2.
//
// Bytes are multiplied by vpmaddubsw, vpmaddwd by ones and vpaddd: 4 inputs of 8 channels in 3 instructions, a clock where 3 ports do
// these, 2 of them products. vpmaddubsw saturates where two neighbouring weights of a channel add up to more than 128 (255 * 128 < 2^15).
// A step (4 inputs) of a block (16 channels) in which some do is multiplied as signs and magnitudes instead:
//   w x = |w| (x - 128) + 128 w for w >= 0,   |w| (127 - x) + 127 w for w < 0
// whose factors in parentheses are x ^ 0x80 and x ^ 0x7f as int8, and of which no two products exceed 2 * 127 * 128. That is a vpxor
// more, 4/3 of a clock, as much as products in 16 bits take, but of the same bytes. The constants 128 w and 127 w join the zero point's
// correction. So every layer is exact, and as fast as its weights let it be: those in [-64, 64] never need signs, normal ones do in a
// step out of three, heavy-tailed ones less often.
//
// Which steps need them is found once per chunk of rows, and two lists of steps are made per block; where a few rows are all there is,
// they are multiplied in 16 bits from the packed bytes, at 7 instructions per 4 inputs of 8 channels.
//
// Register tile: 6 rows x 16 channels, 12 accumulators. 8 channels at a time keep their weights (and signs) in registers, and 6 inputs
// are broadcast for each: 14 (16) loads beside 36 (48) instructions that calculate. Memory operands would cost 5 to 14 % (Golden Cove).
// The driver's tile has 24 rows, 4 register tiles, which meet a block's weights one after the other: 64 (128) bytes per 12 (16) clocks, from L2
// where they do not stay in L1.
// winograd.h does 3x3 convolutions of stride 1 in fewer products.
// dense_driver.h has the order of the loops and the budget of L2.
#define PROBQUANT_TILE_ROWS 24
#include "../dense_driver.h"
#include "multiply.h"
#include "winograd.h"

#include <optional>

namespace probquant {
namespace {

enum class Output { codes, floats, range };

constexpr int64_t kPanelChannels = kPanelBlocks * kBlockChannels;
constexpr int64_t kStreamedAhead = 1024;  ///< bytes that weights of a few rows are prefetched ahead

// ---------------------------------------------------------------------------------------------------------------------
// Weights

/// A block's steps, sorted by how they are multiplied. Steps are named by the offset of their inputs, 4 times their index.
struct BlockSteps {
  uint32_t *plain, *heavy;
  uint32_t* before;      ///< [steps + 1]: how many signed ones come before
  uint8_t* words;        ///< of the signed ones, [32 magnitudes, 32 signs] of 8 channels and of 8 more
  int32_t* corrections;  ///< [signed steps + 1][16]: 128 w or 127 w of all the signed ones before

  /// Adds the constants of a segment's.
  void correct(const Segment& segment, __m256i (&sum)[2]) const {
    const int64_t begin = segment.weight_offset / kStreamBytes, end = begin + segment.steps;
    const int32_t *const from = corrections + int64_t{before[begin]} * kBlockChannels, *const until = corrections + int64_t{before[end]} * kBlockChannels;
    for (int j = 0; j < 2; ++j) sum[j] = _mm256_add_epi32(sum[j], _mm256_sub_epi32(load(until + 8 * j), load(from + 8 * j)));
  }
};

/// Weights that tiles meet: neighbouring blocks, with their lists where tiles use these.
class Weights {
 public:
  explicit Weights(const PackedLayout& packed) : layout(packed) {}

  /// For `rows` rows.
  void set(const uint8_t* block, int64_t blocks, int64_t rows) {
    constexpr int64_t kFewRows = 4;
    first = block;
    few_rows = rows <= kFewRows;
    if (few_rows) return;
    memory.at_least(blocks * block_bytes());
    for (int64_t b = 0; b < blocks; ++b) sort(block + b * layout.block_bytes + sizeof(BlockHeader), steps_at(b));
  }

  bool few_rows = true;

  BlockSteps steps_of(const uint8_t* block) const { return steps_at((block - first) / layout.block_bytes); }

 private:
  static constexpr int64_t kSignedBytes = 2 * kStreamBytes;

  int64_t list_bytes() const { return (layout.steps + 16) / 16 * 64; }
  int64_t block_bytes() const { return 3 * list_bytes() + layout.steps * kSignedBytes + (layout.steps + 1) * kBlockChannels * 4; }
  BlockSteps steps_at(int64_t b) const {
    uint8_t* at = memory.get() + b * block_bytes();
    const auto list = [&](int64_t i) { return reinterpret_cast<uint32_t*>(at + i * list_bytes()); };
    uint8_t* const words = at + 3 * list_bytes();
    return {list(0), list(1), list(2), words, reinterpret_cast<int32_t*>(words + layout.steps * kSignedBytes)};
  }

  void sort(const uint8_t* stream, const BlockSteps& to) const {
    const __m256i ones = _mm256_set1_epi8(1), limit = _mm256_set1_epi16(128);
    uint32_t count = 0;
    for (int64_t step = 0; step < layout.steps; ++step) {
      const auto beyond = [&](int64_t half) {
        return _mm256_cmpgt_epi16(_mm256_abs_epi16(_mm256_maddubs_epi16(ones, load_unaligned(stream + step * kStreamBytes + half * 32))), limit);
      };
      const __m256i any = _mm256_or_si256(beyond(0), beyond(1));
      to.plain[step - count] = to.heavy[count] = static_cast<uint32_t>(4 * step);
      to.before[step] = count;
      count += !_mm256_testz_si256(any, any);
    }
    to.before[layout.steps] = count;

    const __m256i zero = _mm256_setzero_si256(), pairs = _mm256_set1_epi16(1);
    __m256i correction[2] = {zero, zero};
    for (int64_t i = 0; i < count; ++i)
      for (int half = 0; half < 2; ++half) {
        const __m256i w = load_unaligned(stream + int64_t{to.heavy[i]} * (kStreamBytes / 4) + half * 32), negative = _mm256_cmpgt_epi8(zero, w);
        uint8_t* const words = to.words + i * kSignedBytes + half * 64;
        store(words, _mm256_abs_epi8(w));
        store(words + 32, _mm256_xor_si256(negative, _mm256_set1_epi8(-128)));
        store(to.corrections + i * kBlockChannels + half * 8, correction[half]);
        const __m256i upper = _mm256_maddubs_epi16(ones, _mm256_andnot_si256(negative, w)), lower = _mm256_maddubs_epi16(ones, _mm256_and_si256(negative, w));
        correction[half] = _mm256_add_epi32(correction[half], _mm256_madd_epi16(upper, _mm256_slli_epi16(pairs, 7)));
        correction[half] = _mm256_add_epi32(correction[half], _mm256_madd_epi16(lower, _mm256_set1_epi16(127)));
      }
    for (int half = 0; half < 2; ++half) store(to.corrections + int64_t{count} * kBlockChannels + half * 8, correction[half]);
  }

  const PackedLayout& layout;
  const uint8_t* first = nullptr;
  Scratch memory;
};

// ---------------------------------------------------------------------------------------------------------------------
// Register tiles

/// The first n lanes of 8; n may be more.
inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n < 8 ? n : 8)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i load_lanes(const int32_t* from, int64_t n) { return n >= 8 ? load_unaligned(from) : _mm256_maskload_epi32(from, first_lanes(n)); }

/// What the kernels of a block take: `tiles` register tiles of rows from `row` on.
struct BlockOperands {
  const TileInput& in;
  const uint8_t* stream;
  BlockSteps steps;
  const int32_t* start;       ///< what the products are added to, [row of the driver's tile][start_stride]
  int64_t start_stride;
  int32_t* out;
  int64_t stride;
};

/// Adds to the sums of 8 channels a step's products of 6 inputs, which `x + at` points to.
template <bool kSigned, int kRows>
__attribute__((always_inline)) inline void add_bytes(Accumulators<kRows>& acc, int j, const uint8_t* const (&x)[kRows], int64_t at, const uint8_t* w, __m256i ones) {
  __m256i weight = load_unaligned(w), sign;
  asm("" : "+x"(weight), "+r"(at));  // in registers; and inputs are broadcast for each 8 channels, as there are none to keep them in
  if (kSigned) {
    sign = load(w + 32);
    asm("" : "+x"(sign));
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    int32_t four;
    __builtin_memcpy(&four, x[i] + at, 4);
    __m256i v = _mm256_set1_epi32(four);
    v = kSigned ? _mm256_maddubs_epi16(weight, _mm256_xor_si256(v, sign)) : _mm256_maddubs_epi16(v, weight);
    acc.sum[i][j] = _mm256_add_epi32(acc.sum[i][j], _mm256_madd_epi16(v, ones));
    asm("" : "+x"(acc.sum[i][j]));  // or two products are added first, and wait for it in memory
  }
}

template <int kRows>
void multiply_sorted(const BlockOperands& o, int row, int tiles) {
  __m256i ones = _mm256_set1_epi16(1);
  asm("" : "+x"(ones));  // or it would be a memory operand
  for (; tiles > 0; --tiles, row += kRows) {
    Accumulators<kRows> acc;
    acc.load_from(o.start + row * o.start_stride, o.start_stride);
    for (int s = 0; s < o.in.segment_count; ++s) {
      const Segment& segment = o.in.segments[s];
      const uint8_t* const* const rows = o.in.rows + s * o.in.row_step + row;
      const int64_t begin = segment.weight_offset / kStreamBytes, end = begin + segment.steps;
      const int64_t heavy_begin = o.steps.before[begin], heavy_end = o.steps.before[end];
      const uint8_t* x[kRows];
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) x[i] = rows[i] + segment.x_offset - 4 * begin;
      const uint8_t* const stream = o.stream;
      for (const uint32_t *step = o.steps.plain + (begin - heavy_begin), *const stop = o.steps.plain + (end - heavy_end); step != stop; ++step) {
        const int64_t at = *step;
        const uint8_t* const w = stream + at * (kStreamBytes / 4);
        add_bytes<false>(acc, 0, x, at, w, ones);
        add_bytes<false>(acc, 1, x, at, w + 32, ones);
      }
      const uint8_t* w = o.steps.words + heavy_begin * 2 * kStreamBytes;
      for (const uint32_t *step = o.steps.heavy + heavy_begin, *const stop = o.steps.heavy + heavy_end; step != stop; ++step, w += 2 * kStreamBytes) {
        const int64_t at = *step;
        add_bytes<true>(acc, 0, x, at, w, ones);
        add_bytes<true>(acc, 1, x, at, w + 64, ones);
      }
    }
    acc.store_to(o.out + row * o.stride, o.stride);
  }
}

/// In 16 bits, of packed weights: inputs 0 and 2 of a step, then 1 and 3.
template <int kRows>
void multiply_words(const BlockOperands& o, int row, int tiles) {
  for (; tiles > 0; --tiles, row += kRows) {
    Accumulators<kRows> acc;
    acc.load_from(o.start + row * o.start_stride, o.start_stride);
    for (int s = 0; s < o.in.segment_count; ++s) {
      const Segment& segment = o.in.segments[s];
      const uint8_t* const* const rows = o.in.rows + s * o.in.row_step + row;
      const uint8_t *w = o.stream + segment.weight_offset, *x[kRows];
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) x[i] = rows[i] + segment.x_offset;
      for (int64_t at = 0; at < 4 * segment.steps; at += 4, w += kStreamBytes) {
        __m256i even[2], odd[2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          const __m256i v = load_unaligned(w + 32 * j);
          even[j] = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8);
          odd[j] = _mm256_srai_epi16(v, 8);
          __builtin_prefetch(w + 32 * j + kStreamedAhead);
        }
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i) {
          int32_t four;
          __builtin_memcpy(&four, x[i] + at, 4);
          const __m256i v = _mm256_set1_epi32(four), even_x = _mm256_and_si256(v, _mm256_set1_epi16(255)), odd_x = _mm256_srli_epi16(v, 8);
#pragma GCC unroll 2
          for (int j = 0; j < 2; ++j)
            acc.sum[i][j] = _mm256_add_epi32(acc.sum[i][j], _mm256_add_epi32(_mm256_madd_epi16(even_x, even[j]), _mm256_madd_epi16(odd_x, odd[j])));
        }
      }
    }
    acc.store_to(o.out + row * o.stride, o.stride);
  }
}

constexpr TileKernels<void (*)(const BlockOperands&, int row, int tiles)> kSorted = PROBQUANT_TILES(multiply_sorted), kWords = PROBQUANT_TILES(multiply_words);

/// Accumulators of a tile, [blocks * 16] per row.
class TileMultiplier {
 public:
  void operator()(TileInput& in, int rows, const Panel& panel, const Weights& weights, int32_t* out) {
    const int64_t stride = panel.blocks * kBlockChannels;
    const TileInput whole = in;
    if (in.segment_count >= kManySegments && in.segments[0].steps <= kShortSteps) join(in, rows);
    alignas(32) int32_t initial[kTileRows * kBlockChannels];
    const int64_t start_stride = in.partial ? kBlockChannels : in.one_zero_point ? 0 : kBlockChannels;
    BlockOperands operands{in, in.weights, {}, initial, start_stride, out, stride};
    for (int b = 0; b < panel.blocks; ++b) {
      __m256i correction[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
      if (!weights.few_rows) {
        operands.steps = weights.steps_of(panel.block + b * in.block_bytes);
        for (int s = 0; s < in.segment_count; ++s) operands.steps.correct(in.segments[s], correction);
      }
      for (int i = 0; i < (start_stride ? rows : 1); ++i)
        for (int j = 0; j < 2; ++j) {
          const auto zero_point = [&] { return _mm256_mullo_epi32(load_unaligned(in.weight_sums + b * in.sums_step + 32 * j), _mm256_set1_epi32(-in.zero_points[i])); };
          const __m256i before = in.partial ? load(in.partial + i * stride + b * kBlockChannels + 8 * j) : zero_point();
          store(initial + i * kBlockChannels + 8 * j, _mm256_add_epi32(before, correction[j]));
        }
      for_each_part(rows, [&](int row, int count, int tiles) { (weights.few_rows ? kWords : kSorted).of[count - 1](operands, row, tiles); });
      operands.stream += in.block_bytes;
      operands.out += kBlockChannels;
    }
    in = whole;
  }

 private:
  /// Many short segments that follow each other in the weights are copied to follow each other in x: two short loops of each take longer.
  void join(TileInput& in, int rows) {
    const int64_t steps = in.segments[0].steps, total = steps * in.segment_count;
    if (total * 4 > kJoinedBytes) return;
    for (int s = 1; s < in.segment_count; ++s)
      if (in.segments[s].steps != steps || in.segments[s].weight_offset != in.segments[0].weight_offset + s * steps * kStreamBytes) return;
    const __m256i lanes = first_lanes(steps);
    const Segment *const first = in.segments, *const end = first + in.segment_count;
    const int64_t row_step = in.row_step;
    for (int i = 0; i < rows; ++i) {
      uint8_t* to = joined_rows[i] = joined[i];
      const uint8_t* const* row = in.rows + i;
      for (const Segment* segment = first; segment != end; ++segment, to += 4 * steps, row += row_step)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskload_epi32(reinterpret_cast<const int32_t*>(*row + segment->x_offset), lanes));
    }
    joined_segment = {0, in.segments[0].weight_offset, total};
    in.segments = &joined_segment;
    in.segment_count = 1;
    in.rows = joined_rows;
    in.row_step = 0;
  }

  static constexpr int kManySegments = 3;
  static constexpr int64_t kShortSteps = 8, kJoinedBytes = 512;

  Segment joined_segment;
  uint8_t* joined_rows[kTileRows];
  alignas(32) uint8_t joined[kTileRows][kJoinedBytes + 32];
};

// ---------------------------------------------------------------------------------------------------------------------
// Epilogue

inline void store_lanes(int32_t* to, __m256i v, int64_t n) {
  if (n >= 8) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
  _mm256_maskstore_epi32(to, first_lanes(n), v);
}

/// Constants of a panel's channels in one sample: multiplier * accumulator + bias, plus the residual, is in units of the
/// output's scale behind a clamp, unless floats are wanted, and in real ones otherwise.
struct PanelConstants {
  const uint8_t* block = nullptr;
  int64_t sample = -1;
  alignas(32) float multiplier[kPanelChannels], bias[kPanelChannels];
  float residual_multiplier;
  int32_t residual_zero_point;
  std::optional<WordRounding> rounding;  ///< of codes, where it covers the sample

  void set(const LayerProblem& p, const Panel& panel, int64_t sample_index, Output output) {
    const SampleEpilogue& e = p.samples[sample_index];
    block = panel.block;
    sample = sample_index;
    const bool scaled = output != Output::floats && p.activation == Activation::clamp;
    const __m256 a = _mm256_set1_ps(scaled ? e.multiplier : e.x_scale), i = _mm256_set1_ps(scaled ? e.inverse_scale : 1.0f);
    for (int64_t c = 0; c < panel.blocks * kBlockChannels; c += 8) {
      const auto* header = reinterpret_cast<const BlockHeader*>(panel.block + c / kBlockChannels * p.layout.block_bytes);
      _mm256_store_ps(multiplier + c, _mm256_mul_ps(a, _mm256_loadu_ps(header->scale + c % kBlockChannels)));
      _mm256_store_ps(bias + c, _mm256_mul_ps(i, _mm256_loadu_ps(header->bias + c % kBlockChannels)));
    }
    residual_multiplier = scaled ? e.residual_multiplier : e.residual_scale;
    residual_zero_point = e.residual_zero_point;
    rounding.reset();
    if (output == Output::codes && WordRounding::covers(p, e)) rounding.emplace(e);
  }
};

/// Finishes tiles, and gathers statistics.
class DenseKernel {
 public:
  static constexpr bool kPrefetches = false;    ///< the next panel's weights, by itself
  static constexpr bool spans_groups = false;
  static constexpr int64_t weights_together = 0;  ///< bytes of panels that a tile meets one after the other
  static constexpr int64_t weights_in_cache = 96 << 10;  ///< of packed ones; signs and magnitudes come to that
  static constexpr int64_t kInputInCache = 256 << 10;
  static int64_t max_rows(int64_t) { return kTileRows; }
  static int panel_blocks(int64_t left) { return static_cast<int>(min_i(left, kPanelBlocks)); }

  DenseKernel(const LayerProblem& problem, Output kind, const LayerRange& of)
      : p(problem),
        output(kind),
        channels(problem.shape.out_channels),
        profiled_bounds(problem.profiled_bounds()),
        held(kind == Output::floats ? nullptr : held_of(problem, of)),
        range(of),
        weights(problem.layout) {}

  /// `quantized` of what is held, [rows][channels] of the range.
  void finish_held() {
    const int64_t chunk = min_i(kChunkRows, kChunkSamples * p.rows_per_sample);
    for (int64_t begin = range.row_begin; begin < range.row_end; begin += chunk) {
      const int64_t end = min_i(begin + chunk, range.row_end);
      start_chunk(begin, end);
      for (int64_t channel = range.channel_begin; channel < range.channel_end;) {
        const int64_t in_group = channel % p.layout.group_channels;
        Panel panel;
        panel.index = block_of(p.layout, channel);
        panel.block = p.packed_weight + panel.index * p.layout.block_bytes;
        panel.channel = channel;
        panel.channels = min_i(min_i(kPanelBlocks * kBlockChannels, p.layout.group_channels - in_group), range.channel_end - channel);
        panel.blocks = static_cast<int>((panel.channels + kBlockChannels - 1) / kBlockChannels);
        for (int64_t row = begin; row < end; ++row) finish_rows(&row, 1, row / p.rows_per_sample, held_at(row, channel), 0, panel);
        channel += panel.channels;
      }
      end_chunk();
    }
  }

  /// The weights that tiles of `rows` rows will meet until the next call, of neighbouring blocks.
  void start_weights(const uint8_t* block, int64_t blocks, int64_t rows, bool) { weights.set(block, blocks, rows); }

  void start_chunk(int64_t begin, int64_t end) {
    chunk_sample = begin / p.rows_per_sample;
    chunk_samples = (end - 1) / p.rows_per_sample + 1 - chunk_sample;
    for (int64_t i = 0; i < chunk_samples; ++i)
      for (int64_t& counter : counters[i]) counter = 0;
  }

  void start_tile(const Tile&) {}

  void run(DenseDriver& driver, const Tile& tile, const Panel& panel) {
    driver.accumulate(tile, panel, [&](TileInput& in, bool) { multiply(in, tile.rows, panel, weights, driver.partial); });
    for (int i = 0, next; i < tile.rows; i = next) {
      for (next = i + 1; next < tile.rows && tile.sample[next] == tile.sample[i];) ++next;
      finish_rows(tile.row + i, next - i, tile.sample[i], driver.partial + i * panel.blocks * kBlockChannels, panel.blocks * kBlockChannels, panel);
    }
  }

  /// Finishes rows of one sample from a panel's accumulators, [row][stride].
  void finish_rows(const int64_t* row, int rows, int64_t sample, const int32_t* acc, int64_t stride, const Panel& panel) {
    if (sample != current_sample || vectors >= CodeSums::kFlushAfter - kTileRows * kPanelBlocks) start_sample(sample);
    if (constants.sample != sample || constants.block != panel.block) constants.set(p, panel, sample, output);
    if (output == Output::range && p.activation == Activation::clamp && !p.residual) return widen_by_extremes(row, rows, sample, acc, stride, panel);
    int64_t c = 0;
    if (constants.rounding) c = p.residual ? plain_channels<true>(row, rows, acc, stride, panel) : plain_channels<false>(row, rows, acc, stride, panel);
    if (c < panel.channels)
      for (int i = 0; i < rows; ++i) finish_channels(row[i], p.samples[sample], acc + i * stride, panel, c);
    if (!p.channel_stats || output != Output::codes) return;
    int64_t* stats = stats_row(sample) + kStatsSample + panel.channel;
    for (int i = 0; i < rows; ++i) add_channel_moments(p.y + row[i] * channels + panel.channel, 1, panel.channels, channels, stats, stats + channels);
  }

  void end_panel() {}

  void end_chunk() {
    start_sample(-1);
    if (output != Output::codes) return;
    for (int64_t i = 0; i < chunk_samples; ++i)
      for (int64_t column = 0; column < kStatsSample; ++column)
        if (counters[i][column]) add_to(stats_row(chunk_sample + i) + column, counters[i][column]);
  }

 private:
  int64_t* stats_row(int64_t sample) const { return p.stats + sample * (kStatsSample + (p.channel_stats ? 2 * channels : 0)); }

  int32_t* held_at(int64_t row, int64_t channel) const {
    return held + (row - range.row_begin) * (range.channel_end - range.channel_begin) + channel - range.channel_begin;
  }

  /// multiplier * accumulator + bias, plus the residual, of 8 channels; `left` exist.
  __m256 value(__m256i acc, int64_t at, int64_t c, int64_t left) const {
    const __m256 v = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), _mm256_load_ps(constants.multiplier + c), _mm256_load_ps(constants.bias + c));
    if (!p.residual) return v;
    const __m256i codes = _mm256_cvtepu8_epi32(load_bytes16(p.residual + at, min_i(left, 8)));
    const __m256 centred = _mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(constants.residual_zero_point)));
    return _mm256_fmadd_ps(centred, _mm256_set1_ps(constants.residual_multiplier), v);
  }

  /// 32 words below 256, packed in lanes, to bytes.
  static __m256i narrow(__m256i low, __m256i high) {
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }

  /// Codes of all channels but the last few, where their number is no multiple of 8. Returns how many.
  template <bool kResidual>
  int64_t plain_channels(const int64_t* row, int rows, const int32_t* acc, int64_t stride, const Panel& panel) {
    int64_t c = 0;
    for (; c + 32 <= panel.channels; c += 32) plain_columns<kResidual, 4>(row, rows, acc + c, stride, panel.channel + c, c);
    if (c + 16 <= panel.channels) plain_columns<kResidual, 2>(row, rows, acc + c, stride, panel.channel + c, c), c += 16;
    if (c + 8 <= panel.channels) plain_columns<kResidual, 1>(row, rows, acc + c, stride, panel.channel + c, c), c += 8;
    return c;
  }

  /// Codes of 8 * kVectors channels, `c` in the panel, of rows of a sample that `rounding` covers.
  template <bool kResidual, int kVectors>
  void plain_columns(const int64_t* row, int rows, const int32_t* acc, int64_t stride, int64_t channel, int64_t c) {
    const WordRounding rounding = *constants.rounding;
    const __m256i zero = _mm256_setzero_si256();
    const __m256i residual_zero_point = _mm256_set1_epi32(constants.residual_zero_point);
    const __m256 residual_multiplier = _mm256_set1_ps(constants.residual_multiplier);
    __m256 multiplier[4], bias[4];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) multiplier[j] = _mm256_load_ps(constants.multiplier + c + 8 * j), bias[j] = _mm256_load_ps(constants.bias + c + 8 * j);
    CodeSums row_sums = sums;
    __m256i inside_here = inside;
    for (int i = 0; i < rows; ++i, acc += stride) {
      const int64_t at = row[i] * channels + channel;
      __m256i code[4];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        __m256 t = _mm256_fmadd_ps(_mm256_cvtepi32_ps(load_unaligned(acc + 8 * j)), multiplier[j], bias[j]);
        if (kResidual) {
          const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p.residual + at + 8 * j)));
          t = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(codes, residual_zero_point)), residual_multiplier, t);
        }
        code[j] = _mm256_cvtps_epi32(t);
      }
      __m256i q;
      if (kVectors == 4) {
        q = narrow(rounding.words(code[0], code[1], inside_here), rounding.words(code[2], code[3], inside_here));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p.y + at), q);
      } else if (kVectors == 2) {
        q = narrow(rounding.words(code[0], code[1], inside_here), zero);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p.y + at), _mm256_castsi256_si128(q));
      } else {
        const __m256i exist = _mm256_setr_epi64x(-1, 0, -1, 0);
        q = narrow(_mm256_and_si256(rounding.words(code[0], zero, inside_here, exist), exist), zero);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p.y + at), _mm256_castsi256_si128(q));
      }
      row_sums.add(q);
    }
    sums = row_sums;
    inside = inside_here;
    clipped += rows * kVectors * 8;  // less those inside
    vectors += rows;
  }

  /// The channels of one row from `c` on.
  void finish_channels(int64_t row, const SampleEpilogue& e, const int32_t* acc, const Panel& panel, int64_t c) {
    const int64_t at = row * channels + panel.channel;
    if (output != Output::codes) {
      if (held) __builtin_memcpy(held_at(row, panel.channel + c), acc + c, static_cast<size_t>(panel.channels - c) * sizeof(int32_t));
      for (; c < panel.channels; c += 8) finish_value(e, at + c, acc, panel, c);
      return;
    }
    const Rounding rounding(e.y_zero_point);
    for (; c < panel.channels; c += 32) {
      const int64_t present = min_i(panel.channels - c, 32);
      const __m256i q = e.valid ? codes(e, rounding, at + c, acc + c, panel, c, present) : _mm256_setzero_si256();
      store_bytes32(p.y + at + c, q, present);
      sums.add(q);
      ++vectors;
    }
  }

  const BlockHeader& header(const Panel& panel, int64_t c) const {
    return *reinterpret_cast<const BlockHeader*>(panel.block + c / kBlockChannels * p.layout.block_bytes);
  }

  /// output_value() of 8 channels, of which `left` exist.
  __m256 output_values(const SampleEpilogue& e, __m256i acc, int64_t at, const Panel& panel, int64_t c, int64_t left) const {
    const BlockHeader& block = header(panel, c);
    const __m256 t = value(acc, at, c, left), inverse_profile = _mm256_loadu_ps(block.inverse_profile + c % kBlockChannels);
    if (p.activation != Activation::clamp)
      return _mm256_mul_ps(activate_ps(p.activation, _mm256_mul_ps(t, _mm256_loadu_ps(block.profile + c % kBlockChannels))),
                           _mm256_mul_ps(_mm256_set1_ps(e.inverse_scale), inverse_profile));
    __m256 lower = _mm256_set1_ps(e.activation_lo), upper = _mm256_set1_ps(e.activation_hi);
    if (profiled_bounds) {
      lower = _mm256_mul_ps(lower, inverse_profile);
      upper = _mm256_mul_ps(upper, inverse_profile);
    }
    return clamp_ps(t, lower, upper);
  }

  /// Codes of up to 32 channels of a valid sample; zeros behind them.
  __m256i codes(const SampleEpilogue& e, const Rounding& rounding, int64_t at, const int32_t* acc, const Panel& panel, int64_t c, int64_t present) {
    __m256i code[4];
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t left = present - 8 * j;
      code[j] = _mm256_setzero_si256();
      if (left <= 0) continue;
      const __m256 t = output_values(e, load_lanes(acc + 8 * j, left), at + 8 * j, panel, c + 8 * j, left);
      clipped += count_bits(rounding.clipped(t) & first_lanes8(left));
      code[j] = rounding.codes(t);
    }
    return keep_bytes(narrow(_mm256_packs_epi32(code[0], code[1]), _mm256_packs_epi32(code[2], code[3])), present);
  }

  /// 8 channels: stores layer_value(), or widens the range by output_value().
  void finish_value(const SampleEpilogue& e, int64_t at, const int32_t* accumulators, const Panel& panel, int64_t c) {
    const int64_t left = panel.channels - c;
    const __m256i acc = load_lanes(accumulators + c, left);
    if (output == Output::floats) {
      __m256 y = _mm256_mul_ps(value(acc, at, c, left), _mm256_loadu_ps(header(panel, c).profile + c % kBlockChannels));
      y = p.activation == Activation::clamp ? clamp_ps(y, _mm256_set1_ps(p.activation_min), _mm256_set1_ps(p.activation_max)) : activate_ps(p.activation, y);
      return store_lanes(reinterpret_cast<int32_t*>(p.y_float + at), _mm256_castps_si256(y), left);
    }
    widen(output_values(e, acc, at, panel, c, left), left);
  }

  /// Widens the range by 8 values, of which `left` exist. A NaN is passed over.
  void widen(__m256 y, int64_t left) {
    __m256 low = y, high = y;
    if (left < 8) {
      const __m256 exists = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
      low = _mm256_blendv_ps(_mm256_set1_ps(__builtin_inff()), y, exists);
      high = _mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), y, exists);
    }
    range_lo = _mm256_min_ps(low, range_lo);
    range_hi = _mm256_max_ps(high, range_hi);
  }

  /// Rows of one sample, without a residual: a clamp over constants of the channel keeps the order of sums (or turns it around), so a
  /// channel's extremes come from its extreme sums. NaNs do not disturb that: they become the lower bound, as all else on their side does.
  void widen_by_extremes(const int64_t* row, int rows, int64_t sample, const int32_t* acc, int64_t stride, const Panel& panel) {
    const SampleEpilogue& e = p.samples[sample];
    if (held)
      for (int i = 0; i < rows; ++i) __builtin_memcpy(held_at(row[i], panel.channel), acc + i * stride, static_cast<size_t>(panel.channels) * sizeof(int32_t));
    for (int64_t c = 0; c < panel.channels; c += 8) {
      const int64_t left = panel.channels - c;
      __m256i lo = load_lanes(acc + c, left), hi = lo;
      for (int i = 1; i < rows; ++i) {
        const __m256i v = load_lanes(acc + i * stride + c, left);
        lo = _mm256_min_epi32(lo, v);
        hi = _mm256_max_epi32(hi, v);
      }
      widen(output_values(e, lo, 0, panel, c, left), left);
      widen(output_values(e, hi, 0, panel, c, left), left);
    }
  }

  /// Hands over what was gathered of the sample before.
  void start_sample(int64_t sample) {
    if (current_sample >= 0 && output == Output::codes) {
      int64_t* counter = counters[current_sample - chunk_sample];
      sums.flush(counter[kStatsSum], counter[kStatsSquares]);
      counter[kStatsClipped] += clipped - sum_epi16(inside);
    }
    if (current_sample >= 0 && output == Output::range) {
      alignas(32) float lo[8], hi[8];
      _mm256_store_ps(lo, range_lo);
      _mm256_store_ps(hi, range_hi);
      for (int i = 1; i < 8; ++i) {
        lo[0] = lo[i] < lo[0] ? lo[i] : lo[0];
        hi[0] = hi[i] > hi[0] ? hi[i] : hi[0];
      }
      atomic_widen(p.range + 2 * current_sample, lo[0], hi[0]);
    }
    clipped = vectors = 0;
    inside = _mm256_setzero_si256();
    range_lo = _mm256_set1_ps(__builtin_inff());
    range_hi = _mm256_set1_ps(-__builtin_inff());
    current_sample = sample;
  }

  const LayerProblem& p;
  const Output output;
  const int64_t channels;
  const bool profiled_bounds;
  int32_t* const held;
  const LayerRange range;
  Weights weights;
  TileMultiplier multiply;
  PanelConstants constants;

  int64_t chunk_sample = 0, chunk_samples = 0;
  int64_t counters[kChunkSamples + 1][kStatsSample];

  int64_t current_sample = -1;  ///< whose statistics follow
  CodeSums sums;
  __m256i inside;  ///< words of codes that did not clip
  int64_t clipped = 0, vectors = 0;
  __m256 range_lo, range_hi;
};

void run(const LayerProblem& p, const LayerRange& range, Output output) {
  DenseKernel kernel(p, output, range);
  if (output == Output::codes && p.held) return kernel.finish_held();
  if (Winograd::covers(p, range)) return Winograd(p).run(range, kernel);
  DenseDriver driver(p, true);
  driver.run(range, kernel);
}

void quantized(const LayerProblem& p, const LayerRange& range) { run(p, range, Output::codes); }
void to_float(const LayerProblem& p, const LayerRange& range) { run(p, range, Output::floats); }
void find_range(const LayerProblem& p, const LayerRange& range) { run(p, range, Output::range); }

}  // namespace

void install_dense_avx2(Kernels& table) {
  table.dense = {quantized, to_float, find_range};
  table.macs_per_clock = 32;
}

}  // namespace probquant
