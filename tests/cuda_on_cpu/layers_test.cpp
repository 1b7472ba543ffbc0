// Runs the layer kernels of csrc/cuda on the CPU and compares every byte they write with what the CPU kernels write: pools, convolutions
// and linear layers of odd and of tile-sized shapes, with every tile, strategy, activation and residual, zero points at their ends,
// invalid scales, misaligned pointers, and batches whose samples meet in a tile.
//
//   layers_test [forward|backward|random] [seed]        exit status 0 if all is equal
//   layers_test large                                   a GEMM of 1024^3 and a convolution of ResNet-50, without the checker; prints the profile
#include <probquant/cuda.h>

#include <cstdio>

#include "codes.h"
#include "cudart.h"
#include "core/front_end.h"
#include "cuda/launch.h"
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

/// A layer's weight, in the CPU's and in CUDA's form.
struct Weight {
  Buffer on_cpu, on_cuda;

  explicit Weight(const WeightShape& s) : on_cpu(packed_weight_bytes(s), 5), on_cuda(cuda::packed_weight_bytes(s), 6) {
    const int64_t weights = s.kernel_height * s.kernel_width * s.in_channels_per_group;
    Buffer canonical(s.out_channels * weights, 7), scale(4 * s.out_channels, 8), bias(4 * s.out_channels, 9), profile(4 * s.out_channels, 10);
    const bool extreme = random_bits() % 4 == 0, with_bias = random_bits() % 4 != 0, with_profile = random_bits() % 3 == 0;
    for (int64_t i = 0; i < s.out_channels * weights; ++i)
      canonical.as<int8_t>()[i] = static_cast<int8_t>(extreme ? (random_bits() % 2 ? 127 : -127) : static_cast<int>(random_bits() % 255) - 127);
    for (int64_t o = 0; o < s.out_channels; ++o) {
      scale.as<float>()[o] = (1.0f + static_cast<float>(random_bits() % 1000) / 1000) / 128 / std::sqrt(static_cast<float>(weights));
      bias.as<float>()[o] = random_float();
      profile.as<float>()[o] = std::exp2(random_float());
    }
    const float *biases = with_bias ? bias.as<float>() : nullptr, *profiles = with_profile ? profile.as<float>() : nullptr;
    pack_weight(s, canonical.as<int8_t>(), scale.as<float>(), biases, profiles, on_cpu.as<uint8_t>());
    cuda::pack_weight(s, canonical.as<int8_t>(), scale.as<float>(), biases, profiles, on_cuda.as<uint8_t>(), nullptr);
  }
};

/// With the floats of Strategy::none.
struct LayerOutputs : Outputs {
  Buffer floats;

  LayerOutputs(const Conv2dShape& s, bool with_channels, uint8_t garbage)
      : Outputs(s.batch, s.out_height() * s.out_width() * s.out_channels, s.out_channels, with_channels, garbage),
        floats(s.batch * s.out_height() * s.out_width() * s.out_channels * 4, garbage) {}
};

struct Options {
  Strategy strategy = Strategy::fixed;
  Activation activation = Activation::clamp;
  bool bounds = false, residual = false, channel_stats = false, wild = false;
  int64_t gamma = 1, misalignment = 0;
};

std::string text(const Conv2dShape& s, const Options& o) {
  const auto number = [](int64_t v) { return std::to_string(v) + " "; };
  return "[" + number(s.batch) + number(s.in_height) + number(s.in_width) + number(s.in_channels) + "-> " + number(s.out_channels) + "kernel " +
         number(s.kernel_height) + number(s.kernel_width) + "stride " + number(s.stride_height) + number(s.stride_width) + "groups " + number(s.groups) +
         "] strategy " + number(static_cast<int64_t>(o.strategy)) + "activation " + number(static_cast<int64_t>(o.activation)) +
         (o.residual ? "residual " : "") + (o.bounds ? "bounds " : "") + (o.wild ? "wild " : "") + "gamma " + number(o.gamma);
}

void test_layer(const Conv2dShape& s, const Options& o, bool every_tile = true) {
  ++cases;
  Activations x(s.batch, s.in_height * s.in_width * s.in_channels, s.in_channels, o.wild, o.misalignment);
  Activations residual(s.batch, s.out_height() * s.out_width() * s.out_channels, s.out_channels, o.wild, o.misalignment);
  Weight weight(weight_shape(s));
  const int64_t laws = surrogate_laws(s, o.strategy);
  const int64_t values = o.strategy == Strategy::fixed || o.strategy == Strategy::probe ? 2
                         : o.strategy == Strategy::gaussian                            ? kGaussianPredictorSize
                         : law_per_output(s, o.strategy)                               ? law_per_output_predictor_size(s.out_channels)
                         : o.strategy == Strategy::channel                             ? channel_predictor_size(s.in_channels)
                                                                                       : 0;
  Buffer predictor(4 * values, 10);
  float* p = predictor.as<float>();
  for (int64_t i = 0; i < values; ++i) p[i] = (random_float() + 2.2f) / (i < 3 ? 1.0f : static_cast<float>(field_weights(s)));
  if (o.strategy == Strategy::fixed) p[0] = 0.02f, p[1] = static_cast<float>(random_bits() % 256);
  if (o.strategy == Strategy::probe) p[0] = 0.1f, p[1] = 0.25f;
  if (o.wild && values > 0 && random_bits() % 2) p[random_bits() % static_cast<uint32_t>(values)] = random_bits() % 2 ? kNan : -1e38f;

  LayerArguments a;
  a.x = x.input();
  if (o.residual) a.residual = residual.input();
  a.activation = o.activation;
  a.activation_min = o.bounds ? 0.0f : -kInfinity, a.activation_max = o.bounds ? 1.5f : kInfinity;
  a.strategy = o.strategy;
  a.predictor = p;
  a.predictor_size = values;
  a.gamma = o.gamma;
  LayerArguments on_cuda = a;
  LayerOutputs wanted(s, o.channel_stats, 0x11), got(s, o.channel_stats, 0xee);
  Buffer wide(conv2d_workspace_bytes(s, o.strategy), 0xaa), workspace(cuda::conv2d_workspace_bytes(s, o.strategy, o.gamma, o.channel_stats), 0xcc);
  a.packed_weight = weight.on_cpu.as<uint8_t>(), a.y = wanted.pointers(), a.y_float = wanted.floats.as<float>(), a.workspace = wide.as<void>();
  on_cuda.packed_weight = weight.on_cuda.as<uint8_t>(), on_cuda.y = got.pointers(), on_cuda.y_float = got.floats.as<float>();
  on_cuda.workspace = workspace.as<void>();
  conv2d(s, a, serial_executor());
  const size_t first = cuda_on_cpu::enqueued().size();
  cuda::conv2d(s, on_cuda, nullptr);
  if (o.strategy == Strategy::none) {
    const int64_t count = s.batch * s.out_height() * s.out_width() * s.out_channels;
    if (!same_floats(wanted.floats, got.floats, count)) fail(text(s, o) + ": floats");
    return;
  }
  compare(text(s, o), wanted, got);
  if (cases % 3 == 0 && cuda_on_cpu::options().check) {  // as a CUDA graph replays them: on other values, in the workspace as they left it
    x.flip();
    conv2d(s, a, serial_executor());
    got.overwrite(0x99);
    cuda_on_cpu::replay(first);
    compare(text(s, o) + "replayed", wanted, got);
  }
  if (has_law(o.strategy)) {
    Buffer wanted_law(8 * s.batch * laws, 1), got_law(8 * s.batch * laws, 2);
    surrogate_law(s, a, wanted_law.as<float>(), serial_executor());
    cuda::surrogate_law(s, on_cuda, got_law.as<float>(), nullptr);
    if (!same_floats(wanted_law, got_law, 2 * s.batch * laws)) fail(text(s, o) + ": laws");
  }

  // Every tile, with the parameters that are there: the choice between them must never show.
  if (!every_tile || s.batch == 0 || cuda::PackedLayout(weight_shape(s)).depthwise) return;
  const char* const names[] = {"large", "medium", "small"};
  for (const cuda::DenseTile tile : {cuda::DenseTile::large, cuda::DenseTile::medium, cuda::DenseTile::small}) {
    LayerOutputs again(s, o.channel_stats, 0xdd);
    on_cuda.y = again.pointers();
    for (int64_t n = 0; n < s.batch; ++n) {
      again.scale.as<float>()[n] = wanted.scale.as<float>()[n];
      again.zero_point.as<int32_t>()[n] = wanted.zero_point.as<int32_t>()[n];
    }
    cuda::LayerPlan plan{};
    plan.output = cuda::LayerOutput::codes;
    plan.parts = cuda::dense_parts(s, o.channel_stats).at(workspace.as<void>());
    cuda::launch_dense(s, on_cuda, plan, tile, nullptr);
    compare(text(s, o) + names[static_cast<int>(tile)] + " tile", wanted, again);
  }
}

Conv2dShape conv(int64_t batch, int64_t height, int64_t width, int64_t in, int64_t out, int64_t kernel, int64_t stride = 1, int64_t padding = 0,
                 int64_t groups = 1, int64_t dilation = 1) {
  Conv2dShape s;
  s.batch = batch, s.in_height = height, s.in_width = width, s.in_channels = in, s.out_channels = out;
  s.kernel_height = s.kernel_width = kernel, s.stride_height = s.stride_width = stride;
  s.padding_top = s.padding_bottom = s.padding_left = s.padding_right = padding;
  s.dilation_height = s.dilation_width = dilation, s.groups = groups;
  return s;
}

/// With a kernel, strides, padding and dilation that differ between the axes.
Conv2dShape uneven(Conv2dShape s) {
  s.kernel_height = 2, s.stride_width = 3, s.padding_top = 4, s.padding_right = 5, s.dilation_width = 2;
  return s;
}

void test_pool(const Conv2dShape& s, const Options& o, Pool kind, bool count_include_pad, bool adaptive) {
  ++cases;
  Activations x(s.batch, s.in_height * s.in_width * s.in_channels, s.in_channels, o.wild, o.misalignment);
  const float predictor[] = {0.02f, 100.0f};
  const Buffer given(predictor, 2);
  const bool fixed = o.strategy == Strategy::fixed;
  const RangeArguments range{o.strategy, fixed ? given.as<float>() : nullptr, fixed ? 2 : 0};
  LayerOutputs wanted(s, o.channel_stats, 0x11), got(s, o.channel_stats, 0xee);
  const int64_t height = s.out_height(), width = s.out_width();
  Buffer workspace(cuda::workspace_bytes(s.batch, height * width, s.in_channels, o.channel_stats, kind == Pool::average && !fixed), 0xcc);
  if (adaptive) {
    adaptive_average_pool2d(s.batch, s.in_height, s.in_width, s.in_channels, height, width, x.input(), range, wanted.pointers(), serial_executor());
    cuda::adaptive_average_pool2d(s.batch, s.in_height, s.in_width, s.in_channels, height, width, x.input(), range, got.pointers(), workspace.as<void>(), nullptr);
  } else {
    pool2d(kind, s, count_include_pad, x.input(), range, wanted.pointers(), serial_executor());
    cuda::pool2d(kind, s, count_include_pad, x.input(), range, got.pointers(), workspace.as<void>(), nullptr);
  }
  compare(text(s, o) + (adaptive ? " adaptive pool" : kind == Pool::max ? " max pool" : " average pool"), wanted, got);
}

const Conv2dShape kShapes[] = {
    linear_shape(1, 1, 1, 1), linear_shape(3, 1, 17, 5), linear_shape(2, 65, 64, 33), linear_shape(1, 130, 192, 129), linear_shape(129, 1, 48, 64),
    linear_shape(5, 7, 640, 70), linear_shape(0, 3, 16, 8), linear_shape(2, 49, 1040, 130),
    conv(2, 5, 7, 3, 8, 3, 1, 1), conv(1, 9, 11, 16, 64, 3, 1, 1), conv(2, 8, 8, 32, 20, 3, 2, 1), conv(1, 13, 9, 3, 17, 7, 2, 3),
    conv(1, 6, 6, 48, 130, 1), conv(3, 7, 5, 64, 66, 1, 2), conv(2, 6, 7, 80, 64, 3, 1, 2, 1, 2), conv(1, 5, 5, 5, 7, 5, 1, 6),
    conv(2, 6, 6, 32, 32, 3, 1, 1, 2), conv(1, 7, 7, 24, 12, 3, 1, 1, 4), conv(1, 6, 5, 64, 128, 3, 1, 1, 4), conv(2, 4, 4, 12, 6, 2, 3, 0, 2),
    uneven(conv(2, 9, 8, 16, 12, 3, 1, 1)), uneven(conv(1, 9, 8, 3, 9, 3, 1, 1)), uneven(conv(1, 5, 9, 34, 10, 3, 1, 0, 2)), conv(3, 3, 3, 128, 40, 3, 1, 1),
    // Units of 8 bytes: of taps, of kernel rows with a tail, dilated; and what is gathered: several times 6 k blocks, with and without a rest, 13 taps.
    conv(1, 9, 8, 24, 40, 1), conv(2, 7, 6, 48, 34, 3, 1, 1, 2), conv(2, 7, 9, 24, 20, 3, 2, 1), uneven(conv(1, 9, 8, 40, 24, 3, 1, 1)), linear_shape(70, 1, 8, 66),
    linear_shape(3, 1, 449, 9), conv(1, 9, 8, 21, 10, 5, 1, 2), conv(1, 5, 6, 130, 7, 3, 1, 1), conv(1, 10, 14, 16, 8, 13, 1, 6),
    conv(2, 17, 15, 16, 24, 3, 1, 1), conv(2, 9, 9, 8, 8, 3, 1, 1, 8), conv(1, 10, 7, 144, 144, 3, 2, 1, 144), conv(2, 7, 9, 5, 15, 5, 1, 2, 5),
    uneven(conv(1, 12, 11, 36, 36, 3, 1, 1, 36)), conv(1, 16, 16, 4, 4, 7, 1, 3, 4, 2), conv(2, 5, 5, 3, 6, 1, 1, 0, 3)};

int test_large() {
  cuda_on_cpu::options().check = false;
  cuda_on_cpu::options().profile = true;
  Options o;
  o.strategy = Strategy::gaussian, o.bounds = true;
  test_layer(linear_shape(1, 1024, 1024, 1024), o, false);
  for (const int64_t channels : {3, 24, 64}) test_layer(conv(1, 56, 56, channels, 64, 3, 1, 1), o, channels == 64);
  test_layer(conv(1, 56, 56, 64, 64, 3, 1, 1, 64), o, false);
  o.strategy = Strategy::dynamic;
  test_pool(conv(1, 56, 56, 64, 64, 3, 2, 1), o, Pool::max, false, false);
  test_pool(conv(1, 56, 56, 64, 64, 2, 2), o, Pool::average, false, false);
  cuda_on_cpu::print_profile(stdout);
  return cuda_on_cpu::summary(cases);
}

}  // namespace

int main(int argument_count, char** arguments) try {
  cuda_on_cpu::set_order(argument_count, arguments);
  if (argument_count > 1 && std::string(arguments[1]) == "large") return test_large();
  const Strategy strategies[] = {Strategy::none, Strategy::fixed, Strategy::dynamic, Strategy::gaussian, Strategy::gaussian_channel,
                                 Strategy::probe, Strategy::channel};
  uint32_t turn = 0;
  for (const Conv2dShape& s : kShapes)
    for (const Strategy strategy : strategies) {
      Options o;
      o.strategy = strategy;
      o.activation = turn % 3 == 0 ? static_cast<Activation>(turn / 3 % 5) : Activation::clamp;
      o.residual = o.activation == Activation::clamp && turn % 2 == 0;
      o.bounds = o.activation == Activation::clamp && turn % 5 < 2;
      o.channel_stats = turn % 4 < 2;
      o.wild = turn % 7 == 3;
      o.gamma = turn % 4;
      o.misalignment = turn % 11 == 5 ? 1 : 0;
      test_layer(s, o);
      ++turn;
    }
  for (const Conv2dShape& s : {conv(2, 9, 11, 5, 5, 3, 2, 1), conv(1, 7, 7, 96, 96, 7), conv(3, 6, 5, 17, 17, 2, 2), conv(2, 8, 8, 300, 300, 3, 1, 1), conv(0, 4, 4, 8, 8, 2)})
    for (const Strategy strategy : {Strategy::fixed, Strategy::dynamic, Strategy::gaussian})
      for (int variant = 0; variant < 4; ++variant) {
        Options o;
        o.strategy = strategy, o.channel_stats = turn % 2 == 0, o.wild = turn % 5 == 1, o.misalignment = turn % 3 == 0;
        test_pool(s, o, variant == 0 ? Pool::max : Pool::average, variant == 1, variant == 3);
        ++turn;
      }
  Options dilated;
  dilated.strategy = Strategy::dynamic;
  test_pool(conv(2, 9, 8, 6, 6, 3, 2, 1, 1, 2), dilated, Pool::max, false, false);
  return cuda_on_cpu::summary(cases);
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
