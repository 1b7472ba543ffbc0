// Attention, AVX2. Both products are vpmaddwd on centred 16-bit values, so that no zero point is left to correct: register tiles
// of 6 queries x 16 columns, 12 accumulators, 2 packed operands, a broadcast pair and a product. The keys of a head (or its
// values) come from L2, block by block, and meet all queries of the call.
#include "epilogue.h"
#include "sums.h"

namespace probquant {
namespace {

constexpr int kRows = 6;

/// out[row][16] = sum over pairs of a[row] * b[.][16 columns].
template <int kCount>
void multiply_tile(const int16_t* a, int64_t a_stride, const int16_t* b, int64_t pairs, int32_t* out, int64_t out_stride) {
  __m256i acc[kCount][2];
#pragma GCC unroll 6
  for (int i = 0; i < kCount; ++i) acc[i][0] = acc[i][1] = _mm256_setzero_si256();
  for (const int16_t* const end = a + 2 * pairs; a < end; a += 2, b += 2 * PairLayout::kColumns) {
    const __m256i b0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)), b1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 16));
#pragma GCC unroll 6
    for (int i = 0; i < kCount; ++i) {
      int32_t pair;
      __builtin_memcpy(&pair, a + i * a_stride, 4);
      const __m256i v = _mm256_set1_epi32(pair);
      acc[i][0] = _mm256_add_epi32(acc[i][0], _mm256_madd_epi16(v, b0));
      acc[i][1] = _mm256_add_epi32(acc[i][1], _mm256_madd_epi16(v, b1));
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kCount; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * out_stride), acc[i][0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * out_stride + 8), acc[i][1]);
  }
}

/// out[rows][columns, padded to 16] = a b
void multiply(const int16_t* a, int64_t a_stride, int64_t rows, const int16_t* b, const PairLayout& layout, int32_t* out, int64_t out_stride) {
  using TileKernel = void (*)(const int16_t*, int64_t, const int16_t*, int64_t, int32_t*, int64_t);
  constexpr TileKernel kTiles[kRows] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<3>, multiply_tile<4>, multiply_tile<5>, multiply_tile<6>};
  for (int64_t block = 0; block < layout.blocks(); ++block, b += layout.block_size())
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t count = rows - row < kRows ? rows - row : kRows;
      kTiles[count - 1](a + row * a_stride, a_stride, b, layout.pairs(), out + row * out_stride + block * PairLayout::kColumns, out_stride);
    }
}

/// The first n of 16 codes less their zero point; zeros behind.
inline __m256i centred(const uint8_t* q, int64_t n, __m256i zero_point) {
  return keep_bytes(_mm256_sub_epi16(_mm256_cvtepu8_epi16(load_bytes16(q, n)), zero_point), 2 * n);
}

/// Centres a head's codes of one token: [count], and zeros up to a multiple of 16.
inline void centre(const uint8_t* q, int64_t count, int32_t zero_point, int16_t* to) {
  const __m256i z = _mm256_set1_epi16(static_cast<int16_t>(clamp_zero_point(zero_point)));
  for (int64_t d = 0; d < count; d += 16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d), centred(q + d, count - d, z));
}

/// A pair of a key's values is a dword of its block: rows of pairs become columns.
void pack_keys(const AttentionProblem& p, int64_t image, int64_t head) {
  constexpr int64_t kPiece = 256;  // values of a head that are centred at once
  const PairLayout layout = p.keys();
  int16_t* const packed = p.packed_keys(image, head);
  __builtin_memset(packed + (layout.blocks() - 1) * layout.block_size(), 0, static_cast<size_t>(2 * layout.block_size()));
  alignas(32) int16_t values[kPiece];
  for (int64_t j = 0; j < p.shape.keys; ++j) {
    const int64_t token = image * p.shape.keys + j;
    const uint8_t* q = p.key.q + token * p.shape.channels() + head * p.shape.head_dim;
    for (int64_t d = 0; d < p.shape.head_dim; d += kPiece) {
      const int64_t count = p.shape.head_dim - d < kPiece ? p.shape.head_dim - d : kPiece;
      centre(q + d, count, p.key.zero_point[token], values);
      int16_t* to = packed + layout.offset(d, j);
      for (int64_t k = 0; k < count; k += 2, to += 2 * PairLayout::kColumns) __builtin_memcpy(to, values + k, 4);
    }
  }
}

/// Two tokens' values are interleaved.
void pack_values(const AttentionProblem& p, int64_t image, int64_t head) {
  const PairLayout layout = p.values();
  const int64_t channels = p.shape.channels(), first = image * p.shape.keys;
  const auto zero_point = [&](int64_t j) { return _mm256_set1_epi16(static_cast<int16_t>(clamp_zero_point(p.value.zero_point[first + j]))); };
  for (int64_t j = 0; j < p.shape.keys; j += 2) {
    const bool two = j + 1 < p.shape.keys;
    const __m256i z0 = zero_point(j), z1 = two ? zero_point(j + 1) : z0;
    const uint8_t* q = p.value.q + (first + j) * channels + head * p.shape.head_dim;
    for (int64_t d = 0; d < p.shape.head_dim; d += PairLayout::kColumns) {
      const int64_t n = p.shape.head_dim - d;
      const __m256i a = centred(q + d, n, z0), b = two ? centred(q + channels + d, n, z1) : _mm256_setzero_si256();
      const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
      auto* to = reinterpret_cast<__m256i*>(p.packed_values(image, head) + layout.offset(j, d));
      _mm256_storeu_si256(to, _mm256_permute2x128_si256(low, high, 0x20));
      _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(low, high, 0x31));
    }
  }
}

void attention_pack(const AttentionProblem& p, int64_t image, int64_t head) {
  pack_keys(p, image, head);
  pack_values(p, image, head);
}

inline float largest_of(__m256 v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

/// From the int32 products of one query in w to its weights in 8 bits (zeros up to a multiple of 16). Returns the factor of
/// their products with the values.
float weights_of(float* w, int64_t keys, const float* key_scale, const float* value_scale, float scale, int16_t* codes) {
  __m256 largest = _mm256_set1_ps(-kInfinity), most = _mm256_setzero_ps();
  for_each_vector(keys, [&](int64_t j, int64_t present) {
    const __m256 t = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_castps_si256(_mm256_loadu_ps(w + j))), load_floats(key_scale + j, present));
    _mm256_storeu_ps(w + j, t);
    largest = _mm256_max_ps(present == 8 ? t : _mm256_blendv_ps(largest, t, keep_floats(_mm256_set1_ps(-1.0f), present)), largest);
  });
  const __m256 top = _mm256_set1_ps(largest_of(largest)), factor = _mm256_set1_ps(scale);
  const float total = sum_in_lanes(keys, [&](int64_t j, int64_t present, __m256 partial) {
    const __m256 e = exp_ps(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(w + j), top), factor));
    const __m256 weight = _mm256_mul_ps(e, load_floats(value_scale + j, present));  // zeros behind the end
    _mm256_storeu_ps(w + j, weight);
    most = _mm256_max_ps(weight, most);
    return _mm256_add_ps(partial, e);
  });
  const float ceiling = largest_of(most);
  const __m256 inverse = _mm256_set1_ps(255.0f / ceiling), zero = _mm256_setzero_ps(), full = _mm256_set1_ps(255.0f);
  for (int64_t j = 0; j < keys; j += 16) {
    const auto code = [&](int64_t at) {
      const __m256 t = clamp_ps(_mm256_mul_ps(keep_floats(_mm256_loadu_ps(w + at), keys - at), inverse), zero, full);
      return _mm256_cvtps_epi32(t);
    };
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(code(j), code(j + 8)), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + j), words);
  }
  return ceiling / 255.0f / total;
}

void attention(const AttentionProblem& p, int64_t image, int64_t begin, int64_t end, const AttentionScratch& s, float* y) {
  const AttentionShape& shape = p.shape;
  const int64_t rows = end - begin, channels = shape.channels(), first = image * shape.queries + begin;
  for (int64_t head = 0; head < shape.heads; ++head) {
    for (int64_t i = 0; i < rows; ++i)
      centre(p.query.q + (first + i) * channels + head * shape.head_dim, shape.head_dim, p.query.zero_point[first + i], s.query + i * s.dim_stride);
    multiply(s.query, s.dim_stride, rows, p.packed_keys(image, head), p.keys(), reinterpret_cast<int32_t*>(s.logits), s.key_stride);
    for (int64_t i = 0; i < rows; ++i)
      s.factors[i] = weights_of(s.logits + i * s.key_stride, shape.keys, p.key.scale + image * shape.keys, p.value.scale + image * shape.keys,
                                p.query.scale[first + i] * p.scale, s.weights + i * s.key_stride);
    multiply(s.weights, s.key_stride, rows, p.packed_values(image, head), p.values(), s.products, s.dim_stride);
    for (int64_t i = 0; i < rows; ++i)
      for_each_vector(shape.head_dim, [&](int64_t d, int64_t present) {
        const __m256 sum = _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(s.products + i * s.dim_stride + d)));
        store_floats(y + i * channels + head * shape.head_dim + d, _mm256_mul_ps(sum, _mm256_set1_ps(s.factors[i])), present);
      });
  }
}

}  // namespace

void install_attention_avx2(Kernels& table) {
  table.attention_pack = attention_pack;
  table.attention = attention;
}

}  // namespace probquant
