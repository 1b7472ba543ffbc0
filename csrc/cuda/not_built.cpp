// Stands for csrc/cuda in a build without CUDA kernels: the functions exist, so that programs link, and say so.
#include <probquant/cuda.h>

namespace probquant::cuda {
namespace {

[[noreturn]] void refuse(const char* op) {
  throw Error(std::string(op) + ": this probquant was built without CUDA kernels (no working nvcc was found, or PROBQUANT_CUDA=off)");
}

}  // namespace

int64_t quantize_workspace_bytes(const FloatView&, bool) { refuse("quantize"); }
void quantize(const FloatView&, const float*, const int32_t*, const QuantizedOutput&, void*, void*) { refuse("quantize"); }
void dequantize(const QuantizedInput&, int64_t, int64_t, DType, void*, void*) { refuse("dequantize"); }
void moments(const uint8_t*, int64_t, int64_t, int64_t, bool, int64_t*, void*) { refuse("moments"); }

}  // namespace probquant::cuda
