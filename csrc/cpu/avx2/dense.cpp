// Linear layers and convolutions, AVX2.
//
// vpmaddubsw saturates where two weights of one sign add up to more than 128 (255 * 128 < 2^15). A panel without such pairs,
// as 7-bit weights are, is multiplied as it is packed: vpmaddubsw, vpmaddwd by ones and vpaddd for 4 inputs of 8 channels.
// For any other panel both sides are widened to 16 bits, and vpmaddwd and vpaddd do 2 inputs of 8 channels. Its weights (those
// of all blocks, where tiles are outside) are widened once per chunk of rows, two blocks together:
//   [inputs / 2][32 channels][2 inputs] int16, or [inputs / 2][16 channels][2 inputs] of a block that is left over.
// Where a few rows are all there is, they are widened in registers instead.
//
// multiply.h has the register tiles. The driver's tile has 12 rows, which meet kPieceInputs inputs of the panel's blocks two
// by two: L1 holds 256 x 32 weights (16 KB when widened), 12 x 256 inputs (6 KB) and 12 x 64 accumulators (3 KB).
// winograd.h does 3x3 convolutions of stride 1 in fewer products.
// dense_driver.h has the order of the loops and the budget of L2.
#include "../dense_driver.h"
#include "multiply.h"
#include "winograd.h"

#include <optional>

namespace probquant {
namespace {

enum class Output { codes, floats, range };

constexpr int64_t kPieceInputs = 256;
constexpr int64_t kPanelChannels = kPanelBlocks * kBlockChannels;
constexpr int64_t kStepWords = 4 * kBlockChannels;  ///< widened weights of a block's step

// ---------------------------------------------------------------------------------------------------------------------
// Weights

/// How tiles multiply: bytes by packed bytes, words by packed bytes that are widened in registers, words by widened weights.
enum class Form { bytes, packed, widened };

/// Weights that tiles meet: neighbouring blocks, widened where they have to be.
class Weights {
 public:
  explicit Weights(const PackedLayout& packed) : layout(packed) {}

  /// For `rows` rows.
  void set(const uint8_t* block, int64_t blocks, int64_t rows) {
    constexpr int64_t kFewRows = 4;
    first = block;
    form = rows <= kFewRows ? Form::packed : saturates(block, blocks) ? Form::widened : Form::bytes;
    if (form == Form::widened) widen(block, blocks);
  }

  Form form = Form::packed;

  /// Widened ones of a block that is the first of two.
  const int16_t* at(const uint8_t* block) const { return words->get() + (block - first) / layout.block_bytes * block_words(); }
  int64_t block_words() const { return layout.steps * kStepWords; }

 private:
  bool saturates(const uint8_t* block, int64_t blocks) const {
    const __m256i zero = _mm256_setzero_si256(), ones = _mm256_set1_epi8(1);
    __m256i most = zero, least = zero;  // sums of the positive and of the negative ones of every two
    for (int64_t b = 0; b < blocks; ++b, block += layout.block_bytes) {
      for (const uint8_t *w = block + sizeof(BlockHeader), *const end = w + layout.steps * kStreamBytes; w < end; w += 32) {
        const __m256i v = load_unaligned(w);
        most = _mm256_max_epi16(most, _mm256_maddubs_epi16(ones, _mm256_max_epi8(v, zero)));
        least = _mm256_min_epi16(least, _mm256_maddubs_epi16(ones, _mm256_min_epi8(v, zero)));
        if ((w - block) % 1024 == 0 && any_beyond(most, least)) return true;
      }
    }
    return any_beyond(most, least);
  }
  static bool any_beyond(__m256i most, __m256i least) {
    const __m256i limit = _mm256_set1_epi16(128);
    const __m256i beyond = _mm256_or_si256(_mm256_cmpgt_epi16(most, limit), _mm256_cmpgt_epi16(_mm256_sub_epi16(_mm256_setzero_si256(), least), limit));
    return !_mm256_testz_si256(beyond, beyond);
  }

  void widen(const uint8_t* block, int64_t blocks) {
    if (blocks > room) words.emplace(blocks * block_words()), room = blocks;
    int16_t* to = words->get();
    for (int64_t b = 0; b < blocks; b += 2, block += 2 * layout.block_bytes) {
      const int64_t together = min_i(blocks - b, 2);
      for (int64_t step = 0; step < layout.steps; ++step, to += together * kStepWords)
        for (int64_t half = 0; half < 2 * together; ++half) {
          const uint8_t* from = block + half / 2 * layout.block_bytes + sizeof(BlockHeader) + step * kStreamBytes + half % 2 * 32;
          const auto channels = [from](int i) {  // 4 channels x 4 inputs
            return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i));
          };
          __m256i pairs[2];
          separate_pairs(channels(0), channels(1), pairs);
          store(to + half * 16, pairs[0]);
          store(to + (2 * together + half) * 16, pairs[1]);
        }
    }
  }

  const PackedLayout& layout;
  const uint8_t* first = nullptr;
  int64_t room = 0;  ///< blocks
  std::optional<AlignedWords> words;
};

// ---------------------------------------------------------------------------------------------------------------------
// Register tiles

/// Steps of a piece: neighbouring inputs of every row, and the weights they meet.
struct Stretch {
  const uint8_t* const* rows;
  int64_t x_offset;    ///< from a row's pointer
  int64_t weights;     ///< first step of the packed stream
  int64_t begin, end;  ///< steps of the piece
};

struct Piece {
  int stretches = 0;
  int64_t steps = 0;
  Stretch stretch[kCallSegments];
  alignas(32) int16_t x[kTileRows][kPieceInputs];  ///< widened inputs
};

inline void widen(const uint8_t* from, int64_t steps, int16_t* to) {
  int64_t k = 0;
  for (; k + 4 <= steps; k += 4) store(to + 4 * k, _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 4 * k))));
  for (; k < steps; ++k) {
    int32_t four;
    __builtin_memcpy(&four, from + 4 * k, 4);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 4 * k), _mm_cvtepu8_epi16(_mm_cvtsi32_si128(four)));
  }
}

/// What the kernels of a piece take: register tiles of rows from `row` on.
struct PieceOperands {
  const Piece& piece;
  int row, tiles;
  const uint8_t* bytes;  ///< packed stream of the first block
  int64_t block_bytes;
  const int16_t* words;  ///< widened weights of the blocks
  const int32_t* start;  ///< what the products are added to, [row of the driver's tile][start_stride]
  int64_t start_stride;
  int32_t* out;
  int64_t stride;
};

/// Adds the products of a piece, in 16 bits.
template <int kRows, int kVectors>
void multiply_words(const PieceOperands& o) {
  for (int tile = 0, row = o.row; tile < o.tiles; ++tile, row += kRows) {
    Accumulators<kRows, kVectors> acc;
    acc.load_from(o.start + row * o.start_stride, o.start_stride);
    for (int s = 0; s < o.piece.stretches; ++s) {
      const Stretch& stretch = o.piece.stretch[s];
      acc.add_words(o.piece.x[row] + 4 * stretch.begin, kPieceInputs, o.words + stretch.weights * kVectors * 32, stretch.end - stretch.begin);
    }
    acc.store_to(o.out + row * o.stride, o.stride);
  }
}

/// The same in 8 bits, of weights that do not saturate.
template <int kRows, int kVectors>
void multiply_bytes(const PieceOperands& o) {
  __m256i ones = _mm256_set1_epi16(1);
  asm("" : "+x"(ones));  // or it would be a memory operand
  for (int tile = 0, row = o.row; tile < o.tiles; ++tile, row += kRows) {
    Accumulators<kRows, kVectors> acc;
    acc.load_from(o.start + row * o.start_stride, o.start_stride);
    for (int s = 0; s < o.piece.stretches; ++s) {
      const Stretch& stretch = o.piece.stretch[s];
      const uint8_t *w = o.bytes + stretch.weights * kStreamBytes, *x[kRows];
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) x[i] = stretch.rows[row + i] + stretch.x_offset;
      for (int64_t at = 0, end = 4 * (stretch.end - stretch.begin); at < end; at += 4, w += kStreamBytes) {
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i) {
          asm("" : "+r"(w));
          int32_t four;
          __builtin_memcpy(&four, x[i] + at, 4);
          const __m256i v = _mm256_set1_epi32(four);
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) {
            const __m256i two = _mm256_maddubs_epi16(v, load_unaligned(w + j / 2 * o.block_bytes + j % 2 * 32));
            acc.sum[i][j] = _mm256_add_epi32(acc.sum[i][j], _mm256_madd_epi16(two, ones));
          }
        }
      }
    }
    acc.store_to(o.out + row * o.stride, o.stride);
  }
}

/// Words by packed bytes. Widening leaves 8 channels in the order 0 1 4 5 2 3 6 7.
template <int kRows, int kVectors>
void multiply_packed(const PieceOperands& o) {
  for (int tile = 0, row = o.row; tile < o.tiles; ++tile, row += kRows) {
    Accumulators<kRows, kVectors> acc;
    acc.load_from(o.start + row * o.start_stride, o.start_stride);
    acc.exchange_middle();
    for (int s = 0; s < o.piece.stretches; ++s) {
      const Stretch& stretch = o.piece.stretch[s];
      const uint8_t* w = o.bytes + stretch.weights * kStreamBytes;
      for (int64_t step = stretch.begin; step < stretch.end; ++step, w += kStreamBytes) {
        __m256i x[kRows][2];
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
          for (int pair = 0; pair < 2; ++pair) {
            int32_t two;
            __builtin_memcpy(&two, o.piece.x[row + i] + 4 * step + 2 * pair, 4);
            x[i][pair] = _mm256_set1_epi32(two);
          }
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          const auto channels = [&](int i) {
            const uint8_t* from = w + j / 2 * o.block_bytes + j % 2 * 32 + 16 * i;
            return _mm256_castsi256_ps(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
          };
          const __m256 low = channels(0), high = channels(1);
          const __m256i pairs[2] = {_mm256_castps_si256(_mm256_shuffle_ps(low, high, 0x88)), _mm256_castps_si256(_mm256_shuffle_ps(low, high, 0xdd))};
#pragma GCC unroll 6
          for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
            for (int pair = 0; pair < 2; ++pair) acc.sum[i][j] = _mm256_add_epi32(acc.sum[i][j], _mm256_madd_epi16(x[i][pair], pairs[pair]));
        }
      }
    }
    acc.exchange_middle();
    acc.store_to(o.out + row * o.stride, o.stride);
  }
}

constexpr TileKernels<void (*)(const PieceOperands&)> kPieceKernels[] = {PROBQUANT_TILES(multiply_bytes), PROBQUANT_TILES(multiply_packed),
                                                                         PROBQUANT_TILES(multiply_words)};  ///< by Form

/// Accumulators of a tile, [blocks * 16] per row.
class TileMultiplier {
 public:
  void operator()(const TileInput& in, int tile_rows, const Panel& panel, const Weights& weights, int32_t* out) {
    rows = tile_rows;
    blocks = panel.blocks;
    first = !in.partial;
    if (first) start(in);
    for (int s = 0; s < in.segment_count; ++s) {
      const Segment& segment = in.segments[s];
      for (int64_t done = 0; done < segment.steps;) {
        const int64_t steps = min_i(segment.steps - done, kPieceInputs / 4 - piece.steps);
        const uint8_t* const* from = in.rows + s * in.row_step;
        const int64_t offset = segment.x_offset + 4 * done;
        if (weights.form != Form::bytes)
          for (int i = 0; i < rows; ++i) widen(from[i] + offset, steps, piece.x[i] + 4 * piece.steps);
        piece.stretch[piece.stretches++] = {from, offset, segment.weight_offset / kStreamBytes + done, piece.steps, piece.steps + steps};
        piece.steps = (piece.steps + steps + 3) / 4 * 4;  // keeps the widened vectors aligned
        done += steps;
        if (piece.steps == kPieceInputs / 4 || piece.stretches == kCallSegments) flush(in, panel, weights, out);
      }
    }
    if (piece.stretches > 0 || first) flush(in, panel, weights, out);
  }

 private:
  /// Sets `initial` to -zero point * sum of the weights: one row, or all.
  void start(const TileInput& in) {
    initial_stride = in.one_zero_point ? 0 : blocks * kBlockChannels;
    for (int i = 0; i < (in.one_zero_point ? 1 : rows); ++i)
      for (int64_t c = 0; c < blocks * kBlockChannels; c += 8) {
        const __m256i sum = load_unaligned(in.weight_sums + c / kBlockChannels * in.sums_step + c % kBlockChannels * 4);
        store(initial + i * initial_stride + c, _mm256_mullo_epi32(sum, _mm256_set1_epi32(-in.zero_points[i])));
      }
  }

  /// Adds the products of the piece, and empties it.
  void flush(const TileInput& in, const Panel& panel, const Weights& weights, int32_t* out) {
    const int16_t* words = weights.form == Form::widened ? weights.at(panel.block) : nullptr;
    const int64_t stride = blocks * kBlockChannels;
    for (int b = 0; b < blocks; b += 2) {
      const bool two = b + 2 <= blocks;
      for_each_part(rows, two, [&](int row, int count, int tiles) {
        const int64_t channel = b * kBlockChannels;
        const PieceOperands operands{piece, row, tiles, in.weights + b * in.block_bytes, in.block_bytes, words + (words ? b * weights.block_words() : 0),
                                     (first ? initial : out) + channel, first ? initial_stride : stride, out + channel, stride};
        kPieceKernels[static_cast<int>(weights.form)].of[two][count - 1](operands);
      });
    }
    piece.steps = 0;
    piece.stretches = 0;
    first = false;
  }

  int rows = 0, blocks = 0;
  bool first = true;  ///< the accumulators are still to be started
  int64_t initial_stride = 0;
  alignas(32) int32_t initial[kTileRows * kPanelChannels];
  Piece piece;
};

// ---------------------------------------------------------------------------------------------------------------------
// Epilogue

inline __m256i load_lanes(const int32_t* from, int64_t n) {
  if (n >= 8) return load_unaligned(from);
  return _mm256_maskload_epi32(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
}
inline void store_lanes(int32_t* to, __m256i v, int64_t n) {
  if (n >= 8) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
  _mm256_maskstore_epi32(to, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)), v);
}

/// Constants of a panel's channels in one sample: multiplier * accumulator + bias, plus the residual, is in units of the
/// output's scale behind a clamp, unless floats are wanted, and in real ones otherwise.
struct PanelConstants {
  const uint8_t* block = nullptr;
  int64_t sample = -1;
  alignas(32) float multiplier[kPanelChannels], bias[kPanelChannels];
  float residual_multiplier;
  int32_t residual_zero_point;
  bool plain;  ///< `rounding` covers the sample
  std::optional<ClampedRounding> rounding;

  void set(const LayerProblem& p, const Panel& panel, int64_t sample_index, Output output, bool profiled_bounds) {
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
    plain = output == Output::codes && ClampedRounding::covers(e, p.activation) && !profiled_bounds;
    if (plain) rounding.emplace(e);
  }
};

/// Finishes tiles, and gathers statistics.
class DenseKernel {
 public:
  static constexpr bool kPrefetches = false;    ///< the next panel's weights, by itself
  static constexpr int64_t weights_together = 0;  ///< bytes of panels that a tile meets one after the other
  static constexpr int64_t weights_in_cache = 96 << 10;  ///< of packed ones; twice that when widened
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
        panel.block = p.packed_weight + p.layout.block_offset(channel);
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
  void start_weights(const uint8_t* block, int64_t blocks, int64_t rows) { weights.set(block, blocks, rows); }

  void start_chunk(int64_t begin, int64_t end) {
    chunk_sample = begin / p.rows_per_sample;
    chunk_samples = (end - 1) / p.rows_per_sample + 1 - chunk_sample;
    for (int64_t i = 0; i < chunk_samples; ++i)
      for (int64_t& counter : counters[i]) counter = 0;
  }

  void start_tile(const Tile&) {}

  void run(DenseDriver& driver, const Tile& tile, const Panel& panel) {
    driver.accumulate(tile, panel, [&](const TileInput& in, bool) { multiply(in, tile.rows, panel, weights, driver.partial); });
    for (int i = 0, next; i < tile.rows; i = next) {
      for (next = i + 1; next < tile.rows && tile.sample[next] == tile.sample[i];) ++next;
      finish_rows(tile.row + i, next - i, tile.sample[i], driver.partial + i * panel.blocks * kBlockChannels, panel.blocks * kBlockChannels, panel);
    }
  }

  /// Finishes rows of one sample from a panel's accumulators, [row][stride].
  void finish_rows(const int64_t* row, int rows, int64_t sample, const int32_t* acc, int64_t stride, const Panel& panel) {
    if (sample != current_sample || vectors >= CodeSums::kFlushAfter - kTileRows * kPanelBlocks) start_sample(sample);
    if (constants.sample != sample || constants.block != panel.block) constants.set(p, panel, sample, output, profiled_bounds);
    if (output == Output::range && p.activation == Activation::clamp && !p.residual) return widen_by_extremes(row, rows, sample, acc, stride, panel);
    int64_t c = 0;
    if (constants.plain)
      for (; c + 32 <= panel.channels; c += 32)
        p.residual ? plain_columns<true>(row, rows, acc + c, stride, panel.channel + c, c) : plain_columns<false>(row, rows, acc + c, stride, panel.channel + c, c);
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

  /// Codes of 32 channels, `c` in the panel, of rows of a plain sample.
  template <bool kResidual>
  void plain_columns(const int64_t* row, int rows, const int32_t* acc, int64_t stride, int64_t channel, int64_t c) {
    const ClampedRounding rounding = *constants.rounding;
    const __m256i residual_zero_point = _mm256_set1_epi32(constants.residual_zero_point);
    const __m256 residual_multiplier = _mm256_set1_ps(constants.residual_multiplier);
    __m256 multiplier[4], bias[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) multiplier[j] = _mm256_load_ps(constants.multiplier + c + 8 * j), bias[j] = _mm256_load_ps(constants.bias + c + 8 * j);
    CodeSums row_sums = sums;
    __m256i clipped_here = clipped_lanes;
    for (int i = 0; i < rows; ++i, acc += stride) {
      const int64_t at = row[i] * channels + channel;
      __m256i code[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        __m256 t = _mm256_fmadd_ps(_mm256_cvtepi32_ps(load_unaligned(acc + 8 * j)), multiplier[j], bias[j]);
        if (kResidual) {
          const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p.residual + at + 8 * j)));
          t = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(codes, residual_zero_point)), residual_multiplier, t);
        }
        code[j] = rounding.code(t, clipped_here);
      }
      const __m256i q = narrow(rounding.words(code[0], code[1]), rounding.words(code[2], code[3]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p.y + at), q);
      row_sums.add(q);
    }
    sums = row_sums;
    clipped_lanes = clipped_here;
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
      counter[kStatsClipped] += clipped + sum_epu32(clipped_lanes);
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
    clipped_lanes = _mm256_setzero_si256();
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
  __m256i clipped_lanes;
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
