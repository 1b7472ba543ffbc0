// The workspace of an attention on CUDA: its operands in the order of mma's fragments, one head behind the other, then what the kernels
// pass on to each other. attention.cu writes and reads it.
//
// A fragment is 512 bytes, 16 per lane: with g = lane / 4 and t = lane % 4 a lane has four words of four bytes
//   queries, keys   [tile of 16 tokens][step of 32 channels]      tokens g, g + 8 (channels 4t..), then the same (channels 16 + 4t..)
//   values          [chunk][warp][tile of 16 channels]            channel g (keys of tiles 0 and 1, then of 2 and 3), then channel g + 8
// Keys come in chunks of 128. Each of 4 warps has 4 tiles of 8 keys there, the tile n of warp w from 128 chunk + 32 n + 8 w on; two of a
// warp's tiles are one fragment. The last tile of values holds their zero points in every channel. What does not exist is zero.
#pragma once
#include <probquant/ops.h>

#include "../core/numerics.h"

namespace probquant::cuda {

/// What the products need to know of a token: its parameters and the sum of its codes in a head.
struct alignas(16) TokenTerms {
  int32_t zero_point, sum;
  float scale, value_scale;  ///< of a key; a query has no value
};

struct AttentionLayout {
  static constexpr int32_t kRows = 16, kChunk = 128, kWarps = 4, kFragment = 512;
  int64_t batch, heads, queries, keys, head_dim;

  explicit constexpr AttentionLayout(const AttentionShape& s) : batch(s.batch), heads(s.heads), queries(s.queries), keys(s.keys), head_dim(s.head_dim) {}

  /// Key of column `column` in a warp's tile n of a chunk.
  static PROBQUANT_HOST_DEVICE constexpr int32_t key(int32_t chunk, int32_t warp, int32_t n, int32_t column) {
    return chunk * kChunk + n * 32 + warp * 8 + column;
  }

  PROBQUANT_HOST_DEVICE constexpr int64_t channels() const { return heads * head_dim; }
  PROBQUANT_HOST_DEVICE constexpr int32_t steps() const { return static_cast<int32_t>((head_dim + 31) / 32); }
  PROBQUANT_HOST_DEVICE constexpr int32_t padded_dim() const { return steps() * 32; }
  PROBQUANT_HOST_DEVICE constexpr int64_t query_tiles() const { return (queries + kRows - 1) / kRows; }
  PROBQUANT_HOST_DEVICE constexpr int32_t key_chunks() const { return static_cast<int32_t>((keys + kChunk - 1) / kChunk); }
  PROBQUANT_HOST_DEVICE constexpr int32_t key_tiles() const { return key_chunks() * (kChunk / kRows); }
  PROBQUANT_HOST_DEVICE constexpr int32_t value_columns() const { return padded_dim() / 16 + 1; }
  PROBQUANT_HOST_DEVICE constexpr int64_t column_blocks() const { return (head_dim + 63) / 64; }
  /// Warps that pack a head: one per tile of queries, per tile of keys and per fragment of values.
  PROBQUANT_HOST_DEVICE constexpr int64_t pack_tasks() const { return query_tiles() + key_tiles() + int64_t{key_chunks()} * kWarps * value_columns(); }

  PROBQUANT_HOST_DEVICE constexpr int64_t query_bytes() const { return query_tiles() * steps() * kFragment; }
  PROBQUANT_HOST_DEVICE constexpr int64_t key_bytes() const { return int64_t{key_tiles()} * steps() * kFragment; }
  PROBQUANT_HOST_DEVICE constexpr int64_t value_bytes() const { return int64_t{key_chunks()} * kWarps * value_columns() * kFragment; }
  PROBQUANT_HOST_DEVICE constexpr int64_t term_bytes(int64_t tokens) const { return tokens * static_cast<int64_t>(sizeof(TokenTerms)); }
  PROBQUANT_HOST_DEVICE constexpr int64_t head_bytes() const {
    return query_bytes() + key_bytes() + value_bytes() + term_bytes(query_tiles() * kRows) + term_bytes(int64_t{key_chunks()} * kChunk);
  }
  /// In front of the heads the output in float, [batch, queries, channels].
  PROBQUANT_HOST_DEVICE float* floats(uint8_t* workspace) const { return reinterpret_cast<float*>(workspace); }
  PROBQUANT_HOST_DEVICE uint8_t* head(uint8_t* workspace, int64_t index) const { return workspace + float_bytes() + index * head_bytes(); }
  constexpr int64_t bytes() const { return float_bytes() + batch * heads * head_bytes(); }

 private:
  PROBQUANT_HOST_DEVICE constexpr int64_t float_bytes() const {
    return (batch * queries * channels() * static_cast<int64_t>(sizeof(float)) + kFragment - 1) / kFragment * kFragment;
  }
};

}  // namespace probquant::cuda
