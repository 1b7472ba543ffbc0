// What the CPU and the CUDA registrations share: the geometry of quantized tensors, the outputs of an op, and the arguments of
// quantize, dequantize and moments, checked and allocated, ready for the core. Metadata only: no value is read.
#pragma once
#include <algorithm>

#include "checks.h"

namespace probquant::ops {

using stable::codes;
using OptionalTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;
using Quantized = std::tuple<Tensor, Tensor, Tensor, Tensor>;

/// The sizes an op works on: an image batch [N, C, H, W] (channels_last), or rows [samples..., rows..., K].
struct Geometry {
  int64_t samples = 1, count = 1, channels = 1;  ///< count: values per sample
  bool image = false;
};

/// Checks a code tensor with its parameters and returns its geometry. Rank 4 with a one-dimensional scale is an image.
inline Geometry check_quantized(const char* op, const char* name, const Tensor& q, const Tensor& scale, const Tensor& zero_point) {
  const Device device = device_of(q);
  check_device_and_dtype({op, name}, q, device, codes().uint8);
  const IntView sizes = q.sizes(), leading = scale.sizes();
  require(sizes.size() >= 2, op, ": ", name, " has shape ", text(sizes), ", want at least two dimensions");
  require(leading.size() >= 1 && leading.size() < sizes.size() && same(leading, {sizes.data(), leading.size()}), op, ": ", name,
          "_scale has shape ", text(leading), ", want leading dimensions of ", name, "'s ", text(sizes));
  check_dense({op, name, "_scale"}, scale, device, codes().float32, leading);
  check_dense({op, name, "_zero_point"}, zero_point, device, codes().int32, leading);
  Geometry g;
  g.image = sizes.size() == 4 && leading.size() == 1;
  for (size_t i = 0; i < sizes.size(); ++i) (i < leading.size() ? g.samples : g.count) *= sizes[i];
  g.channels = g.image ? sizes[1] : sizes[sizes.size() - 1];
  require(g.image ? is_channels_last(q) : q.is_contiguous(), op, ": ", name, " of shape ", text(sizes), " has strides ", text(q.strides()),
          g.image ? ", want channels_last" : ", want contiguous");
  return g;
}

inline QuantizedInput input(const Tensor& q, const Tensor& scale, const Tensor& zero_point) {
  QuantizedInput x;
  x.q = q.data<const uint8_t>();
  x.scale = scale.data<const float>();
  x.zero_point = zero_point.data<const int32_t>();
  return x;
}

inline Tensor empty_image(int64_t batch, int64_t channels, int64_t height, int64_t width, int32_t dtype, const Tensor& like) {
  const int64_t row = std::max<int64_t>(width, 1) * std::max<int64_t>(channels, 1);
  return stable::empty_strided({batch, channels, height, width}, {std::max<int64_t>(height, 1) * row, 1, row, std::max<int64_t>(channels, 1)},
                               dtype, like);
}

/// The four outputs of an op and where the core writes them.
struct Output {
  Tensor q, scale, zero_point, stats;
  QuantizedOutput pointers;

  Output(Tensor codes_tensor, IntView leading, int64_t channels, bool channel_stats)
      : q(std::move(codes_tensor)),
        scale(stable::empty(leading, codes().float32, q)),
        zero_point(stable::empty(leading, codes().int32, q)),
        stats(stable::empty(with_columns(leading, stats_columns(channels, channel_stats)), codes().int64, q)) {
    pointers = {q.data<uint8_t>(), scale.data<float>(), zero_point.data<int32_t>(), stats.data<int64_t>(), channel_stats};
  }
  Quantized release() { return {std::move(q), std::move(scale), std::move(zero_point), std::move(stats)}; }

 private:
  static Ints with_columns(IntView leading, int64_t columns) {
    Ints sizes(leading.begin(), leading.end());
    sizes.push_back(columns);
    return sizes;
  }
};

/// Arguments of probquant::quantize.
struct QuantizeArguments {
  FloatView x;
  const float* scale;
  const int32_t* zero_point;
  Output y;
};

inline QuantizeArguments quantize_arguments(const Tensor& x, int64_t sample_dims, const OptionalTensor& scale, const OptionalTensor& zero_point,
                                            bool channel_stats) {
  const char* op = "quantize";
  const IntView sizes = x.sizes(), strides = x.strides();
  const auto rank = static_cast<int64_t>(sizes.size());
  require(rank >= 2, op, ": x has shape ", text(sizes), ", want at least two dimensions");
  require(sample_dims >= 1 && sample_dims < rank, op, ": sample_dims ", sample_dims, ", want 1 to ", rank - 1);
  FloatView view;
  view.dtype = x.dtype() == codes().float32    ? DType::float32
               : x.dtype() == codes().float16  ? DType::float16
               : x.dtype() == codes().bfloat16 ? DType::bfloat16
                                               : static_cast<DType>(-1);
  require(static_cast<int32_t>(view.dtype) >= 0, op, ": x has dtype ", dtype_name(x.dtype()), ", want float32, float16 or bfloat16");
  require(scale.has_value() == zero_point.has_value(), op, ": scale and zero_point are given together");
  if (scale) {
    check_dense({op, "scale"}, *scale, device_of(x), codes().float32, {1});
    check_dense({op, "zero_point"}, *zero_point, device_of(x), codes().int32, {1});
  }
  const bool image = rank == 4 && sample_dims == 1;
  if (image) {
    const size_t order[4] = {0, 2, 3, 1};
    for (size_t i = 0; i < 4; ++i) view.size[i] = sizes[order[i]], view.stride[i] = strides[order[i]];
  } else {
    require(x.is_contiguous(), op, ": x of shape ", text(sizes), " has strides ", text(strides), ", want contiguous");
    view.size[0] = view.size[2] = 1;
    view.size[1] = 1;
    view.size[3] = sizes[static_cast<size_t>(rank - 1)];
    for (int64_t i = 0; i < rank - 1; ++i) view.size[i < sample_dims ? 0 : 1] *= sizes[static_cast<size_t>(i)];
    view.stride[3] = 1;
    view.stride[2] = view.stride[1] = view.size[3];
    view.stride[0] = view.size[1] * view.size[3];
  }
  view.data = x.data<const void>();
  return {view, scale ? scale->data<const float>() : nullptr, zero_point ? zero_point->data<const int32_t>() : nullptr,
          Output(image ? empty_image(sizes[0], sizes[1], sizes[2], sizes[3], codes().uint8, x) : stable::empty(sizes, codes().uint8, x),
                 {sizes.data(), static_cast<size_t>(sample_dims)}, view.size[3], channel_stats)};
}

/// Arguments of probquant::dequantize.
struct DequantizeArguments {
  QuantizedInput x;
  int64_t samples, count;
  DType dtype;
  Tensor y;
};

inline DequantizeArguments dequantize_arguments(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, std::optional<int32_t> dtype) {
  const char* op = "dequantize";
  const Geometry g = check_quantized(op, "x", x, x_scale, x_zero_point);
  const int32_t code = dtype.value_or(codes().float32);
  require(code == codes().float32 || code == codes().float16 || code == codes().bfloat16, op, ": dtype ", dtype_name(code),
          ", want float32, float16 or bfloat16");
  const DType type = code == codes().float16 ? DType::float16 : code == codes().bfloat16 ? DType::bfloat16 : DType::float32;
  const IntView sizes = x.sizes();
  return {input(x, x_scale, x_zero_point), g.samples, g.count, type,
          g.image ? empty_image(sizes[0], sizes[1], sizes[2], sizes[3], code, x) : stable::empty(sizes, code, x)};
}

/// Arguments of probquant::moments.
struct MomentsArguments {
  const uint8_t* q;
  int64_t samples, count, channels;
  Tensor stats;
};

inline MomentsArguments moments_arguments(const Tensor& q, int64_t sample_dims, bool channel_stats) {
  const char* op = "moments";
  check_device_and_dtype({op, "q"}, q, device_of(q), codes().uint8);
  const IntView sizes = q.sizes();
  const auto rank = static_cast<int64_t>(sizes.size());
  require(rank >= 2, op, ": q has shape ", text(sizes), ", want at least two dimensions");
  require(sample_dims >= 1 && sample_dims < rank, op, ": sample_dims ", sample_dims, ", want 1 to ", rank - 1);
  const bool image = rank == 4 && sample_dims == 1;
  require(image ? is_channels_last(q) : q.is_contiguous(), op, ": q of shape ", text(sizes), " has strides ", text(q.strides()),
          image ? ", want channels_last" : ", want contiguous");
  int64_t samples = 1, count = 1;
  Ints leading;
  for (int64_t i = 0; i < rank; ++i) {
    const int64_t size = sizes[static_cast<size_t>(i)];
    (i < sample_dims ? samples : count) *= size;
    if (i < sample_dims) leading.push_back(size);
  }
  const int64_t channels = image ? sizes[1] : sizes[static_cast<size_t>(rank - 1)];
  leading.push_back(stats_columns(channels, channel_stats));
  return {q.data<const uint8_t>(), samples, count, channels, stable::empty(leading, codes().int64, q)};
}

}  // namespace probquant::ops
