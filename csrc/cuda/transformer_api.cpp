// LayerNorm's and attention's public functions of cuda.h: checks, workspace, launches. Host code only; the checks are those of the CPU front
// ends, and some for what a kernel counts in 32 bits.
#include <probquant/cuda.h>

#include "../core/front_end.h"
#include "launch.h"

namespace probquant::cuda {
namespace {

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
constexpr int64_t kWorkspaceAlignment = 16;
constexpr int64_t kMaxChannels = 32 * kMaxPerThread;  ///< of a row that a warp quantizes

}  // namespace

void layer_norm(int64_t rows, int64_t channels, const LayerNormArguments& a, void* stream) {
  check_layer_norm(rows, channels, a);
  require(channels <= kMaxChannels && rows <= kMaxBlocks, "layer_norm: [", rows, ", ", channels, "], CUDA kernels take at most ", kMaxChannels,
          " channels and 2^31 - 1 rows");
  if (rows > 0) launch_layer_norm(rows, channels, a, stream);
}

int64_t attention_workspace_bytes(const AttentionShape& shape) {
  check_attention_shape(shape);
  return AttentionLayout(shape).bytes();
}

void attention(const AttentionShape& shape, const AttentionArguments& a, void* stream) {
  check_attention(shape, a);
  const AttentionLayout layout(shape);
  const double heads = static_cast<double>(shape.batch) * static_cast<double>(shape.heads);
  const double warps = heads * static_cast<double>(layout.pack_tasks()), tiles = heads * static_cast<double>(layout.query_tiles() * layout.column_blocks());
  require(shape.channels() <= kMaxChannels && warps < static_cast<double>(kMaxBlocks) && tiles < static_cast<double>(kMaxBlocks), "attention: batch ",
          shape.batch, ", queries ", shape.queries, ", keys ", shape.keys, ", heads ", shape.heads, ", head_dim ", shape.head_dim,
          " is too large for one launch, or has more than ", kMaxChannels, " channels");
  if (shape.batch == 0 || shape.queries == 0) return;
  require(aligned(a.workspace, kWorkspaceAlignment), "attention: workspace must be aligned to ", kWorkspaceAlignment, " bytes");
  launch_attention(layout, a, stream);
}

}  // namespace probquant::cuda
