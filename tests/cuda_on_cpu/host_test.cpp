// The host side of csrc/cuda without a driver: what it refuses before it asks the device, what it says when the device refuses,
// what it enqueues, and where. Exit status 0 if all is as expected.
#include <cuda_runtime.h>
#include <probquant/cuda.h>

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "core/front_end.h"
#include "cuda/heuristics.h"
#include "cudart.h"

namespace {

using namespace probquant;
using cuda::DenseTile;
using cuda_on_cpu::enqueued;
using cuda_on_cpu::uncapturable_calls;

int failures = 0;

void expect(bool right, const std::string& what) {
  if (!right) std::printf("failed: %s\n", what.c_str()), ++failures;
}

/// Calls it; the error's text must hold `wanted`, and nothing may have been enqueued unless `device_was_asked`.
void expect_error(const std::string& wanted, bool device_was_asked, const std::function<void()>& call) {
  enqueued().clear();
  std::string said = "nothing";
  try {
    call();
  } catch (const Error& error) {
    said = error.what();
  }
  expect(said.find(wanted) != std::string::npos, "wanted '" + wanted + "', got '" + said + "'");
  expect(enqueued().empty() != device_was_asked, wanted + (device_was_asked ? ": nothing was enqueued" : ": something was enqueued"));
}

template <class T>
T* device_memory(int64_t count) {
  void* data = nullptr;
  cudaMalloc(&data, static_cast<size_t>(count) * sizeof(T));
  return static_cast<T*>(data);
}

struct Problem {
  static constexpr int64_t kSamples = 3, kRows = 5, kColumns = 7, kChannels = 9, kCount = kRows * kColumns * kChannels;
  float* values = device_memory<float>(kSamples * kCount);
  FloatView x{};
  QuantizedOutput y{};
  QuantizedInput q{};
  void* workspace = nullptr;
  void* const stream = reinterpret_cast<void*>(0x5eed);

  Problem() {
    for (int64_t i = 0; i < kSamples * kCount; ++i) values[i] = static_cast<float>(i % 17) - 8;
    x.data = values, x.dtype = DType::float32;
    const int64_t size[] = {kSamples, kRows, kColumns, kChannels}, stride[] = {kCount, kColumns * kChannels, kChannels, 1};
    for (int i = 0; i < 4; ++i) x.size[i] = size[i], x.stride[i] = stride[i];
    y.q = device_memory<uint8_t>(kSamples * kCount);
    y.scale = device_memory<float>(kSamples), y.zero_point = device_memory<int32_t>(kSamples);
    y.stats = device_memory<int64_t>(kSamples * stats_columns(kChannels, false));
    q.q = y.q, q.scale = y.scale, q.zero_point = y.zero_point;
    workspace = device_memory<uint8_t>(cuda::workspace_bytes(kSamples, kRows * kColumns, kChannels, false, true));  // to the byte: memory.h sees one more
  }
  void quantize() { cuda::quantize(x, nullptr, nullptr, y, workspace, stream); }
  void dequantize() { cuda::dequantize(q, kSamples, kCount, DType::float32, values, stream); }
  RangeArguments dynamic{Strategy::dynamic, nullptr, 0};
  void add() { cuda::add(q, q, kSamples, kCount, kChannels, 0.0f, 6.0f, dynamic, y, workspace, stream); }
  void activation() { cuda::activation(q, kSamples, kCount, kChannels, Activation::gelu, 0.0f, 6.0f, dynamic, y, workspace, stream); }
  void concat() {
    const QuantizedInput inputs[] = {q, q};
    const int64_t channels[] = {kChannels - 1, 1};
    cuda::concat(inputs, channels, 2, kSamples, kRows * kColumns, dynamic, y, workspace, stream);
  }
  void upsample() { cuda::upsample_nearest2d(kSamples, kRows, kColumns, kChannels, 1, 1, q, y, workspace, stream); }
  void layer_norm() {
    LayerNormArguments a;
    a.x = q, a.range = dynamic, a.y = y;
    cuda::layer_norm(kSamples, kChannels, a, stream);
  }
  void attention() {
    const AttentionShape s{1, 1, 2, 3, 3};
    AttentionArguments a;
    a.query = a.key = a.value = q, a.scale = 1, a.range = dynamic, a.y = y;
    a.workspace = operands == nullptr ? nullptr : operands + misalignment;
    cuda::attention(s, a, stream);
  }
  uint8_t* operands = device_memory<uint8_t>(cuda::attention_workspace_bytes({1, 1, 2, 3, 3}));
  int misalignment = 0;
  void moments() { cuda::moments(y.q, kSamples, kCount, kChannels, false, y.stats, workspace, stream); }
};

/// A layer of 3x3 taps, or of one field per image, with everything that any strategy may want.
struct Layer {
  Conv2dShape shape;
  LayerArguments a;
  void* const stream = reinterpret_cast<void*>(0x5eed);

  explicit Layer(bool one_field = false, int groups = 1) {
    shape.batch = 2, shape.in_height = shape.in_width = one_field ? 1 : 6, shape.in_channels = 5;
    shape.out_channels = groups == 1 ? 7 : groups, shape.groups = groups;
    shape.kernel_height = shape.kernel_width = one_field ? 1 : 3;
    const int64_t inputs = shape.in_height * shape.in_width * shape.in_channels, outputs = shape.out_height() * shape.out_width() * shape.out_channels;
    auto* packed = device_memory<uint8_t>(cuda::packed_weight_bytes(weight_shape(shape)));
    auto* weight = device_memory<int8_t>(7 * 9 * 5);
    auto* scale = device_memory<float>(7);
    for (int i = 0; i < 7; ++i) scale[i] = 1;
    cuda::pack_weight(weight_shape(shape), weight, scale, nullptr, nullptr, packed, stream);
    auto* values = device_memory<float>(64);
    for (int i = 0; i < 64; ++i) values[i] = 1;
    auto* zero_points = device_memory<int32_t>(2);
    auto* stats = device_memory<int64_t>(2 * stats_columns(5, true));
    zero_points[0] = zero_points[1] = 0;
    for (int64_t i = 0; i < 2 * stats_columns(5, true); ++i) stats[i] = 1000;
    a.x = {device_memory<uint8_t>(2 * inputs), values, zero_points, stats, stats_columns(5, true)};
    a.packed_weight = packed, a.predictor = values, a.y_float = device_memory<float>(2 * outputs);
    a.y = {device_memory<uint8_t>(2 * outputs), device_memory<float>(2), device_memory<int32_t>(2), device_memory<int64_t>(2 * stats_columns(7, false)), false};
  }
  void run(Strategy strategy, int64_t gamma) {
    a.strategy = strategy, a.gamma = gamma;
    a.predictor_size = strategy == Strategy::fixed || strategy == Strategy::probe ? 2
                       : strategy == Strategy::gaussian                           ? kGaussianPredictorSize
                       : strategy == Strategy::gaussian_channel                   ? law_per_output_predictor_size(shape.out_channels)
                       : law_per_output(shape, strategy)                          ? law_per_output_predictor_size(shape.out_channels)
                       : strategy == Strategy::channel                            ? channel_predictor_size(5)
                                                                                  : 0;
    const int64_t bytes = cuda::conv2d_workspace_bytes(shape, strategy, gamma, false);
    a.workspace = bytes > 0 ? device_memory<uint8_t>(bytes) : nullptr;
    enqueued().clear();
    const int before = uncapturable_calls();
    cuda::conv2d(shape, a, stream);
    expect(uncapturable_calls() == before, "conv2d allocates, copies or waits");
    for (const auto& e : enqueued()) expect(e.stream == stream, e.what + " is on another stream");
  }
};

/// A layer is one launch. One that samples patches, has a law per channel, or looks at its range first has one in front. Nothing is cleared.
void test_layer_launches() {
  const auto launches = [](Layer& layer, Strategy strategy, int64_t gamma) {
    layer.run(strategy, gamma);
    return enqueued().size();
  };
  const struct {
    Strategy strategy;
    int64_t gamma;
    size_t wanted, of_one_field;
  } cases[] = {{Strategy::none, 0, 1, 1},    {Strategy::fixed, 0, 1, 1},    {Strategy::gaussian, 0, 1, 1},         {Strategy::gaussian_channel, 0, 2, 2},
               {Strategy::channel, 0, 2, 2}, {Strategy::gaussian, 2, 2, 1}, {Strategy::gaussian_channel, 1, 2, 2}, {Strategy::probe, 0, 2, 2},
               {Strategy::dynamic, 0, 2, 2}};
  for (const int groups : {1, 5}) {  // dense and depthwise
    Layer layer(false, groups), one_field(true, groups);
    for (const auto& c : cases) {
      const std::string what = "strategy " + std::to_string(static_cast<int>(c.strategy)) +
                               ", gamma " + std::to_string(c.gamma) + ", groups " + std::to_string(groups) + ": ";
      const size_t got = launches(layer, c.strategy, c.gamma), of_one_field = launches(one_field, c.strategy, c.gamma);
      expect(got == c.wanted, what + std::to_string(got) + " launches, wanted " + std::to_string(c.wanted));
      const size_t wanted = groups == 1 ? c.of_one_field : c.wanted;  // with groups there is a field for each
      expect(of_one_field == wanted, what + std::to_string(of_one_field) + " launches of one field, wanted " + std::to_string(wanted));
    }
  }
}

void test_layer_arguments() {
  Layer layer;
  layer.run(Strategy::dynamic, 0);
  layer.a.workspace = nullptr;
  expect_error("conv2d: workspace is null", false, [&] { cuda::conv2d(layer.shape, layer.a, layer.stream); });
  layer.run(Strategy::fixed, 0);
  layer.a.packed_weight += 8;
  expect_error("packed_weight must be aligned to 16 bytes", false, [&] { cuda::conv2d(layer.shape, layer.a, layer.stream); });
  layer.a.packed_weight -= 8;
  Conv2dShape large = layer.shape;
  large.batch = int64_t{1} << 28;
  expect_error("fewer than 2^31 positions", false, [&] { cuda::conv2d(large, layer.a, layer.stream); });
  large = layer.shape, large.in_width = int64_t{1} << 30;
  expect_error("2^31", false, [&] { cuda::conv2d(large, layer.a, layer.stream); });
  large = layer.shape, large.in_channels = 40000;
  expect_error("40000 inputs per group and 3 kernel columns", false, [&] { cuda::conv2d(large, layer.a, layer.stream); });
  large = layer.shape, large.batch = 0;
  enqueued().clear();
  cuda::conv2d(large, layer.a, layer.stream);
  expect(enqueued().empty(), "an empty batch enqueues nothing");
}

/// Layers of ResNet-50 and ViT-B/16: whole waves of large tiles where there is work for them, K split where there is not.
constexpr DenseTile tile_of(int64_t rows, int64_t columns, int64_t k) { return cuda::choose_dense_tile(rows, columns, 1, k / cuda::kBlockK); }
static_assert(tile_of(32 * 56 * 56, 256, 64) == DenseTile::large && tile_of(32 * 56 * 56, 64, 576) == DenseTile::medium);
static_assert(tile_of(56 * 56, 64, 576) == DenseTile::small && tile_of(56 * 56, 256, 64) == DenseTile::medium && tile_of(1, 1000, 2048) == DenseTile::small);
static_assert(tile_of(197, 3072, 768) == DenseTile::medium && tile_of(32 * 197, 768, 3072) == DenseTile::large);

void test_arguments() {
  Problem p;
  expect_error("workspace", false, [&] { cuda::quantize(p.x, nullptr, nullptr, p.y, nullptr, p.stream); });
  expect_error("scale and zero_point come together", false, [&] { cuda::quantize(p.x, p.y.scale, nullptr, p.y, p.workspace, p.stream); });
  p.x.size[1] = -1;
  expect_error("negative size -1", false, [&] { p.quantize(); });
  p.x.size[1] = int64_t{1} << 50;
  expect_error("thread blocks", false, [&] { p.quantize(); });
  expect_error("negative size", false, [&] { cuda::dequantize(p.q, -1, 4, DType::float32, p.values, p.stream); });
  expect_error("is none of float32", false, [&] { cuda::dequantize(p.q, 1, 4, static_cast<DType>(9), p.values, p.stream); });
  p.workspace = nullptr;
  expect_error("add: workspace is null", false, [&] { p.add(); });
  expect_error("activation: workspace is null", false, [&] { p.activation(); });
  const std::vector<QuantizedInput> many(65, p.q);
  const std::vector<int64_t> channels(65, 1);
  expect_error("65 inputs, CUDA kernels take at most 64", false,
               [&] { cuda::concat(many.data(), channels.data(), 65, 1, 1, p.dynamic, p.y, p.workspace, p.stream); });
  p.misalignment = 8;
  expect_error("workspace must be aligned to 16 bytes", false, [&] { p.attention(); });
  p.operands = nullptr;
  expect_error("attention: workspace is null", false, [&] { p.attention(); });
  expect_error("want keys, heads and head_dim > 0", false, [&] { cuda::attention_workspace_bytes({1, 1, 0, 1, 1}); });
  expect_error("layer_norm: size [1, 0]", false, [&] { cuda::layer_norm(1, 0, {}, p.stream); });
  expect_error("at most 2097152 channels", false, [&] { cuda::layer_norm(1, 3000000, {}, p.stream); });
  expect_error("scale_factor (0, 1)", false, [&] { cuda::upsample_nearest2d(1, 2, 2, 1, 0, 1, p.q, p.y, p.workspace, p.stream); });
  expect_error("channels 2 does not divide", false, [&] { cuda::moments(p.y.q, 1, 3, 2, false, p.y.stats, p.workspace, p.stream); });
}

void test_stream() {
  Problem p;
  enqueued().clear();
  const int before = uncapturable_calls();
  p.quantize(), p.dequantize(), p.moments();
  expect(enqueued().size() == 4, "quantize measures and writes, dequantize writes, moments adds up");
  p.add(), p.activation(), p.concat(), p.upsample(), p.layer_norm(), p.attention();
  expect(enqueued().size() == 14, "add and activation measure and write, concat, upsampling and a norm write, attention runs thrice");
  for (const auto& e : enqueued()) expect(e.stream == p.stream, e.what + " is on another stream");
  expect(uncapturable_calls() == before, "an op allocates, copies or waits");
}

void test_nothing_to_do() {
  Problem p;
  p.x.size[0] = 0;
  enqueued().clear();
  expect(cuda::workspace_bytes(0, 5, 7, true, true) == 0, "an empty batch needs no workspace");
  expect(cuda::workspace_bytes(3, 1, 7, true, false) == 0, "a sample of one block needs no workspace");
  p.quantize();
  cuda::dequantize(p.q, 0, 5, DType::float32, nullptr, p.stream);
  cuda::moments(nullptr, 0, 6, 3, false, nullptr, nullptr, p.stream);
  expect(enqueued().empty(), "an empty batch enqueues nothing");
}

void test_device_errors() {
  Problem p;
  const struct {
    int error;
    const char* text;
  } errors[] = {{cudaErrorNoDevice, "no CUDA device"},
                {cudaErrorInsufficientDriver, "NVIDIA driver"},
                {cudaErrorNoKernelImageForDevice, "not built for this device's architecture"},
                {cudaErrorMemoryAllocation, "cudaError"}};
  for (const auto& [error, text] : errors) {
    cuda_on_cpu::device().error = error;
    expect_error(text, true, [&] { p.quantize(); });
    expect_error(text, true, [&] { p.dequantize(); });
    expect_error(text, true, [&] { p.moments(); });
    expect(cudaGetLastError() == cudaSuccess, "an error that was thrown is found again");
  }
  cuda_on_cpu::device().error = 0;
  p.quantize();
  expect(cudaGetLastError() == cudaSuccess, "the device is back");
}

/// Every grid that the heuristics choose is one that CUDA takes: the launches go through cudart.cpp's checks.
void test_grids() {
  const int64_t sizes[][3] = {{1, 1, 1}, {1, 1, 100000}, {1, 40000, 1}, {3000, 1, 1}, {300, 2, 300}};
  for (const auto& [samples, count, channels] : sizes) {
    auto* codes = device_memory<uint8_t>(samples * count * channels);
    auto* stats = device_memory<int64_t>(samples * stats_columns(channels, true));
    enqueued().clear();
    auto* workspace = device_memory<uint8_t>(cuda::workspace_bytes(samples, count, channels, true, false));
    cuda::moments(codes, samples, count * channels, channels, true, stats, workspace, nullptr);
    for (const auto& e : enqueued()) expect(e.block.x % 32 == 0 && e.block.x <= 256, "blocks are whole warps");
    cudaFree(codes), cudaFree(stats), cudaFree(workspace);
  }
}

}  // namespace

int main() try {
  cuda_on_cpu::options().check = false;
  test_arguments();
  test_stream();
  test_layer_launches();
  test_layer_arguments();
  test_nothing_to_do();
  test_device_errors();
  test_grids();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
