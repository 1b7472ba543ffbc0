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
  report("quantize_workspace_bytes", [&] { probquant::cuda::quantize_workspace_bytes(x, false); });
  report("quantize", [&] { probquant::cuda::quantize(x, nullptr, nullptr, y, workspace, nullptr); });
  report("dequantize", [&] { probquant::cuda::dequantize(codes, 1, 2, probquant::DType::float32, values, nullptr); });
  report("moments", [&] { probquant::cuda::moments(q, 1, 2, 2, false, stats, nullptr); });
  report("a wrong size", [&] { probquant::cuda::moments(q, 1, 3, 2, false, stats, nullptr); });
}
