// 3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3) in integers (Lavin and Gray, arXiv 1509.09308), AVX2.
//
// 16 products give 4 outputs where 36 do directly, and with integers the result is the same to the bit:
//   V = B^T (q - zero point) B    4 x 4 inputs, at most 4 * 255 in 16 bits
//   U = 2G w (2G)^T               at most 9 * 127 in 16 bits
//   4 acc = A^T (sum_c U V) A     in 32 bits, exact modulo 2^32, and |4 acc| < 2^31 for up to kMostInputs channels
// Padding is 0, and no sum of weights is needed. B^T has rows (1 0 -1 0), (0 1 1 0), (0 -1 1 0), (0 1 0 -1), 2G has
// (2 0 0), (1 1 1), (1 -1 1), (0 0 2), and A^T (1 1 1 0), (0 1 -1 -1).
//
// A chunk of tiles is transformed once: V [16][tiles][channels]. Then, for 32 output channels at a time, U [16][block][inputs / 2]
// [16 channels][2 inputs] is made of the packed weights, and 12 tiles at a time are multiplied, position by position, and
// transformed back. V and U come from L2 or L3, 4 bytes per clock of the multiplication; the sums of 12 tiles are 24 KB.
#pragma once
#include "../kernels.h"
#include "multiply.h"

namespace probquant {
namespace {

class Winograd {
 public:
  static constexpr int64_t kMostInputs = 1841;  ///< 9 * 255 * 127 * 4 * inputs < 2^31
  static constexpr int64_t kLeastRows = 128;    ///< of a sample: below, the transform of the weights costs too much

  static bool covers(const LayerProblem& p, const LayerRange& range) {
    const Conv2dShape& s = p.shape;
    return s.groups == 1 && s.kernel_height == 3 && s.kernel_width == 3 && s.stride_height == 1 && s.stride_width == 1 && s.dilation_height == 1 &&
           s.dilation_width == 1 && s.in_channels % 16 == 0 && s.in_channels <= kMostInputs &&
           p.rows_per_sample >= kLeastRows && range.row_end - range.row_begin >= kLeastRows;
  }

  explicit Winograd(const LayerProblem& problem)
      : p(problem), s(problem.shape), tiles_wide((p.out_width + 1) / 2), inputs(s.in_channels) {}

  /// Calls start_chunk(row begin, row end), finish_rows(rows, their number, sample, accumulators, stride, panel) for every row and
  /// panel of two blocks of the range, and end_chunk(). A chunk lies in one sample.
  template <class Kernel>
  void run(const LayerRange& range, Kernel& kernel) {
    const int64_t most = clamp(kInputBytes / (kPositions * inputs * 2), kTogether, 4096);
    Scratch inputs_memory, weights_memory;
    int16_t* const v = inputs_memory.at_least<int16_t>(most * kPositions * inputs);
    int16_t* const u = weights_memory.at_least<int16_t>(kPositions * inputs * kPanel);
    for (int64_t sample = range.row_begin / p.rows_per_sample; sample * p.rows_per_sample < range.row_end; ++sample) {
      const int64_t first_row = sample * p.rows_per_sample;
      begin = clamp(range.row_begin - first_row, 0, p.rows_per_sample);
      end = clamp(range.row_end - first_row, 0, p.rows_per_sample);
      const int64_t first = begin / p.out_width / 2 * tiles_wide, last = ((end - 1) / p.out_width / 2 + 1) * tiles_wide;
      const int64_t chunks = (last - first + most - 1) / most;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t from = first + (last - first) * chunk / chunks, count = first + (last - first) * (chunk + 1) / chunks - from;
        kernel.start_chunk(first_row + begin, first_row + end);
        for (int64_t i = 0; i < count; ++i) transform_input(sample, from + i, v + i * inputs, count * inputs);
        for (int64_t channel = range.channel_begin; channel < range.channel_end; channel += kPanel) {
          Panel panel;
          panel.index = channel / kBlockChannels;
          panel.block = p.packed_weight + panel.index * p.layout.block_bytes;
          panel.channel = channel;
          panel.channels = range.channel_end - channel < kPanel ? range.channel_end - channel : kPanel;
          panel.blocks = panel.channels > kBlockChannels ? 2 : 1;
          transform_weights(panel, u);
          for (int64_t i = 0; i < count; i += kTogether) {
            const int64_t together = count - i < kTogether ? count - i : kTogether;
            multiply(v + i * inputs, count * inputs, u, together);
            for (int64_t t = 0; t < together; ++t) finish_tile(sample, from + i + t, t, panel, kernel);
          }
        }
        kernel.end_chunk();
      }
    }
  }

 private:
  static constexpr int64_t kPositions = 16, kTogether = 12, kPanel = 2 * kBlockChannels;
  static constexpr int64_t kInputBytes = 512 << 10;  // of V
  static constexpr int64_t kPieceInputs = 512;       // 16 KB of U in L1

  static int64_t clamp(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : x > hi ? hi : x; }

  /// B^T d of 4 vectors.
  static void input_axis(__m256i& a, __m256i& b, __m256i& c, __m256i& d) {
    const __m256i first = _mm256_sub_epi16(a, c), second = _mm256_add_epi16(b, c), third = _mm256_sub_epi16(c, b), fourth = _mm256_sub_epi16(b, d);
    a = first, b = second, c = third, d = fourth;
  }

  /// V of a tile: position i at v + i * step.
  void transform_input(int64_t sample, int64_t tile, int16_t* v, int64_t step) const {
    const int64_t y0 = tile / tiles_wide * 2 - s.padding_top, x0 = tile % tiles_wide * 2 - s.padding_left;
    const int32_t z = p.samples[sample].x_zero_point;
    const __m256i zero_point = _mm256_set1_epi16(static_cast<int16_t>(z));
    const uint8_t* pixel[kPositions];
    for (int64_t i = 0; i < kPositions; ++i) {
      const int64_t y = y0 + i / 4, x = x0 + i % 4;
      const bool inside = y >= 0 && y < s.in_height && x >= 0 && x < s.in_width;
      pixel[i] = inside ? p.x + ((sample * s.in_height + y) * s.in_width + x) * inputs : nullptr;
    }
    for (int64_t c = 0; c < inputs; c += 16, v += 16) {
      __m256i d[4][4];
#pragma GCC unroll 16
      for (int i = 0; i < kPositions; ++i)
        d[i / 4][i % 4] = pixel[i] ? _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pixel[i] + c))), zero_point)
                                   : _mm256_setzero_si256();
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) input_axis(d[i][0], d[i][1], d[i][2], d[i][3]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        input_axis(d[0][j], d[1][j], d[2][j], d[3][j]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) store(v + (4 * i + j) * step, d[i][j]);
      }
    }
  }

  /// 2G g of 3 vectors, into 4.
  static void weight_axis(const __m256i (&g)[3], __m256i (&u)[4]) {
    const __m256i ends = _mm256_add_epi16(g[0], g[2]);
    u[0] = _mm256_add_epi16(g[0], g[0]);
    u[1] = _mm256_add_epi16(ends, g[1]);
    u[2] = _mm256_sub_epi16(ends, g[1]);
    u[3] = _mm256_add_epi16(g[2], g[2]);
  }

  /// U of 4 inputs of 4 channels, from tap 0's weights on.
  void transform_quad(const uint8_t* weights, __m256i (&u)[4][4]) const {
    const int64_t tap = p.layout.segment_steps * kStreamBytes;
    __m256i columns[3][4];
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx) {
      __m256i g[3];
#pragma GCC unroll 3
      for (int ky = 0; ky < 3; ++ky) g[ky] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + (3 * ky + kx) * tap)));
      weight_axis(g, columns[kx]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256i row[3] = {columns[0][i], columns[1][i], columns[2][i]};
      weight_axis(row, u[i]);
    }
  }

  void transform_weights(const Panel& panel, int16_t* u) {
    blocks = panel.blocks;
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t step = 0; step < inputs / 4; ++step)
        for (int64_t half = 0; half < 2; ++half) {
          const uint8_t* from = panel.block + b * p.layout.block_bytes + sizeof(BlockHeader) + step * kStreamBytes + half * 32;
          int16_t* to = u + b * block_words() + step * 4 * kBlockChannels + half * 16;
          __m256i low[4][4], high[4][4];
          transform_quad(from, low);
          transform_quad(from + 16, high);
#pragma GCC unroll 16
          for (int i = 0; i < kPositions; ++i) {
            __m256i pairs[2];
            separate_pairs(low[i / 4][i % 4], high[i / 4][i % 4], pairs);
            store(to + i * blocks * block_words(), pairs[0]);
            store(to + i * blocks * block_words() + 2 * kBlockChannels, pairs[1]);
          }
        }
  }
  int64_t block_words() const { return inputs * kBlockChannels; }  ///< of U, at a position

  /// Sums over the inputs: sums[position][tile][32 channels].
  void multiply(const int16_t* v, int64_t step, const int16_t* u, int64_t together) {
    for (int64_t position = 0; position < kPositions; ++position)
      for (int64_t b = 0; b < blocks; ++b, u += block_words())
        for (int64_t k = 0; k < inputs; k += kPieceInputs) {
          const int64_t steps = (inputs - k < kPieceInputs ? inputs - k : kPieceInputs) / 4;
          for_each_part(static_cast<int>(together), [&](int row, int rows, int tiles) {
            kKernels.of[rows - 1](v + position * step + row * inputs + k, inputs, u + k * kBlockChannels, steps, tiles,
                                  sums[position][row] + b * kBlockChannels, k > 0);
          });
        }
  }

  /// Transforms a tile's sums back and finishes those of its 4 rows that the range has.
  template <class Kernel>
  void finish_tile(int64_t sample, int64_t tile, int64_t t, const Panel& panel, Kernel& kernel) {
    for (int64_t c = 0; c < panel.blocks * kBlockChannels; c += 8) {
      __m256i half[2][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const auto m = [&](int i) { return load(sums[4 * i + j][t] + c); };
        const __m256i first = m(1), second = m(2);
        half[0][j] = _mm256_add_epi32(_mm256_add_epi32(m(0), first), second);
        half[1][j] = _mm256_sub_epi32(_mm256_sub_epi32(first, second), m(3));
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m256i(&m)[4] = half[i];
        store(outputs[2 * i] + c, _mm256_srai_epi32(_mm256_add_epi32(_mm256_add_epi32(m[0], m[1]), m[2]), 2));
        store(outputs[2 * i + 1] + c, _mm256_srai_epi32(_mm256_sub_epi32(_mm256_sub_epi32(m[1], m[2]), m[3]), 2));
      }
    }
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t y = tile / tiles_wide * 2 + i, x = tile % tiles_wide * 2, row = y * p.out_width + x;
      const int64_t from = row < begin ? 1 : 0, to = x + 1 < p.out_width && row + 1 < end ? 2 : row < end ? 1 : 0;
      const int64_t rows[2] = {sample * p.rows_per_sample + row, sample * p.rows_per_sample + row + 1};
      if (from < to && row + from >= begin) kernel.finish_rows(rows + from, static_cast<int>(to - from), sample, outputs[2 * i + from], kPanel, panel);
    }
  }

  /// Products of rows of V, in place of the sums or added to them.
  template <int kRows>
  static void multiply_rows(const int16_t* v, int64_t stride, const int16_t* u, int64_t steps, int tiles, int32_t* out, bool add) {
    for (; tiles > 0; --tiles, v += kRows * stride, out += kRows * kPanel) {
      Accumulators<kRows> acc;
      if (add) acc.load_from(out, kPanel);
      else acc.clear();
      acc.add_words(v, stride, u, steps);
      acc.store_to(out, kPanel);
    }
  }
  static constexpr TileKernels<void (*)(const int16_t*, int64_t, const int16_t*, int64_t, int, int32_t*, bool)> kKernels = PROBQUANT_TILES(multiply_rows);

  const LayerProblem& p;
  const Conv2dShape& s;
  const int64_t tiles_wide, inputs;
  int64_t begin = 0, end = 0;  ///< rows of the sample that the range has
  int64_t blocks = 0;          ///< of the panel
  alignas(32) int32_t sums[kPositions][kTogether][kPanel];
  alignas(32) int32_t outputs[4][kPanel];
};

}  // namespace
}  // namespace probquant
