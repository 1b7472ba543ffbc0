// The epilogue of dense layers in AVX-512, for what multiplies with its own vectors and for AMX: the tile's own, which requantizes
// 4 rows at a time, and one from memory for everything else (curved activations, invalid samples, floats). For ranges, sums of
// which only the extremes count are compared as they are. Everything has internal linkage.
#pragma once
#include "../dense_driver.h"
#include "epilogue.h"

#include <memory>

namespace probquant {
namespace {

enum class Output { codes, floats, range };

// ---------------------------------------------------------------------------------------------------------------------
// Epilogue of a tile: requantize, clamp, count, store

/// Constants of a sample's epilogue.
struct SampleConstants {
  bool fits;   ///< valid, and values fit the conversion to integers
  bool plain;  ///< that, with an activation that the tile's own epilogue knows
  bool relu;   ///< zero point 0, and the activation lets nothing below 0 through
  bool positive;  ///< that, and its upper bound is no code below 255, the same for all channels
  bool clips;     ///< values beyond 255 count as clipped: that bound lies above
  bool open;   ///< no activation
  float x_scale, multiplier, inverse_scale, residual_multiplier, activation_lo, activation_hi;
  int32_t x_zero_point, residual_zero_point, zero_point;

  void set(const SampleEpilogue& e, const LayerProblem& p, const PackedTrailer& weight) {
    x_scale = e.x_scale;
    multiplier = e.multiplier;
    inverse_scale = e.inverse_scale;
    residual_multiplier = e.residual_multiplier;
    activation_lo = e.activation_lo;
    activation_hi = e.activation_hi;
    x_zero_point = e.x_zero_point;
    residual_zero_point = e.residual_zero_point;
    zero_point = e.y_zero_point;
    const float accumulator = static_cast<float>(p.layout.taps * p.layout.inputs) * (255.0f * 127.0f);
    const float reach = multiplier * weight.largest_scale * accumulator + inverse_scale * weight.largest_bias + residual_multiplier * 255.0f;
    fits = e.valid && reach < 1e9f;
    plain = fits && p.activation == Activation::clamp;
    if (p.activation != Activation::clamp) {  // none goes beyond its argument but sigmoid, which ends at 1; the argument must be finite
      fits = fits && reach < 1e30f * e.inverse_scale * p.profile.least_inverse;
      if (p.activation == Activation::sigmoid) fits = fits && e.inverse_scale * p.profile.largest_inverse < 1e9f;
      activation_lo = -__builtin_inff(), activation_hi = __builtin_inff();
    }
    relu = zero_point == 0 && activation_lo == 0.0f;
    const int ceiling = _mm512_cvtsi512_si32(bound_codes(_mm512_set1_ps(activation_hi), zero_point));
    positive = relu && ceiling >= 255 && (activation_hi == __builtin_inff() || !p.profiled_bounds());
    clips = ceiling > 255;
    open = activation_lo == -__builtin_inff() && activation_hi == __builtin_inff();
  }
};

/// Constants of a sample and a block of channels.
struct BlockConstants {
  alignas(64) float scale[kBlockChannels], bias[kBlockChannels];  ///< over the output's scale
  alignas(64) int16_t floor[32], ceiling[32];                     ///< for two rows, see WordRounding
  alignas(64) int32_t correction[kBlockChannels];                 ///< where accumulators of all taps start
  int64_t sample;

  void set(int64_t of, const SampleConstants& c, const BlockHeader& header) {
    sample = of;
    _mm512_store_ps(scale, _mm512_mul_ps(_mm512_set1_ps(c.multiplier), _mm512_loadu_ps(header.scale)));
    _mm512_store_ps(bias, _mm512_mul_ps(_mm512_set1_ps(c.inverse_scale), _mm512_loadu_ps(header.bias)));
    const auto bounds = [&](float bound) {
      const __m512i codes = bound_codes(_mm512_mul_ps(_mm512_set1_ps(bound), _mm512_loadu_ps(header.inverse_profile)), c.zero_point);
      return _mm512_packs_epi32(codes, codes);
    };
    _mm512_store_si512(floor, bounds(c.activation_lo));
    _mm512_store_si512(ceiling, bounds(c.activation_hi));
    _mm512_store_si512(correction, _mm512_mullo_epi32(_mm512_loadu_si512(header.weight_sum), _mm512_set1_epi32(-c.x_zero_point)));
  }
};

/// Moments of a run of tiles within one sample.
struct Moments {
  CodeSums sums;
  ClipCount clipped[2];  ///< two chains, of pairs of rows
  int64_t values = 0;    ///< values written
  bool words = false;    ///< clipped ones are counted as those of Clamp::positive
};
/// Values after which moments are flushed, between tiles. A tile of one row uses a quarter of the lanes of the sums, one of a
/// few channels less still, and a lane holds 66,000 times 255 * 127 in any case.
constexpr int64_t kFlushAfter = 50000;

struct TileOutput {
  const uint8_t* block;     ///< headers of the panel
  const BlockConstants* constants;  ///< of the panel's blocks, when all rows lie in one sample
  int64_t channels;         ///< of the panel that exist
  const int64_t* row;       ///< output rows
  int64_t stride;           ///< bytes of an output row
  uint8_t* y;               ///< of the panel's first channel
  const uint8_t* residual;  ///< likewise
  const SampleConstants* const* samples;  ///< of each row; of the first, when all rows lie in one sample
  Moments* moments;                       ///< all rows in one sample
  int64_t* const* counters;               ///< of each row, otherwise
  Activation activation = Activation::clamp;  ///< of curved ones, for which samples and counters are always of each row
  bool held = false;                          ///< and what comes in are its values instead of sums
};

/// float(q - zero point), exactly: bits 0x4b000000 + q are the float 2^23 + q. A conversion would compete with the products of tiles.
inline __m512 centred_codes(__m128i q, int32_t zero_point) {
  const __m512i shifted = _mm512_or_si512(_mm512_cvtepu8_epi32(q), _mm512_set1_epi32(0x4b000000));
  return _mm512_sub_ps(_mm512_castsi512_ps(shifted), _mm512_set1_ps(static_cast<float>(0x800000 + zero_point)));
}

/// Dwords of two packed blocks in the order of rows 0 and 1 (add 2 for rows 2 and 3); of one block in the order of rows.
alignas(64) constexpr int32_t kRowPairOrder[16] = {0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29};
alignas(64) constexpr int32_t kRowOrder[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};

/// Requantizes rows of a tile four at a time. The codes of four rows and 16 channels are packed into one vector: each
/// 128 bits hold 4 channels of row 0, of row 1, and so on. kReady: what comes in are floats over the output's scale.
template <bool kOneSample, bool kResidual, Clamp kClamp, int kBlocks, bool kReady = false>
struct Requantizer {
  static_assert(kOneSample || kClamp == Clamp::any, "rows of several samples have bounds of their own");
  const TileOutput& out;      ///< not a copy, whose loads would wait for the stores of its parts
  const int64_t* row;         ///< the following are out's, from the next row on
  const SampleConstants* const* samples;
  int64_t* const* counters;
  const SampleConstants one;  ///< of the first row
  bool full;                  ///< all channels of the last block exist
  __mmask16 last_lanes;       ///< those that do
  uint64_t last_bytes;        ///< the same, of a packed vector
  uint32_t last_words;        ///< the same, of two rows
  CodeSums sums;
  ClipCount clipped[2];  ///< of rows 0 and 1, 2 and 3

  __attribute__((always_inline)) Requantizer(const TileOutput& output, int64_t block_bytes)
      : out(output), row(output.row), samples(output.samples), counters(output.counters), one(*output.samples[0]), header_bytes(block_bytes) {
    const int64_t last_channels = out.channels - (kBlocks - 1) * kBlockChannels;
    full = last_channels >= kBlockChannels;
    last_lanes = first_lanes16(last_channels);
    last_bytes = ~uint64_t{0};
    last_words = ~uint32_t{0};
    if (last_channels < kBlockChannels) last_bytes = last_words = 0;
#pragma GCC unroll 4
    for (int lane = 0; lane < 4 && last_channels < kBlockChannels; ++lane) {
      const uint32_t exist = last_lanes >> (4 * lane) & 15;
      last_bytes |= static_cast<uint64_t>(exist * 0x1111) << (16 * lane);
      last_words |= exist * 0x11 << (8 * lane);
    }
    if (kOneSample) {
      sums = out.moments->sums;
      for (int pair = 0; pair < 2; ++pair) clipped[pair] = out.moments->clipped[pair];
    }
  }

  /// Up to 4 rows from the first on, of the tile's rows that begin where skip() got to.
  template <int first, int kRows>
  __attribute__((always_inline)) void rows(const __m512i (&acc)[kRows][kBlocks]) {
    constexpr int count = kRows - first < 4 ? kRows - first : 4;
    constexpr uint64_t existing = count == 4 ? ~uint64_t{0} : 0x0001000100010001u * ((1u << (4 * count)) - 1);
    WordRounding rounding[2];  // of rows 0 and 1, 2 and 3
    if (!kOneSample) {
#pragma GCC unroll 2
      for (int pair = 0; 2 * pair < count; ++pair)
        rounding[pair] = rounding_of(*samples[first + 2 * pair], *samples[first + (2 * pair + 1 < count ? 2 * pair + 1 : 2 * pair)]);
    }
    __m512i q[kBlocks];
#pragma GCC unroll 4
    for (int j = 0; j < kBlocks; ++j) {
      const bool is_last = j == kBlocks - 1;
      __m512i code[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) code[i] = i < count ? _mm512_cvtps_epi32(value(acc[i < count ? first + i : first][j], first + i, j)) : _mm512_setzero_si512();
      __m512i words[2];
#pragma GCC unroll 2
      for (int pair = 0; pair < 2; ++pair) {
        if (2 * pair >= count) {
          words[pair] = _mm512_setzero_si512();
          continue;
        }
        if (kOneSample) {
          rounding[pair] = {_mm512_set1_epi16(static_cast<int16_t>(one.zero_point)), _mm512_load_si512(out.constants[j].floor),
                            _mm512_load_si512(out.constants[j].ceiling)};
        }
        words[pair] = rounding[pair].template words<kClamp>(code[2 * pair], code[2 * pair + 1]);
        const uint32_t rows = 2 * pair + 1 < count ? ~0u : 0x0f0f0f0fu;
        clipped[pair].template add<kClamp>(words[pair], _cvtu32_mask32(is_last ? last_words & rows : rows));
      }
      q[j] = _mm512_maskz_packus_epi16(_cvtu64_mask64(is_last ? last_bytes & existing : existing), words[0], words[1]);
      sums.add(q[j]);
    }
    store<first, count>(q);
    if (!kOneSample) count_rows<first, count>();
  }

  void skip(int rows) {
    row += rows;
    if (kOneSample) return;
    samples += rows;
    counters += rows;
  }

  /// After `rows` rows.
  __attribute__((always_inline)) void finish(int rows) {
    if (!kOneSample) return;
    out.moments->sums = sums;
    for (int pair = 0; pair < 2; ++pair) out.moments->clipped[pair] = clipped[pair];
    out.moments->values += rows * out.channels;
    out.moments->words = kClamp == Clamp::positive;
  }

 private:
  const int64_t header_bytes;

  /// Of two rows.
  static WordRounding rounding_of(const SampleConstants& upper, const SampleConstants& lower) {
    const auto both = [](__m512i of_upper, __m512i of_lower) { return _mm512_packs_epi32(of_upper, of_lower); };
    const auto bounds = [&](float of_upper, float of_lower) {
      return both(bound_codes(_mm512_set1_ps(of_upper), upper.zero_point), bound_codes(_mm512_set1_ps(of_lower), lower.zero_point));
    };
    return {both(_mm512_set1_epi32(upper.zero_point), _mm512_set1_epi32(lower.zero_point)), bounds(upper.activation_lo, lower.activation_lo),
            bounds(upper.activation_hi, lower.activation_hi)};
  }

  /// The values of a row and block, over the output's scale.
  __attribute__((always_inline)) __m512 value(__m512i acc, int i, int j) const {
    if (kReady) return _mm512_castsi512_ps(acc);
    const SampleConstants& c = kOneSample ? one : *samples[i];
    __m512 t = _mm512_cvtepi32_ps(acc);
    if (kOneSample) {
      t = _mm512_fmadd_ps(t, _mm512_load_ps(out.constants[j].scale), _mm512_load_ps(out.constants[j].bias));
    } else {
      const auto* header = reinterpret_cast<const BlockHeader*>(out.block + j * header_bytes);
      t = _mm512_fmadd_ps(t, _mm512_mul_ps(_mm512_set1_ps(c.multiplier), _mm512_loadu_ps(header->scale)),
                          _mm512_mul_ps(_mm512_set1_ps(c.inverse_scale), _mm512_loadu_ps(header->bias)));
    }
    if (kResidual && out.residual) {
      const uint8_t* at = out.residual + row[i] * out.stride + j * kBlockChannels;
      const __m128i bytes = j == kBlocks - 1 ? _mm_maskz_loadu_epi8(last_lanes, at) : _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
      t = _mm512_fmadd_ps(centred_codes(bytes, c.residual_zero_point), _mm512_set1_ps(c.residual_multiplier), t);
    }
    return t;
  }

  template <int first, int count>
  __attribute__((always_inline)) void store(const __m512i (&q)[kBlocks]) {
    uint8_t* y[count];
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) y[i] = out.y + row[first + i] * out.stride;
#pragma GCC unroll 2
    for (int j = 0; j + 1 < kBlocks; j += 2) {
      const __mmask32 lanes = j + 2 == kBlocks ? 0xffff | (static_cast<uint32_t>(last_lanes) << 16) : 0xffffffff;
#pragma GCC unroll 2
      for (int i = 0; i < count; i += 2) {
        const __m512i order = _mm512_add_epi32(_mm512_load_si512(kRowPairOrder), _mm512_set1_epi32(i));
        const __m512i two = _mm512_permutex2var_epi32(q[j], order, q[j + 1]);
        if (full) {  // without a mask the upper half goes to memory as it is
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(y[i] + j * kBlockChannels), _mm512_castsi512_si256(two));
          if (i + 1 < count) _mm256_storeu_si256(reinterpret_cast<__m256i*>(y[i + 1] + j * kBlockChannels), _mm512_extracti64x4_epi64(two, 1));
          continue;
        }
        _mm256_mask_storeu_epi8(y[i] + j * kBlockChannels, lanes, _mm512_castsi512_si256(two));
        if (i + 1 < count) _mm256_mask_storeu_epi8(y[i + 1] + j * kBlockChannels, lanes, _mm512_extracti64x4_epi64(two, 1));
      }
    }
    if (kBlocks % 2 == 1) {
      constexpr int64_t j = kBlocks - 1;
      const __m512i four = _mm512_permutexvar_epi32(_mm512_load_si512(kRowOrder), q[j]);
      _mm_mask_storeu_epi8(y[0] + j * kBlockChannels, last_lanes, _mm512_castsi512_si128(four));
      if (count > 1) _mm_mask_storeu_epi8(y[count > 1 ? 1 : 0] + j * kBlockChannels, last_lanes, _mm512_extracti32x4_epi32(four, 1));
      if (count > 2) _mm_mask_storeu_epi8(y[count > 2 ? 2 : 0] + j * kBlockChannels, last_lanes, _mm512_extracti32x4_epi32(four, 2));
      if (count > 3) _mm_mask_storeu_epi8(y[count > 3 ? 3 : 0] + j * kBlockChannels, last_lanes, _mm512_extracti32x4_epi32(four, 3));
    }
  }

  /// Dword i of each 128 bits of the sums belongs to row first + i, two dwords of a pair's clip counts to each of its rows.
  template <int first, int count>
  __attribute__((always_inline)) void count_rows() {
    alignas(16) int32_t sum[4], product[4], clips[2][4];
    add_lanes(sums.sum, sum);
    add_lanes(sums.product, product);
    for (int pair = 0; pair < 2; ++pair) {
      add_lanes(clipped[pair].lanes, clips[pair]);
      clipped[pair] = ClipCount();
    }
    sums = CodeSums();
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      int64_t* counter = counters[first + i];
      counter[kStatsSum] += sum[i];
      counter[kStatsSquares] += product[i] + 128 * int64_t{sum[i]};
      counter[kStatsClipped] += clips[i / 2][i % 2 * 2] + clips[i / 2][i % 2 * 2 + 1];
    }
  }

  static void add_lanes(__m512i v, int32_t (&to)[4]) {
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  }
};

/// Codes of rows from their sums in memory, a few rows at a time.
template <bool kOneSample, bool kResidual, Clamp kClamp, int kBlocks>
struct RowsFromMemory {
  Requantizer<kOneSample, kResidual, kClamp, kBlocks> to;
  const int32_t* sums;

  template <int kRows>
  __attribute__((always_inline)) void next() {
    __m512i acc[kRows][kBlocks];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kBlocks; ++j) acc[i][j] = _mm512_loadu_si512(sums + (i * kBlocks + j) * kBlockChannels);
    to.template rows<0>(acc);
    to.skip(kRows);
    sums += kRows * kBlocks * kBlockChannels;
  }
};

template <bool kOneSample, bool kResidual, Clamp kClamp, int kBlocks>
__attribute__((noinline)) void requantize_rows(const TileOutput& out, int64_t block_bytes, const int32_t* sums, int rows) {
  RowsFromMemory<kOneSample, kResidual, kClamp, kBlocks> from{{out, block_bytes}, sums};
  int left = rows;
  for (; left >= 4; left -= 4) from.template next<4>();
  if (left == 3) from.template next<3>();
  else if (left == 2) from.template next<2>();
  else if (left == 1) from.template next<1>();
  from.to.finish(rows);
}

using RowsEpilogue = void (*)(const TileOutput&, int64_t, const int32_t*, int);

// ---------------------------------------------------------------------------------------------------------------------
// Epilogue from memory

/// q - zero point of a residual.
inline __m512 residual_values(const uint8_t* residual, const SampleEpilogue& e, __mmask16 lanes) {
  return centred_codes(_mm_maskz_loadu_epi8(lanes, residual), e.residual_zero_point);
}

/// layer_value() of 16 channels.
inline __m512 layer_values(__m512i acc, const BlockHeader& header, const SampleEpilogue& e, const LayerProblem& p, const uint8_t* residual,
                           __mmask16 lanes) {
  const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(e.x_scale), _mm512_loadu_ps(header.scale));
  __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), scale, _mm512_loadu_ps(header.bias));
  if (residual) y = _mm512_fmadd_ps(residual_values(residual, e, lanes), _mm512_set1_ps(e.residual_scale), y);
  y = _mm512_mul_ps(y, _mm512_loadu_ps(header.profile));
  if (p.activation != Activation::clamp) return activate_ps(p.activation, y);
  return clamp_ps(y, _mm512_set1_ps(p.activation_min), _mm512_set1_ps(p.activation_max));
}

/// What a curved activation makes of 16 channels, and that in units of the output.
inline __m512 curved_values(__m512i acc, const BlockHeader& header, float x_scale, Activation activation) {
  const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(x_scale), _mm512_loadu_ps(header.scale));
  const __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), scale, _mm512_loadu_ps(header.bias));
  return activate_ps(activation, _mm512_mul_ps(y, _mm512_loadu_ps(header.profile)));
}
inline __m512 curved_outputs(__m512 values, const BlockHeader& header, float inverse_scale) {
  return _mm512_mul_ps(values, _mm512_mul_ps(_mm512_set1_ps(inverse_scale), _mm512_loadu_ps(header.inverse_profile)));
}

/// output_value() of 16 channels.
inline __m512 output_values(__m512i acc, const BlockHeader& header, const SampleEpilogue& e, const LayerProblem& p, const uint8_t* residual,
                            __mmask16 lanes) {
  if (p.activation != Activation::clamp) return curved_outputs(curved_values(acc, header, e.x_scale, p.activation), header, e.inverse_scale);
  const __m512 value = _mm512_cvtepi32_ps(acc), scale = _mm512_loadu_ps(header.scale), bias = _mm512_loadu_ps(header.bias);
  const __m512 inverse_scale = _mm512_set1_ps(e.inverse_scale), inverse_profile = _mm512_loadu_ps(header.inverse_profile);
  __m512 t = _mm512_fmadd_ps(value, _mm512_mul_ps(_mm512_set1_ps(e.multiplier), scale), _mm512_mul_ps(inverse_scale, bias));
  if (residual) t = _mm512_fmadd_ps(residual_values(residual, e, lanes), _mm512_set1_ps(e.residual_multiplier), t);
  __m512 lo = _mm512_set1_ps(e.activation_lo), hi = _mm512_set1_ps(e.activation_hi);
  if (p.profiled_bounds()) {
    lo = _mm512_mul_ps(lo, inverse_profile);
    hi = _mm512_mul_ps(hi, inverse_profile);
  }
  return clamp_ps(t, lo, hi);
}

/// Rows of the output, and the samples that they belong to.
struct OutputRows {
  int count;
  bool one_sample;
  const int64_t *row, *sample;
};

/// Extremes of values, lane by lane. A NaN is passed over.
struct RangeLanes {
  __m512 lo = _mm512_set1_ps(__builtin_inff()), hi = _mm512_set1_ps(-__builtin_inff());

  void widen(__m512 y, __mmask16 lanes) {
    lo = _mm512_mask_min_ps(lo, lanes, y, lo);
    hi = _mm512_mask_max_ps(hi, lanes, y, hi);
  }
  void join(const RangeLanes& other) {
    lo = _mm512_min_ps(lo, other.lo);
    hi = _mm512_max_ps(hi, other.hi);
  }
};

/// Codes of up to 4 rows, of samples of their own, from floats over the output's scale, [blocks * 16] each.
template <int kBlocks, int kRows>
__attribute__((noinline)) void requantize_ready(const TileOutput& out, int64_t block_bytes, const float* values) {
  __m512i v[kRows][kBlocks];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kBlocks; ++j) v[i][j] = _mm512_castps_si512(_mm512_load_ps(values + (i * kBlocks + j) * kBlockChannels));
  Requantizer<false, false, Clamp::any, kBlocks, true>(out, block_bytes).template rows<0>(v);
}
/// Codes of rows with a curved activation: its values first, then these as any others. Sums are [blocks * 16] per row.
template <int kBlocks>
__attribute__((noinline)) void curve_rows(const TileOutput& out, int64_t block_bytes, const int32_t* sums, int rows) {
  alignas(64) float values[4 * kBlocks * kBlockChannels];
  TileOutput four = out;
  for (int left = rows; left > 0; left -= 4, four.row += 4, four.samples += 4, four.counters += 4) {
    const int count = left < 4 ? left : 4;
    float* to = values;
    for (int i = 0; i < count; ++i) {
      const SampleConstants& c = *four.samples[i];
      const uint8_t* block = out.block;
      for (int j = 0; j < kBlocks; ++j, sums += kBlockChannels, to += kBlockChannels, block += block_bytes) {
        const auto& header = *reinterpret_cast<const BlockHeader*>(block);
        const __m512i sum = _mm512_loadu_si512(sums);
        const __m512 value = out.held ? _mm512_castsi512_ps(sum) : curved_values(sum, header, c.x_scale, out.activation);
        _mm512_store_ps(to, curved_outputs(value, header, c.inverse_scale));
      }
    }
    if (count == 4) requantize_ready<kBlocks, 4>(four, block_bytes, values);
    else if (count == 3) requantize_ready<kBlocks, 3>(four, block_bytes, values);
    else if (count == 2) requantize_ready<kBlocks, 2>(four, block_bytes, values);
    else requantize_ready<kBlocks, 1>(four, block_bytes, values);
  }
}
/// [blocks - 1]
constexpr void (*kCurvedEpilogues[kPanelBlocks])(const TileOutput&, int64_t, const int32_t*, int) = {curve_rows<1>, curve_rows<2>, curve_rows<3>, curve_rows<4>};

/// Finishes what the register tiles leave, and gathers statistics.
class DenseEpilogue {
 public:
  /// `held` are the range's, if sums are held.
  DenseEpilogue(const LayerProblem& problem, Output kind, int32_t* held) : p(problem), output(kind), channels(problem.shape.out_channels), held(held) {
    if (output == Output::floats) return;
    const int64_t count = p.layout.trailer_offset() / p.layout.block_bytes;
    block_constants.reset(new BlockConstants[static_cast<size_t>(count)]);
    for (int64_t i = 0; i < count; ++i) block_constants[static_cast<size_t>(i)].sample = -1;
  }

  void start_weights(const uint8_t*, int64_t, int64_t, bool) {}

  /// Rows [begin, end) follow, of at most kChunkSamples samples.
  void start_chunk(int64_t begin, int64_t end) {
    if (output == Output::floats) return;
    chunk_sample = begin / p.rows_per_sample;
    chunk_samples = (end - 1) / p.rows_per_sample + 1 - chunk_sample;
    const auto& trailer = *reinterpret_cast<const PackedTrailer*>(p.packed_weight + p.layout.trailer_offset());
    for (int64_t i = 0; i < chunk_samples; ++i) {
      constants[i].set(p.samples[chunk_sample + i], p, trailer);
      for (int64_t& counter : counters[i]) counter = 0;
      ranges[i] = RangeLanes();
    }
  }

  void start_tile(const Tile& tile) {
    at_once = output == Output::codes;
    for (int i = 0; at_once && i < (tile.one_sample ? 1 : tile.rows); ++i) {
      const int64_t at = tile.sample[i] - chunk_sample;
      samples[i] = &constants[at];
      row_counters[i] = counters[at];
      at_once = samples[i]->plain && (tile.one_sample || !p.profiled_bounds());
    }
    curved = output == Output::codes && p.activation != Activation::clamp;
    for (int i = 0; curved && i < tile.rows; ++i) {
      const int64_t at = tile.sample[i] - chunk_sample;
      samples[i] = &constants[at];
      row_counters[i] = counters[at];
      curved = samples[i]->fits;
    }
    if (output != Output::floats && tile.one_sample && (tile.sample[0] != current_sample || current.values >= kFlushAfter)) start_sample(tile.sample[0]);
  }

  /// Constants of a panel and the current sample.
  const BlockConstants* panel_constants(const Panel& panel) {
    BlockConstants* at = block_constants.get() + panel.index;
    if (at->sample != current_sample)
      for (int j = 0; j < panel.blocks; ++j)
        at[j].set(current_sample, constants[current_sample - chunk_sample], *reinterpret_cast<const BlockHeader*>(panel.block + j * p.layout.block_bytes));
    return at;
  }

  /// Finishes rows from accumulators in memory, [row_step] per row.
  void finish(const int64_t* row, const int64_t* sample, int rows, const int32_t* acc, int64_t row_step, const Panel& panel) {
    if (curved) {
      const TileOutput out{panel.block, nullptr, panel.channels, row, channels, p.y + panel.channel, nullptr, samples, nullptr, row_counters, p.activation, held != nullptr};
      return kCurvedEpilogues[panel.blocks - 1](out, p.layout.block_bytes, acc, rows);
    }
    for (int i = 0; i < rows; ++i) {
      const SampleEpilogue& e = p.samples[sample[i]];
      if (output == Output::codes && (sample[i] != current_sample || current.values >= kFlushAfter)) start_sample(sample[i]);
      const Rounding rounding(e.y_zero_point);
      for (int64_t j = 0; j < panel.blocks; ++j) {
        const int64_t at = row[i] * channels + panel.channel + j * kBlockChannels;
        const auto& header = *reinterpret_cast<const BlockHeader*>(panel.block + j * p.layout.block_bytes);
        const __mmask16 lanes = first_lanes16(panel.channels - j * kBlockChannels);
        const __m512i a = _mm512_maskz_loadu_epi32(lanes, acc + i * row_step + j * kBlockChannels);
        const uint8_t* residual = p.residual ? p.residual + at : nullptr;
        if (output == Output::codes) {
          finish_codes(a, header, e, rounding, residual, lanes, at);
        } else if (output == Output::floats) {
          _mm512_mask_storeu_ps(p.y_float + at, lanes, layer_values(a, header, e, p, residual, lanes));
        }
      }
    }
  }

  /// Widens the samples' ranges by [blocks * 16] sums per row. Of sums that are held, a curved activation, which costs more than
  /// anything else here, leaves its values in their place.
  void widen_ranges(const OutputRows& rows, const Panel& panel, int32_t* sums) {
    bool plain = !p.profiled_bounds();
    for (int i = 0; plain && i < (rows.one_sample ? 1 : rows.count); ++i) plain = constants[rows.sample[i] - chunk_sample].plain;
    if (rows.one_sample && p.activation == Activation::clamp && !p.residual) widen_by_extremes(rows, panel, sums);
    else if (rows.one_sample && p.residual && plain) widen_by_residual(rows, panel, sums);
    else if (p.residual || !plain) widen_by_values(rows, panel, sums);
    else widen_by_samples(rows, panel, sums);
  }

  void end_panel() {
    if (p.channel_stats) flush_channels();
  }

  void end_chunk() {
    for (int64_t i = 0; output == Output::range && i < chunk_samples; ++i) {
      const SampleEpilogue& e = p.samples[chunk_sample + i];
      RangeLanes& range = ranges[i];
      if (p.activation == Activation::clamp && !p.profiled_bounds()) {
        const __m512 least = _mm512_set1_ps(e.activation_lo), largest = _mm512_set1_ps(e.activation_hi);
        range.lo = clamp_ps(range.lo, least, largest);
        range.hi = clamp_ps(range.hi, least, largest);
      }
      atomic_widen(p.range + 2 * (chunk_sample + i), _mm512_reduce_min_ps(range.lo), _mm512_reduce_max_ps(range.hi));
    }
    if (output != Output::codes) return;
    flush_run();
    flush_channels();
    current_sample = -1;
    for (int64_t i = 0; i < chunk_samples; ++i)
      for (int64_t column = 0; column < kStatsSample; ++column)
        if (counters[i][column]) add(stats_row(chunk_sample + i) + column, counters[i][column]);
  }

 protected:
  static void add(int64_t* counter, int64_t value) { __atomic_fetch_add(counter, value, __ATOMIC_RELAXED); }
  int64_t* stats_row(int64_t sample) const { return p.stats + sample * (kStatsSample + (p.channel_stats ? 2 * channels : 0)); }

  void finish_codes(__m512i acc, const BlockHeader& header, const SampleEpilogue& e, const Rounding& rounding, const uint8_t* residual, __mmask16 lanes,
                    int64_t at) {
    current.values += __builtin_popcount(lanes);
    if (!e.valid) {
      _mm_mask_storeu_epi8(p.y + at, lanes, _mm_setzero_si128());
      return;
    }
    const bool curved_already = held && p.activation != Activation::clamp;
    const __m512 t = curved_already ? curved_outputs(_mm512_castsi512_ps(acc), header, e.inverse_scale) : output_values(acc, header, e, p, residual, lanes);
    const __m128i q = _mm_maskz_mov_epi8(lanes, _mm512_cvtepi32_epi8(rounding.codes(t)));
    _mm_mask_storeu_epi8(p.y + at, lanes, q);
    current.sums.add(_mm512_zextsi128_si512(q));
    current.clipped[0].add(static_cast<__mmask16>(lanes & rounding.clipped(t)));
  }

  void start_sample(int64_t sample) {
    flush_run();
    current_sample = sample;
  }

  void flush_run() {
    if (current.values == 0) return;
    const int64_t at = current_sample - chunk_sample;
    int64_t* counter = counters[at];
    current.sums.flush(counter[kStatsSum], counter[kStatsSquares]);
    for (ClipCount& clipped : current.clipped) {
      if (current.words) clipped.widen();
      const int64_t count = clipped.flush();
      if (!current.words || constants[at].clips) counter[kStatsClipped] += count;
    }
    current.values = 0;
    current.words = false;
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

  /// Rows of one sample, without a residual: a clamp over constants of the channel keeps the order of sums (or turns it around), so a
  /// channel's extremes come from its extreme sums. NaNs do not disturb that: they become the lower bound, as all else on their side does.
  void widen_by_extremes(const OutputRows& rows, const Panel& panel, const int32_t* sums) {
    const int64_t stride = panel.blocks * kBlockChannels;
    for (int64_t j = 0; j < panel.blocks; ++j) {
      const int32_t* at = sums + j * kBlockChannels;
      __m512i lo = _mm512_loadu_si512(at), hi = lo;
#pragma GCC unroll 4
      for (int i = 1; i < rows.count; ++i) {
        const __m512i v = _mm512_loadu_si512(at += stride);
        lo = _mm512_min_epi32(lo, v);
        hi = _mm512_max_epi32(hi, v);
      }
      widen_channels(rows.sample[0], panel, j, lo, hi);
    }
  }

  /// What is between extreme sums of the channels of a block.
  void widen_channels(int64_t sample, const Panel& panel, int64_t j, __m512i lo, __m512i hi) {
    const SampleEpilogue& e = p.samples[sample];
    const auto& header = *reinterpret_cast<const BlockHeader*>(panel.block + j * p.layout.block_bytes);
    const __mmask16 lanes = first_lanes16(panel.channels - j * kBlockChannels);
    RangeLanes& range = ranges[sample - chunk_sample];
    range.widen(output_values(lo, header, e, p, nullptr, lanes), lanes);
    range.widen(output_values(hi, header, e, p, nullptr, lanes), lanes);
  }

  /// Rows of one plain sample with a residual. The activation's bounds, the same for all channels, act in end_chunk().
  void widen_by_residual(const OutputRows& rows, const Panel& panel, const int32_t* sums) {
    const SampleEpilogue& e = p.samples[rows.sample[0]];
    const __m512 residual_multiplier = _mm512_set1_ps(e.residual_multiplier);
    const int64_t stride = panel.blocks * kBlockChannels;
    RangeLanes& range = ranges[rows.sample[0] - chunk_sample];
    for (int64_t j = 0; j < panel.blocks; ++j, sums += kBlockChannels) {
      const auto& header = *reinterpret_cast<const BlockHeader*>(panel.block + j * p.layout.block_bytes);
      const __mmask16 lanes = first_lanes16(panel.channels - j * kBlockChannels);
      const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(e.multiplier), _mm512_loadu_ps(header.scale)), bias = _mm512_loadu_ps(header.bias);
      const uint8_t* const residual = p.residual + panel.channel + j * kBlockChannels;
      const auto widen = [&](RangeLanes& seen, int i) __attribute__((always_inline)) {
        const __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums + i * stride)), scale, bias);
        seen.widen(_mm512_fmadd_ps(residual_values(residual + rows.row[i] * channels, e, lanes), residual_multiplier, y), lanes);
      };
      RangeLanes seen[4];  // minima and maxima take 4 clocks
      int i = 0;
      for (; i + 4 <= rows.count; i += 4)
#pragma GCC unroll 4
        for (int chain = 0; chain < 4; ++chain) widen(seen[chain], i + chain);
      for (; i < rows.count; ++i) widen(seen[0], i);
      for (const RangeLanes& chain : seen) range.join(chain);
    }
  }

  /// Rows of several plain samples, without a residual.
  void widen_by_samples(const OutputRows& rows, const Panel& panel, const int32_t* sums) {
    const __mmask16 last_lanes = first_lanes16(panel.channels - (panel.blocks - 1) * kBlockChannels);
    for (int i = 0; i < rows.count; ++i) {
      RangeLanes& range = ranges[rows.sample[i] - chunk_sample];
      RangeLanes seen = range;
      const __m512 multiplier = _mm512_set1_ps(p.samples[rows.sample[i]].multiplier);
      const uint8_t* block = panel.block;
      for (int64_t j = 0; j < panel.blocks; ++j, sums += kBlockChannels, block += p.layout.block_bytes) {
        const auto& header = *reinterpret_cast<const BlockHeader*>(block);
        const __m512 scale = _mm512_mul_ps(multiplier, _mm512_loadu_ps(header.scale));
        const __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums)), scale, _mm512_loadu_ps(header.bias));
        seen.widen(y, j + 1 == panel.blocks ? last_lanes : 0xffff);
      }
      range = seen;
    }
  }

  /// Any rows.
  void widen_by_values(const OutputRows& rows, const Panel& panel, int32_t* sums) {
    const bool curved = p.activation != Activation::clamp;
    for (int i = 0; i < rows.count; ++i) {
      const SampleEpilogue& e = p.samples[rows.sample[i]];
      RangeLanes& range = ranges[rows.sample[i] - chunk_sample];
      for (int64_t j = 0; j < panel.blocks; ++j, sums += kBlockChannels) {
        const auto& header = *reinterpret_cast<const BlockHeader*>(panel.block + j * p.layout.block_bytes);
        const __mmask16 lanes = first_lanes16(panel.channels - j * kBlockChannels);
        const __m512i acc = _mm512_loadu_si512(sums);
        const uint8_t* residual = p.residual ? p.residual + rows.row[i] * channels + panel.channel + j * kBlockChannels : nullptr;
        if (curved) {
          const __m512 values = curved_values(acc, header, e.x_scale, p.activation);
          if (held) _mm512_storeu_ps(sums, values);
          range.widen(curved_outputs(values, header, e.inverse_scale), lanes);
        } else {
          range.widen(output_values(acc, header, e, p, residual, lanes), lanes);
        }
      }
    }
  }

  const LayerProblem& p;
  const Output output;
  const int64_t channels;

  int32_t* held;  ///< the next tile's, if sums are held
  int64_t chunk_sample = 0, chunk_samples = 0;
  RangeLanes ranges[kChunkSamples + 1];
  SampleConstants constants[kChunkSamples + 1];
  std::unique_ptr<BlockConstants[]> block_constants;  ///< of the sample that each was last used for
  int64_t counters[kChunkSamples + 1][kStatsSample];

  int64_t current_sample = -1;  ///< whose moments are in `current`
  Moments current;
  bool at_once = false;                       ///< the tile's own epilogue serves
  bool curved = false;                        ///< curve_rows() does
  const SampleConstants* samples[kTileRows];  ///< of the tile's rows
  int64_t* row_counters[kTileRows];

  int64_t channel_sample = -1, channel_first = 0, channel_count = 0;
  __m512i channel_sums[kPanelBlocks] = {}, channel_squares[kPanelBlocks] = {};
};

}  // namespace
}  // namespace probquant
