// Linear layers and convolutions, AVX-512 VNNI.
//
// Register tile: 12 rows x 2 blocks of 16 channels, or 8 rows x 3 blocks where an odd number of blocks ends: 24 accumulators,
// 2 or 3 weights and a broadcast activation of 32 registers. A step (4 inputs) is 24 vpdpbusd on 14 (11) loads.
// L1: a panel's weights stream through (128 or 192 bytes per step, once per 12 or 8 rows) past the tile's rows of x.
// dense_driver.h has the order of the loops and the budget of L2.
//
// vpdpbusd takes unsigned activations and signed weights as they are; accumulators start at the zero point's correction.
#include "../dense_driver.h"
#include "epilogue.h"

namespace probquant {
namespace {

enum class Output { codes, floats, accumulators };

// ---------------------------------------------------------------------------------------------------------------------
// Register tiles

/// Rows whose pointers stay in registers; the others' are loaded in every step. Left to itself, GCC keeps those in vector
/// registers, and every address then waits for the vector units.
constexpr int kPointerRegisters = 8;

template <int ahead, int kRows, int kBlocks>
__attribute__((always_inline)) inline void step(__m512i (&acc)[kRows][kBlocks], const uint8_t* (&x)[kRows], const uint8_t* (&x_memory)[kRows], int64_t at,
                                                const uint8_t* weights, int64_t block_bytes) {
  __m512i w[kBlocks];
#pragma GCC unroll 3
  for (int j = 0; j < kBlocks; ++j) w[j] = _mm512_loadu_si512(weights + j * block_bytes);
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    __m512i v;
    if (i < kPointerRegisters) {
      int32_t four;
      __builtin_memcpy(&four, x[i] + at + ahead, 4);
      v = _mm512_set1_epi32(four);
    } else {
      const uint8_t* row;
      asm("mov %2, %1\n\tvpbroadcastd %c4(%1, %3), %0" : "=v"(v), "=&r"(row) : "m"(x_memory[i]), "r"(at), "i"(ahead));
    }
#pragma GCC unroll 3
    for (int j = 0; j < kBlocks; ++j) asm("vpdpbusd %2, %1, %0" : "+v"(acc[i][j]) : "v"(v), "v"(w[j]));
  }
}

template <int kRows, int kBlocks>
__attribute__((always_inline)) inline void start(const TileInput& in, __m512i (&acc)[kRows][kBlocks]) {
#ifdef EXP1
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kBlocks; ++j)acc[i][j]=_mm512_setzero_si512();
return;
#endif
  __m512i sums[kBlocks];
#pragma GCC unroll 3
  for (int j = 0; j < kBlocks; ++j)
    sums[j] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(in.weight_sums + j * in.sums_step));
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kBlocks; ++j)
      acc[i][j] = i > 0 && in.one_zero_point ? acc[0][j] : _mm512_mullo_epi32(sums[j], _mm512_set1_epi32(in.zero_points[i]));
  if (!in.partial) return;
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
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
void tile_accumulators(const TileInput& in, int32_t* out) {
  __m512i acc[kRows][kBlocks];
  multiply(in, acc);
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kBlocks; ++j) _mm512_storeu_si512(out + (i * kBlocks + j) * kBlockChannels, acc[i][j]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Epilogue of a tile within one sample: requantize, clamp, count, store

/// Constants of a sample, and the moments of a run of its tiles.
struct Run {
  int64_t sample = -1;
  bool plain;  ///< valid, Activation::clamp: the tile's own epilogue serves
  float multiplier, inverse_scale, residual_multiplier, activation_lo, activation_hi, lo_edge, hi_edge, hi;
  int32_t residual_zero_point;
  int16_t zero_point;
  CodeSums sums;
  __m512i inside = _mm512_setzero_si512();  ///< values that were not clipped, per lane
  int64_t values = 0;                       ///< values written

  void set(const LayerProblem& p, int64_t n) {
    const SampleEpilogue& e = p.samples[n];
    sample = n;
    plain = e.valid && p.activation == Activation::clamp;
    multiplier = e.multiplier;
    inverse_scale = e.inverse_scale;
    residual_multiplier = e.residual_multiplier;
    activation_lo = e.activation_lo;
    activation_hi = e.activation_hi;
    const float z = static_cast<float>(e.y_zero_point);
    hi = 255.0f - z;
    lo_edge = -z - 0.5f;
    hi_edge = hi + 0.5f;
    residual_zero_point = e.residual_zero_point;
    zero_point = static_cast<int16_t>(e.y_zero_point);
  }
};

struct TileOutput {
  Run* run;
  const uint8_t* block;     ///< headers of the panel
  int64_t channels;         ///< of the panel that exist
  const int64_t* row;       ///< output rows
  int64_t stride;           ///< bytes of an output row
  uint8_t* y;               ///< of the panel's first channel
  const uint8_t* residual;  ///< likewise
};

/// Dwords of two packed blocks (see pack_rows) in the order of rows 0 and 1; of one block in the order of rows 0 to 3.
alignas(64) constexpr int32_t kRowPairOrder[16] = {0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29};
alignas(64) constexpr int32_t kRowOrder[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};

/// Bytes of a vector of pack_rows that exist: channels [0, channels), rows [0, rows).
constexpr uint64_t packed_bytes(int64_t channels, int64_t rows) {
  uint64_t mask = 0;
  for (int64_t i = 0; i < 64; ++i)
    if (i / 16 * 4 + i % 4 < channels && i / 4 % 4 < rows) mask |= uint64_t{1} << i;
  return mask;
}
template <int kRows>
constexpr uint64_t kPackedRows = packed_bytes(16, kRows);

template <bool kResidual, int kRows, int kBlocks>
__attribute__((always_inline)) inline void requantize_tile(const TileInput& in, const TileOutput& out, __m512i (&acc)[kRows][kBlocks]) {
  Run& run = *out.run;
  const __m512 activation_lo = _mm512_set1_ps(run.activation_lo), activation_hi = _mm512_set1_ps(run.activation_hi);
  const __m512 lo_edge = _mm512_set1_ps(run.lo_edge), hi_edge = _mm512_set1_ps(run.hi_edge), hi = _mm512_set1_ps(run.hi);
  const __m512i zero_point = _mm512_set1_epi16(run.zero_point);
  const int64_t last_channels = out.channels - (kBlocks - 1) * kBlockChannels;
  const __mmask16 last_lanes = first_lanes16(last_channels);
  uint64_t last_bytes = ~uint64_t{0};
  const bool full = last_channels >= kBlockChannels;
  if (last_channels < kBlockChannels) last_bytes = packed_bytes(last_channels, 4);

  __m512 scale[kBlocks], bias[kBlocks];
#pragma GCC unroll 3
  for (int j = 0; j < kBlocks; ++j) {
    const auto* header = reinterpret_cast<const BlockHeader*>(out.block + j * in.block_bytes);
    scale[j] = _mm512_mul_ps(_mm512_set1_ps(run.multiplier), _mm512_loadu_ps(header->scale));
    bias[j] = _mm512_mul_ps(_mm512_set1_ps(run.inverse_scale), _mm512_loadu_ps(header->bias));
  }

  __m512i inside = run.inside;
  CodeSums sums = run.sums;
#pragma GCC unroll 3
  for (int r = 0; r < kRows; r += 4) {
    constexpr int kLeft = kRows % 4 ? kRows % 4 : 4;
    const int rows = r + 4 <= kRows ? 4 : kLeft;
    __m512i q[kBlocks];
#pragma GCC unroll 3
    for (int j = 0; j < kBlocks; ++j) {
      const bool is_last = j == kBlocks - 1;
      __m512i code[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (i >= rows) {
          code[i] = _mm512_setzero_si512();
          continue;
        }
        __m512 t = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r + i][j]), scale[j], bias[j]);
        if (kResidual) {
          const uint8_t* at = out.residual + out.row[r + i] * out.stride + j * kBlockChannels;
          const __m128i bytes = is_last ? _mm_maskz_loadu_epi8(last_lanes, at) : _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
          const __m512i centred = _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(run.residual_zero_point));
          t = _mm512_fmadd_ps(_mm512_cvtepi32_ps(centred), _mm512_set1_ps(run.residual_multiplier), t);
        }
        t = clamp_ps(t, activation_lo, activation_hi);
        const __mmask16 above = is_last ? _mm512_mask_cmp_ps_mask(last_lanes, t, lo_edge, _CMP_GE_OQ) : _mm512_cmp_ps_mask(t, lo_edge, _CMP_GE_OQ);
        const __mmask16 in_range = _mm512_mask_cmp_ps_mask(above, t, hi_edge, _CMP_LE_OQ);
        inside = _mm512_mask_sub_epi32(inside, in_range, inside, _mm512_set1_epi32(-1));
        // The packs below saturate at 0 and 255; only what overflows int32 upwards has to be stopped. A NaN becomes 0.
        code[i] = _mm512_cvtps_epi32(_mm512_min_ps(hi, t));
      }
      // pack_rows: within each 128 bits, 4 channels of row 0, of row 1, ...
      const __m512i a = _mm512_adds_epi16(_mm512_packs_epi32(code[0], code[1]), zero_point);
      const __m512i b = _mm512_adds_epi16(_mm512_packs_epi32(code[2], code[3]), zero_point);
      const uint64_t row_bytes = rows == 4 ? ~uint64_t{0} : kPackedRows<kLeft>;
      q[j] = _mm512_maskz_packus_epi16(_cvtu64_mask64(is_last ? last_bytes & row_bytes : row_bytes), a, b);
      sums.add(q[j]);
    }
    uint8_t* y[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) y[i] = out.y + out.row[r + (i < rows ? i : 0)] * out.stride;
#pragma GCC unroll 2
    for (int j = 0; j + 1 < kBlocks; j += 2) {
      const __mmask32 lanes = j + 2 < kBlocks ? 0xffffffff : 0xffff | (static_cast<uint32_t>(last_lanes) << 16);
#pragma GCC unroll 2
      for (int pair = 0; pair < 2; ++pair) {
        if (2 * pair >= rows) continue;
        const __m512i order = _mm512_add_epi32(_mm512_load_si512(kRowPairOrder), _mm512_set1_epi32(2 * pair));
        const __m512i two = _mm512_permutex2var_epi32(q[j], order, q[j + 1]);
        if (full) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(y[2 * pair] + j * kBlockChannels), _mm512_castsi512_si256(two));
        if (2 * pair + 1 < rows) _mm256_storeu_si256(reinterpret_cast<__m256i*>(y[2 * pair + 1] + j * kBlockChannels), _mm512_extracti64x4_epi64(two, 1));
        } else {
        _mm256_mask_storeu_epi8(y[2 * pair] + j * kBlockChannels, lanes, _mm512_castsi512_si256(two));
        if (2 * pair + 1 < rows) _mm256_mask_storeu_epi8(y[2 * pair + 1] + j * kBlockChannels, lanes, _mm512_extracti64x4_epi64(two, 1));
        }
      }
    }
    if (kBlocks % 2 == 1) {
      constexpr int j = kBlocks - 1;
      const __m512i four = _mm512_permutexvar_epi32(_mm512_load_si512(kRowOrder), q[j]);
      _mm_mask_storeu_epi8(y[0] + j * kBlockChannels, last_lanes, _mm512_castsi512_si128(four));
      if (rows > 1) _mm_mask_storeu_epi8(y[1] + j * kBlockChannels, last_lanes, _mm512_extracti32x4_epi32(four, 1));
      if (rows > 2) _mm_mask_storeu_epi8(y[2] + j * kBlockChannels, last_lanes, _mm512_extracti32x4_epi32(four, 2));
      if (rows > 3) _mm_mask_storeu_epi8(y[3] + j * kBlockChannels, last_lanes, _mm512_extracti32x4_epi32(four, 3));
    }
  }
  run.inside = inside;
  run.sums = sums;
  run.values += kRows * out.channels;
}

/// Requantizes at once. All rows lie in one sample, which is valid, and the activation is a clamp.
template <int kRows, int kBlocks>
void tile_codes(const TileInput& in, const TileOutput& out) {
  __m512i acc[kRows][kBlocks];
  multiply(in, acc);
  if (out.residual) requantize_tile<true>(in, out, acc);
  else requantize_tile<false>(in, out, acc);
}

using AccumulatorsTile = void (*)(const TileInput&, int32_t*);
using CodesTile = void (*)(const TileInput&, const TileOutput&);

#define PROBQUANT_TILES_8(tile, blocks) \
  tile<1, blocks>, tile<2, blocks>, tile<3, blocks>, tile<4, blocks>, tile<5, blocks>, tile<6, blocks>, tile<7, blocks>, tile<8, blocks>
#define PROBQUANT_TILES_12(tile, blocks) PROBQUANT_TILES_8(tile, blocks), tile<9, blocks>, tile<10, blocks>, tile<11, blocks>, tile<12, blocks>
/// [blocks - 1][rows - 1]
constexpr AccumulatorsTile kAccumulatorsTiles[kPanelBlocks][kTileRows] = {
    {PROBQUANT_TILES_12(tile_accumulators, 1)}, {PROBQUANT_TILES_12(tile_accumulators, 2)}, {PROBQUANT_TILES_8(tile_accumulators, 3)}};
constexpr CodesTile kCodesTiles[kPanelBlocks][kTileRows] = {
    {PROBQUANT_TILES_12(tile_codes, 1)}, {PROBQUANT_TILES_12(tile_codes, 2)}, {PROBQUANT_TILES_8(tile_codes, 3)}};

// ---------------------------------------------------------------------------------------------------------------------
// Epilogue from memory: what is left, and layer_requantize

/// layer_value() of 16 channels.
inline __m512 layer_values(__m512i acc, const BlockHeader& header, const SampleEpilogue& e, const LayerProblem& p, const uint8_t* residual, __mmask16 lanes) {
  __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), _mm512_mul_ps(_mm512_set1_ps(e.x_scale), _mm512_loadu_ps(header.scale)), _mm512_loadu_ps(header.bias));
  if (residual) {
    const __m512i q = _mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, residual)), _mm512_set1_epi32(e.residual_zero_point));
    y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(e.residual_scale), y);
  }
  if (p.activation != Activation::clamp) return activate_ps(p.activation, y);
  return clamp_ps(y, _mm512_set1_ps(p.activation_min), _mm512_set1_ps(p.activation_max));
}

/// What requantize() hands to round_to_code(), for 16 channels of a valid sample.
inline __m512 layer_codes(__m512i acc, const BlockHeader& header, const SampleEpilogue& e, const LayerProblem& p, const uint8_t* residual, __mmask16 lanes) {
  const __m512 value = _mm512_cvtepi32_ps(acc), scale = _mm512_loadu_ps(header.scale), bias = _mm512_loadu_ps(header.bias);
  const __m512 inverse_scale = _mm512_set1_ps(e.inverse_scale);
  if (p.activation != Activation::clamp) {
    const __m512 y = _mm512_fmadd_ps(value, _mm512_mul_ps(_mm512_set1_ps(e.x_scale), scale), bias);
    return _mm512_mul_ps(activate_ps(p.activation, y), inverse_scale);
  }
  __m512 t = _mm512_fmadd_ps(value, _mm512_mul_ps(_mm512_set1_ps(e.multiplier), scale), _mm512_mul_ps(inverse_scale, bias));
  if (residual) {
    const __m512i q = _mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, residual)), _mm512_set1_epi32(e.residual_zero_point));
    t = _mm512_fmadd_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(e.residual_multiplier), t);
  }
  return clamp_ps(t, _mm512_set1_ps(e.activation_lo), _mm512_set1_ps(e.activation_hi));
}

/// Runs the layer: chooses the register tile, finishes what it leaves, and gathers statistics.
class DenseKernel {
 public:
  static constexpr int64_t kWeightsInCache = 256 << 10;
  static int64_t max_rows(int64_t blocks) { return blocks % 2 == 1 && blocks > 1 ? 8 : 12; }
  static int panel_blocks(int64_t left) { return left == 1 ? 1 : left == 3 ? 3 : 2; }

  DenseKernel(const LayerProblem& problem, Output kind, int64_t first_row)
      : p(problem), output(kind), channels(problem.shape.out_channels), chunk_sample(first_row / problem.rows_per_sample) {}

  void run(DenseDriver& driver, const Tile& tile, const Panel& panel) {
    if (output == Output::codes && tile.sample[0] != current.sample) start_sample(tile.sample[0]);
    const bool at_once = output == Output::codes && tile.one_sample && current.plain;
    const TileOutput out{&current, panel.block, panel.channels, tile.row, channels, p.y + panel.channel, p.residual ? p.residual + panel.channel : nullptr};
    driver.accumulate(tile, panel, [&](const TileInput& in, bool last) {
      if (last && at_once) kCodesTiles[panel.blocks - 1][tile.rows - 1](in, out);
      else kAccumulatorsTiles[panel.blocks - 1][tile.rows - 1](in, driver.partial);
    });
    if (!at_once) finish(tile.row, tile.sample, tile.rows, driver.partial, panel.blocks * kBlockChannels, panel);
    if (p.channel_stats && output == Output::codes) add_channel_stats(tile.row, tile.sample, tile.rows, panel);
  }

  /// Finishes rows from accumulators in memory, [row_step] per row.
  void finish(const int64_t* row, const int64_t* sample, int rows, const int32_t* acc, int64_t row_step, const Panel& panel) {
    for (int i = 0; i < rows; ++i) {
      const SampleEpilogue& e = p.samples[sample[i]];
      if (output == Output::codes && sample[i] != current.sample) start_sample(sample[i]);
      const Rounding rounding(e.y_zero_point);
      for (int64_t j = 0; j < panel.blocks; ++j) {
        const int64_t at = row[i] * channels + panel.channel + j * kBlockChannels;
        const auto& header = *reinterpret_cast<const BlockHeader*>(panel.block + j * p.layout.block_bytes);
        const __mmask16 lanes = first_lanes16(panel.channels - j * kBlockChannels);
        const __m512i a = _mm512_maskz_loadu_epi32(lanes, acc + i * row_step + j * kBlockChannels);
        const uint8_t* residual = p.residual ? p.residual + at : nullptr;
        if (output == Output::codes) {
          finish_codes(a, header, e, rounding, residual, lanes, at);
          continue;
        }
        const __m512 y = layer_values(a, header, e, p, residual, lanes);
        if (output == Output::floats) {
          _mm512_mask_storeu_ps(p.y_float + at, lanes, y);
          continue;
        }
        _mm512_mask_storeu_epi32(p.accumulators + at, lanes, a);
        if (sample[i] != range_sample) flush_range(sample[i]);
        range_lo = _mm512_mask_min_ps(range_lo, lanes, y, range_lo);
        range_hi = _mm512_mask_max_ps(range_hi, lanes, y, range_hi);
        range_nan = static_cast<__mmask16>(range_nan | _mm512_mask_cmp_ps_mask(lanes, y, y, _CMP_UNORD_Q));
      }
    }
  }

  /// A whole row of `quantized`, from memory.
  void finish_row(int64_t row, int64_t sample, const int32_t* acc, const Panel& panel) {
    finish(&row, &sample, 1, acc, 0, panel);
    if (p.channel_stats) add_channel_stats(&row, &sample, 1, panel);
  }

  void end_panel() {
    if (p.channel_stats) flush_channels();
  }

  void end_chunk() {
    if (output == Output::accumulators) flush_range(-1);
    if (output != Output::codes) return;
    flush_run();
    flush_channels();
    current.sample = -1;
    for (int64_t i = 0; i < chunk_samples; ++i)
      for (int64_t column = 0; column < kStatsSample; ++column) {
        if (counters[i][column]) add(stats_row(chunk_sample + i) + column, counters[i][column]);
        counters[i][column] = 0;
      }
    chunk_samples = 0;
  }

 private:
  static void add(int64_t* counter, int64_t value) { __atomic_fetch_add(counter, value, __ATOMIC_RELAXED); }
  int64_t* stats_row(int64_t sample) const { return p.stats + sample * (kStatsSample + (p.channel_stats ? 2 * channels : 0)); }

  void finish_codes(__m512i acc, const BlockHeader& header, const SampleEpilogue& e, const Rounding& rounding, const uint8_t* residual, __mmask16 lanes,
                    int64_t at) {
    current.values += __builtin_popcount(lanes);
    if (!e.valid) {
      _mm_mask_storeu_epi8(p.y + at, lanes, _mm_setzero_si128());
      current.inside = _mm512_mask_sub_epi32(current.inside, lanes, current.inside, _mm512_set1_epi32(-1));
      return;
    }
    const __m512 t = layer_codes(acc, header, e, p, residual, lanes);
    const __m128i q = _mm_maskz_mov_epi8(lanes, _mm512_cvtepi32_epi8(rounding.codes(t)));
    _mm_mask_storeu_epi8(p.y + at, lanes, q);
    current.sums.add(_mm512_zextsi128_si512(q));
    const auto inside = static_cast<__mmask16>(lanes & ~rounding.clipped(t));
    current.inside = _mm512_mask_sub_epi32(current.inside, inside, current.inside, _mm512_set1_epi32(-1));
  }

  void start_sample(int64_t sample) {
    flush_run();
    if (p.channel_stats) flush_channels();
    if (chunk_samples == 0) chunk_sample = sample;
    chunk_samples = max_i(chunk_samples, sample - chunk_sample + 1);
    current.set(p, sample);
  }

  void flush_run() {
    if (current.sample < 0 || current.values == 0) return;
    int64_t* counter = counters[current.sample - chunk_sample];
    current.sums.flush(counter[kStatsSum], counter[kStatsSquares]);
    counter[kStatsClipped] += current.values - _mm512_reduce_add_epi32(current.inside);
    current.inside = _mm512_setzero_si512();
    current.values = 0;
  }

  // Moments per channel, from the codes just written; only on request.

  void add_channel_stats(const int64_t* row, const int64_t* sample, int rows, const Panel& panel) {
    for (int i = 0; i < rows; ++i) {
      if (sample[i] != channel_sample || panel.channel != channel_first) {
        flush_channels();
        channel_sample = sample[i];
        channel_first = panel.channel;
        channel_count = panel.channels;
      }
      for (int64_t j = 0; j < panel.blocks; ++j) {
        const __mmask16 lanes = first_lanes16(panel.channels - j * kBlockChannels);
        const __m512i q = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, p.y + row[i] * channels + panel.channel + j * kBlockChannels));
        channel_sums[j] = _mm512_add_epi32(channel_sums[j], q);
        channel_squares[j] = _mm512_add_epi32(channel_squares[j], _mm512_madd_epi16(q, q));
      }
    }
  }

  void flush_channels() {
    if (channel_sample < 0) return;
    int64_t* stats = stats_row(channel_sample) + kStatsSample + channel_first;
    for (int64_t c = 0; c < channel_count; ++c) {
      add(stats + c, reinterpret_cast<const uint32_t*>(channel_sums)[c]);
      add(stats + channels + c, reinterpret_cast<const uint32_t*>(channel_squares)[c]);
    }
    for (int64_t j = 0; j < kPanelBlocks; ++j) channel_sums[j] = channel_squares[j] = _mm512_setzero_si512();
    channel_sample = -1;
  }

  void flush_range(int64_t next) {
    if (range_sample >= 0) {
      float* range = p.range + 2 * range_sample;
      atomic_widen(range, range_nan ? __builtin_nanf("") : _mm512_reduce_min_ps(range_lo), _mm512_reduce_max_ps(range_hi));
    }
    range_sample = next;
    range_lo = _mm512_set1_ps(__builtin_inff());
    range_hi = _mm512_set1_ps(-__builtin_inff());
    range_nan = 0;
  }

  const LayerProblem& p;
  const Output output;
  const int64_t channels;

  Run current;
  int64_t chunk_sample, chunk_samples = 0;
  int64_t counters[kChunkSamples + 1][kStatsSample] = {};

  int64_t channel_sample = -1, channel_first = 0, channel_count = 0;
  __m512i channel_sums[kPanelBlocks] = {}, channel_squares[kPanelBlocks] = {};

  int64_t range_sample = -1;
  __m512 range_lo, range_hi;
  __mmask16 range_nan = 0;
};

void run(const LayerProblem& p, const LayerRange& range, Output output) {
  DenseDriver driver(p);
  DenseKernel kernel(p, output, range.row_begin);
  driver.run(range, kernel);
}

void quantized(const LayerProblem& p, const LayerRange& range) { run(p, range, Output::codes); }
void to_float(const LayerProblem& p, const LayerRange& range) { run(p, range, Output::floats); }
void accumulate(const LayerProblem& p, const LayerRange& range) { run(p, range, Output::accumulators); }

void requantize(const LayerProblem& p, const LayerRange& range) {
  DenseKernel kernel(p, Output::codes, range.row_begin);
  for_each_row_panel(p, range, kernel, [&](int64_t row, int64_t sample, const Panel& panel) {
    kernel.finish_row(row, sample, p.accumulators + row * p.shape.out_channels + panel.channel, panel);
  });
}

}  // namespace

void install_dense_avx512vnni(Kernels& table) {
  table.dense = {quantized, to_float, accumulate};
  table.layer_requantize = requantize;
}

}  // namespace probquant
