// Stands for csrc/cuda in a build without CUDA kernels: the functions exist, so that programs link, and say so.
#include <probquant/cuda.h>

namespace probquant::cuda {
namespace {

[[noreturn]] void refuse(const char* op) {
  throw Error(std::string(op) + ": this probquant was built without CUDA kernels (no working nvcc was found, or PROBQUANT_CUDA=off)");
}

}  // namespace

int64_t workspace_bytes(int64_t, int64_t, int64_t, bool, bool) { refuse("workspace_bytes"); }
void quantize(const FloatView&, const float*, const int32_t*, const QuantizedOutput&, void*, void*) { refuse("quantize"); }
void dequantize(const QuantizedInput&, int64_t, int64_t, DType, void*, void*) { refuse("dequantize"); }
void moments(const uint8_t*, int64_t, int64_t, int64_t, bool, int64_t*, void*, void*) { refuse("moments"); }
int64_t packed_weight_bytes(const WeightShape&) { refuse("pack_weight"); }
void pack_weight(const WeightShape&, const int8_t*, const float*, const float*, const float*, uint8_t*, void*) { refuse("pack_weight"); }
int64_t conv2d_workspace_bytes(const Conv2dShape&, Strategy, int64_t, bool) { refuse("conv2d"); }
void conv2d(const Conv2dShape&, const LayerArguments&, void*) { refuse("conv2d"); }
void surrogate_law(const Conv2dShape&, const LayerArguments&, float*, void*) { refuse("surrogate_law"); }
void add(const QuantizedInput&, const QuantizedInput&, int64_t, int64_t, int64_t, float, float, const RangeArguments&, const QuantizedOutput&, void*, void*) {
  refuse("add");
}
void mul(const QuantizedInput&, const QuantizedInput&, int64_t, int64_t, int64_t, bool, const RangeArguments&, const QuantizedOutput&, void*, void*) {
  refuse("mul");
}
void activation(const QuantizedInput&, int64_t, int64_t, int64_t, Activation, float, float, const RangeArguments&, const QuantizedOutput&, void*, void*) {
  refuse("activation");
}
void concat(const QuantizedInput*, const int64_t*, int64_t, int64_t, int64_t, const RangeArguments&, const QuantizedOutput&, void*, void*) {
  refuse("concat");
}
void upsample_nearest2d(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const QuantizedInput&, const QuantizedOutput&, void*, void*) {
  refuse("upsample_nearest2d");
}
void pool2d(Pool, const Conv2dShape&, bool, const QuantizedInput&, const RangeArguments&, const QuantizedOutput&, void*, void*) { refuse("pool2d"); }
void adaptive_average_pool2d(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const QuantizedInput&, const RangeArguments&, const QuantizedOutput&,
                             void*, void*) {
  refuse("adaptive_average_pool2d");
}
void layer_norm(int64_t, int64_t, const LayerNormArguments&, void*) { refuse("layer_norm"); }
int64_t attention_workspace_bytes(const AttentionShape&) { refuse("attention"); }
void attention(const AttentionShape&, const AttentionArguments&, void*) { refuse("attention"); }

}  // namespace probquant::cuda
