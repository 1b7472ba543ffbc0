// The host side of csrc/cuda without a driver: what it refuses before it asks the device, what it says when the device refuses,
// what it enqueues, and where. Exit status 0 if all is as expected.
#include <cuda_runtime.h>
#include <probquant/cuda.h>

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "cudart.h"

namespace {

using namespace probquant;
using cuda_on_cpu::enqueued;

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
    workspace = device_memory<uint8_t>(cuda::quantize_workspace_bytes(x, false));  // to the byte: memory.h sees one more
  }
  void quantize() { cuda::quantize(x, nullptr, nullptr, y, workspace, stream); }
  void dequantize() { cuda::dequantize(q, kSamples, kCount, DType::float32, values, stream); }
  RangeArguments dynamic{Strategy::dynamic, nullptr, 0};
  void add() { cuda::add(q, q, kSamples, kCount, kChannels, 0.0f, 6.0f, dynamic, y, workspace, stream); }
  void activation() { cuda::activation(q, kSamples, kCount, kChannels, Activation::gelu, 0.0f, 6.0f, dynamic, y, workspace, stream); }
  void concat() {
    const QuantizedInput inputs[] = {q, q};
    const int64_t channels[] = {kChannels - 1, 1};
    cuda::concat(inputs, channels, 2, kSamples, kRows * kColumns, dynamic, y, stream);
  }
  void upsample() { cuda::upsample_nearest2d(kSamples, kRows, kColumns, kChannels, 1, 1, q, y, stream); }
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
  void moments() { cuda::moments(y.q, kSamples, kCount, kChannels, false, y.stats, stream); }
};

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
  expect_error("add: the dynamic strategy needs a workspace", false, [&] { p.add(); });
  expect_error("activation: the dynamic strategy needs a workspace", false, [&] { p.activation(); });
  const std::vector<QuantizedInput> many(65, p.q);
  const std::vector<int64_t> channels(65, 1);
  expect_error("65 inputs, CUDA kernels take at most 64", false, [&] { cuda::concat(many.data(), channels.data(), 65, 1, 1, p.dynamic, p.y, p.stream); });
  p.misalignment = 8;
  expect_error("workspace must be aligned to 16 bytes", false, [&] { p.attention(); });
  p.operands = nullptr;
  expect_error("attention: workspace is null", false, [&] { p.attention(); });
  expect_error("want keys, heads and head_dim > 0", false, [&] { cuda::attention_workspace_bytes({1, 1, 0, 1, 1}); });
  expect_error("layer_norm: size [1, 0]", false, [&] { cuda::layer_norm(1, 0, {}, p.stream); });
  expect_error("at most 2097152 channels", false, [&] { cuda::layer_norm(1, 3000000, {}, p.stream); });
  expect_error("scale_factor (0, 1)", false, [&] { cuda::upsample_nearest2d(1, 2, 2, 1, 0, 1, p.q, p.y, p.stream); });
  expect_error("channels 2 does not divide", false, [&] { cuda::moments(p.y.q, 1, 3, 2, false, p.y.stats, p.stream); });
}

void test_stream() {
  Problem p;
  enqueued().clear();
  p.quantize(), p.dequantize(), p.moments();
  expect(enqueued().size() >= 6, "quantize clears, measures and writes, dequantize writes, moments clears and adds");
  p.add(), p.activation(), p.concat(), p.upsample(), p.layer_norm(), p.attention();
  expect(enqueued().size() >= 21, "add and activation clear, measure and write, concat and upsampling clear and write, a norm writes, attention clears and runs thrice");
  for (const auto& e : enqueued()) expect(e.stream == p.stream, e.what + " is on another stream");
}

void test_nothing_to_do() {
  Problem p;
  p.x.size[0] = 0;
  enqueued().clear();
  expect(cuda::quantize_workspace_bytes(p.x, false) == 0, "an empty batch needs no workspace");
  expect(cuda::quantize_workspace_bytes(Problem().x, true) == 0, "given parameters need no workspace");
  p.quantize();
  cuda::dequantize(p.q, 0, 5, DType::float32, nullptr, p.stream);
  cuda::moments(nullptr, 0, 6, 3, false, nullptr, p.stream);
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
    cuda::moments(codes, samples, count * channels, channels, true, stats, nullptr);
    for (const auto& e : enqueued()) expect(e.what == "memset" || (e.block.x % 32 == 0 && e.block.x <= 256), "blocks are whole warps");
    cudaFree(codes), cudaFree(stats);
  }
}

}  // namespace

int main() try {
  cuda_on_cpu::options().check = false;
  test_arguments();
  test_stream();
  test_nothing_to_do();
  test_device_errors();
  test_grids();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
