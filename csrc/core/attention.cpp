// Attention: packs the keys and values of some images, then runs tiles of queries over all of their heads, so that a token's
// output is whole, and its range known, before the tile is left.
#include <algorithm>
#include <vector>

#include "front_end.h"

namespace probquant {
namespace {

/// Images whose keys and values are packed at once.
int64_t images_at_once(const AttentionShape& s, const Executor& executor) {
  return std::min<int64_t>(s.batch, std::max(1, executor.threads));
}

bool valid_tokens(const QuantizedInput& x, int64_t begin, int64_t count) {
  return std::all_of(x.scale + begin, x.scale + begin + count, valid_scale);
}

}  // namespace

int64_t attention_workspace_bytes(const AttentionShape& s, const Executor& executor) {
  check_attention_shape(s);
  const PairLayout keys{s.head_dim, s.keys}, values{s.keys, s.head_dim};
  return images_at_once(s, executor) * s.heads * (keys.size() + values.size()) * static_cast<int64_t>(sizeof(int16_t));
}

void attention(const AttentionShape& s, const AttentionArguments& a, const Executor& executor) {
  check_attention(s, a);
  if (s.batch == 0 || s.queries == 0) return;
  AttentionProblem p{s, a.query, a.key, a.value, a.scale, static_cast<int16_t*>(a.workspace)};
  const int64_t tiles = (s.queries + kAttentionQueries - 1) / kAttentionQueries, images = images_at_once(s, executor), channels = s.channels();
  for (p.image_begin = 0; p.image_begin < s.batch; p.image_begin += images) {
    const int64_t count = std::min(images, s.batch - p.image_begin);
    parallel_for(executor, count * s.heads, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) kernels().attention_pack(p, p.image_begin + task / s.heads, task % s.heads);
    });
    parallel_for(executor, count * tiles, [&](int64_t begin, int64_t end) {
      std::vector<char> memory(static_cast<size_t>(AttentionScratch::bytes(s)));
      const AttentionScratch scratch(s, memory.data());
      std::vector<float> y(static_cast<size_t>(kAttentionQueries * channels));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = p.image_begin + task / tiles, first = task % tiles * kAttentionQueries, last = std::min(first + kAttentionQueries, s.queries);
        const bool valid = valid_tokens(a.key, image * s.keys, s.keys) && valid_tokens(a.value, image * s.keys, s.keys);
        if (valid) kernels().attention(p, image, first, last, scratch, y.data());
        for (int64_t i = first; i < last; ++i) {
          const int64_t token = image * s.queries + i;
          quantize_row(y.data() + (i - first) * channels, token, channels, valid && valid_scale(a.query.scale[token]), a.range, a.y);
        }
      }
    });
  }
}

}  // namespace probquant
