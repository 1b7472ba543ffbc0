// Attention, AMX-INT8. Both products are of codes as they are (TDPBUUD), which needs neither 16 bits nor a copy of the queries: their tiles are
// loaded from where they lie. Zero points are taken off behind the products: from the logits in float, where no term of a head of up to
// kMostDims reaches 2^24, so that everything is exact; from the output as the sum of weights times the values' zero points. Heads that
// are not a multiple of a tile's bytes, longer ones and few keys are left to the tier below.
//
// Register tile: 2 parts of up to 16 queries x 2 blocks of 16 keys (or dimensions of values), as in dense.cpp. Per call and head of 64, 197
// keys: 52 + 64 products of at most 16 clocks. What takes the time is the softmax between them.
#include "../avx512vnni/sums.h"
#include "tiles.h"

namespace probquant {
namespace {

constexpr int64_t kColumns = 16, kPartRows = 16, kWeightTile = 16 * kTileBytes, kMostDims = 128, kLeastKeys = 32;

/// Of the tier below.
decltype(Kernels::attention) attention_elsewhere;
decltype(Kernels::attention_pack) attention_pack_elsewhere;

bool serves(const AttentionShape& s) { return s.head_dim % kTileBytes == 0 && s.head_dim <= kMostDims && s.keys >= kLeastKeys; }

/// What a head's share of the workspace holds here; half of what 16-bit values take, and more room than the rest needs.
struct Packed {
  int64_t blocks, dim_steps;  ///< of keys
  int64_t key_steps;          ///< of values
  uint8_t* keys;              ///< [blocks][dim steps] tiles of 64 dimensions x 16 keys
  float* sums;                ///< [keys]: of k - its zero point
  float* zero_points;         ///< [keys]
  uint8_t* values;            ///< [blocks of dimensions][key steps] tiles of 64 keys x 16 dimensions

  Packed(const AttentionProblem& p, int64_t image, int64_t head)
      : blocks(p.keys().blocks()),
        dim_steps(p.shape.head_dim / kTileBytes),
        key_steps((p.shape.keys + kTileBytes - 1) / kTileBytes),
        keys(reinterpret_cast<uint8_t*>(p.packed_keys(image, head))),
        sums(reinterpret_cast<float*>(keys + blocks * dim_steps * kWeightTile)),
        zero_points(sums + blocks * kColumns),
        values(reinterpret_cast<uint8_t*>(p.packed_values(image, head))) {}
};

inline int32_t sum_of_codes(const uint8_t* q, int64_t count) {  // a multiple of 64
  __m512i sum = _mm512_setzero_si512();
  for (int64_t d = 0; d < count; d += 64) sum = _mm512_add_epi64(sum, _mm512_sad_epu8(_mm512_loadu_si512(q + d), _mm512_setzero_si512()));
  return static_cast<int32_t>(_mm512_reduce_add_epi64(sum));
}
inline int32_t clamped(int32_t zero_point) { return zero_point < 0 ? 0 : zero_point > 255 ? 255 : zero_point; }

void attention_pack(const AttentionProblem& p, int64_t image, int64_t head) {
  if (!serves(p.shape)) return attention_pack_elsewhere(p, image, head);
  const Packed packed(p, image, head);
  const int64_t keys = p.shape.keys, dims = p.shape.head_dim, channels = p.shape.channels(), first = image * keys, offset = head * dims;
  __builtin_memset(packed.keys + (packed.blocks - 1) * packed.dim_steps * kWeightTile, 0, static_cast<size_t>(packed.dim_steps * kWeightTile));
  for (int64_t j = 0; j < keys; ++j) {
    const uint8_t* q = p.key.q + (first + j) * channels + offset;
    const int32_t zero_point = clamped(p.key.zero_point[first + j]);
    packed.sums[j] = static_cast<float>(sum_of_codes(q, dims) - static_cast<int32_t>(dims) * zero_point);
    packed.zero_points[j] = static_cast<float>(zero_point);
    uint8_t* to = packed.keys + j / kColumns * packed.dim_steps * kWeightTile + j % kColumns * 4;
    for (int64_t d = 0; d < dims; d += 4, to += kTileBytes) __builtin_memcpy(to, q + d, 4);
  }
  for (int64_t j = 0; j < packed.key_steps * kTileBytes; j += 4)  // 4 keys' values are interleaved
    for (int64_t d = 0; d < dims; d += kColumns) {
      const auto row = [&](int64_t i) {
        return j + i < keys ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p.value.q + (first + j + i) * channels + offset + d)) : _mm_setzero_si128();
      };
      const __m128i a = row(0), b = row(1), c = row(2), e = row(3);
      const __m128i low_ab = _mm_unpacklo_epi8(a, b), high_ab = _mm_unpackhi_epi8(a, b), low_ce = _mm_unpacklo_epi8(c, e), high_ce = _mm_unpackhi_epi8(c, e);
      auto* to = reinterpret_cast<__m128i*>(packed.values + (d / kColumns * packed.key_steps + j / kTileBytes) * kWeightTile + j % kTileBytes / 4 * kTileBytes);
      _mm_storeu_si128(to, _mm_unpacklo_epi16(low_ab, low_ce));
      _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(low_ab, low_ce));
      _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(high_ab, high_ce));
      _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(high_ab, high_ce));
    }
}

/// Rows of a call in one or two tiles of the same size; those of two may overlap.
struct Parts {
  int64_t rows, second;  ///< of a tile; the first of the second tile, 0: there is none

  explicit Parts(int64_t count) : rows(count > kPartRows ? (count + 1) / 2 : count), second(count > kPartRows ? count - rows : 0) {}
};

/// out[rows][blocks * 16] = a b: rows of a `a_stride` bytes apart, [steps * 64]; tiles of b [blocks][steps].
void multiply(const Parts& parts, const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t blocks, int64_t steps, int32_t* out, int64_t out_stride) {
  alignas(64) static constexpr uint8_t zeros[kTileBytes] = {};
  const int64_t out_bytes = 4 * out_stride;
  const uint8_t* const a_second = a + parts.second * a_stride;
  for (int64_t block = 0; block < blocks; block += 2, b += 2 * steps * kWeightTile) {
    const bool two = block + 1 < blocks, second = parts.second > 0;
    load_tile<0>(zeros, 0);
    if (two) load_tile<1>(zeros, 0);
    if (second) load_tile<2>(zeros, 0);
    if (second && two) load_tile<3>(zeros, 0);
    for (int64_t step = 0; step < steps; ++step) {
      load_tile<4>(a + step * kTileBytes, a_stride);
      load_tile<6>(b + step * kWeightTile, kTileBytes);
      multiply_unsigned_tiles<0, 4, 6>();
      if (two) {
        load_tile<7>(b + (steps + step) * kWeightTile, kTileBytes);
        multiply_unsigned_tiles<1, 4, 7>();
      }
      if (second) {
        load_tile<5>(a_second + step * kTileBytes, a_stride);
        multiply_unsigned_tiles<2, 5, 6>();
        if (two) multiply_unsigned_tiles<3, 5, 7>();
      }
    }
    int32_t *to = out + block * kColumns, *to_second = to + parts.second * out_stride;
    store_tile<0>(to, out_bytes);
    if (two) store_tile<1>(to + kColumns, out_bytes);
    if (second) store_tile<2>(to_second, out_bytes);
    if (second && two) store_tile<3>(to_second + kColumns, out_bytes);
  }
}

/// From the int32 products of one query in w to its weights in 8 bits (zeros up to a multiple of 64). Returns the factor of their products with
/// the values, and in `offset` their sum with the values' zero points.
float weights_of(float* w, int64_t keys, const Packed& packed, float query_zero_point, float query_sum, const float* key_scale, const float* value_scale,
                 const int32_t* value_zero_point, float scale, uint8_t* codes, int32_t& offset) {
  const __m512 zero_point = _mm512_set1_ps(query_zero_point), sum = _mm512_set1_ps(query_sum);
  __m512 largest = _mm512_set1_ps(-__builtin_inff());
  for_each_vector(keys, [&](int64_t j, __mmask16 lanes) {
    __m512 product = _mm512_cvtepi32_ps(_mm512_loadu_si512(w + j));
    product = _mm512_fnmadd_ps(zero_point, _mm512_maskz_loadu_ps(lanes, packed.sums + j), product);
    product = _mm512_fnmadd_ps(_mm512_maskz_loadu_ps(lanes, packed.zero_points + j), sum, product);
    const __m512 t = _mm512_mul_ps(product, _mm512_maskz_loadu_ps(lanes, key_scale + j));
    _mm512_storeu_ps(w + j, t);
    largest = _mm512_mask_max_ps(largest, lanes, t, largest);
  });
  const auto [ceiling, total] = weigh(w, keys, value_scale, scale, largest);
  const __m512 inverse = _mm512_set1_ps(255.0f / ceiling), zero = _mm512_setzero_ps(), full = _mm512_set1_ps(255.0f);
  const __m512i highest = _mm512_set1_epi32(255);
  __m512i offsets = _mm512_setzero_si512();
  for_each_vector(keys, [&](int64_t j, __mmask16 lanes) {
    const __m512i code = _mm512_cvtps_epi32(clamp_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, w + j), inverse), zero, full));
    const __m512i z = _mm512_min_epi32(_mm512_max_epi32(_mm512_maskz_loadu_epi32(lanes, value_zero_point + j), _mm512_setzero_si512()), highest);
    offsets = _mm512_add_epi32(offsets, _mm512_madd_epi16(code, z));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + j), _mm512_cvtepi32_epi8(code));
  });
  for (int64_t j = (keys + 15) / 16 * 16; j < packed.key_steps * kTileBytes; j += 16) _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + j), _mm_setzero_si128());
  offset = _mm512_reduce_add_epi32(offsets);
  return ceiling / 255.0f / total;
}

void attention(const AttentionProblem& p, int64_t image, int64_t begin, int64_t end, const AttentionScratch& s, float* y) {
  const AttentionShape& shape = p.shape;
  if (!serves(shape)) return attention_elsewhere(p, image, begin, end, s, y);
  const int64_t rows = end - begin, channels = shape.channels(), first = image * shape.queries + begin, first_key = image * shape.keys;
  const Parts parts(rows);
  TileConfiguration tiles;
  for (int tile = 0; tile < 6; ++tile) tiles.set(tile, parts.rows, kTileBytes);
  for (int tile = 6; tile < 8; ++tile) tiles.set(tile, 16, kTileBytes);
  configure_tiles(tiles);
  auto* const weights = reinterpret_cast<uint8_t*>(s.weights);
  const int64_t weights_stride = 2 * s.key_stride;
  int32_t offsets[kAttentionQueries];
  for (int64_t head = 0; head < shape.heads; ++head) {
    const Packed packed(p, image, head);
    const uint8_t* const query = p.query.q + first * channels + head * shape.head_dim;
    multiply(parts, query, channels, packed.keys, packed.blocks, packed.dim_steps, reinterpret_cast<int32_t*>(s.logits), s.key_stride);
    for (int64_t i = 0; i < rows; ++i)
      s.factors[i] = weights_of(s.logits + i * s.key_stride, shape.keys, packed, static_cast<float>(clamped(p.query.zero_point[first + i])),
                                static_cast<float>(sum_of_codes(query + i * channels, shape.head_dim)), p.key.scale + first_key, p.value.scale + first_key,
                                p.value.zero_point + first_key, p.query.scale[first + i] * p.scale, weights + i * weights_stride, offsets[i]);
    multiply(parts, weights, weights_stride, packed.values, shape.head_dim / kColumns, packed.key_steps, s.products, s.dim_stride);
    for (int64_t i = 0; i < rows; ++i) {
      const __m512 factor = _mm512_set1_ps(s.factors[i]);
      const __m512i offset = _mm512_set1_epi32(offsets[i]);
      for (int64_t d = 0; d < shape.head_dim; d += 16) {
        const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(s.products + i * s.dim_stride + d), offset);
        _mm512_storeu_ps(y + i * channels + head * shape.head_dim + d, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), factor));
      }
    }
  }
  release_tiles();
}

}  // namespace

void install_attention_amx(Kernels& table) {
  attention_elsewhere = table.attention;
  attention_pack_elsewhere = table.attention_pack;
  table.attention = attention;
  table.attention_pack = attention_pack;
}

}  // namespace probquant
