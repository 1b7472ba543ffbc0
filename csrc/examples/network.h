// What both examples run: an image through a 3x3 convolution with ReLU and a linear layer, in int8, on raw buffers.
//
// The way through the library, as you would copy it:
//   1. Once per layer: quantize the weights (int8, one scale per output channel), pack them, and describe them to the
//      Gaussian surrogate by seven numbers, its predictor.
//   2. Per batch: quantize the float images; run the layers; dequantize the last output.
// No output range is measured: each layer predicts its images' scales from the moments (`stats`) that came with its input,
// and writes 8 bits at once.
#pragma once
#include <probquant/probquant.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace example {

/// A quantized activation and the memory it lives in: codes, and per image a scale, a zero point and the moments.
struct Activation {
  std::vector<std::uint8_t> q;
  std::vector<float> scale;
  std::vector<std::int32_t> zero_point;
  std::vector<std::int64_t> stats;

  Activation(std::int64_t images, std::int64_t values_per_image)
      : q(static_cast<std::size_t>(images * values_per_image)),
        scale(static_cast<std::size_t>(images)),
        zero_point(static_cast<std::size_t>(images)),
        stats(static_cast<std::size_t>(images * probquant::kStatsSample)) {}

  /// As the next layer reads it.
  probquant::QuantizedInput input() const {
    probquant::QuantizedInput x;
    x.q = q.data(), x.scale = scale.data(), x.zero_point = zero_point.data(), x.stats = stats.data();
    return x;
  }
  /// As a layer writes it.
  probquant::QuantizedOutput output() {
    probquant::QuantizedOutput y;
    y.q = q.data(), y.scale = scale.data(), y.zero_point = zero_point.data(), y.stats = stats.data();
    return y;
  }

  friend bool operator==(const Activation& a, const Activation& b) {
    return a.q == b.q && a.scale == b.scale && a.zero_point == b.zero_point && a.stats == b.stats;
  }
};

/// Weights in int8 with one scale per output channel, packed for this library's kernels, and their predictor.
struct Weights {
  std::vector<std::uint8_t> packed;
  std::vector<float> predictor;  // [alpha, beta, rho, mean_w, var_w, mean_b, var_b], see probquant::Strategy

  /// `weight` is [out_channels][kernel_height][kernel_width][in_channels], `bias` [out_channels]. The predicted range is
  /// [mean - alpha sigma, mean + beta sigma]; calibration would choose both for each layer, here they are given.
  Weights(const probquant::WeightShape& shape, const std::vector<float>& weight, const std::vector<float>& bias, float alpha, float beta) {
    const std::size_t channels = static_cast<std::size_t>(shape.out_channels), k = weight.size() / channels;
    std::vector<std::int8_t> codes(weight.size());
    std::vector<float> scale(channels), values(weight.size());
    for (std::size_t o = 0; o < channels; ++o) {
      float largest = 0;
      for (std::size_t i = 0; i < k; ++i) largest = std::max(largest, std::fabs(weight[o * k + i]));
      scale[o] = largest > 0 ? largest / 127 : 1;
      for (std::size_t i = 0; i < k; ++i) {
        codes[o * k + i] = static_cast<std::int8_t>(std::nearbyint(weight[o * k + i] / scale[o]));
        values[o * k + i] = static_cast<float>(codes[o * k + i]) * scale[o];
      }
    }
    packed.resize(static_cast<std::size_t>(probquant::packed_weight_bytes(shape)));
    probquant::pack_weight(shape, codes.data(), scale.data(), bias.data(), nullptr, packed.data());

    const auto [mean_w, var_w] = mean_and_variance(values);
    const auto [mean_b, var_b] = mean_and_variance(bias);
    predictor = {alpha, beta, 0, mean_w, var_w, mean_b, var_b};
  }

 private:
  struct MeanAndVariance {
    float mean, variance;
  };
  static MeanAndVariance mean_and_variance(const std::vector<float>& values) {
    double sum = 0, squares = 0;
    for (const float v : values) sum += static_cast<double>(v);
    const double mean = sum / static_cast<double>(values.size());
    for (const float v : values) squares += (static_cast<double>(v) - mean) * (static_cast<double>(v) - mean);
    return {static_cast<float>(mean), static_cast<float>(squares / static_cast<double>(values.size()))};
  }
};

/// Runs one layer with predicted scales. A linear layer is the shape that probquant::linear_shape gives.
inline void run_layer(const probquant::Conv2dShape& shape, const Weights& weights, const Activation& x, bool relu, Activation& y,
                      const probquant::Executor& executor) {
  probquant::LayerArguments arguments;
  arguments.x = x.input();
  arguments.packed_weight = weights.packed.data();
  arguments.activation_min = relu ? 0.0f : -HUGE_VALF;  // ReLU is a lower bound of 0; nothing more to compute
  arguments.activation_max = HUGE_VALF;
  arguments.strategy = probquant::Strategy::gaussian;
  arguments.predictor = weights.predictor.data();
  arguments.predictor_size = static_cast<std::int64_t>(weights.predictor.size());
  arguments.gamma = 1;  // look at every receptive field; 2 would look at every second one in each direction
  arguments.y = y.output();
  probquant::conv2d(shape, arguments, executor);
}

/// Numbers in [-1, 1) that are the same on every machine.
inline std::vector<float> noise(std::size_t count, std::uint32_t seed) {
  std::vector<float> values(count);
  for (float& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(static_cast<std::int32_t>(seed >> 16) - 32768) / 32768;
  }
  return values;
}

inline constexpr std::int64_t kImages = 2, kHeight = 6, kWidth = 5, kChannels = 3, kFeatures = 8, kClasses = 10;

/// Everything the network gives on its way.
struct Results {
  Activation x{kImages, kHeight * kWidth * kChannels};
  Activation hidden{kImages, kHeight * kWidth * kFeatures};
  Activation logits{kImages, kClasses};
  std::vector<float> float_logits = std::vector<float>(static_cast<std::size_t>(kImages * kClasses));

  friend bool operator==(const Results& a, const Results& b) {
    return a.x == b.x && a.hidden == b.hidden && a.logits == b.logits && a.float_logits == b.float_logits;
  }
};

inline Results run_network(const probquant::Executor& executor) {
  // The layers.
  probquant::Conv2dShape conv;
  conv.batch = kImages, conv.in_height = kHeight, conv.in_width = kWidth, conv.in_channels = kChannels, conv.out_channels = kFeatures;
  conv.kernel_height = conv.kernel_width = 3;
  conv.padding_top = conv.padding_bottom = conv.padding_left = conv.padding_right = 1;
  const Weights conv_weights({kFeatures, 3, 3, kChannels, 1}, noise(kFeatures * 3 * 3 * kChannels, 1), noise(kFeatures, 2), 3.0f, 3.0f);

  const std::int64_t k = kHeight * kWidth * kFeatures;  // the image's hidden values, in NHWC order
  const probquant::Conv2dShape linear = probquant::linear_shape(kImages, 1, k, kClasses);
  const Weights linear_weights({kClasses, 1, 1, k, 1}, noise(static_cast<std::size_t>(kClasses * k), 3), noise(kClasses, 4), 4.0f, 4.0f);

  // The images: NHWC, the second one ten times as dark. Each gets a scale of its own.
  std::vector<float> images = noise(static_cast<std::size_t>(kImages * kHeight * kWidth * kChannels), 5);
  for (std::size_t i = images.size() / 2; i < images.size(); ++i) images[i] /= 10;
  probquant::FloatView view;  // any strides will do: NCHW, a crop, ...
  view.data = images.data();
  view.size[0] = kImages, view.size[1] = kHeight, view.size[2] = kWidth, view.size[3] = kChannels;
  view.stride[0] = kHeight * kWidth * kChannels, view.stride[1] = kWidth * kChannels, view.stride[2] = kChannels, view.stride[3] = 1;

  // The run.
  Results r;
  probquant::quantize(view, nullptr, nullptr, r.x.output(), executor);
  run_layer(conv, conv_weights, r.x, true, r.hidden, executor);
  run_layer(linear, linear_weights, r.hidden, false, r.logits, executor);
  probquant::dequantize(r.logits.input(), kImages, kClasses, probquant::DType::float32, r.float_logits.data(), executor);
  return r;
}

}  // namespace example
