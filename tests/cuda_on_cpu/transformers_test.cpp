// Runs LayerNorm and attention of csrc/cuda on the CPU and compares every byte they write with what the CPU kernels write: rows shorter and
// longer than a warp holds, residuals, floats and codes, tails of every tile of queries, keys and channels, zero points at their ends, and
// tokens that are invalid.
//
//   transformers_test [forward|backward|random] [seed]        exit status 0 if all is equal
//   transformers_test large                                   sizes of ViT-B/16, without the checker; prints the profile
#include <probquant/cuda.h>

#include <cstdio>

#include "codes.h"
#include "memory.h"

namespace {

using namespace probquant;
using cuda_on_cpu::Activations;
using cuda_on_cpu::Buffer;
using cuda_on_cpu::compare;
using cuda_on_cpu::fail;
using cuda_on_cpu::Outputs;
using cuda_on_cpu::random_bits;
using cuda_on_cpu::random_float;
using cuda_on_cpu::same_floats;

int cases = 0;

Buffer random_floats(int64_t count) {
  Buffer values(4 * count, 1);
  for (int64_t i = 0; i < count; ++i) values.as<float>()[i] = random_float();
  return values;
}

void test_layer_norm(int64_t rows, int64_t channels, Strategy strategy, uint32_t turn) {
  ++cases;
  const bool wild = turn % 3 == 1, channel_stats = turn % 2 == 0;
  Activations x(rows, channels, channels, wild, turn % 5 == 2);
  const Buffer x_float = random_floats(rows * channels), residual = random_floats(rows * channels), weight = random_floats(channels), bias = random_floats(channels);
  if (wild && rows > 1) residual.as<float>()[channels] = turn % 2 == 0 ? kNan : kInfinity;
  const float values[] = {0.02f, 100.0f};
  const Buffer predictor(values, 2);
  LayerNormArguments a;
  if (turn % 4 != 3) a.x = x.input();
  else a.x_float = x_float.as<float>();
  if (turn % 2 == 0 || wild) a.residual = residual.as<float>();
  if (turn % 3 != 0) a.weight = weight.as<float>(), a.bias = bias.as<float>();
  a.eps = turn % 5 == 0 ? 0.0f : 1e-5f;
  const bool fixed = strategy == Strategy::fixed;
  a.range = {strategy, fixed ? predictor.as<float>() : nullptr, fixed ? 2 : 0};
  LayerNormArguments on_cuda = a;
  Outputs wanted(rows, channels, channels, channel_stats, 0x11), got(rows, channels, channels, channel_stats, 0xee);
  Buffer wanted_floats(4 * rows * channels, 0x11), got_floats(4 * rows * channels, 0xee), wanted_sum(4 * rows * channels, 0x11), got_sum(4 * rows * channels, 0xee);
  a.y = wanted.pointers(), on_cuda.y = got.pointers();
  a.y_float = wanted_floats.as<float>(), on_cuda.y_float = got_floats.as<float>();
  if (turn % 3 != 2) a.sum = wanted_sum.as<float>(), on_cuda.sum = got_sum.as<float>();
  layer_norm(rows, channels, a, serial_executor());
  cuda::layer_norm(rows, channels, on_cuda, nullptr);
  const std::string what = "layer_norm [" + std::to_string(rows) + ", " + std::to_string(channels) + "] strategy " + std::to_string(static_cast<int>(strategy)) +
                           " turn " + std::to_string(turn);
  if (a.sum != nullptr && !same_floats(wanted_sum, got_sum, rows * channels)) fail(what + ": sum");
  if (strategy != Strategy::none) return compare(what, wanted, got);
  if (!same_floats(wanted_floats, got_floats, rows * channels)) fail(what + ": floats");
}

void test_attention(const AttentionShape& s, Strategy strategy, uint32_t turn) {
  ++cases;
  const bool wild = turn % 3 == 1;
  const int64_t channels = s.channels();
  Activations query(s.batch * s.queries, channels, channels, wild, turn % 4 == 1), key(s.batch * s.keys, channels, channels, false, turn % 4 == 2),
      value(s.batch * s.keys, channels, channels, false, turn % 4 == 3);
  if (wild && s.batch > 1) (turn % 2 == 0 ? key : value).scale.as<float>()[s.keys + random_bits() % static_cast<uint32_t>(s.keys)] = kNan;
  const float values[] = {0.02f, 100.0f};
  const Buffer predictor(values, 2);
  const bool fixed = strategy == Strategy::fixed, channel_stats = turn % 2 == 0;
  AttentionArguments a;
  a.query = query.input(), a.key = key.input(), a.value = value.input();
  a.scale = turn % 2 == 0 ? 1.0f / std::sqrt(static_cast<float>(s.head_dim)) : 1e-3f;  // one key takes all, or all have their share
  a.range = {strategy, fixed ? predictor.as<float>() : nullptr, fixed ? 2 : 0};
  const int64_t tokens = s.batch * s.queries;
  Outputs wanted(tokens, channels, channels, channel_stats, 0x11), got(tokens, channels, channels, channel_stats, 0xee);
  AttentionArguments on_cuda = a;
  Buffer on_cpu(attention_workspace_bytes(s, serial_executor()), 0xaa), workspace(cuda::attention_workspace_bytes(s), 0xcc);
  a.y = wanted.pointers(), a.workspace = on_cpu.as<void>();
  on_cuda.y = got.pointers(), on_cuda.workspace = workspace.as<void>();
  attention(s, a, serial_executor());
  cuda::attention(s, on_cuda, nullptr);
  const auto number = [](int64_t v) { return std::to_string(v) + " "; };
  compare("attention [" + number(s.batch) + number(s.queries) + number(s.keys) + number(s.heads) + number(s.head_dim) + "] turn " + number(turn), wanted, got);
}

int test_large() {
  cuda_on_cpu::options().check = false;
  cuda_on_cpu::options().profile = true;
  test_layer_norm(197, 768, Strategy::dynamic, 0);
  test_attention({1, 197, 197, 12, 64}, Strategy::dynamic, 0);
  cuda_on_cpu::print_profile(stdout);
  return cuda_on_cpu::summary(cases);
}

}  // namespace

int main(int argument_count, char** arguments) try {
  cuda_on_cpu::set_order(argument_count, arguments);
  if (argument_count > 1 && std::string(arguments[1]) == "large") return test_large();
  uint32_t turn = 0;
  for (const int64_t channels : {1, 31, 64, 96, 768, 1025, 1500})
    for (const Strategy strategy : {Strategy::none, Strategy::fixed, Strategy::dynamic, Strategy::gaussian}) test_layer_norm(turn % 6, channels, strategy, turn), ++turn;
  // batch, queries, keys, heads, head_dim
  for (const AttentionShape& s : {AttentionShape{1, 1, 1, 1, 1}, AttentionShape{2, 17, 33, 2, 8}, AttentionShape{2, 5, 130, 3, 33}, AttentionShape{0, 4, 4, 1, 8},
                                  AttentionShape{2, 0, 4, 1, 8}, AttentionShape{1, 49, 197, 2, 64}, AttentionShape{3, 16, 128, 1, 65}, AttentionShape{1, 3, 257, 2, 150}})
    for (const Strategy strategy : {Strategy::fixed, Strategy::dynamic}) test_attention(s, strategy, turn), ++turn;
  return cuda_on_cpu::summary(cases);
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
