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
// Register tile: 2 rows x 2 columns or 1 row x 4 columns, times 4 parts: 16 accumulators. A step (one quad of one kernel
// column) needs 4 strip loads per column and 4 weights per row for 16 vpdpbusd. The epilogue adds 3 registers of moments
// and clip counts, 6 of constants, and reads the two floats per part and lane from L1.
// L1: a strip has at most kStripQuads x 256 bytes = 16 KB, the weights of a group 2 x steps x 256 (1.5 KB for 3x3).
#include "../depthwise_geometry.h"
#include "epilogue.h"

#include <cstddef>

namespace probquant {
namespace {

constexpr int64_t kVector = 64, kParts = 4, kQuadBytes = kParts * kVector;
constexpr int64_t kMaxSteps = 32;    // of the stream; 9x9 has 27
constexpr int64_t kMaxQuads = 8;     // per kernel column
constexpr int64_t kStripQuads = 64;  // interleaved (column, quad) pairs held at once

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
  float lower_edge, upper_edge;  ///< beyond these a value is clipped (fast path)
  uint8_t lowest, highest;       ///< codes of the activation's bounds (fast path)
  int64_t sum = 0, squares = 0, clipped = 0;
  float lo = kInfinity, hi = -kInfinity;

  Work(const LayerProblem& problem, const Group& group) : p(problem), g(group) {}

  /// Constants of one sample: t = multiplier * accumulator + bias.
  void start(int64_t sample, float scale_factor, float bias_factor) {
    s = p.samples + sample;
    const __m512i minus_zero_point = _mm512_set1_epi32(-s->x_zero_point);
    for (int i = 0; i < kParts; ++i) {
      _mm512_store_si512(correction[i], _mm512_mullo_epi32(minus_zero_point, _mm512_load_si512(g.weight_sum[i])));
      _mm512_store_ps(multiplier[i], _mm512_mul_ps(_mm512_set1_ps(scale_factor), _mm512_load_ps(g.scale[i])));
      _mm512_store_ps(bias[i], _mm512_mul_ps(_mm512_set1_ps(bias_factor), _mm512_load_ps(g.bias[i])));
    }
  }

  /// Whether the activation's bounds and the saturation may act on codes after the conversion: every t stays far inside
  /// int32 and is no NaN, and both bounds are within reach of the code range. rint and saturation are monotone, so
  /// clamping before or after them gives the same code.
  bool prepare_fast() {
    const float z = static_cast<float>(s->y_zero_point), lo_edge = -z - 0.5f, hi_edge = 255.5f - z;
    if (p.activation != Activation::clamp || p.residual || !(s->activation_lo <= hi_edge) || !(s->activation_hi >= lo_edge)) return false;
    const __m512 largest = _mm512_set1_ps(static_cast<float>(p.layout.taps * 255 * 127));
    for (int i = 0; i < kParts; ++i) {
      const __m512 reach = _mm512_fmadd_ps(_mm512_abs_ps(_mm512_load_ps(multiplier[i])), largest, _mm512_abs_ps(_mm512_load_ps(bias[i])));
      if (_mm512_cmp_ps_mask(reach, _mm512_set1_ps(1e6f), _CMP_LT_OQ) != 0xffff) return false;
    }
    lower_edge = s->activation_lo < lo_edge ? lo_edge : -kInfinity;
    upper_edge = s->activation_hi > hi_edge ? hi_edge : kInfinity;
    const Rounding rounding(s->y_zero_point);
    lowest = static_cast<uint8_t>(_mm512_cvtsi512_si32(rounding.codes(_mm512_set1_ps(s->activation_lo))));
    highest = static_cast<uint8_t>(_mm512_cvtsi512_si32(rounding.codes(_mm512_set1_ps(s->activation_hi))));
    return true;
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
  if (g.slots == 1) return _mm512_mask_storeu_epi8(y + place.at, place.mask, q);
  alignas(64) uint8_t codes[kVector];
  _mm512_store_si512(codes, q);
  for (int64_t j = 0; j < 4; ++j) {
    const BlockPlace block = block_place(g, place, j);
    _mm_mask_storeu_epi8(y + block.at, block.mask, _mm_load_si128(reinterpret_cast<const __m128i*>(codes + 16 * j)));
  }
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
// Epilogues: half(acc) takes the accumulators of half of a tile's parts, store() ends the tile, finish() hands over what
// registers summed up

/// Requantization with everything but the clip test after the conversion (see Work::prepare_fast). `kFull`: no mask and
/// one slot. `kBothEdges`: values may be clipped at the low end too, which a ReLU rules out.
template <bool kFull, bool kBothEdges>
struct FastCodes {
  Work* w;
  CodeSums sums;
  int64_t pending = 0;
  __m512i clipped[kParts] = {};  // one chain of masked subtractions per part

  explicit FastCodes(Work& work) : w(&work) {}

  template <int R, int T>
  struct Tile {
    __m512i codes[R][T], packed[R][T][2];  ///< of the part before; 16-bit codes of parts 0 and 1, of 2 and 3
  };

  template <int kPart, int R, int T>
  __attribute__((always_inline)) void part(const __m512i (&acc)[R][T], const Place (&places)[R][T], Tile<R, T>& tile) {
    const __m512 upper = _mm512_set1_ps(w->upper_edge), lower = _mm512_set1_ps(w->lower_edge);
    const __m512i minus_one = _mm512_set1_epi32(-1), zero_point = _mm512_set1_epi16(static_cast<int16_t>(w->s->y_zero_point));
    const __m512 multiplier = _mm512_load_ps(w->multiplier[kPart]), bias = _mm512_load_ps(w->bias[kPart]);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m512 v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][t]), multiplier, bias);
        __mmask16 outside = _mm512_cmp_ps_mask(v, upper, _CMP_GT_OQ);
        if (kBothEdges) outside = static_cast<__mmask16>(outside | _mm512_cmp_ps_mask(v, lower, _CMP_LT_OQ));
        if (!kFull) outside = static_cast<__mmask16>(outside & part_mask(places[r][t].mask, kPart));
        clipped[kPart] = _mm512_mask_sub_epi32(clipped[kPart], outside, clipped[kPart], minus_one);
        const __m512i codes = _mm512_cvtps_epi32(v);
        if (kPart % 2) tile.packed[r][t][kPart / 2] = _mm512_adds_epi16(_mm512_packs_epi32(tile.codes[r][t], codes), zero_point);
        else tile.codes[r][t] = codes;
      }
  }

  template <int R, int T>
  __attribute__((always_inline)) void store(const Tile<R, T>& tile, const Place (&places)[R][T]) {
    const __m512i lowest = _mm512_set1_epi8(static_cast<char>(w->lowest)), highest = _mm512_set1_epi8(static_cast<char>(w->highest));
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        __m512i q = _mm512_packus_epi16(tile.packed[r][t][0], tile.packed[r][t][1]);
        q = _mm512_min_epu8(_mm512_max_epu8(q, lowest), highest);
        const Place& place = places[r][t];
        if (kFull) {
          _mm512_storeu_si512(w->p.y + place.at, q);
        } else {
          store_codes(w->p.y, w->g, place, q);
          q = _mm512_maskz_mov_epi8(place.mask, q);
        }
        sums.add(q);
      }
    pending += R * T;
    if (pending > CodeSums::kFlushAfter - 8) flush();
  }

  void flush() {
    sums.flush(w->sum, w->squares);
    for (__m512i& counts : clipped) {
      w->clipped += _mm512_reduce_add_epi32(counts);
      counts = _mm512_setzero_si512();
    }
    pending = 0;
  }
  void finish() { flush(); }
};

struct VectorOfParts {
  __m512i part[kParts];
};

/// What the other epilogues share: they take one vector of outputs at a time.
template <class Derived>
struct OneByOne {
  Work* w;
  explicit OneByOne(Work& work) : w(&work) {}

  template <int R, int T>
  struct Tile {
    VectorOfParts acc[R][T];
  };
  template <int kPart, int R, int T>
  void part(const __m512i (&acc)[R][T], const Place (&)[R][T], Tile<R, T>& tile) {
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) tile.acc[r][t].part[kPart] = acc[r][t];
  }
  template <int R, int T>
  void store(const Tile<R, T>& tile, const Place (&places)[R][T]) {
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) static_cast<Derived*>(this)->one(tile.acc[r][t], places[r][t]);
  }
  void finish() {}
};

/// Requantization in full: curved activations, residuals, values beyond int32, NaN.
struct AnyCodes : OneByOne<AnyCodes> {
  using OneByOne::OneByOne;

  __attribute__((noinline)) void one(VectorOfParts acc, Place place) {
    const SampleEpilogue& s = *w->s;
    const Rounding rounding(s.y_zero_point);
    __m512i residual[kParts];
    if (w->p.residual) load_residual(w->p.residual, s.residual_zero_point, w->g, place, residual);
    for (int i = 0; i < kParts; ++i) {
      __m512 t = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc.part[i]), _mm512_load_ps(w->multiplier[i]), _mm512_load_ps(w->bias[i]));
      if (w->p.activation != Activation::clamp) {
        t = _mm512_mul_ps(activate_ps(w->p.activation, t), _mm512_set1_ps(s.inverse_scale));
      } else {
        if (w->p.residual) t = _mm512_fmadd_ps(_mm512_cvtepi32_ps(residual[i]), _mm512_set1_ps(s.residual_multiplier), t);
        t = clamp_ps(t, _mm512_set1_ps(s.activation_lo), _mm512_set1_ps(s.activation_hi));
      }
      w->clipped += __builtin_popcount(rounding.clipped(t) & part_mask(place.mask, i));
      acc.part[i] = rounding.codes(t);
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
  __m512i residual[kParts];
  if (w.p.residual) load_residual(w.p.residual, w.s->residual_zero_point, w.g, place, residual);
  for (int i = 0; i < kParts; ++i) {
    __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc.part[i]), _mm512_load_ps(w.multiplier[i]), _mm512_load_ps(w.bias[i]));
    if (w.p.residual) y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(residual[i]), _mm512_set1_ps(w.s->residual_scale), y);
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

struct Accumulators : OneByOne<Accumulators> {
  __m512 lo = _mm512_set1_ps(kInfinity), hi = _mm512_set1_ps(-kInfinity);
  __mmask16 not_numbers = 0;
  explicit Accumulators(Work& work) : OneByOne(work) {}

  __attribute__((noinline)) void one(VectorOfParts acc, Place place) {
    __m512 y[kParts];
    layer_values(*w, acc, place, y);
    for (int i = 0; i < kParts; ++i) {
      const __mmask16 mask = part_mask(place.mask, i);
      not_numbers = static_cast<__mmask16>(not_numbers | _mm512_mask_cmp_ps_mask(mask, y[i], y[i], _CMP_UNORD_Q));
      lo = _mm512_mask_min_ps(lo, mask, y[i], lo);
      hi = _mm512_mask_max_ps(hi, mask, y[i], hi);
    }
    store_dwords(w->p.accumulators, w->g, place, acc.part);
  }
  void finish() {
    const float low = not_numbers ? kNan : _mm512_reduce_min_ps(lo), high = _mm512_reduce_max_ps(hi);
    w->lo = low != low || low < w->lo ? low : w->lo;
    w->hi = high > w->hi ? high : w->hi;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Strips

/// An input row of one slot: column x starts at at + x * step; a padding row has step 0.
struct RowSource {
  const uint8_t* at;
  int64_t step;
};

template <int kSlots>
inline __m512i load_column(const RowSource* rows, int64_t x, __mmask64 mask) {
  const auto at = [&](int slot) { return rows[slot].at + x * rows[slot].step; };
  if (kSlots == 1) return _mm512_maskz_loadu_epi8(mask, at(0));
  if (kSlots == 2) {
    const auto half = static_cast<__mmask32>(mask);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi8(half, at(0))), _mm256_maskz_loadu_epi8(half, at(1)), 1);
  }
  const auto quarter = static_cast<__mmask16>(mask);
  __m512i v = _mm512_castsi128_si512(_mm_maskz_loadu_epi8(quarter, at(0)));
  v = _mm512_inserti32x4(v, _mm_maskz_loadu_epi8(quarter, at(1)), 1);
  v = _mm512_inserti32x4(v, _mm_maskz_loadu_epi8(quarter, at(2)), 2);
  return _mm512_inserti32x4(v, _mm_maskz_loadu_epi8(quarter, at(3)), 3);
}

/// Interleaves input columns [x, x + columns) of 4 rows into every `quads`-th quad of the strip.
template <int kSlots>
void interleave(const RowSource* rows, int64_t x, int64_t columns, int64_t width, __mmask64 mask, int32_t zero_point, int64_t quads, uint8_t* strip) {
  const int64_t step = quads * kQuadBytes;
  const int64_t first = x < 0 ? (-x < columns ? -x : columns) : 0;                  // strip columns before the image
  const int64_t last = width - x < columns ? (width - x > first ? width - x : first) : columns;  // and where it ends
  const __m512i padding = _mm512_set1_epi8(static_cast<char>(zero_point));
  const auto pad = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t part = 0; part < kParts; ++part) _mm512_store_si512(strip + i * step + part * kVector, padding);
  };
  pad(0, first);
  for (int64_t i = first; i < last; ++i) {
    const __m512i a = load_column<kSlots>(rows, x + i, mask), b = load_column<kSlots>(rows + kSlots, x + i, mask);
    const __m512i c = load_column<kSlots>(rows + 2 * kSlots, x + i, mask), d = load_column<kSlots>(rows + 3 * kSlots, x + i, mask);
    const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
    const __m512i ab_high = _mm512_unpackhi_epi8(a, b), cd_high = _mm512_unpackhi_epi8(c, d);
    uint8_t* out = strip + i * step;
    _mm512_store_si512(out, _mm512_unpacklo_epi16(ab, cd));
    _mm512_store_si512(out + kVector, _mm512_unpackhi_epi16(ab, cd));
    _mm512_store_si512(out + 2 * kVector, _mm512_unpacklo_epi16(ab_high, cd_high));
    _mm512_store_si512(out + 3 * kVector, _mm512_unpackhi_epi16(ab_high, cd_high));
  }
  pad(last, columns);
}

template <int kSize>
struct Size {
  static constexpr int value = kSize;
};

/// vpdpbusd in place. The intrinsic makes gcc copy all accumulators in every turn of the loop.
inline void dot(__m512i& accumulator, __m512i x, __m512i weights) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(accumulator) : "v"(x), "v"(weights));
}

/// The accumulators of R rows x T columns of one part. `column` is the strip at the first kernel column of the first
/// output column.
template <int kPart, bool kThreeTaps, int R, int T>
__attribute__((always_inline)) inline void accumulate(const Work& w, const uint8_t* column, int64_t tap_step, int64_t column_step,
                                                      __m512i (&acc)[R][T]) {
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) acc[r][t] = _mm512_load_si512(w.correction[kPart]);
  const int8_t* weights = w.g.weights[0] + kPart * kVector;
  column += kPart * kVector;
  const auto step = [&](const uint8_t* x) __attribute__((always_inline)) {
    __m512i rows[R];
    rows[0] = _mm512_load_si512(weights);
    if (R == 2) rows[R - 1] = _mm512_load_si512(weights + kMaxSteps * kQuadBytes);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const __m512i v = _mm512_load_si512(x + t * column_step);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) dot(acc[r][t], v, rows[r]);
    }
    weights += kQuadBytes;
  };
  if (kThreeTaps) {
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx) step(column + kx * tap_step);
    return;
  }
  int64_t kx = w.p.layout.kernel_width;
  do {
    const uint8_t* x = column;
    int64_t quad = w.p.layout.column_steps;
    do {
      step(x);
      x += kQuadBytes;
    } while (--quad > 0);
    column += tap_step;
  } while (--kx > 0);
}

/// Outputs of `rows` image rows from y (at most R per slot), columns [x_begin, x_end) of a rectangle's sample.
template <int R, bool kThreeTaps, class Epilogue>
void run_strip(Work& w, const Rectangle& rectangle, int64_t y, int64_t rows, const uint8_t* padding_row, Epilogue& kept) {
  Epilogue epilogue = kept;  // in registers
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
    const uint8_t* column = strip;
    int64_t ox = begin;
    const auto tile = [&](auto size) __attribute__((always_inline)) {
      constexpr int T = decltype(size)::value;
      Place places[R][T];
      for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) places[r][t] = {place[r].at + (ox + t) * channels, place[r].slot_step, place[r].mask};
      typename Epilogue::template Tile<R, T> outputs;
      const auto part = [&](auto index) __attribute__((always_inline)) {
        __m512i acc[R][T];
        accumulate<decltype(index)::value, kThreeTaps>(w, column, tap_step, column_step, acc);
        epilogue.template part<decltype(index)::value>(acc, places, outputs);
      };
      part(Size<0>{}), part(Size<1>{}), part(Size<2>{}), part(Size<3>{});
      epilogue.store(outputs, places);
      ox += T;
      column += T * column_step;
    };
    constexpr int kTile = 4 / R;
    while (ox + kTile <= end) tile(Size<kTile>{});
    if (kTile == 4 && ox + 2 <= end) tile(Size<2>{});
    if (ox < end) tile(Size<1>{});
  }
  kept = epilogue;
}

/// Runs a rectangle with one epilogue.
template <class Epilogue, bool kThreeTaps = false>
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
    if (most > w.g.slots) run_strip<2, kThreeTaps>(w, rectangle, y, rows, padding_row, epilogue);
    else run_strip<1, kThreeTaps>(w, rectangle, y, rows, padding_row, epilogue);
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

void quantized(const LayerProblem& p, const LayerRange& range) {
  if (!covers(p)) return kReferenceKernels.depthwise.quantized(p, range);
  const bool three_taps = p.layout.steps == 3 && p.layout.kernel_width == 3;  // 3x3 above all
  bool fast = false;
  for_each_group(
      p, range,
      [&](Work& w, int64_t sample) {
        const SampleEpilogue& s = p.samples[sample];
        const bool clamp = p.activation == Activation::clamp;
        w.start(sample, clamp ? s.multiplier : s.x_scale, clamp ? s.inverse_scale : 1.0f);
        fast = s.valid && w.prepare_fast();
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
        else if (g.channels != kVector) three_taps ? run_rectangle<FastCodes<false, true>, true>(w, r) : run_rectangle<FastCodes<false, true>>(w, r);
        else if (w.lower_edge > -kInfinity) three_taps ? run_rectangle<FastCodes<true, true>, true>(w, r) : run_rectangle<FastCodes<true, true>>(w, r);
        else three_taps ? run_rectangle<FastCodes<true, false>, true>(w, r) : run_rectangle<FastCodes<true, false>>(w, r);
        if (!p.channel_stats) return;
        int64_t* sums = p.stats + r.sample * (kStatsSample + 2 * p.shape.out_channels) + kStatsSample + g.channel;
        for (int64_t y = r.y_begin; y < r.y_end; ++y)
          add_channel_moments(p.y + row(y), columns, g.channels, p.shape.out_channels, sums, sums + p.shape.out_channels);
      },
      [](Work& w) { w.add_stats(); });
}

/// Constants of layer_value.
void start_values(Work& w, int64_t sample) { w.start(sample, w.p.samples[sample].x_scale, 1.0f); }

void to_float(const LayerProblem& p, const LayerRange& range) {
  if (!covers(p)) return kReferenceKernels.depthwise.to_float(p, range);
  for_each_group(p, range, start_values, run_rectangle<Floats>, [](Work&) {});
}

void accumulate_range(const LayerProblem& p, const LayerRange& range) {
  if (!covers(p)) return kReferenceKernels.depthwise.accumulate(p, range);
  for_each_group(p, range, start_values, run_rectangle<Accumulators>, [&](Work& w) {
    atomic_widen(p.range + 2 * (w.s - p.samples), w.lo, w.hi);
    w.lo = kInfinity;
    w.hi = -kInfinity;
  });
}

}  // namespace

void install_depthwise_avx512vnni(Kernels& table) { table.depthwise = {quantized, to_float, accumulate_range}; }

}  // namespace probquant
