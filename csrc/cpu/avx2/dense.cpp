// Linear layers and convolutions, AVX2.
//
// vpmaddubsw would saturate, so both sides are widened to 16 bits: vpmaddwd of 4 channels x 4 inputs gives two sums per
// channel, which stay apart until the end.
//
// Register tile: 6 rows x 8 channels (half a block), 12 accumulators of 4 channels; 2 widened weights, an activation and a
// product complete the 16 registers. A step (4 inputs) is 12 vpmaddwd, 12 vpaddd and 2 vpmovsxbw on 8 loads.
// The rows of x are widened beforehand, kPieceInputs at a time, and the pieces are met by every half block of the panel:
// 6 x 256 x 2 bytes = 3 KB of L1, beside accumulators (6 x 32 channels x 2 sums = 1.5 KB) and the stream of the weights.
// dense_driver.h has the order of the loops and the budget of L2.
#include "../dense_driver.h"
#include "epilogue.h"

namespace probquant {
namespace {

enum class Output { codes, floats, accumulators };

constexpr int kRowsAtOnce = 6;
constexpr int kBlocksAtOnce = 2;
constexpr int64_t kPieceInputs = 256;

// ---------------------------------------------------------------------------------------------------------------------
// Register tiles

/// Steps of a piece whose weights follow each other.
struct Stretch {
  const uint8_t* weights;
  int64_t begin, end;  ///< steps of the piece
};

/// What is widened of the rows' inputs, and the sums so far.
struct Piece {
  int stretches = 0;
  int64_t steps = 0;
  Stretch stretch[kCallSegments];
  alignas(32) int16_t x[kRowsAtOnce][kPieceInputs];
  alignas(32) int32_t sums[2 * kBlocksAtOnce][kRowsAtOnce][16];  ///< [half block][row][8 channels][2]
};

inline void widen(const uint8_t* from, int64_t steps, int16_t* to) {
  int64_t k = 0;
  for (; k + 4 <= steps; k += 4)
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + 4 * k), _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 4 * k))));
  for (; k < steps; ++k) {
    int32_t four;
    __builtin_memcpy(&four, from + 4 * k, 4);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 4 * k), _mm_cvtepu8_epi16(_mm_cvtsi32_si128(four)));
  }
}

template <int kRows>
void multiply_piece(Piece& piece, int blocks, int64_t block_bytes) {
  for (int half = 0; half < 2 * blocks; ++half) {
    __m256i acc[kRows][2];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) acc[i][j] = _mm256_load_si256(reinterpret_cast<const __m256i*>(piece.sums[half][i] + 8 * j));
    for (int s = 0; s < piece.stretches; ++s) {
      const Stretch& stretch = piece.stretch[s];
      const uint8_t* w = stretch.weights + half / 2 * block_bytes + half % 2 * (kStreamBytes / 2);
      const int16_t* x = &piece.x[0][4 * stretch.begin];
      for (const int16_t* const end = &piece.x[0][4 * stretch.end]; x < end; x += 4, w += kStreamBytes) {
        const __m256i w0 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
        const __m256i w1 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16)));
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i) {
          int64_t four;
          __builtin_memcpy(&four, x + i * kPieceInputs, 8);
          const __m256i v = _mm256_set1_epi64x(four);
          acc[i][0] = _mm256_add_epi32(acc[i][0], _mm256_madd_epi16(v, w0));
          acc[i][1] = _mm256_add_epi32(acc[i][1], _mm256_madd_epi16(v, w1));
        }
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) _mm256_store_si256(reinterpret_cast<__m256i*>(piece.sums[half][i] + 8 * j), acc[i][j]);
  }
}

using PieceKernel = void (*)(Piece&, int, int64_t);
constexpr PieceKernel kPieceKernels[kRowsAtOnce] = {multiply_piece<1>, multiply_piece<2>, multiply_piece<3>,
                                                    multiply_piece<4>, multiply_piece<5>, multiply_piece<6>};

void flush_piece(Piece& piece, int rows, int blocks, int64_t block_bytes) {
  if (piece.steps > 0) kPieceKernels[rows - 1](piece, blocks, block_bytes);
  piece.steps = 0;
  piece.stretches = 0;
}

/// Accumulators of a tile, [blocks * 16] per row.
void multiply(const TileInput& in, int rows, int blocks, Piece& piece, int32_t* out) {
  __builtin_memset(piece.sums, 0, sizeof piece.sums);
  for (int s = 0; s < in.segment_count; ++s) {
    const Segment& segment = in.segments[s];
    for (int64_t done = 0; done < segment.steps;) {
      const int64_t steps = min_i(segment.steps - done, kPieceInputs / 4 - piece.steps);
      for (int i = 0; i < rows; ++i) widen(in.rows[s * in.row_step + i] + segment.x_offset + 4 * done, steps, piece.x[i] + 4 * piece.steps);
      piece.stretch[piece.stretches++] = {in.weights + segment.weight_offset + done * kStreamBytes, piece.steps, piece.steps + steps};
      piece.steps = (piece.steps + steps + 3) / 4 * 4;  // keeps the widened vectors aligned
      done += steps;
      if (piece.steps == kPieceInputs / 4 || piece.stretches == kCallSegments) flush_piece(piece, rows, blocks, in.block_bytes);
    }
  }
  flush_piece(piece, rows, blocks, in.block_bytes);
  for (int half = 0; half < 2 * blocks; ++half) {
    const __m256i weight_sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in.weight_sums + half / 2 * in.sums_step + half % 2 * 32));
    for (int i = 0; i < rows; ++i) {
      const auto* sums = reinterpret_cast<const __m256i*>(piece.sums[half][i]);
      __m256i acc = _mm256_permute4x64_epi64(_mm256_hadd_epi32(_mm256_load_si256(sums), _mm256_load_si256(sums + 1)), 0xd8);
      auto* to = reinterpret_cast<__m256i*>(out + i * blocks * kBlockChannels + half * 8);
      if (in.partial) acc = _mm256_add_epi32(acc, _mm256_loadu_si256(to));
      else acc = _mm256_sub_epi32(acc, _mm256_mullo_epi32(weight_sum, _mm256_set1_epi32(in.zero_points[in.one_zero_point ? 0 : i])));
      _mm256_storeu_si256(to, acc);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Epilogue

inline __m256i load_lanes(const int32_t* from, int64_t n) {
  if (n >= 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm256_maskload_epi32(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
}
inline void store_lanes(int32_t* to, __m256i v, int64_t n) {
  if (n >= 8) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
  _mm256_maskstore_epi32(to, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)), v);
}

/// Finishes tiles, and gathers statistics.
class DenseKernel {
 public:
  static constexpr int64_t kWeightsInCache = 256 << 10;
  static int64_t max_rows(int64_t) { return kRowsAtOnce; }
  static int panel_blocks(int64_t left) { return left == 1 ? 1 : kBlocksAtOnce; }

  DenseKernel(const LayerProblem& problem, Output kind)
      : p(problem), output(kind), channels(problem.shape.out_channels), profiled_bounds(problem.profiled_bounds()) {}

  void start_chunk(int64_t begin, int64_t end) {
    chunk_sample = begin / p.rows_per_sample;
    chunk_samples = (end - 1) / p.rows_per_sample + 1 - chunk_sample;
    for (int64_t i = 0; i < chunk_samples; ++i)
      for (int64_t& counter : counters[i]) counter = 0;
  }

  void start_tile(const Tile&) {}

  void run(DenseDriver& driver, const Tile& tile, const Panel& panel) {
    driver.accumulate(tile, panel, [&](const TileInput& in, bool) { multiply(in, tile.rows, panel.blocks, piece, driver.partial); });
    for (int i = 0; i < tile.rows; ++i) finish_row(tile.row[i], tile.sample[i], driver.partial + i * panel.blocks * kBlockChannels, panel);
  }

  /// Finishes one row of a panel from its accumulators.
  void finish_row(int64_t row, int64_t sample, const int32_t* acc, const Panel& panel) {
    if (sample != current_sample || vectors >= CodeSums::kFlushAfter) start_sample(sample);
    const SampleEpilogue& e = p.samples[sample];
    const int64_t at = row * channels + panel.channel;
    if (output != Output::codes) {
      for (int64_t c = 0; c < panel.channels; c += 8) finish_value(e, at + c, load_lanes(acc + c, panel.channels - c), panel, c);
      return;
    }
    const Rounding rounding(e.y_zero_point);
    for (int64_t c = 0; c < panel.channels; c += 32) {
      const int64_t present = min_i(panel.channels - c, 32);
      __m256i q = _mm256_setzero_si256();
      if (e.valid) {
        __m256i code[4];
        for (int64_t j = 0; j < 4; ++j) {
          const int64_t left = present - 8 * j;
          code[j] = _mm256_setzero_si256();
          if (left <= 0) continue;
          const __m256 t = output_values(e, at + c + 8 * j, load_lanes(acc + c + 8 * j, left), panel, c + 8 * j, left);
          clipped += count_bits(rounding.clipped(t) & first_lanes8(left));
          code[j] = rounding.codes(t);
        }
        const __m256i packed = _mm256_packus_epi16(_mm256_packs_epi32(code[0], code[1]), _mm256_packs_epi32(code[2], code[3]));
        q = keep_bytes(_mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)), present);
      }
      store_bytes32(p.y + at + c, q, present);
      sums.add(q);
      ++vectors;
    }
    if (p.channel_stats) {
      int64_t* stats = stats_row(sample) + kStatsSample + panel.channel;
      add_channel_moments(p.y + at, 1, panel.channels, channels, stats, stats + channels);
    }
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

  __m256 residual(int32_t zero_point, int64_t at, int64_t left) const {
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_cvtepu8_epi32(load_bytes16(p.residual + at, min_i(left, 8))), _mm256_set1_epi32(zero_point)));
  }
  const BlockHeader& header(const Panel& panel, int64_t c) const {
    return *reinterpret_cast<const BlockHeader*>(panel.block + c / kBlockChannels * p.layout.block_bytes);
  }

  /// output_value() of 8 channels.
  __m256 output_values(const SampleEpilogue& e, int64_t at, __m256i acc, const Panel& panel, int64_t c, int64_t left) const {
    const BlockHeader& constants = header(panel, c);
    const int64_t lane = c % kBlockChannels;
    const __m256 value = _mm256_cvtepi32_ps(acc), inverse_scale = _mm256_set1_ps(e.inverse_scale);
    const __m256 scale = _mm256_loadu_ps(constants.scale + lane), bias = _mm256_loadu_ps(constants.bias + lane);
    if (p.activation != Activation::clamp) {
      const __m256 y = _mm256_fmadd_ps(value, _mm256_mul_ps(_mm256_set1_ps(e.x_scale), scale), bias);
      return _mm256_mul_ps(activate_ps(p.activation, _mm256_mul_ps(y, _mm256_loadu_ps(constants.profile + lane))),
                           _mm256_mul_ps(inverse_scale, _mm256_loadu_ps(constants.inverse_profile + lane)));
    }
    __m256 t = _mm256_fmadd_ps(value, _mm256_mul_ps(_mm256_set1_ps(e.multiplier), scale), _mm256_mul_ps(inverse_scale, bias));
    if (p.residual) t = _mm256_fmadd_ps(residual(e.residual_zero_point, at, left), _mm256_set1_ps(e.residual_multiplier), t);
    __m256 lo = _mm256_set1_ps(e.activation_lo), hi = _mm256_set1_ps(e.activation_hi);
    if (profiled_bounds) {
      const __m256 inverse_profile = _mm256_loadu_ps(constants.inverse_profile + lane);
      lo = _mm256_mul_ps(lo, inverse_profile);
      hi = _mm256_mul_ps(hi, inverse_profile);
    }
    return clamp_ps(t, lo, hi);
  }

  /// layer_value() of 8 channels.
  __m256 layer_values(const SampleEpilogue& e, int64_t at, __m256i acc, const Panel& panel, int64_t c, int64_t left) const {
    const BlockHeader& constants = header(panel, c);
    const int64_t lane = c % kBlockChannels;
    const __m256 scale = _mm256_loadu_ps(constants.scale + lane), bias = _mm256_loadu_ps(constants.bias + lane);
    __m256 y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), _mm256_mul_ps(_mm256_set1_ps(e.x_scale), scale), bias);
    if (p.residual) y = _mm256_fmadd_ps(residual(e.residual_zero_point, at, left), _mm256_set1_ps(e.residual_scale), y);
    y = _mm256_mul_ps(y, _mm256_loadu_ps(constants.profile + lane));
    return p.activation == Activation::clamp ? clamp_ps(y, _mm256_set1_ps(p.activation_min), _mm256_set1_ps(p.activation_max))
                                             : activate_ps(p.activation, y);
  }

  /// 8 channels that are not written as codes: stores layer_value, or the accumulators, and the range of output_value.
  void finish_value(const SampleEpilogue& e, int64_t at, __m256i acc, const Panel& panel, int64_t c) {
    const int64_t left = panel.channels - c;
    if (output == Output::floats)
      return store_lanes(reinterpret_cast<int32_t*>(p.y_float + at), _mm256_castps_si256(layer_values(e, at, acc, panel, c, left)), left);
    const __m256 y = output_values(e, at, acc, panel, c, left);
    store_lanes(p.accumulators + at, acc, left);
    const __m256 exists = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
    range_lo = _mm256_min_ps(_mm256_blendv_ps(_mm256_set1_ps(__builtin_inff()), y, exists), range_lo);
    range_hi = _mm256_max_ps(_mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), y, exists), range_hi);
    range_nan |= _mm256_movemask_ps(_mm256_and_ps(exists, _mm256_cmp_ps(y, y, _CMP_UNORD_Q)));
  }

  /// Hands over what was gathered of the sample before.
  void start_sample(int64_t sample) {
    if (current_sample >= 0 && output == Output::codes) {
      int64_t* counter = counters[current_sample - chunk_sample];
      sums.flush(counter[kStatsSum], counter[kStatsSquares]);
      counter[kStatsClipped] += clipped;
    }
    if (current_sample >= 0 && output == Output::accumulators) {
      alignas(32) float lo[8], hi[8];
      _mm256_store_ps(lo, range_lo);
      _mm256_store_ps(hi, range_hi);
      for (int i = 1; i < 8; ++i) {
        lo[0] = lo[i] < lo[0] ? lo[i] : lo[0];
        hi[0] = hi[i] > hi[0] ? hi[i] : hi[0];
      }
      atomic_widen(p.range + 2 * current_sample, range_nan ? __builtin_nanf("") : lo[0], hi[0]);
    }
    clipped = vectors = 0;
    range_lo = _mm256_set1_ps(__builtin_inff());
    range_hi = _mm256_set1_ps(-__builtin_inff());
    range_nan = 0;
    current_sample = sample;
  }

  const LayerProblem& p;
  const Output output;
  const int64_t channels;
  const bool profiled_bounds;
  Piece piece;

  int64_t chunk_sample = 0, chunk_samples = 0;
  int64_t counters[kChunkSamples + 1][kStatsSample];

  int64_t current_sample = -1;  ///< whose statistics follow
  CodeSums sums;
  int64_t clipped = 0, vectors = 0;
  __m256 range_lo, range_hi;
  int range_nan = 0;
};

void run(const LayerProblem& p, const LayerRange& range, Output output) {
  DenseDriver driver(p);
  DenseKernel kernel(p, output);
  driver.run(range, kernel);
}

void quantized(const LayerProblem& p, const LayerRange& range) { run(p, range, Output::codes); }
void to_float(const LayerProblem& p, const LayerRange& range) { run(p, range, Output::floats); }
void accumulate(const LayerProblem& p, const LayerRange& range) { run(p, range, Output::accumulators); }

void requantize(const LayerProblem& p, const LayerRange& range) {
  DenseKernel kernel(p, Output::codes);
  for_each_row_panel(p, range, kernel, [&](int64_t row, int64_t sample, const Panel& panel) {
    kernel.finish_row(row, sample, p.accumulators + row * p.shape.out_channels + panel.channel, panel);
  });
}

}  // namespace

void install_dense_avx2(Kernels& table) {
  table.dense = {quantized, to_float, accumulate};
  table.layer_requantize = requantize;
}

}  // namespace probquant
