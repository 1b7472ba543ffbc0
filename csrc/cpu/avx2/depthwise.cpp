// Depthwise convolution, AVX2.
//
// vpmaddubsw would saturate, so taps are widened: a group is one block of 16 channels, and for every input column the rows
// that one output row (or two, at stride 1) needs are interleaved in pairs of 16-bit words, 2 loads, 2 unpacks and 2 stores
// of 32 bytes per pair into a strip in L1. Half h (dwords) of a pair holds channels 0-3 and 8-11, or 4-7 and 12-15; packs
// undo it. vpmaddwd then takes two taps of a kernel column at once.
//
// Register tile: 2 rows x 2 columns or 1 row x 4 columns, times 2 halves: 8 accumulators, 4 strip vectors or 8, the
// weights from L1. L1: a strip is at most kStripPairs x 64 bytes = 8 KB; the weights 2 x steps x 64 bytes (768 for 3x3).
#include "../depthwise_geometry.h"
#include "epilogue.h"

#include <cstddef>

namespace probquant {
namespace {

constexpr int64_t kChannels = kBlockChannels, kVector = 32, kPairBytes = 2 * kVector;
constexpr int64_t kMaxSteps = 64;     // pairs of taps
constexpr int64_t kMaxPairs = 16;     // per kernel column
constexpr int64_t kStripPairs = 128;  // interleaved (column, pair)s held at once


/// Halves of 16 dwords in natural order: 0-3 and 8-11, 4-7 and 12-15; and back.
inline void exchange_middle(__m256i (&v)[2]) {
  const __m256i first = _mm256_permute2x128_si256(v[0], v[1], 0x20), second = _mm256_permute2x128_si256(v[0], v[1], 0x31);
  v[0] = first;
  v[1] = second;
}

/// Up to 16 channels and their weights, in halves.
struct Group {
  int64_t channel, channels;
  alignas(32) int32_t weight_sum[2][8];
  alignas(32) float scale[2][8];
  alignas(32) float bias[2][8];
  alignas(32) float profile[2][8];
  alignas(32) float inverse_profile[2][8];
  alignas(32) int16_t weights[2][kMaxSteps * kPairBytes / 2];  ///< of the first output row of a pair, and of the second

  /// `pairs` of taps per kernel column are wanted.
  Group(const LayerProblem& p, int64_t first, int64_t end, int64_t pairs)
      : channel(first), channels(end - first < kChannels ? end - first : kChannels) {
    const uint8_t* block = p.packed_weight + first / kBlockChannels * p.layout.block_bytes;
    const auto halves = [block](int64_t offset, void* out) {
      const auto* from = reinterpret_cast<const __m256i*>(block + offset);
      __m256i v[2] = {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
      exchange_middle(v);
      store(out, v[0]);
      store(static_cast<char*>(out) + kVector, v[1]);
    };
    halves(offsetof(BlockHeader, weight_sum), weight_sum);
    halves(offsetof(BlockHeader, scale), scale);
    halves(offsetof(BlockHeader, bias), bias);
    halves(offsetof(BlockHeader, profile), profile);
    halves(offsetof(BlockHeader, inverse_profile), inverse_profile);
    const __m256i split = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    for (int64_t kx = 0; kx < p.layout.kernel_width; ++kx) {
      int16_t *upper = weights[0] + kx * pairs * kPairBytes / 2, *lower = weights[1] + kx * pairs * kPairBytes / 2;
      for (int64_t half = 0; half < 2; ++half) {
        __m256i before = _mm256_setzero_si256();
        for (int64_t pair = 0; pair < pairs; ++pair) {
          const uint8_t* step = block + sizeof(BlockHeader) + (kx * p.layout.column_steps + pair / 2) * kStreamBytes + half * 16;
          const auto words = [split](const uint8_t* at) {  // 4 channels: their first pairs of taps, then their second
            return _mm256_permutevar8x32_epi32(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))), split);
          };
          const __m256i v = pair % 2 ? _mm256_permute2x128_si256(words(step), words(step + 32), 0x31)
                                     : _mm256_permute2x128_si256(words(step), words(step + 32), 0x20);
          store(upper + (pair * 2 + half) * kVector / 2, v);
          store(lower + (pair * 2 + half) * kVector / 2, _mm256_or_si256(_mm256_slli_epi32(v, 16), _mm256_srli_epi32(before, 16)));
          before = v;
        }
      }
    }
  }
};

/// A group's work on one sample: constants of its epilogue, and what it sums up.
struct Work {
  const LayerProblem& p;
  const Group& g;
  const bool profiled_bounds;
  const SampleEpilogue* s = nullptr;
  alignas(32) int32_t correction[2][8];  ///< -zero point * weight sum
  alignas(32) float multiplier[2][8];
  alignas(32) float bias[2][8];
  int64_t sum = 0, squares = 0, clipped = 0;
  float lo = kInfinity, hi = -kInfinity;

  Work(const LayerProblem& problem, const Group& group) : p(problem), g(group), profiled_bounds(problem.profiled_bounds()) {}

  /// Constants of one sample: multiplier * accumulator + bias, in real units, or in those of the output's scale.
  void start(int64_t sample, bool real) {
    s = p.samples + sample;
    const float scale_factor = real ? s->x_scale : s->multiplier, bias_factor = real ? 1.0f : s->inverse_scale;
    for (int i = 0; i < 2; ++i) {
      store(correction[i], _mm256_mullo_epi32(_mm256_set1_epi32(-s->x_zero_point), load(g.weight_sum[i])));
      _mm256_store_ps(multiplier[i], _mm256_mul_ps(_mm256_set1_ps(scale_factor), _mm256_load_ps(g.scale[i])));
      _mm256_store_ps(bias[i], _mm256_mul_ps(_mm256_set1_ps(bias_factor), _mm256_load_ps(g.bias[i])));
    }
  }

  /// multiplier * accumulator + bias + residual_factor * residual of 16 outputs.
  void values(const __m256i (&acc)[2], int64_t at, float residual_factor, __m256 (&out)[2]) const {
    for (int i = 0; i < 2; ++i) out[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[i]), _mm256_load_ps(multiplier[i]), _mm256_load_ps(bias[i]));
    if (!p.residual) return;
    const __m128i codes = load_bytes16(p.residual + at, g.channels);
    __m256i v[2] = {_mm256_cvtepu8_epi32(codes), _mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8))};
    exchange_middle(v);
    for (int i = 0; i < 2; ++i) {
      const __m256i centred = _mm256_sub_epi32(v[i], _mm256_set1_epi32(s->residual_zero_point));
      out[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(centred), _mm256_set1_ps(residual_factor), out[i]);
    }
  }
  /// output_value of 16 outputs.
  void output_values(const __m256i (&acc)[2], int64_t at, __m256 (&t)[2]) const {
    values(acc, at, s->residual_multiplier, t);
    for (int i = 0; i < 2; ++i) {
      const __m256 inverse_profile = _mm256_load_ps(g.inverse_profile[i]);
      if (p.activation != Activation::clamp) {
        t[i] = activate_ps(p.activation, _mm256_mul_ps(t[i], _mm256_load_ps(g.profile[i])));
        t[i] = _mm256_mul_ps(t[i], _mm256_mul_ps(_mm256_set1_ps(s->inverse_scale), inverse_profile));
        continue;
      }
      __m256 lower = _mm256_set1_ps(s->activation_lo), upper = _mm256_set1_ps(s->activation_hi);
      if (profiled_bounds) {
        lower = _mm256_mul_ps(lower, inverse_profile);
        upper = _mm256_mul_ps(upper, inverse_profile);
      }
      t[i] = clamp_ps(t[i], lower, upper);
    }
  }
  /// layer_value of 16 outputs.
  void layer_values(const __m256i (&acc)[2], int64_t at, __m256 (&y)[2]) const {
    values(acc, at, s->residual_scale, y);
    for (int i = 0; i < 2; ++i) {
      y[i] = _mm256_mul_ps(y[i], _mm256_load_ps(g.profile[i]));
      y[i] = p.activation == Activation::clamp ? clamp_ps(y[i], _mm256_set1_ps(p.activation_min), _mm256_set1_ps(p.activation_max))
                                               : activate_ps(p.activation, y[i]);
    }
  }
  /// Bits of the dwords of a half that are channels.
  int half_mask(int i) const {
    const int bytes = g.channels >= kChannels ? 0xffff : (1 << g.channels) - 1;
    return (bytes >> 4 * i & 0xf) | (bytes >> (8 + 4 * i) & 0xf) << 4;
  }

  void widen(float low, float high) {
    lo = low < lo ? low : lo;
    hi = high > hi ? high : hi;
  }

  void add_stats() {
    int64_t* stats = p.stats + (s - p.samples) * (kStatsSample + (p.channel_stats ? 2 * p.shape.out_channels : 0));
    add_to(stats + kStatsSum, sum);
    add_to(stats + kStatsSquares, squares);
    add_to(stats + kStatsClipped, clipped);
    sum = squares = clipped = 0;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Epilogues: 16 outputs at index `at`

struct Codes {
  const Work* w;
  Rounding rounding;
  WordRounding of_words;
  const bool plain;  ///< `of_words` does, on all 16 channels
  int masks[2];
  CodeSums sums;
  __m256i inside = _mm256_setzero_si256();  ///< words of plain codes that did not clip
  int64_t pending = 0, sum = 0, squares = 0, clipped = 0;
  explicit Codes(const Work& work)
      : w(&work),
        rounding(work.s->y_zero_point),
        of_words(*work.s),
        plain(WordRounding::covers(work.p, *work.s) && work.g.channels == kChannels),
        masks{work.half_mask(0), work.half_mask(1)} {}

  /// Words of 16 codes.
  __attribute__((always_inline)) __m256i words(const __m256i (&acc)[2], int64_t at) {
    __m256 t[2];
    if (plain) {
      w->values(acc, at, w->s->residual_multiplier, t);
      return of_words.words(_mm256_cvtps_epi32(t[0]), _mm256_cvtps_epi32(t[1]), inside);
    }
    w->output_values(acc, at, t);
    for (int i = 0; i < 2; ++i) clipped += count_bits(rounding.clipped(t[i]) & masks[i]);
    return _mm256_packs_epi32(rounding.codes(t[0]), rounding.codes(t[1]));
  }
  /// T neighbouring columns, two at a time.
  template <int T>
  __attribute__((always_inline)) void columns(const __m256i (&acc)[T][2], int64_t at, int64_t step) {
#pragma GCC unroll 2
    for (int t = 0; t < T; t += 2) {
      const bool two = t + 1 < T;
      const __m256i first = words(acc[t], at + t * step), second = two ? words(acc[two ? t + 1 : t], at + (t + 1) * step) : _mm256_setzero_si256();
      __m256i q = _mm256_permute4x64_epi64(_mm256_packus_epi16(first, second), 0xd8);
      if (!plain) q = _mm256_and_si256(q, _mm256_broadcastsi128_si256(_mm256_castsi256_si128(keep_bytes(_mm256_set1_epi8(-1), w->g.channels))));
      store_bytes16(w->p.y + at + t * step, _mm256_castsi256_si128(q), w->g.channels);
      if (two) store_bytes16(w->p.y + at + (t + 1) * step, _mm256_extracti128_si256(q, 1), w->g.channels);
      sums.add(q);
    }
  }
  /// After at most 2 * kStripPairs vectors.
  void end_strip(int64_t vectors) {
    pending += vectors;
    if (pending > CodeSums::kFlushAfter - 2 * kStripPairs) flush();
  }
  void flush() {
    sums.flush(sum, squares);
    if (plain) clipped += pending * kChannels - sum_epi16(inside);
    inside = _mm256_setzero_si256();
    pending = 0;
  }
  void finish(Work& work) {
    flush();
    work.sum += sum;
    work.squares += squares;
    work.clipped += clipped;
  }
};

inline void store_dwords(void* y, int64_t at, int64_t channels, __m256i (&v)[2]) {
  exchange_middle(v);
  for (int64_t i = 0; i < 2; ++i) store_bytes32(static_cast<int32_t*>(y) + at + 8 * i, v[i], 4 * (channels - 8 * i));
}

struct Floats {
  Work& w;
  explicit Floats(Work& work) : w(work) {}

  template <int T>
  void columns(const __m256i (&acc)[T][2], int64_t at, int64_t step) {
    for (int t = 0; t < T; ++t) column(acc[t], at + t * step);
  }
  void column(const __m256i (&acc)[2], int64_t at) {
    __m256 y[2];
    w.layer_values(acc, at, y);
    __m256i bits[2] = {_mm256_castps_si256(y[0]), _mm256_castps_si256(y[1])};
    store_dwords(w.p.y_float, at, w.g.channels, bits);
  }
  void end_strip(int64_t) {}
  void finish(Work&) {}
};

/// The range of output_value in full.
struct AnyRange {
  Work& w;
  __m256 lo = _mm256_set1_ps(kInfinity), hi = _mm256_set1_ps(-kInfinity);
  __m256 exists[2];  ///< the lanes that are channels
  explicit AnyRange(Work& work) : w(work), exists{lanes_of(work.half_mask(0)), lanes_of(work.half_mask(1))} {}

  template <int T>
  void columns(const __m256i (&acc)[T][2], int64_t at, int64_t step) {
    for (int t = 0; t < T; ++t) column(acc[t], at + t * step);
  }
  void column(const __m256i (&acc)[2], int64_t at) {
    __m256 y[2];
    w.output_values(acc, at, y);
    for (int i = 0; i < 2; ++i) {
      lo = _mm256_min_ps(_mm256_blendv_ps(lo, y[i], exists[i]), lo);
      hi = _mm256_max_ps(_mm256_blendv_ps(hi, y[i], exists[i]), hi);
    }
  }
  void end_strip(int64_t) {}
  void finish(Work& work) {
    float low, high;
    reduce_range(lo, hi, &low, &high);
    work.widen(low, high);
  }
};

/// The same of a clamp without a residual, from each channel's extreme sums (as in dense.cpp).
struct FastRange {
  __m256i lo[2], hi[2];
  explicit FastRange(Work&) {
    for (int i = 0; i < 2; ++i) lo[i] = _mm256_set1_epi32(INT32_MAX), hi[i] = _mm256_set1_epi32(INT32_MIN);
  }

  template <int T>
  __attribute__((always_inline)) void columns(const __m256i (&acc)[T][2], int64_t, int64_t) {
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        lo[i] = _mm256_min_epi32(lo[i], acc[t][i]);
        hi[i] = _mm256_max_epi32(hi[i], acc[t][i]);
      }
  }
  void end_strip(int64_t) {}
  void finish(Work& work) {
    AnyRange ends(work);
    ends.column(lo, 0);
    ends.column(hi, 0);
    ends.finish(work);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Strips

/// An input row: column x starts at at + x * step; a padding row has step 0.
struct RowSource {
  const uint8_t* at;
  int64_t step;
};

/// Interleaves input columns [x, x + columns) of 2 rows into every `pairs`-th pair of the strip.
void interleave(const RowSource* rows, int64_t x, int64_t columns, int64_t width, int64_t channels, int32_t zero_point, int64_t pairs,
                uint8_t* strip) {
  const int64_t step = pairs * kPairBytes;
  for (int64_t i = 0; i < columns; ++i, strip += step) {
    if (x + i < 0 || x + i >= width) {
      const __m256i padding = _mm256_set1_epi16(static_cast<int16_t>(zero_point));
      store(strip, padding);
      store(strip + kVector, padding);
      continue;
    }
    const __m256i a = _mm256_cvtepu8_epi16(load_bytes16(rows[0].at + (x + i) * rows[0].step, channels));
    const __m256i b = _mm256_cvtepu8_epi16(load_bytes16(rows[1].at + (x + i) * rows[1].step, channels));
    store(strip, _mm256_unpacklo_epi16(a, b));
    store(strip + kVector, _mm256_unpackhi_epi16(a, b));
  }
}

/// R rows x T columns of outputs. `column` is the strip at the first kernel column of the first output column.
template <int R, int T>
__attribute__((always_inline)) inline void accumulate(const Work& w, const uint8_t* column, int64_t pairs, int64_t tap_step, int64_t column_step,
                                                      __m256i (&acc)[R][T][2]) {
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) acc[r][t][0] = load(w.correction[0]), acc[r][t][1] = load(w.correction[1]);
  const int16_t* weights = w.g.weights[0];
  for (int64_t kx = 0; kx < w.p.layout.kernel_width; ++kx, column += tap_step) {
    const uint8_t* x = column;
    for (int64_t pair = 0; pair < pairs; ++pair, x += kPairBytes, weights += kPairBytes / 2) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h)
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const __m256i v = load(x + t * column_step + h * kVector);
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r)
            acc[r][t][h] = _mm256_add_epi32(acc[r][t][h], _mm256_madd_epi16(v, load(weights + r * kMaxSteps * kPairBytes / 2 + h * kVector / 2)));
        }
    }
  }
}

template <int kSize>
struct Size {
  static constexpr int value = kSize;
};

/// Outputs of R image rows from y, columns [x_begin, x_end) of a rectangle's sample.
template <int R, class Epilogue>
void run_strip(Work& w, const Rectangle& rectangle, int64_t y, int64_t pairs, const uint8_t* padding_row, Epilogue& epilogue) {
  const LayerProblem& p = w.p;
  const Conv2dShape& s = p.shape;
  const Group& g = w.g;
  const int64_t channels = s.in_channels;
  RowSource sources[2 * kMaxPairs];
  for (int64_t i = 0; i < 2 * pairs; ++i) {
    const int64_t iy = y * s.stride_height - s.padding_top + i * s.dilation_height;
    const bool padding = i >= s.kernel_height + R - 1 || iy < 0 || iy >= s.in_height;
    sources[i] = padding ? RowSource{padding_row, 0}
                         : RowSource{p.x + (rectangle.sample * s.in_height + iy) * s.in_width * channels + g.channel, channels};
  }
  alignas(32) uint8_t strip[kStripPairs * kPairBytes];
  const int64_t span = (s.kernel_width - 1) * s.dilation_width + 1, column_step = s.stride_width * pairs * kPairBytes;
  const int64_t tap_step = s.dilation_width * pairs * kPairBytes;
  const int64_t fit = (kStripPairs / pairs - span) / s.stride_width + 1, width = rectangle.x_end - rectangle.x_begin;
  const int64_t chunks = (width + fit - 1) / fit, first = (rectangle.sample * p.rows_per_sample + y * p.out_width) * channels + g.channel;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t begin = rectangle.x_begin + width * chunk / chunks, end = rectangle.x_begin + width * (chunk + 1) / chunks;
    const int64_t x = begin * s.stride_width - s.padding_left, columns = (end - begin - 1) * s.stride_width + span;
    for (int64_t pair = 0; pair < pairs; ++pair)
      interleave(sources + 2 * pair, x, columns, s.in_width, g.channels, w.s->x_zero_point, pairs, strip + pair * kPairBytes);
    const uint8_t* column = strip;
    int64_t ox = begin;
    const auto tile = [&](auto size) __attribute__((always_inline)) {
      constexpr int T = decltype(size)::value;
      __m256i acc[R][T][2];
      accumulate<R, T>(w, column, pairs, tap_step, column_step, acc);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) epilogue.template columns<T>(acc[r], first + (r * p.out_width + ox) * channels, channels);
      ox += T;
      column += T * column_step;
    };
    constexpr int kTile = 4 / R;
    while (ox + kTile <= end) tile(Size<kTile>{});
    while (ox < end) tile(Size<1>{});
    epilogue.end_strip(R * (end - begin));
  }
}

/// Pairs of taps per kernel column, and whether two output rows share them: only neighbours overlap, and only an odd
/// kernel height leaves room.
struct Pairing {
  int64_t pairs;
  bool two_rows;
  explicit Pairing(const Conv2dShape& s)
      : pairs((s.kernel_height + 1) / 2), two_rows(s.stride_height == 1 && s.dilation_height == 1 && s.kernel_height % 2 == 1) {}
};

/// Runs a rectangle with one epilogue.
template <class Epilogue>
void run_rectangle(Work& w, const Rectangle& rectangle) {
  alignas(32) uint8_t padding_row[kVector];
  store(padding_row, _mm256_set1_epi8(static_cast<char>(w.s->x_zero_point)));
  const Pairing pairing(w.p.shape);
  Epilogue epilogue(w);
  for (int64_t y = rectangle.y_begin; y < rectangle.y_end;) {
    if (pairing.two_rows && rectangle.y_end - y >= 2) {
      run_strip<2>(w, rectangle, y, pairing.pairs, padding_row, epilogue);
      y += 2;
    } else {
      run_strip<1>(w, rectangle, y, pairing.pairs, padding_row, epilogue);
      y += 1;
    }
  }
  epilogue.finish(w);
}

/// What the kernels here do not cover: a multiplier, and kernels beyond the strip.
bool covers(const LayerProblem& p) {
  const Conv2dShape& s = p.shape;
  const int64_t span = (s.kernel_width - 1) * s.dilation_width + 1, pairs = Pairing(s).pairs;
  return s.out_channels == s.in_channels && s.kernel_width * pairs <= kMaxSteps && pairs <= kMaxPairs && span * pairs <= kStripPairs;
}

/// Runs body(work, rectangle) for every group of channels and rectangle; start(work, sample) and finish(work) per sample.
template <class Start, class Body, class Finish>
void for_each_group(const LayerProblem& p, const LayerRange& range, Start start, Body body, Finish finish) {
  for_each_band(p, range.row_begin, range.row_end, 2, [&](int64_t begin, int64_t end) {
    for (int64_t channel = range.channel_begin; channel < range.channel_end; channel += kChannels) {
      const Group g(p, channel, range.channel_end, Pairing(p.shape).pairs);
      Work w(p, g);
      for_each_rectangle(p, begin, end, [&](const Rectangle& rectangle) {
        if (w.s != p.samples + rectangle.sample) {
          if (w.s) finish(w);
          start(w, rectangle.sample);
        }
        body(w, rectangle);
      });
      finish(w);
    }
  });
}

/// Constants of output_value, and of layer_value.
void start_outputs(Work& w, int64_t sample) { w.start(sample, w.p.activation != Activation::clamp); }
void start_values(Work& w, int64_t sample) { w.start(sample, true); }

void quantized(const LayerProblem& p, const LayerRange& range) {
  if (!covers(p)) return kReferenceKernels.depthwise.quantized(p, range);
  for_each_group(
      p, range,
      start_outputs,
      [&](Work& w, const Rectangle& r) {
        const Group& g = w.g;
        const int64_t columns = r.x_end - r.x_begin;
        const auto row = [&](int64_t y) { return ((r.sample * p.out_height + y) * p.out_width + r.x_begin) * p.shape.out_channels + g.channel; };
        if (!w.s->valid) {
          for (int64_t y = r.y_begin; y < r.y_end; ++y)
            for (int64_t x = 0; x < columns; ++x) store_bytes16(p.y + row(y) + x * p.shape.out_channels, _mm_setzero_si128(), g.channels);
          return;
        }
        run_rectangle<Codes>(w, r);
        if (!p.channel_stats) return;
        int64_t* sums = p.stats + r.sample * (kStatsSample + 2 * p.shape.out_channels) + kStatsSample + g.channel;
        for (int64_t y = r.y_begin; y < r.y_end; ++y)
          add_channel_moments(p.y + row(y), columns, g.channels, p.shape.out_channels, sums, sums + p.shape.out_channels);
      },
      [](Work& w) { w.add_stats(); });
}

void to_float(const LayerProblem& p, const LayerRange& range) {
  if (!covers(p)) return kReferenceKernels.depthwise.to_float(p, range);
  for_each_group(p, range, start_values, run_rectangle<Floats>, [](Work&) {});
}

void find_range(const LayerProblem& p, const LayerRange& range) {
  if (!covers(p)) return kReferenceKernels.depthwise.range(p, range);
  const bool fast = p.activation == Activation::clamp && !p.residual;
  for_each_group(p, range, start_outputs, fast ? run_rectangle<FastRange> : run_rectangle<AnyRange>, [&](Work& w) {
    atomic_widen(p.range + 2 * (w.s - p.samples), w.lo, w.hi);
    w.lo = kInfinity;
    w.hi = -kInfinity;
  });
}

}  // namespace

void install_depthwise_avx2(Kernels& table) { table.depthwise = {quantized, to_float, find_range}; }

}  // namespace probquant
