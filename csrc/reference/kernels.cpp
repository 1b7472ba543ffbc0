// The scalar kernels: the specification of every result, written to be read, not to be fast. A vector kernel that gives
// other bytes is wrong. They visit one output at a time and call the arithmetic of core/numerics.h.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../cpu/kernels.h"
#include "../core/elementwise.h"
#include "../core/float_formats.h"

namespace probquant {
namespace {

/// Zero-point corrected accumulator of one output.
int32_t accumulate(const LayerProblem& p, int64_t row, int64_t channel) {
  const Conv2dShape& s = p.shape;
  const int64_t image = row / p.rows_per_sample, oy = row % p.rows_per_sample / p.out_width, ox = row % p.out_width;
  const int64_t inputs = s.in_channels / s.groups, group = channel / (s.out_channels / s.groups);
  const uint8_t* block = p.packed_weight + p.layout.block_offset(channel);
  const auto* weights = reinterpret_cast<const int8_t*>(block);
  const int64_t lane = p.layout.lane(channel), first = p.layout.first_input(channel);
  const int32_t zero_point = p.samples[image].x_zero_point;
  int32_t sum = 0;
  for (int64_t ky = 0; ky < s.kernel_height; ++ky)
    for (int64_t kx = 0; kx < s.kernel_width; ++kx) {
      const int64_t iy = oy * s.stride_height - s.padding_top + ky * s.dilation_height;
      const int64_t ix = ox * s.stride_width - s.padding_left + kx * s.dilation_width;
      if (iy < 0 || iy >= s.in_height || ix < 0 || ix >= s.in_width) continue;  // padding is x = 0
      const uint8_t* pixel = p.x + ((image * s.in_height + iy) * s.in_width + ix) * s.in_channels + group * inputs;
      const int64_t tap = ky * s.kernel_width + kx;
      for (int64_t i = 0; i < inputs; ++i) sum += (pixel[i] - zero_point) * weights[p.layout.weight_offset(lane, tap, first + i)];
    }
  return sum;
}

/// Calls visit(row, channel, index, channel's constants, residual, sample) for every output of a range.
template <class Visit>
void for_each_output(const LayerProblem& p, const LayerRange& range, Visit visit) {
  for (int64_t row = range.row_begin; row < range.row_end; ++row) {
    const int64_t sample = row / p.rows_per_sample;
    for (int64_t channel = range.channel_begin; channel < range.channel_end; ++channel) {
      const auto* header = reinterpret_cast<const BlockHeader*>(p.packed_weight + p.layout.block_offset(channel));
      const int64_t lane = p.layout.lane(channel), at = row * p.shape.out_channels + channel;
      const int32_t residual = p.residual ? p.residual[at] - p.samples[sample].residual_zero_point : 0;
      const ChannelEpilogue constants{header->scale[lane], header->bias[lane], header->profile[lane], header->inverse_profile[lane]};
      visit(row, channel, at, constants, residual, sample);
    }
  }
}

/// Adds one written code to its sample's stats row.
void count_code(Code code, int64_t channel, int64_t channels, bool channel_stats, int64_t* stats) {
  const int64_t q = code.q;
  atomic_add(stats + kStatsSum, q);
  atomic_add(stats + kStatsSquares, q * q);
  if (code.clipped) atomic_add(stats + kStatsClipped, 1);
  if (channel_stats) {
    atomic_add(stats + kStatsSample + channel, q);
    atomic_add(stats + kStatsSample + channels + channel, q * q);
  }
}

void layer_quantized(const LayerProblem& p, const LayerRange& range) {
  for_each_output(p, range, [&](int64_t row, int64_t channel, int64_t at, const ChannelEpilogue& c, int32_t residual, int64_t sample) {
    const int32_t sum = p.held ? p.held[row * p.layout.columns() + channel] : accumulate(p, row, channel);
    const Code code = requantize(sum, c, residual, p.samples[sample], p.activation, p.residual != nullptr);
    p.y[at] = code.q;
    count_code(code, channel, p.shape.out_channels, p.channel_stats, p.stats_row(sample));
  });
}

void layer_float(const LayerProblem& p, const LayerRange& range) {
  for_each_output(p, range, [&](int64_t row, int64_t channel, int64_t at, const ChannelEpilogue& c, int32_t residual, int64_t sample) {
    p.y_float[at] = layer_value(accumulate(p, row, channel), c, residual, p.samples[sample], p.activation, p.activation_min, p.activation_max,
                                p.residual != nullptr);
  });
}

void layer_range(const LayerProblem& p, const LayerRange& range) {
  for_each_output(p, range, [&](int64_t row, int64_t channel, int64_t, const ChannelEpilogue& c, int32_t residual, int64_t sample) {
    const int32_t sum = accumulate(p, row, channel);
    if (p.held) p.held[row * p.layout.columns() + channel] = sum;
    const float y = output_value(sum, c, residual, p.samples[sample], p.activation, p.residual != nullptr);
    if (y == y) atomic_widen(p.range + 2 * sample, y, y);
  });
}

void patch_sums(const Conv2dShape& s, const uint8_t* x, int32_t zero_point, int64_t gamma, bool per_group, PatchSums* sums) {
  const int64_t inputs = s.in_channels / s.groups;
  for (int64_t oy = 0; oy < s.out_height(); oy += gamma)
    for (int64_t ox = 0; ox < s.out_width(); ox += gamma)
      for (int64_t group = 0; group < s.groups; ++group) {
        int64_t t1 = 0, t2 = 0;
        for (int64_t ky = 0; ky < s.kernel_height; ++ky)
          for (int64_t kx = 0; kx < s.kernel_width; ++kx) {
            const int64_t iy = oy * s.stride_height - s.padding_top + ky * s.dilation_height;
            const int64_t ix = ox * s.stride_width - s.padding_left + kx * s.dilation_width;
            if (iy < 0 || iy >= s.in_height || ix < 0 || ix >= s.in_width) continue;
            const uint8_t* pixel = x + (iy * s.in_width + ix) * s.in_channels + group * inputs;
            for (int64_t i = 0; i < inputs; ++i) {
              const int64_t centred = pixel[i] - zero_point;
              t1 += centred;
              t2 += centred * centred;
            }
          }
        PatchSums& out = sums[per_group ? group : 0];
        out.count += 1;
        out.sum += t1;
        out.squares += t2;
        out.sum_of_squared += t1 * t1;
      }
}

/// Calls visit(dense index in the sample, channel, x) for rows [begin, end).
template <class Visit>
void for_each_float(const QuantizeProblem& p, int64_t begin, int64_t end, Visit visit) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t j = 0; j < p.size[1]; ++j)
      for (int64_t k = 0; k < p.size[2]; ++k)
        visit((i * p.size[1] + j) * p.size[2] + k, k, load_float(p.x, p.dtype, i * p.stride[0] + j * p.stride[1] + k * p.stride[2]));
}

void float_range(const QuantizeProblem& p, int64_t begin, int64_t end, float* lo, float* hi) {
  *lo = kInfinity;
  *hi = -kInfinity;
  bool finite = true;
  for_each_float(p, begin, end, [&](int64_t, int64_t, float x) {
    finite = finite && is_finite(x);
    *lo = min_f(x, *lo);
    *hi = max_f(x, *hi);
  });
  if (!finite) *lo = kNan;
}

void quantize(const QuantizeProblem& p, int64_t begin, int64_t end, float inverse_scale, int32_t zero_point, uint8_t* q, int64_t* stats,
              bool channel_stats) {
  for_each_float(p, begin, end, [&](int64_t at, int64_t channel, float x) {
    const Code code = round_to_code(x * inverse_scale, zero_point);
    q[at] = code.q;
    count_code(code, channel, p.size[2], channel_stats, stats);
  });
}

void dequantize(const uint8_t* q, int64_t count, float scale, int32_t zero_point, DType dtype, void* y) {
  for (int64_t i = 0; i < count; ++i) store_float(y, dtype, i, scale * static_cast<float>(q[i] - zero_point));
}

void moments(const uint8_t* q, int64_t count, int64_t channels, bool channel_stats, int64_t* stats) {
  for (int64_t i = 0; i < count; ++i) count_code({q[i], false}, i % channels, channels, channel_stats, stats);
}

void mark_codes(const uint8_t* q, int64_t count, bool* seen) {
  for (int64_t i = 0; i < count; ++i) seen[q[i]] = true;
}

void lookup(const uint8_t* q, int64_t rows, int64_t channels, int64_t q_stride, const Code* table, uint8_t* y, int64_t y_stride, int64_t* stats,
            int64_t* channel_sums, int64_t* channel_squares) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < channels; ++c) {
      const Code code = table[q[row * q_stride + c]];
      y[row * y_stride + c] = code.q;
      count_code(code, 0, 0, false, stats);
      if (channel_sums) {
        atomic_add(channel_sums + c, code.q);
        atomic_add(channel_squares + c, int64_t{code.q} * code.q);
      }
    }
}

void add_range(const uint8_t* a, const uint8_t* b, int64_t count, const SampleEpilogue& s, float activation_min, float activation_max, float* lo,
               float* hi) {
  *lo = kInfinity;
  *hi = -kInfinity;
  for (int64_t i = 0; i < count; ++i) {
    const float y = add_value(a[i], b[i], s, activation_min, activation_max);
    *lo = min_f(y, *lo);
    *hi = max_f(y, *hi);
  }
}

void add(const uint8_t* a, const uint8_t* b, int64_t count, int64_t channels, const SampleEpilogue& s, uint8_t* y, int64_t* stats,
         bool channel_stats) {
  for (int64_t i = 0; i < count; ++i) {
    const Code code = add_code(a[i], b[i], s);
    y[i] = code.q;
    count_code(code, i % channels, channels, channel_stats, stats);
  }
}

void mul_range(const uint8_t* a, const uint8_t* b, int64_t rows, int64_t channels, int64_t b_step, const SampleEpilogue& s, float* lo, float* hi) {
  *lo = kInfinity;
  *hi = -kInfinity;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < channels; ++c) {
      const float value = mul_value(a[row * channels + c], b[row * b_step + c], s);
      *lo = min_f(value, *lo);
      *hi = max_f(value, *hi);
    }
}

void mul(const uint8_t* a, const uint8_t* b, int64_t rows, int64_t channels, int64_t b_step, const SampleEpilogue& s, uint8_t* y, int64_t* stats,
         bool channel_stats) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < channels; ++c) {
      const Code code = mul_code(a[row * channels + c], b[row * b_step + c], s);
      y[row * channels + c] = code.q;
      count_code(code, c, channels, channel_stats, stats);
    }
}

void window_max(const uint8_t* window, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, int64_t channels, uint8_t* y) {
  std::fill_n(y, channels, uint8_t{0});
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t c = 0; c < channels; ++c) y[c] = std::max(y[c], window[i * row_step + j * column_step + c]);
}

void window_sums(const uint8_t* window, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, int64_t channels, int32_t* sums) {
  std::fill_n(sums, channels, 0);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t c = 0; c < channels; ++c) sums[c] += window[i * row_step + j * column_step + c];
}

void average_range(const int32_t* sums, int64_t count, int32_t offset, float share, const SampleEpilogue& s, float* lo, float* hi) {
  *lo = kInfinity;
  *hi = -kInfinity;
  for (int64_t i = 0; i < count; ++i) {
    const float y = layer_value(sums[i] - offset, {share, 0.0f}, 0, s, Activation::clamp, -kInfinity, kInfinity, false);
    *lo = min_f(y, *lo);
    *hi = max_f(y, *hi);
  }
}

int64_t average(const int32_t* sums, int64_t count, int32_t offset, float share, const SampleEpilogue& s, uint8_t* y) {
  int64_t clipped = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Code code = requantize(sums[i] - offset, {share, 0.0f}, 0, s, Activation::clamp, false);
    y[i] = code.q;
    clipped += code.clipped;
  }
  return clipped;
}

/// sum of value(i) over [0, count), in the order of kSumLanes.
template <class Value>
float sum_in_lanes(int64_t count, Value value) {
  float lanes[kSumLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i % kSumLanes] = value(i, lanes[i % kSumLanes]);
  return join_lanes(lanes);
}

void layer_norm(const LayerNormProblem& p, int64_t row, QParams x, float* sum, float* y) {
  const int64_t at = row * p.channels;
  const auto n = static_cast<float>(p.channels);
  for (int64_t i = 0; i < p.channels; ++i) {
    const float residual = p.residual ? p.residual[at + i] : 0.0f;
    sum[i] = p.q ? fmaf(static_cast<float>(p.q[at + i] - x.zero_point), x.scale, residual) : p.x_float[at + i] + residual;
  }
  const float mean = sum_in_lanes(p.channels, [&](int64_t i, float total) { return total + sum[i]; }) / n;
  const float variance = sum_in_lanes(p.channels, [&](int64_t i, float total) { return fmaf(sum[i] - mean, sum[i] - mean, total); }) / n;
  const float factor = 1.0f / sqrtf(variance + p.eps);
  for (int64_t i = 0; i < p.channels; ++i)
    y[i] = fmaf((sum[i] - mean) * factor, p.weight ? p.weight[i] : 1.0f, p.bias ? p.bias[i] : 0.0f);
}

void attention_pack(const AttentionProblem& p, int64_t image, int64_t head) {
  const PairLayout keys = p.keys(), values = p.values();
  int16_t *packed_keys = p.packed_keys(image, head), *packed_values = p.packed_values(image, head);
  std::fill_n(packed_keys, keys.size(), int16_t{0});
  std::fill_n(packed_values, values.size(), int16_t{0});
  for (int64_t j = 0; j < p.shape.keys; ++j) {
    const int64_t token = image * p.shape.keys + j, at = token * p.shape.channels() + head * p.shape.head_dim;
    for (int64_t d = 0; d < p.shape.head_dim; ++d) {
      packed_keys[keys.offset(d, j)] = static_cast<int16_t>(p.key.q[at + d] - clamp_zero_point(p.key.zero_point[token]));
      packed_values[values.offset(j, d)] = static_cast<int16_t>(p.value.q[at + d] - clamp_zero_point(p.value.zero_point[token]));
    }
  }
}

void attention(const AttentionProblem& p, int64_t image, int64_t begin, int64_t end, const AttentionScratch& scratch, float* y) {
  const AttentionShape& s = p.shape;
  const float *key_scale = p.key.scale + image * s.keys, *value_scale = p.value.scale + image * s.keys;
  float* w = scratch.logits;
  for (int64_t i = begin; i < end; ++i)
    for (int64_t head = 0; head < s.heads; ++head) {
      const int16_t *keys = p.packed_keys(image, head), *values = p.packed_values(image, head);
      const int64_t token = image * s.queries + i;
      const uint8_t* query = p.query.q + token * s.channels() + head * s.head_dim;
      const int32_t zero_point = clamp_zero_point(p.query.zero_point[token]);
      float largest = -kInfinity, most = 0.0f;
      for (int64_t j = 0; j < s.keys; ++j) {
        int32_t sum = 0;
        for (int64_t d = 0; d < s.head_dim; ++d) sum += (query[d] - zero_point) * keys[p.keys().offset(d, j)];
        w[j] = static_cast<float>(sum) * key_scale[j];
        largest = max_f(w[j], largest);
      }
      const float factor = p.query.scale[token] * p.scale;
      const float total = sum_in_lanes(s.keys, [&](int64_t j, float partial) {
        const float e = exp_f((w[j] - largest) * factor);
        w[j] = e * value_scale[j];
        most = max_f(w[j], most);
        return partial + e;
      });
      for (int64_t d = 0; d < s.head_dim; ++d) {
        int32_t sum = 0;
        for (int64_t j = 0; j < s.keys; ++j)
          sum += static_cast<int32_t>(rintf(clamp_f(w[j] * (255.0f / most), 0.0f, 255.0f))) * values[p.values().offset(j, d)];
        y[(i - begin) * s.channels() + head * s.head_dim + d] = static_cast<float>(sum) * (most / 255.0f / total);
      }
    }
}

}  // namespace

const Kernels kReferenceKernels = {
    "reference",      {layer_quantized, layer_float, layer_range}, {layer_quantized, layer_float, layer_range}, {}, 0,
    1,                patch_sums, float_range, quantize, dequantize, moments, mark_codes, lookup, add_range, add, mul_range, mul,
    window_max,       window_sums, average_range, average, layer_norm, attention_pack, attention};

void atomic_widen(float* range, float lo, float hi) {
  float seen;
  __atomic_load(range, &seen, __ATOMIC_RELAXED);
  while (!(seen != seen) && !(lo >= seen) && !__atomic_compare_exchange(range, &seen, &lo, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  __atomic_load(range + 1, &seen, __ATOMIC_RELAXED);
  while (hi > seen && !__atomic_compare_exchange(range + 1, &seen, &hi, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

}  // namespace probquant
