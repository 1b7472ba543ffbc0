// Ops on several threads give the bytes that one thread gives: split over an executor's threads, and called by several
// threads at once, which share the default pool. Meant for ThreadSanitizer (-DPROBQUANT_SANITIZE=thread) and useful without.
#include <probquant/probquant.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

using namespace probquant;

/// Fresh threads for every call, one for each range.
constexpr int kThreads = 4;
void spawn(void*, int64_t count, void (*body)(void*, int64_t, int64_t), void* argument) {
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    const int64_t begin = count * i / kThreads, end = count * (i + 1) / kThreads;
    if (begin < end) threads.emplace_back(body, argument, begin, end);
  }
  for (std::thread& thread : threads) thread.join();
}
constexpr Executor kSpawning{spawn, nullptr, kThreads};

struct Codes {
  std::vector<uint8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> zero_point;
  std::vector<int64_t> stats;

  Codes(int64_t samples, int64_t values, int64_t channels)
      : q(static_cast<size_t>(samples * values)),
        scale(static_cast<size_t>(samples)),
        zero_point(static_cast<size_t>(samples)),
        stats(static_cast<size_t>(samples * stats_columns(channels, true))) {}

  QuantizedInput input(int64_t channels) const {
    QuantizedInput x;
    x.q = q.data(), x.scale = scale.data(), x.zero_point = zero_point.data(), x.stats = stats.data(), x.stats_stride = stats_columns(channels, true);
    return x;
  }
  QuantizedOutput output() {
    QuantizedOutput y;
    y.q = q.data(), y.scale = scale.data(), y.zero_point = zero_point.data(), y.stats = stats.data(), y.channel_stats = true;
    return y;
  }
  bool operator==(const Codes& o) const { return q == o.q && scale == o.scale && zero_point == o.zero_point && stats == o.stats; }
};

struct Layer {
  const char* name;
  Conv2dShape shape;
  std::vector<uint8_t> packed;

  Layer(const char* layer_name, Conv2dShape s) : name(layer_name), shape(s) {
    const WeightShape w{s.out_channels, s.kernel_height, s.kernel_width, s.in_channels / s.groups, s.groups};
    std::vector<int8_t> weight(static_cast<size_t>(w.out_channels * w.kernel_height * w.kernel_width * w.in_channels_per_group));
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<int8_t>(static_cast<int>(i * 37 % 255) - 127);
    const std::vector<float> scale(static_cast<size_t>(w.out_channels), 0.01f), bias(static_cast<size_t>(w.out_channels), 0.1f);
    packed.resize(static_cast<size_t>(packed_weight_bytes(w)));
    pack_weight(w, weight.data(), scale.data(), bias.data(), nullptr, packed.data());
  }
  int64_t values() const { return shape.out_height() * shape.out_width() * shape.out_channels; }

  Codes run(const Codes& x, Strategy strategy, std::vector<float> predictor, const Executor& executor) const {
    Codes y(shape.batch, values(), shape.out_channels);
    std::vector<uint8_t> workspace(static_cast<size_t>(conv2d_workspace_bytes(shape, strategy)));
    LayerArguments arguments;
    arguments.x = x.input(shape.in_channels);
    arguments.packed_weight = packed.data();
    arguments.activation_max = 6;
    arguments.strategy = strategy;
    arguments.predictor = predictor.data();
    arguments.predictor_size = static_cast<int64_t>(predictor.size());
    arguments.y = y.output();
    arguments.workspace = workspace.data();
    conv2d(shape, arguments, executor);
    return y;
  }
};

Conv2dShape convolution(int64_t channels, int64_t out_channels, int64_t groups) {
  Conv2dShape s;
  s.batch = 3, s.in_height = 13, s.in_width = 11, s.in_channels = channels, s.out_channels = out_channels, s.groups = groups;
  s.kernel_height = s.kernel_width = 3;
  s.padding_top = s.padding_bottom = s.padding_left = s.padding_right = 1;
  return s;
}

/// Everything that is compared, in one pass.
std::vector<Codes> run_all(const std::vector<Layer>& layers, const Executor& executor) {
  std::vector<Codes> results;
  for (const Layer& layer : layers) {
    const Conv2dShape& s = layer.shape;
    const int64_t values = s.in_height * s.in_width * s.in_channels;
    std::vector<float> pixels(static_cast<size_t>(s.batch * values));
    for (size_t i = 0; i < pixels.size(); ++i) pixels[i] = std::sin(static_cast<float>(i));
    FloatView view{pixels.data(), DType::float32, {s.batch, s.in_height, s.in_width, s.in_channels}, {values, s.in_width * s.in_channels, s.in_channels, 1}};
    Codes x(s.batch, values, s.in_channels);
    quantize(view, nullptr, nullptr, x.output(), executor);
    results.push_back(x);
    for (const auto& [strategy, predictor] : {std::pair(Strategy::fixed, std::vector<float>{0.05f, 3.0f}), std::pair(Strategy::dynamic, std::vector<float>{}),
                                              std::pair(Strategy::gaussian, std::vector<float>{3, 3, 0, 0.01f, 0.4f, 0.1f, 0}),
                                              std::pair(Strategy::probe, std::vector<float>{0.1f, 0.1f})})
      results.push_back(layer.run(x, strategy, predictor, executor));
    const int64_t positions = s.out_height() * s.out_width();
    Codes sum(s.batch, layer.values(), s.out_channels), table(s.batch, layer.values(), s.out_channels);
    const QuantizedInput a = results.back().input(s.out_channels), b = results[results.size() - 2].input(s.out_channels);
    add(a, b, s.batch, layer.values(), s.out_channels, 0, 6, {}, sum.output(), executor);
    activation(a, s.batch, layer.values(), s.out_channels, Activation::silu, 0, 0, {}, table.output(), executor);
    Codes pooled(s.batch, positions * s.out_channels, s.out_channels);
    Conv2dShape window = s;
    window.in_height = s.out_height(), window.in_width = s.out_width(), window.in_channels = s.out_channels;
    pool2d(Pool::average, window, true, a, {}, pooled.output(), executor);
    for (Codes* codes : {&sum, &table, &pooled}) results.push_back(*codes);
  }
  return results;
}

/// An exception of one range reaches the caller, and the pool stays usable.
bool exceptions_arrive() {
  const Executor& pool = default_executor();
  for (int i = 0; i < 20; ++i) {
    try {
      pool.parallel_for(pool.self, 100, [](void*, int64_t, int64_t end) { if (end == 100) throw std::runtime_error("the last range"); }, nullptr);
      return false;
    } catch (const std::runtime_error&) {
    }
    std::atomic<int64_t> done{0};
    pool.parallel_for(pool.self, 100, [](void* sum, int64_t begin, int64_t end) { *static_cast<std::atomic<int64_t>*>(sum) += end - begin; }, &done);
    if (done != 100) return false;
  }
  return true;
}

}  // namespace

int main() {
  std::vector<Layer> layers;
  layers.emplace_back("dense", convolution(24, 40, 1));
  layers.emplace_back("depthwise", convolution(33, 33, 33));
  layers.emplace_back("linear", linear_shape(9, 1, 70, 50));
  const std::vector<Codes> expected = run_all(layers, serial_executor());
  bool passed = true;
  const auto check = [&](const char* what, const std::vector<Codes>& got) {
    if (got == expected) return true;
    std::printf("%s: other bytes than in one thread\n", what);
    return false;
  };
  passed &= check("split over threads", run_all(layers, kSpawning));
  passed &= check("default pool", run_all(layers, default_executor()));
  std::vector<std::thread> callers;
  std::atomic<int> failures{0};
  for (int i = 0; i < kThreads; ++i)
    callers.emplace_back([&] {
      for (int turn = 0; turn < 3; ++turn) failures += !check("several callers of the default pool", run_all(layers, default_executor()));
    });
  for (std::thread& caller : callers) caller.join();
  passed &= failures == 0;
  passed &= exceptions_arrive();
  std::printf(passed ? "passed\n" : "failed\n");
  return passed ? 0 : 1;
}
