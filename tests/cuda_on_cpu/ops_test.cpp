// Runs the kernels of the ops without weights on the CPU and compares every byte they write with what the CPU kernels write: add,
// activation, concat and upsampling, over odd shapes, strategies, activations, zero points at their ends, invalid scales and misaligned
// pointers.
//
//   ops_test [forward|backward|random] [seed]        exit status 0 if all is equal
//   ops_test large                                   tensors of 28 x 28 x 64, without the checker; prints the profile
#include <probquant/cuda.h>

#include <cstdio>
#include <vector>

#include "codes.h"
#include "cudart.h"
#include "memory.h"

namespace {

using namespace probquant;
using cuda_on_cpu::Activations;
using cuda_on_cpu::Buffer;
using cuda_on_cpu::compare;
using cuda_on_cpu::Outputs;
using cuda_on_cpu::random_bits;

int cases = 0;

/// [samples, positions, channels]
struct Shape {
  int64_t samples, positions, channels;
  int64_t count() const { return positions * channels; }
};

/// What varies from case to case.
struct Options {
  Strategy strategy;
  Activation activation;
  bool bounds, channel_stats, wild;
  int64_t misalignment;

  Options(uint32_t turn, Strategy s)
      : strategy(s),
        activation(static_cast<Activation>(turn % 5)),
        bounds(turn % 3 != 0),
        channel_stats(turn % 2 == 0),
        wild(turn % 7 == 3),
        misalignment(turn % 11 == 5) {}
  float lo() const { return bounds ? -0.5f : -kInfinity; }
  float hi() const { return bounds ? 1.5f : kInfinity; }
};

std::string text(const char* op, const Shape& s, const Options& o) {
  const auto number = [](int64_t v) { return std::to_string(v) + " "; };
  return std::string(op) + " [" + number(s.samples) + number(s.positions) + number(s.channels) + "] strategy " + number(static_cast<int64_t>(o.strategy)) +
         "activation " + number(static_cast<int64_t>(o.activation)) + (o.bounds ? "bounds " : "") + (o.wild ? "wild " : "");
}

/// A predictor on the device: [scale, zero_point] for fixed, `gaussian` values for gaussian.
struct Predictor {
  Buffer values;
  RangeArguments range;

  Predictor(Strategy strategy, int64_t gaussian) : values(12, 3) {
    const bool fixed = strategy == Strategy::fixed;
    const float all[] = {fixed ? 0.02f : 2.5f, fixed ? 100.0f : 3.0f, 0.25f};
    std::memcpy(values.as<void>(), all, sizeof all);
    const int64_t size = fixed ? 2 : strategy == Strategy::gaussian ? gaussian : 0;
    range = {strategy, size > 0 ? values.as<float>() : nullptr, size};
  }
};

void test_add(const Shape& s, const Options& o) {
  ++cases;
  Activations a(s.samples, s.count(), s.channels, o.wild, o.misalignment), b(s.samples, s.count(), s.channels, o.wild, 0);
  const Predictor predictor(o.strategy, 3);
  Outputs wanted(s.samples, s.count(), s.channels, o.channel_stats, 0x11), got(s.samples, s.count(), s.channels, o.channel_stats, 0xee);
  add(a.input(), b.input(), s.samples, s.count(), s.channels, o.lo(), o.hi(), predictor.range, wanted.pointers(), serial_executor());
  Buffer workspace(cuda::workspace_bytes(s.samples, s.positions, s.channels, o.channel_stats, o.strategy == Strategy::dynamic), 0xcc);
  const size_t first = cuda_on_cpu::enqueued().size();
  cuda::add(a.input(), b.input(), s.samples, s.count(), s.channels, o.lo(), o.hi(), predictor.range, got.pointers(), workspace.as<void>(), nullptr);
  compare(text("add", s, o), wanted, got);
  a.flip();  // once more, as a CUDA graph replays it: on other values, in the workspace as it was left
  add(a.input(), b.input(), s.samples, s.count(), s.channels, o.lo(), o.hi(), predictor.range, wanted.pointers(), serial_executor());
  got.overwrite(0x99);
  cuda_on_cpu::replay(first);
  compare(text("replayed add", s, o), wanted, got);
}

void test_mul(const Shape& s, const Options& o, bool per_channel) {
  ++cases;
  Activations a(s.samples, s.count(), s.channels, o.wild, o.misalignment), b(s.samples, per_channel ? s.channels : s.count(), s.channels, o.wild, 0);
  const Predictor predictor(o.strategy, 2);
  Outputs wanted(s.samples, s.count(), s.channels, o.channel_stats, 0x11), got(s.samples, s.count(), s.channels, o.channel_stats, 0xee);
  mul(a.input(), b.input(), s.samples, s.count(), s.channels, per_channel, predictor.range, wanted.pointers(), serial_executor());
  Buffer workspace(cuda::workspace_bytes(s.samples, s.positions, s.channels, o.channel_stats, o.strategy == Strategy::dynamic), 0xcc);
  cuda::mul(a.input(), b.input(), s.samples, s.count(), s.channels, per_channel, predictor.range, got.pointers(), workspace.as<void>(), nullptr);
  compare(text(per_channel ? "mul per channel" : "mul", s, o), wanted, got);
}

void test_activation(const Shape& s, const Options& o) {
  ++cases;
  Activations x(s.samples, s.count(), s.channels, o.wild, o.misalignment);
  if (o.wild && s.samples > 0) x.scale.as<float>()[0] = 3e37f;  // whose products are infinite
  const Predictor predictor(o.strategy, 0);
  Outputs wanted(s.samples, s.count(), s.channels, o.channel_stats, 0x11), got(s.samples, s.count(), s.channels, o.channel_stats, 0xee);
  activation(x.input(), s.samples, s.count(), s.channels, o.activation, o.lo(), o.hi(), predictor.range, wanted.pointers(), serial_executor());
  Buffer workspace(cuda::workspace_bytes(s.samples, s.positions, s.channels, o.channel_stats, o.strategy == Strategy::dynamic), 0xcc);
  cuda::activation(x.input(), s.samples, s.count(), s.channels, o.activation, o.lo(), o.hi(), predictor.range, got.pointers(), workspace.as<void>(), nullptr);
  compare(text("activation", s, o), wanted, got);
}

void test_concat(const Shape& s, const std::vector<int64_t>& channels, const Options& o, bool equal) {
  ++cases;
  std::vector<Activations> tensors;
  std::vector<QuantizedInput> inputs;
  int64_t total = 0;
  for (const int64_t c : channels) {
    tensors.emplace_back(s.samples, s.positions * c, c, o.wild, o.misalignment);
    total += c;
  }
  for (Activations& t : tensors) {
    inputs.push_back(t.input());
    if (equal) inputs.back().scale = inputs[0].scale, inputs.back().zero_point = inputs[0].zero_point;
  }
  const Predictor predictor(o.strategy, 0);
  Outputs wanted(s.samples, s.positions * total, total, o.channel_stats, 0x11), got(s.samples, s.positions * total, total, o.channel_stats, 0xee);
  const auto count = static_cast<int64_t>(channels.size());
  concat(inputs.data(), channels.data(), count, s.samples, s.positions, predictor.range, wanted.pointers(), serial_executor());
  Buffer workspace(cuda::workspace_bytes(s.samples, s.positions, total, o.channel_stats, false), 0xcc);
  cuda::concat(inputs.data(), channels.data(), count, s.samples, s.positions, predictor.range, got.pointers(), workspace.as<void>(), nullptr);
  compare(text("concat", {s.samples, s.positions, total}, o) + std::to_string(count) + " inputs", wanted, got);
}

void test_upsample(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t factor_height, int64_t factor_width, const Options& o) {
  ++cases;
  Activations x(batch, height * width * channels, channels, o.wild, o.misalignment);
  const int64_t out = height * factor_height * width * factor_width * channels;
  Outputs wanted(batch, out, channels, o.channel_stats, 0x11), got(batch, out, channels, o.channel_stats, 0xee);
  upsample_nearest2d(batch, height, width, channels, factor_height, factor_width, x.input(), wanted.pointers(), serial_executor());
  Buffer workspace(cuda::workspace_bytes(batch, height * width, channels, o.channel_stats, false), 0xcc);
  cuda::upsample_nearest2d(batch, height, width, channels, factor_height, factor_width, x.input(), got.pointers(), workspace.as<void>(), nullptr);
  compare(text("upsample", {batch, height * width, channels}, o), wanted, got);
}

int test_large() {
  cuda_on_cpu::options().check = false;
  cuda_on_cpu::options().profile = true;
  const Shape s{1, 28 * 28, 64};
  const Options o(1, Strategy::dynamic);
  test_add(s, o);
  test_mul(s, o, true);
  test_activation(s, o);
  test_concat(s, {64, 32}, o, false);
  test_upsample(1, 28, 28, 64, 2, 2, o);
  cuda_on_cpu::print_profile(stdout);
  return cuda_on_cpu::summary(cases);
}

}  // namespace

int main(int argument_count, char** arguments) try {
  cuda_on_cpu::set_order(argument_count, arguments);
  if (argument_count > 1 && std::string(arguments[1]) == "large") return test_large();
  const Strategy strategies[] = {Strategy::fixed, Strategy::dynamic, Strategy::gaussian};
  uint32_t turn = 0;
  for (const Shape& s : {Shape{1, 1, 1}, Shape{2, 35, 3}, Shape{0, 4, 5}, Shape{3, 0, 7}, Shape{3, 16, 64}, Shape{2, 9, 300}, Shape{5, 1, 17}, Shape{1, 1030, 5}})
    for (const Strategy strategy : strategies) {
      test_add(s, {turn, strategy});
      test_mul(s, {turn, strategy}, false);
      test_mul(s, {turn + 1, strategy}, true);
      test_activation(s, {turn, strategy});
      test_activation(s, {turn + 2, strategy});
      test_concat(s, {s.channels, 2, 33}, {turn, strategy}, turn % 4 == 0);
      ++turn;
    }
  for (const Strategy strategy : strategies) {
    test_concat({2, 7, 0}, std::vector<int64_t>(64, 5), {turn++, strategy}, false);  // more inputs than a warp has lanes
    test_concat({2, 7, 0}, {40}, {turn++, strategy}, false);
    test_upsample(2, 5, 3, 7, 2, 3, {turn++, strategy});
    test_upsample(3, 4, 4, 70, 2, 2, {turn++, strategy});
    test_upsample(1, 1, 9, 1, 1, 5, {turn++, strategy});
    test_upsample(0, 2, 2, 3, 2, 2, {turn++, strategy});
  }
  return cuda_on_cpu::summary(cases);
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
