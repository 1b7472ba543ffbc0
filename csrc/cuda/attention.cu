// Attention. Three kernels: attention_pack_kernel puts queries, keys and values of every head into the order of mma's fragments, the zero
// points and sums of their tokens beside them; attention_kernel multiplies and takes the softmax; attention_rows_kernel quantizes, a warp per
// token, when all heads of a token are there.
//
// attention_kernel: a block has 16 queries of one head and up to 64 of its channels, and all keys, in chunks of 128. Its 4 warps share the
// keys: warp w has those with key / 8 % 4 = w, since NUMERICS.md sums exponentials in 32 interleaved lanes, and each of those lanes then
// belongs to one thread. The softmax needs the largest logit before any weight, and the largest weight before any code, so the warps walk
// over the keys three times and compute the logits anew: 2 mma of 16 x 8 x 32 per 128 of them and 64 channels, beside about 90 other
// instructions, most of them exp: far from a dense layer's 4 per mma, and no tile would change that, since an exp is per weight. So keys may be as many as they like, and no logit leaves its registers. Fragments of keys and values are
// loaded as they are, 16 bytes per lane and whole sectors, from L1, which a head of a few hundred keys fits. Weights go from accumulators
// into operands without moving: the values' fragments list the keys in the order in which a thread has them.
//
//   acc = sum q k - z_k sum (q - z_q) - z_q sum k     by mma of unsigned bytes; int32 wraps, the result fits (kMaxAttentionSum)
//   sum u (v - z_v) = sum u v - sum u z_v             the zero points of the values are one more fragment
//
// Sectors: of a key's terms half are used at a time, from L1; the packing reads its bytes as they come, once per head, from L1. Bank
// conflicts, two-way: where the exponentials' sums are joined, once per block.
//
// Launch: 128 threads, at most 168 registers (3 blocks per multiprocessor), 21,312 bytes of static shared memory. Bound by exp.
// attention_rows_kernel reads its floats from L2: heads of a token lie in different blocks, so its range is known only behind them.
#include "attention_layout.h"
#include "ptx.cuh"
#include "row.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kDepthBytes = 32;                           ///< of an mma along K
constexpr int kBlockColumns = 64, kPairs = kBlockColumns / 16;
constexpr int kPitch = kBlockColumns + 8;                 ///< int32 per row: fragments are stored without bank conflicts
constexpr int kRows = AttentionLayout::kRows;

/// Where the operands of a head lie.
struct Operands {
  uint4 *queries, *keys, *values;
  TokenTerms *query_terms, *key_terms;

  __device__ Operands(const AttentionLayout& s, uint8_t* workspace, int64_t image, int64_t head) {
    uint8_t* at = s.head(workspace, image * s.heads + head);
    queries = reinterpret_cast<uint4*>(at), at += s.query_bytes();
    keys = reinterpret_cast<uint4*>(at), at += s.key_bytes();
    values = reinterpret_cast<uint4*>(at), at += s.value_bytes();
    query_terms = reinterpret_cast<TokenTerms*>(at);
    key_terms = query_terms + s.query_tiles() * kRows;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Operands

/// Packs 16 tokens of a head, all of its channels: fragments of A, or of B for two tiles of 8 columns. `token(row)` is their index in
/// the tensor, below 0 where there is none: zeros. Terms go to terms[index(row)].
template <class Token, class Index>
__device__ void pack_rows(const AttentionLayout& s, const QuantizedInput& x, const float* value_scale, int64_t head, Token token, Index index, uint4* to,
                          TokenTerms* terms) {
  const auto lane = static_cast<int32_t>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const int64_t tokens[2] = {token(g), token(g + 8)};
  uint32_t sums[2] = {};
  for (int32_t step = 0; step < s.steps(); ++step) {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = tokens[i % 2], first = step * kDepthBytes + i / 2 * 16 + 4 * t;
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        if (row < 0 || first + b >= s.head_dim) continue;
        const uint32_t code = x.q[row * s.channels() + head * s.head_dim + first + b];
        words[i] |= code << 8 * b;
        sums[i % 2] += code;
      }
    }
    to[step * 32 + lane] = {words[0], words[1], words[2], words[3]};
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto add = [](uint32_t a, uint32_t b) { return a + b; };
    uint32_t sum = sums[half];
    for (int distance = 1; distance < 4; distance *= 2) sum = add(sum, __shfl_xor_sync(0xffffffffu, sum, distance));
    if (t != 0) continue;
    const int64_t row = tokens[half];
    TokenTerms of{};
    if (row >= 0) of = {clamp_zero_point(x.zero_point[row]), static_cast<int32_t>(sum), x.scale[row], value_scale != nullptr ? value_scale[row] : 0.0f};
    terms[index(g + 8 * half)] = of;
  }
}

/// Packs 32 keys of a warp by 16 channels of a head's values, from channel `first` on; `first` beyond the last: their zero points.
__device__ void pack_values(const AttentionLayout& s, const QuantizedInput& v, int64_t image, int64_t head, int32_t chunk, int32_t warp, int64_t first,
                            uint4* to) {
  const auto lane = static_cast<int32_t>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t channel = first + g + i / 2 * 8;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int32_t key = AttentionLayout::key(chunk, warp, i % 2 * 2 + b / 2, 2 * t + b % 2);
      if (key >= s.keys) continue;
      const int64_t token = image * s.keys + key;
      if (first >= s.padded_dim()) words[i] |= static_cast<uint32_t>(clamp_zero_point(v.zero_point[token])) << 8 * b;
      else if (channel < s.head_dim) words[i] |= static_cast<uint32_t>(v.q[token * s.channels() + head * s.head_dim + channel]) << 8 * b;
    }
  }
  to[lane] = {words[0], words[1], words[2], words[3]};
}

__global__ void __launch_bounds__(kThreads)
    attention_pack_kernel(const AttentionLayout s, const QuantizedInput query, const QuantizedInput key, const QuantizedInput value, uint8_t* workspace) {
  int64_t task = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t of_head = task / s.pack_tasks(), image = of_head / s.heads, head = of_head % s.heads;
  if (image >= s.batch) return;
  const Operands o(s, workspace, image, head);
  task %= s.pack_tasks();
  if (task < s.query_tiles()) {
    const auto token = [&](int32_t row) { return task * kRows + row < s.queries ? image * s.queries + task * kRows + row : -1; };
    const auto index = [&](int32_t row) { return task * kRows + row; };
    return pack_rows(s, query, nullptr, head, token, index, o.queries + task * s.steps() * 32, o.query_terms);
  }
  task -= s.query_tiles();
  if (task < s.key_tiles()) {
    const auto chunk = static_cast<int32_t>(task / (2 * kWarps));
    const auto warp = static_cast<int32_t>(task / 2 % kWarps), pair = static_cast<int32_t>(task % 2);
    const auto key_of = [&](int32_t row) -> int64_t { return AttentionLayout::key(chunk, warp, 2 * pair + row / 8, row % 8); };
    const auto token = [&](int32_t row) { return key_of(row) < s.keys ? image * s.keys + key_of(row) : -1; };
    return pack_rows(s, key, value.scale, head, token, key_of, o.keys + task * s.steps() * 32, o.key_terms);
  }
  task -= s.key_tiles();
  const int64_t column = task % s.value_columns(), of_warp = task / s.value_columns();
  pack_values(s, value, image, head, static_cast<int32_t>(of_warp / kWarps), static_cast<int32_t>(of_warp % kWarps), column * 16, o.values + task * 32);
}

// ---------------------------------------------------------------------------------------------------------------------
// Products and softmax

class Attention {
 public:
  __device__ Attention(const AttentionLayout& s, float scale, uint8_t* workspace)
      : s_(s), lane_(static_cast<int32_t>(threadIdx.x % 32)), warp_(static_cast<int32_t>(threadIdx.x / 32)) {
    int64_t block = blockIdx.x;
    first_column_ = block % s.column_blocks() * kBlockColumns, block /= s.column_blocks();
    first_query_ = block % s.query_tiles() * kRows, block /= s.query_tiles();
    head_ = block % s.heads, image_ = block / s.heads;
    const Operands o(s, workspace, image_, head_);
    queries_ = o.queries + first_query_ / kRows * s.steps() * 32 + lane_;
    keys_ = o.keys + lane_, values_ = o.values + lane_;
    key_terms_ = o.key_terms;
    y_ = s.floats(workspace);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const TokenTerms q = o.query_terms[first_query_ + lane_ / 4 + 8 * h];
      zero_point_[h] = static_cast<uint32_t>(q.zero_point);
      centred_[h] = static_cast<uint32_t>(q.sum) - static_cast<uint32_t>(s.head_dim) * zero_point_[h];
      factor_[h] = q.scale * scale;
    }
  }

  __device__ void run() {
    find_largest();
    find_total();
    multiply();
    store();
  }

 private:
  /// Calls visit(n, b, key exists, its terms, its two logits) for this thread's keys of a chunk, in order: row h of the thread is
  /// lane / 4 + 8 h, its key the column 2 (lane % 4) + b of tile n.
  template <class Visit>
  __device__ void for_each_key(int32_t chunk, Visit visit) const {
    int32_t products[4][4] = {};
#pragma unroll 1
    for (int32_t step = 0; step < s_.steps(); ++step) {
      const uint4 q = queries_[step * 32];
      const uint32_t a[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint4 k = keys_[(((chunk * kWarps + warp_) * 2 + pair) * s_.steps() + step) * 32];
        mma_m16n8k32<uint8_t>(products[2 * pair], a, k.x, k.z);
        mma_m16n8k32<uint8_t>(products[2 * pair + 1], a, k.y, k.w);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int32_t key = AttentionLayout::key(chunk, warp_, n, 2 * (lane_ % 4) + b);
        const TokenTerms k = key_terms_[key];
        float logits[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t product = static_cast<uint32_t>(products[n][2 * h + b]) - static_cast<uint32_t>(k.zero_point) * centred_[h] -
                                   zero_point_[h] * static_cast<uint32_t>(k.sum);
          logits[h] = static_cast<float>(static_cast<int32_t>(product)) * k.scale;
        }
        visit(n, b, key < s_.keys, k, logits);
      }
  }

  __device__ float exponential(int h, float logit) const { return exp_f((logit - largest_[h]) * factor_[h]); }

  /// The largest of the row's values, which the 4 lanes of a row and the 4 warps have found, in all of them. `shared`: of its own.
  __device__ void join_largest(float (&values)[2], float (&shared)[kWarps][kRows]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      for (int distance = 1; distance < 4; distance *= 2) values[h] = max_f(values[h], __shfl_xor_sync(0xffffffffu, values[h], distance));
      if (lane_ % 4 == 0) shared[warp_][lane_ / 4 + 8 * h] = values[h];
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int w = 0; w < kWarps; ++w) values[h] = max_f(values[h], shared[w][lane_ / 4 + 8 * h]);
  }

  __device__ void find_largest() {
    __shared__ float shared[kWarps][kRows];
#pragma unroll 1
    for (int32_t chunk = 0; chunk < s_.key_chunks(); ++chunk)
      for_each_key(chunk, [&](int, int, bool exists, const TokenTerms&, const float (&logits)[2]) {
        for (int h = 0; h < 2; ++h) largest_[h] = exists ? max_f(logits[h], largest_[h]) : largest_[h];
      });
    join_largest(largest_, shared);
  }

  /// Sum of the exponentials and the largest weight of both rows.
  __device__ void find_total() {
    __shared__ float shared[kWarps][kRows], partial[kWarps][kRows][8];
    float sums[2][2] = {};  // of the interleaved lanes 8 warp + 2 (lane % 4) + b
#pragma unroll 1
    for (int32_t chunk = 0; chunk < s_.key_chunks(); ++chunk)
      for_each_key(chunk, [&](int, int b, bool exists, const TokenTerms& k, const float (&logits)[2]) {
        for (int h = 0; h < 2; ++h) {
          const float e = exists ? exponential(h, logits[h]) : 0.0f;
          sums[h][b] += e;
          most_[h] = max_f(e * k.value_scale, most_[h]);
        }
      });
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int b = 0; b < 2; ++b) partial[warp_][lane_ / 4 + 8 * h][2 * (lane_ % 4) + b] = sums[h][b];
    join_largest(most_, shared);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total[2];
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int32_t row = lane_ / 4 + 8 * h, column = 2 * (lane_ % 4) + b;
        total[b] = (partial[0][row][column] + partial[2][row][column]) + (partial[1][row][column] + partial[3][row][column]);
        for (int distance = 2; distance > 0; distance /= 2) total[b] += __shfl_xor_sync(0xffffffffu, total[b], distance);
      }
      total_[h] = total[0] + total[1];
    }
  }

  __device__ void multiply() {
    const float inverse[2] = {255.0f / most_[0], 255.0f / most_[1]};
    const int32_t columns = s_.value_columns(), first = static_cast<int32_t>(first_column_ / 16);
#pragma unroll 1
    for (int32_t chunk = 0; chunk < s_.key_chunks(); ++chunk) {
      uint32_t weights[4] = {};  // A: rows h, keys of tiles 0 and 1, then of 2 and 3
      for_each_key(chunk, [&](int n, int b, bool exists, const TokenTerms& k, const float (&logits)[2]) {
        for (int h = 0; h < 2; ++h) {
          const float w = exists ? exponential(h, logits[h]) * k.value_scale : 0.0f;
          const auto code = static_cast<uint32_t>(static_cast<int32_t>(rintf(clamp_f(w * inverse[h], 0.0f, 255.0f))));
          weights[n / 2 * 2 + h] |= code << (16 * (n % 2) + 8 * b);
        }
      });
      const uint4* const values = values_ + (chunk * kWarps + warp_) * columns * 32;
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        if (first + pair >= columns - 1) break;
        const uint4 v = values[(first + pair) * 32];
        mma_m16n8k32<uint8_t>(sums_[2 * pair], weights, v.x, v.y);
        mma_m16n8k32<uint8_t>(sums_[2 * pair + 1], weights, v.z, v.w);
      }
      const uint4 z = values[(columns - 1) * 32];
      mma_m16n8k32<uint8_t>(zero_points_, weights, z.x, z.y);
    }
  }

  /// Joins the warps' sums and stores the block's outputs.
  __device__ void store() const {
    __shared__ int32_t sums[kWarps][kRows][kPitch], zero_points[kWarps][kRows];
    __shared__ float factors[kRows];
    const int32_t g = lane_ / 4, t = lane_ % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int n = 0; n < 2 * kPairs; ++n) *reinterpret_cast<int2*>(&sums[warp_][g + 8 * h][8 * n + 2 * t]) = {sums_[n][2 * h], sums_[n][2 * h + 1]};
      if (t == 0) zero_points[warp_][g + 8 * h] = zero_points_[2 * h];
      if (t == 0 && warp_ == 0) factors[g + 8 * h] = most_[h] / 255.0f / total_[h];
    }
    __syncthreads();
    for (auto i = static_cast<int32_t>(threadIdx.x); i < kRows * kBlockColumns; i += kThreads) {
      const int32_t row = i / kBlockColumns, column = i % kBlockColumns;
      if (first_query_ + row >= s_.queries || first_column_ + column >= s_.head_dim) continue;
      uint32_t sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += static_cast<uint32_t>(sums[w][row][column]) - static_cast<uint32_t>(zero_points[w][row]);
      y_[(image_ * s_.queries + first_query_ + row) * s_.channels() + head_ * s_.head_dim + first_column_ + column] =
          static_cast<float>(static_cast<int32_t>(sum)) * factors[row];
    }
  }

  const AttentionLayout& s_;
  const int32_t lane_, warp_;
  int64_t image_, head_, first_query_, first_column_;
  const uint4 *queries_, *keys_, *values_;  ///< fragments, this lane's of the first
  const TokenTerms* key_terms_;
  float* y_;
  uint32_t zero_point_[2], centred_[2];
  float factor_[2], largest_[2] = {-kInfinity, -kInfinity}, most_[2] = {}, total_[2];
  int32_t sums_[2 * kPairs][4] = {}, zero_points_[4] = {};
};

__global__ void __launch_bounds__(kThreads, 3) attention_kernel(const AttentionLayout s, const float scale, uint8_t* workspace) {
  Attention(s, scale, workspace).run();
}

__global__ void __launch_bounds__(kThreads, 4)
    attention_rows_kernel(const AttentionLayout s, const float* query_scale, const float* key_scale, const float* value_scale, const float* fixed,
                          uint8_t* workspace, const QuantizedOutput y) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const auto channels = static_cast<int32_t>(s.channels());
  if (row >= s.batch * s.queries) return;
  const float* values = s.floats(workspace) + row * channels;
  // A key or value with an invalid scale makes all queries of the image invalid: looked up by every warp, from L1, so that nobody counts them.
  bool valid = valid_scale(query_scale[row]);
  const int64_t first_key = row / s.queries * s.keys;
  for (int64_t k = first_key + threadIdx.x % 32; k < first_key + s.keys; k += 32) valid = valid && valid_scale(key_scale[k]) && valid_scale(value_scale[k]);
  valid = __all_sync(0xffffffffu, valid);
  quantize_row(WarpRow(channels, [values](int32_t i) { return values[i]; }), row, channels, valid, fixed, y);
}

}  // namespace

void launch_attention(const AttentionLayout& s, const AttentionArguments& a, void* stream) {
  auto* workspace = static_cast<uint8_t*>(a.workspace);
  const auto blocks = [](int64_t warps) { return (warps + kWarps - 1) / kWarps; };
  launch("attention", attention_pack_kernel, {blocks(s.batch * s.heads * s.pack_tasks()), kThreads}, stream, s, a.query, a.key, a.value, workspace);
  launch("attention", attention_kernel, {s.batch * s.heads * s.query_tiles() * s.column_blocks(), kThreads}, stream, s, a.scale, workspace);
  launch("attention", attention_rows_kernel, {blocks(s.batch * s.queries), kThreads}, stream, s, a.query.scale, a.key.scale, a.value.scale,
         a.range.strategy == Strategy::fixed ? a.range.predictor : nullptr, workspace, a.y);
}

}  // namespace probquant::cuda
