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
// Two passes over a strip, two parts each (the first keeps 16-bit codes and clip signs in L1), so that the weights of a 3x3
// kernel stay in registers: 2 rows x 3 columns x 2 parts = 12. Register tile: 2 rows x 1 column or 1 row x 2 columns, times
// 2 parts: 4 accumulators, and 4 values of the tile before, whose epilogue surrounds this tile's dot products. The rest
// holds bounds, zero point, moments and clip counts; two floats and a correction per part and lane come from L1. Other
// kernels read their weights from L1, once for twice the columns.
// L1: a strip and what the first pass keeps have at most 16 KB each (kStripQuads), the weights of a group 2 x steps x 256
// bytes (1.5 KB for 3x3).
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
  float lower_edge, upper_edge;  ///< beyond these a value is clipped (fast path)
  uint8_t lowest, highest;       ///< codes of the activation's bounds (fast path)
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

  /// Whether the activation's bounds and the saturation may act on codes, after the conversion: every t stays far inside
  /// int32 and is no NaN, and both bounds are within reach of the code range. rint and saturation are monotone, so clamping
  /// before or after them gives the same code.
  bool prepare_fast() {
    const float z = static_cast<float>(s->y_zero_point), low = -z - 0.5f, high = 255.5f - z;
    if (p.activation != Activation::clamp || p.profiled_bounds() || p.residual || !(s->activation_lo <= high) || !(s->activation_hi >= low)) return false;
    const __m512 largest = _mm512_set1_ps(static_cast<float>(p.layout.taps * 255 * 127));
    for (int i = 0; i < kParts; ++i) {
      const __m512 reach = _mm512_fmadd_ps(_mm512_abs_ps(_mm512_load_ps(multiplier[i])), largest, _mm512_abs_ps(_mm512_load_ps(bias[i])));
      if (_mm512_cmp_ps_mask(reach, _mm512_set1_ps(1e6f), _CMP_LT_OQ) != 0xffff) return false;
    }
    lower_edge = s->activation_lo < low ? low : -kInfinity;
    upper_edge = s->activation_hi > high ? high : kInfinity;
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
// Epilogues: first() takes the accumulators of parts 0 and 1 of a vector of outputs, second() those of 2 and 3 and stores,
// finish() hands over what registers summed up

/// Requantization with the activation's bounds on codes (see Work::prepare_fast). The clip test is a subtraction from the
/// edge whose sign bits are packed along with the codes and counted in bytes: a compare into a mask register costs twice
/// as much. `kFull`: no mask and one slot. `kClipsLow`: values may be clipped at the low end too, which a ReLU rules out.
template <bool kFull, bool kClipsLow>
struct FastCodes {
  static constexpr int kKept = 2;  ///< vectors that the first half leaves per vector of outputs
  static constexpr int64_t kFlushClippedAfter = 255;
  Work* w;
  uint8_t* y;
  __m512 upper, lower;
  __m512i zero_point, lowest, highest;
  CodeSums sums;
  __m512i clipped = _mm512_setzero_si512();  ///< counts in bytes
  int64_t pending = 0;

  explicit FastCodes(Work& work)
      : w(&work),
        y(work.p.y),
        upper(_mm512_set1_ps(work.upper_edge)),
        lower(_mm512_set1_ps(work.lower_edge)),
        zero_point(_mm512_set1_epi16(static_cast<int16_t>(work.s->y_zero_point))),
        lowest(_mm512_set1_epi8(static_cast<char>(work.lowest))),
        highest(_mm512_set1_epi8(static_cast<char>(work.highest))) {}

  struct Codes {
    __m512i q;        ///< 16 bits, not yet saturated to 8
    __m512i outside;  ///< 16 bits, negative where clipped
  };
  struct Values {
    __m512 t[2];
  };
  template <int kHalf>
  __attribute__((always_inline)) Values values(const __m512i (&acc)[2]) const {
    Values v;
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
      v.t[j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[j]), _mm512_load_ps(w->multiplier[2 * kHalf + j]), _mm512_load_ps(w->bias[2 * kHalf + j]));
    return v;
  }
  __attribute__((always_inline)) Codes codes(const Values& v) const {
    __m512i q[2], outside[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      outside[j] = _mm512_castps_si512(_mm512_sub_ps(upper, v.t[j]));
      if (kClipsLow) outside[j] = _mm512_or_si512(outside[j], _mm512_castps_si512(_mm512_sub_ps(v.t[j], lower)));
      q[j] = _mm512_cvtps_epi32(v.t[j]);
    }
    return {_mm512_adds_epi16(_mm512_packs_epi32(q[0], q[1]), zero_point), _mm512_packs_epi32(outside[0], outside[1])};
  }

  __attribute__((always_inline)) void first(const Values& v, const Place&, __m512i* kept) const {
    const Codes c = codes(v);
    _mm512_store_si512(kept, c.q);
    _mm512_store_si512(kept + 1, c.outside);
  }
  __attribute__((always_inline)) void second(const Values& v, const Place& place, const __m512i* kept) {
    const Codes c = codes(v);
    __m512i q = _mm512_packus_epi16(_mm512_load_si512(kept), c.q);
    q = _mm512_min_epu8(_mm512_max_epu8(q, lowest), highest);
    __m512i outside = _mm512_packs_epi16(_mm512_load_si512(kept + 1), c.outside);
    outside = _mm512_and_si512(_mm512_srli_epi16(outside, 7), _mm512_set1_epi8(1));
    if (kFull) {
      _mm512_storeu_si512(y + place.at, q);
    } else {
      store_codes(y, w->g, place, q);
      q = _mm512_maskz_mov_epi8(place.mask, q);
      outside = _mm512_maskz_mov_epi8(place.mask, outside);
    }
    clipped = _mm512_add_epi8(clipped, outside);
    sums.add(q);
  }

  /// After at most 2 * kStripQuads vectors.
  void end_strip(int64_t vectors) {
    static_assert(4 * kStripQuads <= kFlushClippedAfter + 1, "a byte counts two strips");
    pending += vectors;
    if (pending > kFlushClippedAfter - 2 * kStripQuads) flush();
  }
  void flush() {
    sums.flush(w->sum, w->squares);
    w->clipped += _mm512_reduce_add_epi64(_mm512_sad_epu8(clipped, _mm512_setzero_si512()));
    clipped = _mm512_setzero_si512();
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
  static constexpr int kKept = 2;
  Work* w;
  explicit OneByOne(Work& work) : w(&work) {}

  struct Values {
    __m512i acc[2];
  };
  template <int>
  Values values(const __m512i (&acc)[2]) const {
    return {{acc[0], acc[1]}};
  }
  void first(const Values& v, const Place&, __m512i* kept) {
    _mm512_store_si512(kept, v.acc[0]);
    _mm512_store_si512(kept + 1, v.acc[1]);
  }
  void second(const Values& v, const Place& place, const __m512i* kept) {
    static_cast<Derived*>(this)->one(VectorOfParts{{kept[0], kept[1], v.acc[0], v.acc[1]}}, place);
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

struct Accumulators : OneByOne<Accumulators> {
  __m512 lo = _mm512_set1_ps(kInfinity), hi = _mm512_set1_ps(-kInfinity);
  __mmask16 not_numbers = 0;
  explicit Accumulators(Work& work) : OneByOne(work) {}

  __attribute__((noinline)) void one(VectorOfParts acc, Place place) {
    __m512 y[kParts];
    output_values(*w, acc, place, y);
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

/// The weights of two parts. Of three taps they stay in registers, else each step reads them.
template <int kHalf, bool kThreeTaps, int R>
struct HalfWeights {
  const int8_t* at;
  __m512i taps[kThreeTaps ? 3 : 1][R][2];

  explicit HalfWeights(const Group& g) : at(g.weights[0] + 2 * kHalf * kVector) {
    for (int kx = 0; kx < 3 && kThreeTaps; ++kx)
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < 2; ++j) taps[kx][r][j] = load(kx, r, j);
  }
  __attribute__((always_inline)) __m512i load(int64_t step, int r, int j) const {
    return _mm512_load_si512(at + r * kMaxSteps * kQuadBytes + step * kQuadBytes + j * kVector);
  }
};

/// The accumulators of R rows x T columns, parts 2 kHalf and 2 kHalf + 1. `column` is the strip at the first kernel column
/// of the first output column.
template <int kHalf, bool kThreeTaps, int R, int T>
__attribute__((always_inline)) inline void accumulate(const Work& w, const HalfWeights<kHalf, kThreeTaps, R>& weights, const uint8_t* column,
                                                      int64_t tap_step, int64_t column_step, __m512i (&acc)[R][T][2]) {
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j)
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) acc[r][t][j] = _mm512_load_si512(w.correction[2 * kHalf + j]);
  column += 2 * kHalf * kVector;
  if (kThreeTaps) {
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j)
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const __m512i v = _mm512_load_si512(column + kx * tap_step + t * column_step + j * kVector);
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) dot(acc[r][t][j], v, weights.taps[kThreeTaps ? kx : 0][r][j]);
        }
    return;
  }
  int64_t kx = w.p.layout.kernel_width, step = 0;
  do {
    const uint8_t* x = column;
    int64_t quad = w.p.layout.column_steps;
    do {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        __m512i rows[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) rows[r] = weights.load(step, r, j);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const __m512i v = _mm512_load_si512(x + t * column_step + j * kVector);
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) dot(acc[r][t][j], v, rows[r]);
        }
      }
      x += kQuadBytes;
      ++step;
    } while (--quad > 0);
    column += tap_step;
  } while (--kx > 0);
}

/// One pass over a strip: parts 2 kHalf and 2 kHalf + 1 of `columns` output columns. `kept` has R * Epilogue::kKept vectors
/// per column.
template <int kHalf, int R, bool kThreeTaps, class Epilogue>
__attribute__((always_inline)) inline void run_half(const Work& w, const uint8_t* column, int64_t tap_step, int64_t column_step, int64_t columns,
                                                    const Place (&first)[R], __m512i* kept, Epilogue& epilogue) {
  const HalfWeights<kHalf, kThreeTaps, R> weights(w.g);
  Place place[R];
  for (int r = 0; r < R; ++r) place[r] = first[r];
  const int64_t channels = w.p.shape.in_channels;
  // A tile's dot products stand between the two halves of the epilogue of the tile before, which fills the pipes better
  // than program order would: the scheduler's window is shorter than a tile's latency.
  const auto tiles = [&](auto size) __attribute__((always_inline)) {
    constexpr int T = decltype(size)::value;
    if (columns < T) return;
    __m512i acc[R][T][2];
    typename Epilogue::Values values[R][T];
    const auto dot_products = [&]() __attribute__((always_inline)) {
      accumulate<kHalf, kThreeTaps>(w, weights, column, tap_step, column_step, acc);
      column += T * column_step;
      columns -= T;
    };
    const auto scale = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) values[r][t] = epilogue.template values<kHalf>(acc[r][t]);
    };
    const auto finish = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          if (kHalf == 0) epilogue.first(values[r][t], place[r], kept);
          else epilogue.second(values[r][t], place[r], kept);
          kept += Epilogue::kKept;
          place[r].at += channels;
        }
    };
    dot_products();
    while (columns >= T) {
      scale();
      dot_products();
      finish();
    }
    scale();
    finish();
  };
  constexpr int kTile = (kThreeTaps ? 2 : 4) / R;
  tiles(Size<kTile>{});
  if (kTile > 1) tiles(Size<1>{});
}

/// Outputs of `rows` image rows from y (at most R per slot), columns [x_begin, x_end) of a rectangle's sample.
template <int R, bool kThreeTaps, class Epilogue>
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
  __m512i kept[kStripQuads * R * Epilogue::kKept];
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
    run_half<0, R, kThreeTaps>(w, strip, tap_step, column_step, end - begin, places, kept, epilogue);
    run_half<1, R, kThreeTaps>(w, strip, tap_step, column_step, end - begin, places, kept, epilogue);
    epilogue.end_strip(R * (end - begin));
  }
  state = epilogue;
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

/// Constants of output_value, and of layer_value.
void start_outputs(Work& w, int64_t sample) { w.start(sample, w.p.activation != Activation::clamp); }
void start_values(Work& w, int64_t sample) { w.start(sample, true); }

void quantized(const LayerProblem& p, const LayerRange& range) {
  if (!covers(p)) return kReferenceKernels.depthwise.quantized(p, range);
  const bool three_taps = p.layout.steps == 3 && p.layout.kernel_width == 3;  // 3x3 above all
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

void to_float(const LayerProblem& p, const LayerRange& range) {
  if (!covers(p)) return kReferenceKernels.depthwise.to_float(p, range);
  for_each_group(p, range, start_values, run_rectangle<Floats>, [](Work&) {});
}

void accumulate_range(const LayerProblem& p, const LayerRange& range) {
  if (!covers(p)) return kReferenceKernels.depthwise.accumulate(p, range);
  for_each_group(p, range, start_outputs, run_rectangle<Accumulators>, [&](Work& w) {
    atomic_widen(p.range + 2 * (w.s - p.samples), w.lo, w.hi);
    w.lo = kInfinity;
    w.hi = -kInfinity;
  });
}

}  // namespace

void install_depthwise_avx512vnni(Kernels& table) { table.depthwise = {quantized, to_float, accumulate_range}; }

}  // namespace probquant
