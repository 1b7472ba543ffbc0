// What an instruction set has to offer: one table of range kernels. The front ends (csrc/core) validate, predict, split
// the work and fill a problem; a kernel computes one range of it in the calling thread. csrc/reference has the scalar
// table that defines every result; dispatch.cpp gives the table of the selected ISA.
#pragma once
#include <probquant/ops.h>

#include "../core/numerics.h"
#include "../core/packed_weight.h"
#include "../core/surrogate.h"

namespace probquant {

/// A convolution or linear layer, ready to run. A row is one output position: row = (image * out_height + oy) *
/// out_width + ox; its sample is row / rows_per_sample (tiles may straddle samples).
struct LayerProblem {
  Conv2dShape shape;
  PackedLayout layout;
  int64_t out_height, out_width, rows_per_sample;
  const uint8_t* x;
  const uint8_t* packed_weight;
  const uint8_t* residual;        ///< null: none
  Activation activation;
  float activation_min, activation_max;
  ProfileSpan profile;            ///< of the packed weight
  const SampleEpilogue* samples;  ///< one per sample; of `range`, with an output scale of 1
  uint8_t* y;                     ///< [rows, out_channels]
  int64_t* stats;                 ///< zeroed by the front end; kernels add to it atomically
  bool channel_stats;
  float* y_float;                 ///< to_float
  float* range;                   ///< [samples][2], minimum and maximum of output_value
  int32_t* held;                  ///< null, or layout.columns() values per row, which `range` leaves for `quantized`
  Upcoming upcoming;

  explicit LayerProblem(const Conv2dShape& s) : shape(s), layout(weight_shape(s)) {}
  /// Whether a clamp's bounds over the profile differ between channels: 0 and infinity do not.
  bool profiled_bounds() const {
    const auto varies = [](float bound) { return bound != 0.0f && is_finite(bound); };
    return has_profile(profile) && activation == Activation::clamp && (varies(activation_min) || varies(activation_max));
  }
  int64_t* stats_row(int64_t sample) const { return stats + sample * stats_columns(shape.out_channels, channel_stats); }
};

/// Rows [row_begin, row_end) times output channels [channel_begin, channel_end); channel_begin is a block's first channel
/// and channel_end a block's last or the layer's (see packed_weight.h).
struct LayerRange {
  int64_t row_begin, row_end, channel_begin, channel_end;
};

/// Quantization of one sample of a strided float tensor [rows, columns, channels] into dense codes.
struct QuantizeProblem {
  const void* x;
  DType dtype;
  int64_t size[3], stride[3];
};

/// A LayerNorm over rows of channels (see LayerNormArguments).
struct LayerNormProblem {
  int64_t channels;
  const uint8_t* q;      ///< null: x_float is read
  const float* x_float;
  const float* residual; ///< null: none
  const float* weight;   ///< null: ones
  const float* bias;     ///< null: zeros
  float eps;
};

/// Right-hand side of an int16 product: columns in blocks of 16, [block][inner / 2][16 columns][2 inner], zeros where there is
/// nothing. 64 bytes are one operand of vpdpwssd, or two of AVX2's vpmaddwd, with a column per dword.
struct PairLayout {
  int64_t inner, columns;

  static constexpr int64_t kColumns = 16;
  int64_t pairs() const { return (inner + 1) / 2; }
  int64_t blocks() const { return (columns + kColumns - 1) / kColumns; }
  int64_t block_size() const { return pairs() * kColumns * 2; }
  int64_t size() const { return blocks() * block_size(); }
  int64_t offset(int64_t k, int64_t column) const {
    return column / kColumns * block_size() + (k / 2 * kColumns + column % kColumns) * 2 + k % 2;
  }
};

/// An attention, ready to run on images [image_begin, ...) whose keys and values are packed: centred on their zero points, per
/// image and head first the keys (inner: head_dim, columns: keys), then the values (inner: keys, columns: head_dim). AMX keeps bytes of its
/// own order in the same room.
struct AttentionProblem {
  AttentionShape shape;
  QuantizedInput query, key, value;
  float scale;
  int16_t* packed;
  int64_t image_begin = 0;

  PairLayout keys() const { return {shape.head_dim, shape.keys}; }
  PairLayout values() const { return {shape.keys, shape.head_dim}; }
  int16_t* packed_keys(int64_t image, int64_t head) const {
    return packed + ((image - image_begin) * shape.heads + head) * (keys().size() + values().size());
  }
  int16_t* packed_values(int64_t image, int64_t head) const { return packed_keys(image, head) + keys().size(); }
};

/// Queries that one call of the attention kernel takes, at most: their logits of a head stay in L1 or L2.
inline constexpr int64_t kAttentionQueries = 24;

/// What a call works in, for kAttentionQueries queries of one head. Rows are padded so that vectors of 32 values fit.
struct AttentionScratch {
  int64_t key_stride, dim_stride;
  float* logits;       ///< [queries][key_stride]: int32 products, logits, weights in turn
  int32_t* products;   ///< [queries][dim_stride]: of weights and values
  int16_t* query;      ///< [queries][dim_stride]: centred
  int16_t* weights;    ///< [queries][key_stride]: in 8 bits
  float* factors;      ///< [queries]: of the products

  AttentionScratch(const AttentionShape& s, void* memory) : key_stride(padded(s.keys)), dim_stride(padded(s.head_dim)) {
    logits = static_cast<float*>(memory);
    products = reinterpret_cast<int32_t*>(logits + kAttentionQueries * key_stride);
    query = reinterpret_cast<int16_t*>(products + kAttentionQueries * dim_stride);
    weights = query + kAttentionQueries * dim_stride;
    factors = reinterpret_cast<float*>(weights + kAttentionQueries * key_stride);
  }
  static int64_t bytes(const AttentionShape& s) { return kAttentionQueries * (6 * padded(s.keys) + 6 * padded(s.head_dim) + 4); }

 private:
  static int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }
};

using LayerKernel = void (*)(const LayerProblem&, const LayerRange&);

/// The three ways to run a layer over a range.
struct LayerKernels {
  /// Requantizes to 8 bits at once and adds the output's moments and clip counts to the stats.
  LayerKernel quantized;
  /// Strategy::none: writes layer_value to y_float.
  LayerKernel to_float;
  /// The first pass where an exact range is wanted, `quantized` being the second: widens the samples' ranges by output_value, NaNs passed
  /// over. Where `held` is set (never of a depthwise layer), it leaves there what the same range of `quantized` takes instead of products.
  LayerKernel range;
};

struct Kernels {
  const char* name;
  LayerKernels dense;      ///< linear layers and convolutions, any groups
  LayerKernels depthwise;  ///< PackedLayout::depthwise
  LayerKernels grouped;    ///< narrow groups, where it is faster than dense
  int64_t grouped_inputs;  ///< of an output of PackedLayout::whole_groups() with at most 2 blocks, up to which it is
  int64_t macs_per_clock;  ///< of dense layers, about: whether sums are held or computed twice
  /// Adds the patch sums of one sample's fields, sampled at every gamma-th position in each direction, to
  /// sums[group] (per_group) or sums[0].
  void (*patch_sums)(const Conv2dShape& shape, const uint8_t* x_sample, int32_t zero_point, int64_t gamma, bool per_group, PatchSums* sums);

  /// Minimum and maximum of rows [begin, end) of the sample; NaN or infinity in x makes lo NaN.
  void (*float_range)(const QuantizeProblem&, int64_t begin, int64_t end, float* lo, float* hi);
  /// q = clamp(rint(x / s) + zero point); `inverse_scale` = 1 / s. Adds to the stats row.
  void (*quantize)(const QuantizeProblem&, int64_t begin, int64_t end, float inverse_scale, int32_t zero_point, uint8_t* q, int64_t* stats,
                   bool channel_stats);
  void (*dequantize)(const uint8_t* q, int64_t count, float scale, int32_t zero_point, DType dtype, void* y);
  /// Adds sums and squares of q [count / channels, channels] to a stats row.
  void (*moments)(const uint8_t* q, int64_t count, int64_t channels, bool channel_stats, int64_t* stats);
  /// The codes that occur: `seen[code]` becomes true.
  void (*mark_codes)(const uint8_t* q, int64_t count, bool* seen);
  /// y[i] = table[q[i]].code; adds moments and the clipped entries to the stats row. Rows of `channels` codes; strides in codes.
  void (*lookup)(const uint8_t* q, int64_t rows, int64_t channels, int64_t q_stride, const Code* table, uint8_t* y, int64_t y_stride,
                 int64_t* stats, int64_t* channel_sums, int64_t* channel_squares);
  /// Fused residual arithmetic of a standalone add (see NUMERICS.md): range of the sum, and the sum requantized.
  void (*add_range)(const uint8_t* a, const uint8_t* b, int64_t count, const SampleEpilogue&, float activation_min, float activation_max,
                    float* lo, float* hi);
  void (*add)(const uint8_t* a, const uint8_t* b, int64_t count, int64_t channels, const SampleEpilogue&, uint8_t* y, int64_t* stats,
              bool channel_stats);
  /// The integer products (q_a - z_a)(q_b - z_b), z_b in residual_zero_point: their range, and they requantized. Row i of a, [rows, channels],
  /// meets b + i * b_step: b_step = channels, or 0 for a row that serves all.
  void (*mul_range)(const uint8_t* a, const uint8_t* b, int64_t rows, int64_t channels, int64_t b_step, const SampleEpilogue&, float* lo, float* hi);
  void (*mul)(const uint8_t* a, const uint8_t* b, int64_t rows, int64_t channels, int64_t b_step, const SampleEpilogue&, uint8_t* y, int64_t* stats,
              bool channel_stats);
  /// Maximum and sum of a pooling window, every channel: rows x columns pixels, with their distances in bytes.
  void (*window_max)(const uint8_t* window, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, int64_t channels, uint8_t* y);
  void (*window_sums)(const uint8_t* window, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, int64_t channels, int32_t* sums);
  /// share * (sum - offset) in real units: the range of averages, and the averages requantized (returns how many clipped).
  void (*average_range)(const int32_t* sums, int64_t count, int32_t offset, float share, const SampleEpilogue&, float* lo, float* hi);
  int64_t (*average)(const int32_t* sums, int64_t count, int32_t offset, float share, const SampleEpilogue&, uint8_t* y);

  /// One row: its sum with the residual, and that normalised. `x` are the parameters of its codes.
  void (*layer_norm)(const LayerNormProblem&, int64_t row, QParams x, float* sum, float* y);
  /// Packs the keys and the values of one head.
  void (*attention_pack)(const AttentionProblem&, int64_t image, int64_t head);
  /// Queries [begin, end) of an image, every head: y [end - begin, heads * head_dim].
  void (*attention)(const AttentionProblem&, int64_t image, int64_t begin, int64_t end, const AttentionScratch&, float* y);

  const LayerKernels& layer(const PackedLayout& layout) const {
    const bool narrow = layout.whole_groups() && layout.group_blocks <= 2 && layout.inputs <= 2 * kBlockChannels;
    return layout.depthwise ? depthwise : narrow && layout.own_inputs <= grouped_inputs ? grouped : dense;
  }
};

/// The scalar table, complete: the normative answer.
extern const Kernels kReferenceKernels;

// An ISA's table.cpp overwrites the entries it has; the others stay as the ISA below left them.
void install_avx2(Kernels& table);
void install_avx512vnni(Kernels& table);
void install_amx(Kernels& table);

/// The table of the selected ISA (features.h).
const Kernels& kernels();

/// Adds to a shared counter; sums of integers do not depend on the order.
inline void atomic_add(int64_t* counter, int64_t value) { __atomic_fetch_add(counter, value, __ATOMIC_RELAXED); }
/// Widens a shared range; a NaN minimum stays.
void atomic_widen(float* range, float lo, float hi);

}  // namespace probquant
