// Depthwise convolution, AVX-512 VNNI.
//
// A group is 64 channels at a time, one zmm of bytes. For every input column, the rows that one output row (or two) needs
// are interleaved in quads, byte by byte, so that a dword holds 4 rows of one channel: 4 loads, 8 unpacks and 4 stores of
// 64 bytes into a strip in L1. The unpacks work within 128-bit lanes and leave the channels in "part order": part p,
// dword 4 j + i is channel 16 j + 4 p + i; the packs at the end undo it. A strip's column is then met by kernel_width
// output columns and, at stride 1, by two output rows (whose weights lie one row lower within the quads).
//
// A group with only one or two blocks of 16 channels would waste 3/4 or 1/2 of the vector: it fills the other lanes with
// the same channels of other output rows ("slots").
//
// Register tile: 1 or 2 rows x 4 columns, one part after the other: 8 accumulators, and the weights of a quad's taps, 6 (3x3) or 10 (5x5),
// which each load of a column meets with all the outputs that need it. The values of a part are rounded at once; two parts are packed
// into words, 8 of which wait for the other two parts. Beside 12 vpdpbusd (of 3x3), 64 outputs take 22 vector instructions behind a ReLU
// and 28 otherwise (epilogue.h), moments and clip counts included, and 4 to interleave. So processors with two vector units take 19 (22)
// clocks where their peak is 4.5.
// L1: a strip has at most 16 KB (kStripQuads), the weights of a group 2 x steps x 256 bytes (1.5 KB for 3x3).
#include "../depthwise_geometry.h"
#include "epilogue.h"

#include <cstddef>

namespace probquant {
namespace {

constexpr int64_t kVector = 64, kParts = 4, kQuadBytes = kParts * kVector;
constexpr int64_t kMaxSteps = 32;    // of the stream; 9x9 has 27
constexpr int64_t kMaxQuads = 8;     // per kernel column
constexpr int64_t kStripQuads = 63;  // interleaved (column, quad) pairs held at once

/// Exchanges lane j of vector p with lane p of vector j: part order to the natural order of dwords, and back.
inline void transpose_lanes(__m512i (&v)[kParts]) {
  const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
  const __m512i c = _mm512_shuffle_i32x4(v[2], v[3], 0x44), d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  v[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
  v[2] = _mm512_shuffle_i32x4(b, d, 0x88);
  v[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

/// Up to 64 channels and their weights in part order.
struct Group {
  int64_t channel, channels;
  int64_t slots;          ///< 1, 2 or 4 output rows (or pairs of them) share a vector
  int64_t slot_channels;  ///< 64 / slots
  __mmask64 slot_mask;    ///< bytes of slot 0 that are channels
  alignas(64) int32_t weight_sum[kParts][16];
  alignas(64) float scale[kParts][16];
  alignas(64) float bias[kParts][16];
  alignas(64) float profile[kParts][16];
  alignas(64) float inverse_profile[kParts][16];
  alignas(64) int8_t weights[2][kMaxSteps * kQuadBytes];  ///< of the first output row of a pair, and of the second

  Group(const LayerProblem& p, int64_t first, int64_t end) : channel(first), channels(end - first < kVector ? end - first : kVector) {
    const int64_t blocks = (channels + kBlockChannels - 1) / kBlockChannels;
    slots = blocks == 1 ? 4 : blocks == 2 ? 2 : 1;
    slot_channels = kVector / slots;
    slot_mask = first_lanes64(channels);
    const uint8_t* lane[4];
    for (int64_t j = 0; j < 4; ++j)
      lane[j] = slots == 1 && j >= blocks ? nullptr : p.packed_weight + (first / kBlockChannels + j % blocks) * p.layout.block_bytes;
    const auto gather = [&lane](int64_t offset, void* out) {
      __m512i v[kParts];
      for (int j = 0; j < 4; ++j) v[j] = lane[j] ? _mm512_loadu_si512(lane[j] + offset) : _mm512_setzero_si512();
      transpose_lanes(v);
      for (int j = 0; j < 4; ++j) _mm512_store_si512(static_cast<char*>(out) + j * kVector, v[j]);
    };
    gather(offsetof(BlockHeader, weight_sum), weight_sum);
    gather(offsetof(BlockHeader, scale), scale);
    gather(offsetof(BlockHeader, bias), bias);
    gather(offsetof(BlockHeader, profile), profile);
    gather(offsetof(BlockHeader, inverse_profile), inverse_profile);
    for (int64_t step = 0; step < p.layout.steps; ++step) {
      int8_t* upper = weights[0] + step * kQuadBytes;
      int8_t* lower = weights[1] + step * kQuadBytes;
      gather(static_cast<int64_t>(sizeof(BlockHeader)) + step * kStreamBytes, upper);
      for (int64_t i = 0; i < kQuadBytes; i += kVector) {
        __m512i v = _mm512_slli_epi32(_mm512_load_si512(upper + i), 8);
        if (step % p.layout.column_steps) v = _mm512_or_si512(v, _mm512_srli_epi32(_mm512_load_si512(upper - kQuadBytes + i), 24));
        _mm512_store_si512(lower + i, v);
      }
    }
  }
};

/// A group's work on one sample: constants of its epilogue, and what it sums up.
struct Work {
  const LayerProblem& p;
  const Group& g;
  const SampleEpilogue* s = nullptr;
  alignas(64) int32_t correction[kParts][16];  ///< -zero point * weight sum
  alignas(64) float multiplier[kParts][16];
  alignas(64) float bias[kParts][16];
  alignas(64) int16_t floor[2][32], ceiling[2][32];  ///< codes of the activation's bounds, parts 0 and 1, 2 and 3 (fast path)
  int64_t sum = 0, squares = 0, clipped = 0;
  float lo = kInfinity, hi = -kInfinity;

  Work(const LayerProblem& problem, const Group& group) : p(problem), g(group) {}

  /// Constants of one sample: multiplier * accumulator + bias, in real units, or in those of the output's scale.
  void start(int64_t sample, bool real) {
    s = p.samples + sample;
    const float scale_factor = real ? s->x_scale : s->multiplier, bias_factor = real ? 1.0f : s->inverse_scale;
    const __m512i minus_zero_point = _mm512_set1_epi32(-s->x_zero_point);
    for (int i = 0; i < kParts; ++i) {
      _mm512_store_si512(correction[i], _mm512_mullo_epi32(minus_zero_point, _mm512_load_si512(g.weight_sum[i])));
      _mm512_store_ps(multiplier[i], _mm512_mul_ps(_mm512_set1_ps(scale_factor), _mm512_load_ps(g.scale[i])));
      _mm512_store_ps(bias[i], _mm512_mul_ps(_mm512_set1_ps(bias_factor), _mm512_load_ps(g.bias[i])));
    }
  }

  /// Whether FastCodes serves: it clamps behind the conversion, which every value has to fit.
  bool prepare_fast() {
    const auto& trailer = *reinterpret_cast<const PackedTrailer*>(p.packed_weight + p.layout.trailer_offset());
    const float accumulator = static_cast<float>(p.layout.taps) * (255.0f * 127.0f);
    const float reach = s->multiplier * trailer.largest_scale * accumulator + s->inverse_scale * trailer.largest_bias;
    if (p.activation != Activation::clamp || p.residual || !(reach < 1e9f)) return false;
    const auto bounds = [&](float bound, int i) {
      const auto codes = [&](int part) { return bound_codes(_mm512_mul_ps(_mm512_set1_ps(bound), _mm512_load_ps(g.inverse_profile[part])), s->y_zero_point); };
      return _mm512_packs_epi32(codes(2 * i), codes(2 * i + 1));
    };
    for (int i = 0; i < 2; ++i) {
      _mm512_store_si512(floor[i], bounds(s->activation_lo, i));
      _mm512_store_si512(ceiling[i], bounds(s->activation_hi, i));
    }
    return true;
  }
  /// The activation is a ReLU, and the range begins at 0.
  bool relu() const { return s->y_zero_point == 0 && s->activation_lo == 0.0f; }

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

/// Where a vector of outputs goes: the index of slot 0's first channel, the distance of slots, the bytes that exist.
struct Place {
  int64_t at, slot_step;
  __mmask64 mask;

  /// Words of parts 2 i and 2 i + 1 that exist, as vpackssdw puts them together.
  __mmask32 words(int i) const {
    uint64_t bytes = mask >> 8 * i & 0x00ff00ff00ff00ffull;
    bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffffull;
    return static_cast<__mmask32>(bytes | bytes >> 16);
  }
};


/// 16 dwords of the natural order: block j of a vector, its mask and its place.
struct BlockPlace {
  int64_t at;
  __mmask16 mask;
};
inline BlockPlace block_place(const Group& g, const Place& place, int64_t j) {
  const int64_t blocks_per_slot = 4 / g.slots;
  return {place.at + j / blocks_per_slot * place.slot_step + j % blocks_per_slot * 16, static_cast<__mmask16>(place.mask >> 16 * j)};
}

inline void store_codes(uint8_t* y, const Group& g, const Place& place, __m512i q) {
  uint8_t* at = y + place.at;
  if (g.slots == 1) return _mm512_mask_storeu_epi8(at, place.mask, q);
  if (g.slots == 2) {
    _mm256_mask_storeu_epi8(at, static_cast<__mmask32>(place.mask), _mm512_castsi512_si256(q));
    _mm256_mask_storeu_epi8(at + place.slot_step, static_cast<__mmask32>(place.mask >> 32), _mm512_extracti64x4_epi64(q, 1));
    return;
  }
  _mm_mask_storeu_epi8(at, static_cast<__mmask16>(place.mask), _mm512_castsi512_si128(q));
  _mm_mask_storeu_epi8(at + place.slot_step, static_cast<__mmask16>(place.mask >> 16), _mm512_extracti32x4_epi32(q, 1));
  _mm_mask_storeu_epi8(at + 2 * place.slot_step, static_cast<__mmask16>(place.mask >> 32), _mm512_extracti32x4_epi32(q, 2));
  _mm_mask_storeu_epi8(at + 3 * place.slot_step, static_cast<__mmask16>(place.mask >> 48), _mm512_extracti32x4_epi32(q, 3));
}

/// q - zero point of a residual, in part order.
inline void load_residual(const uint8_t* residual, int32_t zero_point, const Group& g, const Place& place, __m512i (&out)[kParts]) {
  alignas(64) uint8_t codes[kVector];
  for (int64_t j = 0; j < 4; ++j) {
    const BlockPlace block = block_place(g, place, j);
    _mm_store_si128(reinterpret_cast<__m128i*>(codes + 16 * j), _mm_maskz_loadu_epi8(block.mask, residual + block.at));
  }
  const __m512i v = _mm512_load_si512(codes), zero = _mm512_setzero_si512();
  const __m512i a = _mm512_unpacklo_epi8(v, zero), b = _mm512_unpackhi_epi8(v, zero);
  out[0] = _mm512_unpacklo_epi16(a, zero), out[1] = _mm512_unpackhi_epi16(a, zero);
  out[2] = _mm512_unpacklo_epi16(b, zero), out[3] = _mm512_unpackhi_epi16(b, zero);
  for (int i = 0; i < kParts; ++i) out[i] = _mm512_sub_epi32(out[i], _mm512_set1_epi32(zero_point));
}

/// Dword lanes of part i of the bytes in a mask.
inline __mmask16 part_mask(__mmask64 bytes, int i) {
  const __mmask64 nibbles = bytes >> 4 * i & 0x000f000f000f000full;
  return static_cast<__mmask16>(nibbles | nibbles >> 12 | nibbles >> 24 | nibbles >> 36);
}

inline __m512i pack_codes(const __m512i (&v)[kParts]) {
  return _mm512_packus_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
}

// ---------------------------------------------------------------------------------------------------------------------
// Epilogues: tile(source, place, channels) gets the accumulators of a part of a register tile from source(part, accumulators), and moves
// `place` on; finish() hands over what registers summed up

/// Requantization with the activation's bounds on codes (see Work::prepare_fast). `kFull`: no mask and one slot.
template <bool kFull, Clamp kClamp>
struct FastCodes {
  Work* w;
  uint8_t* y;
  __m512i zero_point;
  CodeSums sums[2];  // two chains: one alone takes as long as everything else
  ClipCount clipped[2];
  int64_t pending = 0;

  explicit FastCodes(Work& work) : w(&work), y(work.p.y), zero_point(_mm512_set1_epi16(static_cast<int16_t>(work.s->y_zero_point))) {}

  template <int R, int T, class Source>
  __attribute__((always_inline)) void tile(Source source, Place (&place)[R], int64_t channels) {
    __m512i words[2][R][T];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const WordRounding rounding{zero_point, _mm512_load_si512(w->floor[i]), _mm512_load_si512(w->ceiling[i])};
      __m512i a[R][T], b[R][T];
      source(2 * i, a);
      round(a, 2 * i);
      source(2 * i + 1, b);
      round(b, 2 * i + 1);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          words[i][r][t] = rounding.words<kClamp>(a[r][t], b[r][t]);
          if (!kFull) words[i][r][t] = _mm512_maskz_mov_epi16(place[r].words(i), words[i][r][t]);
          clipped[t % 2].template add<kClamp>(words[i][r][t], ~__mmask32{0});
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const __m512i q = _mm512_packus_epi16(words[0][r][t], words[1][r][t]);
        sums[t % 2].add(q);
        if (kFull) _mm512_storeu_si512(y + place[r].at, q);
        else store_codes(y, w->g, place[r], q);
        place[r].at += channels;
      }
  }
  void end_strip(int64_t vectors) {
    if ((pending += vectors) > CodeSums::kFlushAfter / 2) finish();
  }
  void finish() {
    for (int i = 0; i < 2; ++i) {
      sums[i].flush(w->sum, w->squares);
      w->clipped += clipped[i].flush();
    }
    pending = 0;
  }

 private:
  template <int R, int T>
  __attribute__((always_inline)) void round(__m512i (&v)[R][T], int part) const {
    const __m512 multiplier = _mm512_load_ps(w->multiplier[part]), bias = _mm512_load_ps(w->bias[part]);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) v[r][t] = _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_cvtepi32_ps(v[r][t]), multiplier, bias));
  }
};

struct VectorOfParts {
  __m512i part[kParts];
};

/// What the other epilogues share: they take one vector of outputs at a time.
template <class Derived>
struct OneByOne {
  Work* w;
  explicit OneByOne(Work& work) : w(&work) {}

  template <int R, int T, class Source>
  void tile(Source source, Place (&place)[R], int64_t channels) {
    __m512i acc[kParts][R][T];
    for (int part = 0; part < kParts; ++part) source(part, acc[part]);
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < R; ++r) {
        static_cast<Derived*>(this)->one(VectorOfParts{{acc[0][r][t], acc[1][r][t], acc[2][r][t], acc[3][r][t]}}, place[r]);
        place[r].at += channels;
      }
  }
  void end_strip(int64_t) {}
  void finish() {}
};

/// multiplier * accumulator + bias + residual_factor * residual of a vector of outputs, in part order.
inline void affine_values(const Work& w, const VectorOfParts& acc, const Place& place, float residual_factor, __m512 (&out)[kParts]) {
  __m512i residual[kParts];
  if (w.p.residual) load_residual(w.p.residual, w.s->residual_zero_point, w.g, place, residual);
  for (int i = 0; i < kParts; ++i) {
    out[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc.part[i]), _mm512_load_ps(w.multiplier[i]), _mm512_load_ps(w.bias[i]));
    if (w.p.residual) out[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(residual[i]), _mm512_set1_ps(residual_factor), out[i]);
  }
}

/// output_value of a vector of outputs, in part order.
inline void output_values(const Work& w, const VectorOfParts& acc, const Place& place, __m512 (&t)[kParts]) {
  const SampleEpilogue& s = *w.s;
  affine_values(w, acc, place, s.residual_multiplier, t);
  for (int i = 0; i < kParts; ++i) {
    const __m512 inverse_profile = _mm512_load_ps(w.g.inverse_profile[i]);
    if (w.p.activation != Activation::clamp) {
      t[i] = activate_ps(w.p.activation, _mm512_mul_ps(t[i], _mm512_load_ps(w.g.profile[i])));
      t[i] = _mm512_mul_ps(t[i], _mm512_mul_ps(_mm512_set1_ps(s.inverse_scale), inverse_profile));
      continue;
    }
    __m512 lower = _mm512_set1_ps(s.activation_lo), upper = _mm512_set1_ps(s.activation_hi);
    if (w.p.profiled_bounds()) {
      lower = _mm512_mul_ps(lower, inverse_profile);
      upper = _mm512_mul_ps(upper, inverse_profile);
    }
    t[i] = clamp_ps(t[i], lower, upper);
  }
}

/// Requantization in full: curved activations, profiled bounds, residuals, values beyond int32, NaN.
struct AnyCodes : OneByOne<AnyCodes> {
  using OneByOne::OneByOne;

  __attribute__((noinline)) void one(VectorOfParts acc, Place place) {
    const Rounding rounding(w->s->y_zero_point);
    __m512 t[kParts];
    output_values(*w, acc, place, t);
    for (int i = 0; i < kParts; ++i) {
      w->clipped += __builtin_popcount(rounding.clipped(t[i]) & part_mask(place.mask, i));
      acc.part[i] = rounding.codes(t[i]);
    }
    const __m512i q = pack_codes(acc.part);
    store_codes(w->p.y, w->g, place, q);
    CodeSums sums;
    sums.add(_mm512_maskz_mov_epi8(place.mask, q));
    sums.flush(w->sum, w->squares);
  }
};

/// layer_value of a vector of outputs, in part order.
inline void layer_values(const Work& w, const VectorOfParts& acc, const Place& place, __m512 (&out)[kParts]) {
  affine_values(w, acc, place, w.s->residual_scale, out);
  for (int i = 0; i < kParts; ++i) {
    const __m512 y = _mm512_mul_ps(out[i], _mm512_load_ps(w.g.profile[i]));
    out[i] = w.p.activation == Activation::clamp ? clamp_ps(y, _mm512_set1_ps(w.p.activation_min), _mm512_set1_ps(w.p.activation_max))
                                                 : activate_ps(w.p.activation, y);
  }
}

/// Stores dwords in part order to [rows, channels].
inline void store_dwords(void* y, const Group& g, const Place& place, __m512i (&v)[kParts]) {
  transpose_lanes(v);
  for (int64_t j = 0; j < 4; ++j) {
    const BlockPlace block = block_place(g, place, j);
    _mm512_mask_storeu_epi32(static_cast<int32_t*>(y) + block.at, block.mask, v[j]);
  }
}

struct Floats : OneByOne<Floats> {
  using OneByOne::OneByOne;

  __attribute__((noinline)) void one(VectorOfParts acc, Place place) {
    __m512 y[kParts];
    layer_values(*w, acc, place, y);
    for (int i = 0; i < kParts; ++i) acc.part[i] = _mm512_castps_si512(y[i]);
    store_dwords(w->p.y_float, w->g, place, acc.part);
  }
};

/// The range of output_value in full.
struct AnyRange : OneByOne<AnyRange> {
  __m512 lo = _mm512_set1_ps(kInfinity), hi = _mm512_set1_ps(-kInfinity);
  explicit AnyRange(Work& work) : OneByOne(work) {}

  __attribute__((noinline)) void one(VectorOfParts acc, Place place) {
    __m512 y[kParts];
    output_values(*w, acc, place, y);
    for (int i = 0; i < kParts; ++i) {
      const __mmask16 mask = part_mask(place.mask, i);
      lo = _mm512_mask_min_ps(lo, mask, y[i], lo);
      hi = _mm512_mask_max_ps(hi, mask, y[i], hi);
    }
  }
  void finish() { w->widen(_mm512_reduce_min_ps(lo), _mm512_reduce_max_ps(hi)); }
};

/// The same of a clamp without a residual, which keeps the order of sums (or turns it around): a channel's extremes come from its extreme
/// sums. NaNs do not disturb that: they become the lower bound, as all else on their side does.
template <bool kFull>
struct FastRange {
  Work* w;
  __m512i lo[kParts], hi[kParts];

  explicit FastRange(Work& work) : w(&work) {
    for (int i = 0; i < kParts; ++i) lo[i] = _mm512_set1_epi32(INT32_MAX), hi[i] = _mm512_set1_epi32(INT32_MIN);
  }

  template <int R, int T, class Source>
  __attribute__((always_inline)) void tile(Source source, Place (&place)[R], int64_t channels) {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) {
      __m512i acc[R][T];
      source(i, acc);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const __mmask16 mask = kFull ? __mmask16(0xffff) : part_mask(place[r].mask, i);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          lo[i] = kFull ? _mm512_min_epi32(lo[i], acc[r][t]) : _mm512_mask_min_epi32(lo[i], mask, lo[i], acc[r][t]);
          hi[i] = kFull ? _mm512_max_epi32(hi[i], acc[r][t]) : _mm512_mask_max_epi32(hi[i], mask, hi[i], acc[r][t]);
        }
      }
    }
    for (int r = 0; r < R; ++r) place[r].at += T * channels;
  }
  void end_strip(int64_t) {}
  void finish() {
    __m512 y[2][kParts];
    output_values(*w, {{lo[0], lo[1], lo[2], lo[3]}}, {}, y[0]);
    output_values(*w, {{hi[0], hi[1], hi[2], hi[3]}}, {}, y[1]);
    for (int i = 0; i < kParts; ++i) {
      const __mmask16 seen = _mm512_cmple_epi32_mask(lo[i], hi[i]);
      const __m512 least = _mm512_min_ps(y[0][i], y[1][i]), largest = _mm512_max_ps(y[0][i], y[1][i]);
      w->widen(_mm512_mask_reduce_min_ps(seen, least), _mm512_mask_reduce_max_ps(seen, largest));
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Strips

/// An input row of one slot: column x starts at at + x * step; a padding row has step 0.
struct RowSource {
  const uint8_t* at;
  int64_t step;
};

/// One row of every slot, walking along the columns.
template <int kSlots>
struct RowCursor {
  RowSource slot[kSlots];

  RowCursor(const RowSource* rows, int64_t x) {
    for (int i = 0; i < kSlots; ++i) slot[i] = {rows[i].at + x * rows[i].step, rows[i].step};
  }
  __attribute__((always_inline)) __m512i next(__mmask64 mask) {
    const auto load16 = [&](int i) { return _mm_maskz_loadu_epi8(static_cast<__mmask16>(mask), slot[i].at); };
    __m512i v;
    if (kSlots == 1) {
      v = _mm512_maskz_loadu_epi8(mask, slot[0].at);
    } else if (kSlots == 2) {
      const auto half = static_cast<__mmask32>(mask);
      v = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi8(half, slot[0].at)), _mm256_maskz_loadu_epi8(half, slot[kSlots - 1].at), 1);
    } else {
      v = _mm512_inserti32x4(_mm512_castsi128_si512(load16(0)), load16(1 % kSlots), 1);
      v = _mm512_inserti32x4(_mm512_inserti32x4(v, load16(2 % kSlots), 2), load16(3 % kSlots), 3);
    }
    for (int i = 0; i < kSlots; ++i) slot[i].at += slot[i].step;
    return v;
  }
};

/// Interleaves input columns [x, x + columns) of 4 rows into every `quads`-th quad of the strip.
template <int kSlots>
void interleave(const RowSource* rows, int64_t x, int64_t columns, int64_t width, __mmask64 mask, int32_t zero_point, int64_t quads,
                uint8_t* strip) {
  const int64_t step = quads * kQuadBytes;
  const int64_t before = x < 0 ? (-x < columns ? -x : columns) : 0;  // columns left of the image
  const int64_t inside = width - x < columns ? (width - x > before ? width - x : before) : columns;
  const __m512i padding = _mm512_set1_epi8(static_cast<char>(zero_point));
  const auto pad = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t part = 0; part < kParts; ++part) _mm512_store_si512(strip + i * step + part * kVector, padding);
  };
  pad(0, before);
  RowCursor<kSlots> a(rows, x + before), b(rows + kSlots, x + before), c(rows + 2 * kSlots, x + before), d(rows + 3 * kSlots, x + before);
  uint8_t* out = strip + before * step;
  for (int64_t i = before; i < inside; ++i, out += step) {
    const __m512i row_a = a.next(mask), row_b = b.next(mask), row_c = c.next(mask), row_d = d.next(mask);
    const __m512i ab = _mm512_unpacklo_epi8(row_a, row_b), cd = _mm512_unpacklo_epi8(row_c, row_d);
    const __m512i ab_high = _mm512_unpackhi_epi8(row_a, row_b), cd_high = _mm512_unpackhi_epi8(row_c, row_d);
    _mm512_store_si512(out, _mm512_unpacklo_epi16(ab, cd));
    _mm512_store_si512(out + kVector, _mm512_unpackhi_epi16(ab, cd));
    _mm512_store_si512(out + 2 * kVector, _mm512_unpacklo_epi16(ab_high, cd_high));
    _mm512_store_si512(out + 3 * kVector, _mm512_unpackhi_epi16(ab_high, cd_high));
  }
  pad(inside, columns);
}

template <int kSize>
struct Size {
  static constexpr int value = kSize;
};

/// The accumulators of a part of R rows x T columns. `column` is the strip at the first kernel column of the first output column. kTaps and
/// kStride, unless 0, are the kernel's columns and the horizontal stride, without dilation.
template <int kTaps, int kStride, int R, int T>
__attribute__((always_inline)) inline void accumulate(const Work& w, int part, const uint8_t* column, int64_t tap_step, int64_t column_step,
                                                      __m512i (&acc)[R][T]) {
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) acc[r][t] = _mm512_load_si512(w.correction[part]);
  const int64_t quads = w.p.layout.column_steps, taps = w.p.layout.kernel_width;
  const int8_t* const weights = w.g.weights[0] + part * kVector;
  column += part * kVector;
  if (kTaps > 0) {
    for (int64_t quad = 0; quad < (kTaps == 3 ? 1 : quads); ++quad) {
      __m512i taps_of[kTaps > 0 ? kTaps : 1][R];
#pragma GCC unroll 5
      for (int kx = 0; kx < kTaps; ++kx)
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) taps_of[kx][r] = _mm512_load_si512(weights + r * kMaxSteps * kQuadBytes + (kx * (kTaps == 3 ? 1 : quads) + quad) * kQuadBytes);
#pragma GCC unroll 16
      for (int c = 0; c < (T - 1) * kStride + kTaps; ++c) {
        const __m512i v = _mm512_load_si512(column + c * tap_step + quad * kQuadBytes);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r)
            if (c >= t * kStride && c - t * kStride < kTaps) dot(acc[r][t], v, taps_of[c - t * kStride][r]);
      }
    }
    return;
  }
  for (int64_t kx = 0; kx < taps; ++kx)
    for (int64_t quad = 0; quad < quads; ++quad) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m512i v = _mm512_load_si512(column + kx * tap_step + t * column_step + quad * kQuadBytes);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) dot(acc[r][t], v, _mm512_load_si512(weights + r * kMaxSteps * kQuadBytes + (kx * quads + quad) * kQuadBytes));
      }
    }
}

/// `columns` output columns of a strip.
template <int R, int kTaps, int kStride, class Epilogue>
__attribute__((always_inline)) inline void run_columns(const Work& w, const uint8_t* column, int64_t tap_step, int64_t column_step, int64_t columns,
                                                       Place (&place)[R], Epilogue& epilogue) {
  const auto tiles = [&](auto size) __attribute__((always_inline)) {
    constexpr int T = decltype(size)::value;
    for (; columns >= T; columns -= T, column += T * column_step) {
      const auto source = [&](int part, __m512i (&acc)[R][T]) __attribute__((always_inline)) {
        accumulate<kTaps, kStride>(w, part, column, tap_step, column_step, acc);
      };
      epilogue.template tile<R, T>(source, place, w.p.shape.in_channels);
    }
  };
  tiles(Size<4>{});
  tiles(Size<2>{});
  tiles(Size<1>{});
}

/// Outputs of `rows` image rows from y (at most R per slot), columns [x_begin, x_end) of a rectangle's sample.
template <int R, int kTaps, int kStride, class Epilogue>
void run_strip(Work& w, const Rectangle& rectangle, int64_t y, int64_t rows, const uint8_t* padding_row, Epilogue& state) {
  Epilogue epilogue = state;  // in registers
  const LayerProblem& p = w.p;
  const Conv2dShape& s = p.shape;
  const Group& g = w.g;
  const int64_t quads = p.layout.column_steps, channels = s.in_channels;

  RowSource sources[kMaxQuads * 4 * 4];
  for (int64_t i = 0; i < quads * 4; ++i)
    for (int64_t slot = 0; slot < g.slots; ++slot) {
      const int64_t iy = (y + slot * R) * s.stride_height - s.padding_top + i * s.dilation_height;
      const bool padding = i >= s.kernel_height + R - 1 || slot * R >= rows || iy < 0 || iy >= s.in_height;
      sources[i * g.slots + slot] = padding ? RowSource{padding_row, 0}
                                            : RowSource{p.x + (rectangle.sample * s.in_height + iy) * s.in_width * channels + g.channel, channels};
    }
  Place place[R];
  for (int r = 0; r < R; ++r) {
    place[r] = {(rectangle.sample * p.rows_per_sample + (y + r) * p.out_width) * channels + g.channel, R * p.out_width * channels, 0};
    for (int64_t slot = 0; slot < g.slots && slot * R + r < rows; ++slot) place[r].mask |= g.slot_mask << slot * g.slot_channels;
  }

  alignas(64) uint8_t strip[kStripQuads * kQuadBytes];
  const int64_t span = (s.kernel_width - 1) * s.dilation_width + 1, column_step = s.stride_width * quads * kQuadBytes;
  const int64_t tap_step = s.dilation_width * quads * kQuadBytes;
  const int64_t fit = (kStripQuads / quads - span) / s.stride_width + 1, width = rectangle.x_end - rectangle.x_begin;
  const int64_t chunks = (width + fit - 1) / fit;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t begin = rectangle.x_begin + width * chunk / chunks, end = rectangle.x_begin + width * (chunk + 1) / chunks;
    const int64_t x = begin * s.stride_width - s.padding_left, columns = (end - begin - 1) * s.stride_width + span;
    for (int64_t quad = 0; quad < quads; ++quad) {
      const RowSource* from = sources + quad * 4 * g.slots;
      uint8_t* to = strip + quad * kQuadBytes;
      if (g.slots == 1) interleave<1>(from, x, columns, s.in_width, g.slot_mask, w.s->x_zero_point, quads, to);
      else if (g.slots == 2) interleave<2>(from, x, columns, s.in_width, g.slot_mask, w.s->x_zero_point, quads, to);
      else interleave<4>(from, x, columns, s.in_width, g.slot_mask, w.s->x_zero_point, quads, to);
    }
    Place places[R];
    for (int r = 0; r < R; ++r) places[r] = {place[r].at + begin * channels, place[r].slot_step, place[r].mask};
    run_columns<R, kTaps, kStride>(w, strip, tap_step, column_step, end - begin, places, epilogue);
    epilogue.end_strip(R * (end - begin));
  }
  state = epilogue;
}

/// Runs a rectangle with one epilogue.
template <class Epilogue, int kTaps = 0, int kStride = 0>
void run_rectangle(Work& w, const Rectangle& rectangle) {
  const Conv2dShape& s = w.p.shape;
  alignas(64) uint8_t padding_row[kVector];
  _mm512_store_si512(padding_row, _mm512_set1_epi8(static_cast<char>(w.s->x_zero_point)));
  // a second row in the same quads: only neighbours overlap, and only a kernel height short of full quads leaves room
  const bool pairs = s.stride_height == 1 && s.dilation_height == 1 && s.kernel_height % 4 != 0;
  Epilogue epilogue(w);
  for (int64_t y = rectangle.y_begin; y < rectangle.y_end;) {
    const int64_t remaining = rectangle.y_end - y, most = w.g.slots * (pairs && remaining > w.g.slots ? 2 : 1);
    const int64_t rows = remaining < most ? remaining : most;
    if (most > w.g.slots) run_strip<2, kTaps, kStride>(w, rectangle, y, rows, padding_row, epilogue);
    else run_strip<1, kTaps, kStride>(w, rectangle, y, rows, padding_row, epilogue);
    y += rows;
  }
  epilogue.finish();
}

/// What the kernels here do not cover: a multiplier, and kernels beyond the strip.
bool covers(const LayerProblem& p) {
  const Conv2dShape& s = p.shape;
  const int64_t span = (s.kernel_width - 1) * s.dilation_width + 1, quads = p.layout.column_steps;
  return s.out_channels == s.in_channels && p.layout.steps <= kMaxSteps && quads <= kMaxQuads && span * quads <= kStripQuads;
}

/// Runs body(work, rectangle) for every group of channels and rectangle; start(work, sample) and finish(work) per sample.
template <class Start, class Body, class Finish>
void for_each_group(const LayerProblem& p, const LayerRange& range, Start start, Body body, Finish finish) {
  for_each_band(p, range.row_begin, range.row_end, 2, [&](int64_t begin, int64_t end) {
    for (int64_t channel = range.channel_begin; channel < range.channel_end; channel += kVector) {
      const Group g(p, channel, range.channel_end);
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

/// 3x3 and 5x5 above all.
template <class Epilogue>
void run_fast(Work& w, const Rectangle& rectangle) {
  const Conv2dShape& s = w.p.shape;
  const int64_t taps = s.dilation_width == 1 && (s.kernel_width == 5 || w.p.layout.steps == 3) ? s.kernel_width : 0, stride = s.stride_width;
  if (taps == 3 && stride == 1) run_rectangle<Epilogue, 3, 1>(w, rectangle);
  else if (taps == 3 && stride == 2) run_rectangle<Epilogue, 3, 2>(w, rectangle);
  else if (taps == 5 && stride == 1) run_rectangle<Epilogue, 5, 1>(w, rectangle);
  else if (taps == 5 && stride == 2) run_rectangle<Epilogue, 5, 2>(w, rectangle);
  else run_rectangle<Epilogue>(w, rectangle);
}

void quantized(const LayerProblem& p, const LayerRange& range) {
  if (!covers(p)) return kReferenceKernels.depthwise.quantized(p, range);
  bool fast = false;
  for_each_group(
      p, range,
      [&](Work& w, int64_t sample) {
        start_outputs(w, sample);
        fast = w.s->valid && w.prepare_fast();
      },
      [&](Work& w, const Rectangle& r) {
        const Group& g = w.g;
        const int64_t columns = r.x_end - r.x_begin;
        const auto row = [&](int64_t y) { return ((r.sample * p.out_height + y) * p.out_width + r.x_begin) * p.shape.out_channels + g.channel; };
        if (!w.s->valid) {
          for (int64_t y = r.y_begin; y < r.y_end; ++y)
            for (int64_t x = 0; x < columns; ++x)
              _mm512_mask_storeu_epi8(p.y + row(y) + x * p.shape.out_channels, first_lanes64(g.channels), _mm512_setzero_si512());
          return;
        }
        if (!fast) run_rectangle<AnyCodes>(w, r);
        else if (!w.relu()) run_fast<FastCodes<false, Clamp::any>>(w, r);
        else if (g.channels == kVector) run_fast<FastCodes<true, Clamp::relu>>(w, r);
        else run_fast<FastCodes<false, Clamp::relu>>(w, r);
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
  for_each_group(
      p, range, start_outputs,
      [&](Work& w, const Rectangle& r) {
        if (!fast) run_rectangle<AnyRange>(w, r);
        else if (w.g.channels == kVector) run_fast<FastRange<true>>(w, r);
        else run_fast<FastRange<false>>(w, r);
      },
      [&](Work& w) {
        atomic_widen(p.range + 2 * (w.s - p.samples), w.lo, w.hi);
        w.lo = kInfinity;
        w.hi = -kInfinity;
      });
}

}  // namespace

void install_depthwise_avx512vnni(Kernels& table) { table.depthwise = {quantized, to_float, find_range}; }

}  // namespace probquant
