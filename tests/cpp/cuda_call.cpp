// Calls every function of cuda.h with sound arguments for two values. On a machine without a GPU, or with a library without CUDA
// kernels, each must throw probquant::Error: one line is printed per call.
#include <probquant/cuda.h>

#include <cstdio>

namespace {

template <class Call>
void report(const char* name, Call call) {
  try {
    call();
    std::printf("%s: ok\n", name);
  } catch (const probquant::Error& error) {
    std::printf("%s: %s\n", name, error.what());
  }
}

}  // namespace

int main() {
  float values[2] = {1, 2}, scale = 0;
  int32_t zero_point = 0;
  uint8_t q[2] = {};
  int64_t stats[probquant::kStatsSample] = {};
  double workspace[64] = {};
  probquant::FloatView x;
  x.data = values;
  for (int i = 0; i < 4; ++i) x.size[i] = 1, x.stride[i] = 2;
  x.size[3] = 2, x.stride[3] = 1;
  probquant::QuantizedOutput y;
  y.q = q, y.scale = &scale, y.zero_point = &zero_point, y.stats = stats;
  probquant::QuantizedInput codes;
  codes.q = q, codes.scale = &scale, codes.zero_point = &zero_point;
  report("workspace_bytes", [&] { probquant::cuda::workspace_bytes(1, 1, 2, false, true); });
  report("quantize", [&] { probquant::cuda::quantize(x, nullptr, nullptr, y, workspace, nullptr); });
  report("dequantize", [&] { probquant::cuda::dequantize(codes, 1, 2, probquant::DType::float32, values, nullptr); });
  report("moments", [&] { probquant::cuda::moments(q, 1, 2, 2, false, stats, workspace, nullptr); });
  const probquant::Conv2dShape layer = probquant::linear_shape(1, 1, 2, 1);
  const int8_t weight[2] = {1, 2};
  alignas(64) uint8_t packed[1 << 16] = {};
  probquant::LayerArguments arguments;
  const float predictor[2] = {1, 0};
  arguments.x = codes, arguments.x.stats = stats, arguments.packed_weight = packed, arguments.y = y;
  arguments.strategy = probquant::Strategy::fixed, arguments.predictor = predictor, arguments.predictor_size = 2;
  report("packed_weight_bytes", [&] { probquant::cuda::packed_weight_bytes(probquant::weight_shape(layer)); });
  report("pack_weight", [&] { probquant::cuda::pack_weight(probquant::weight_shape(layer), weight, values, nullptr, nullptr, packed, nullptr); });
  report("conv2d", [&] { probquant::cuda::conv2d(layer, arguments, nullptr); });
  const probquant::RangeArguments range{probquant::Strategy::fixed, predictor, 2};
  const int64_t channels[1] = {2};
  report("add", [&] { probquant::cuda::add(codes, codes, 1, 2, 2, -1, 1, range, y, nullptr, nullptr); });
  report("mul", [&] { probquant::cuda::mul(codes, codes, 1, 2, 2, true, range, y, nullptr, nullptr); });
  report("activation", [&] { probquant::cuda::activation(codes, 1, 2, 2, probquant::Activation::gelu, -1, 1, range, y, nullptr, nullptr); });
  report("concat", [&] { probquant::cuda::concat(&codes, channels, 1, 1, 1, range, y, workspace, nullptr); });
  report("upsample_nearest2d", [&] { probquant::cuda::upsample_nearest2d(1, 1, 1, 2, 1, 1, codes, y, workspace, nullptr); });
  probquant::LayerNormArguments norm;
  norm.x = codes, norm.range = range, norm.y = y;
  report("layer_norm", [&] { probquant::cuda::layer_norm(1, 2, norm, nullptr); });
  const probquant::AttentionShape one{1, 1, 1, 1, 2};
  probquant::AttentionArguments attention;
  attention.query = attention.key = attention.value = codes, attention.scale = 1, attention.range = range, attention.y = y, attention.workspace = packed;
  report("attention", [&] { probquant::cuda::attention(one, attention, nullptr); });
  report("a missing predictor", [&] {
    arguments.predictor_size = 1;
    probquant::cuda::conv2d(layer, arguments, nullptr);
  });
  report("a wrong size", [&] { probquant::cuda::moments(q, 1, 3, 2, false, stats, workspace, nullptr); });
}
