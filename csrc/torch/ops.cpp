// torch.ops.probquant on the CPU: checks arguments, allocates outputs, calls the core. Nothing is computed here.
#include "elementwise_ops.h"
#include "layer_ops.h"
#include "pool_ops.h"
#include "recording.h"
#include "schemas.h"
#include "transformer_ops.h"

namespace probquant::ops {
namespace {

/// The CPU's ops (elementwise_ops.h, layer_ops.h, pool_ops.h, transformer_ops.h).
struct Cpu {
  explicit Cpu(const Tensor&) {}
  static int64_t packed_weight_bytes(const WeightShape& shape) { return probquant::packed_weight_bytes(shape); }
  static int64_t conv2d_workspace_bytes(const Conv2dShape& shape, Strategy strategy, int64_t) { return probquant::conv2d_workspace_bytes(shape, strategy); }
  template <class... Arguments>
  void pack_weight(const Arguments&... arguments) const {
    probquant::pack_weight(arguments...);
  }
  void conv2d(const Conv2dShape& shape, const LayerArguments& a) const { probquant::conv2d(shape, a, stable::torch_executor(), Replay::upcoming()); }
  void surrogate_law(const Conv2dShape& shape, const LayerArguments& a, float* law) const {
    probquant::surrogate_law(shape, a, law, stable::torch_executor());
  }
  static int64_t elementwise_workspace_bytes(int64_t, int64_t, int64_t, Strategy) { return 0; }
  void add(const QuantizedInput& a, const QuantizedInput& b, int64_t samples, int64_t count, int64_t channels, float activation_min, float activation_max,
           const RangeArguments& range, const QuantizedOutput& y, void*) const {
    probquant::add(a, b, samples, count, channels, activation_min, activation_max, range, y, stable::torch_executor());
  }
  void mul(const QuantizedInput& a, const QuantizedInput& b, int64_t samples, int64_t count, int64_t channels, bool per_channel, const RangeArguments& range,
           const QuantizedOutput& y, void*) const {
    probquant::mul(a, b, samples, count, channels, per_channel, range, y, stable::torch_executor());
  }
  void activation(const QuantizedInput& x, int64_t samples, int64_t count, int64_t channels, Activation kind, float activation_min, float activation_max,
                  const RangeArguments& range, const QuantizedOutput& y, void*) const {
    probquant::activation(x, samples, count, channels, kind, activation_min, activation_max, range, y, stable::torch_executor());
  }
  template <class... Arguments>
  void concat(const Arguments&... arguments) const {
    probquant::concat(arguments..., stable::torch_executor());
  }
  template <class... Arguments>
  void upsample_nearest2d(const Arguments&... arguments) const {
    probquant::upsample_nearest2d(arguments..., stable::torch_executor());
  }
  void layer_norm(int64_t rows, int64_t channels, const LayerNormArguments& a) const { probquant::layer_norm(rows, channels, a, stable::torch_executor()); }
  static int64_t attention_workspace_bytes(const AttentionShape& shape) { return probquant::attention_workspace_bytes(shape, stable::torch_executor()); }
  void attention(const AttentionShape& shape, const AttentionArguments& a) const { probquant::attention(shape, a, stable::torch_executor()); }
  static int64_t pool_workspace_bytes(int64_t, int64_t, int64_t, int64_t, Strategy) { return 0; }
  void pool2d(Pool kind, const Conv2dShape& shape, bool count_include_pad, const QuantizedInput& x, const RangeArguments& range, const QuantizedOutput& y,
              void*) const {
    probquant::pool2d(kind, shape, count_include_pad, x, range, y, stable::torch_executor());
  }
  void adaptive_average_pool2d(int64_t batch, int64_t in_height, int64_t in_width, int64_t channels, int64_t out_height, int64_t out_width,
                               const QuantizedInput& x, const RangeArguments& range, const QuantizedOutput& y, void*) const {
    probquant::adaptive_average_pool2d(batch, in_height, in_width, channels, out_height, out_width, x, range, y, stable::torch_executor());
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Quantize, dequantize, moments

Quantized quantize(const Tensor& x, int64_t sample_dims, const OptionalTensor& scale, const OptionalTensor& zero_point, bool channel_stats) {
  QuantizeArguments a = quantize_arguments(x, sample_dims, scale, zero_point, channel_stats);
  probquant::quantize(a.x, a.scale, a.zero_point, a.y.pointers, stable::torch_executor());
  return a.y.release();
}

Tensor dequantize(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, std::optional<int32_t> dtype) {
  DequantizeArguments a = dequantize_arguments(x, x_scale, x_zero_point, dtype);
  probquant::dequantize(a.x, a.samples, a.count, a.dtype, a.y.data(), stable::torch_executor());
  return std::move(a.y);
}

Tensor moments(const Tensor& q, int64_t sample_dims, bool channel_stats) {
  MomentsArguments a = moments_arguments(q, sample_dims, channel_stats);
  probquant::moments(a.q, a.samples, a.count, a.channels, channel_stats, a.stats.data<int64_t>(), stable::torch_executor());
  return std::move(a.stats);
}

/// Visits every op of the CPU, as visit.op<&kernel>(name).
template <class Visitor>
void for_each_op(Visitor&& visit) {
  visit.template op<&quantize>("quantize");
  visit.template op<&dequantize>("dequantize");
  visit.template op<&moments>("moments");
  visit.template op<&pack_weight<Cpu>>("pack_weight");
  visit.template op<&linear<Cpu>>("linear");
  visit.template op<&conv2d<Cpu>>("conv2d");
  visit.template op<&surrogate_law<Cpu>>("surrogate_law");
  visit.template op<&add<Cpu>>("add");
  visit.template op<&mul<Cpu>>("mul");
  visit.template op<&activation<Cpu>>("activation");
  visit.template op<&concat<Cpu>>("concat");
  visit.template op<&max_pool2d<Cpu>>("max_pool2d");
  visit.template op<&avg_pool2d<Cpu>>("avg_pool2d");
  visit.template op<&adaptive_avg_pool2d<Cpu>>("adaptive_avg_pool2d");
  visit.template op<&upsample_nearest2d<Cpu>>("upsample_nearest2d");
  visit.template op<&layer_norm<Cpu>>("layer_norm");
  visit.template op<&attention<Cpu>>("attention");
}

// ---------------------------------------------------------------------------------------------------------------------
// A recording of ops, in one call

/// The recordings' ops by name.
struct Recordable {
  std::unordered_map<std::string, RecordedOp> by_name;

  template <auto Kernel>
  void op(const char* name) {
    by_name.emplace(name, &replay_op<Kernel>);
  }
};

const std::unordered_map<std::string, RecordedOp>& recordable() {
  static const Recordable ops = [] {
    Recordable all;
    for_each_op(all);
    all.op<&flatten>("flatten");
    return all;
  }();
  return ops.by_name;
}

std::vector<Tensor> run(const std::vector<Tensor>& inputs, const std::vector<Tensor>& constants, const std::string& recording) {
  return replay(recordable(), inputs, constants, read_numbers(recording));
}

HeldRecordings& held_recordings() {
  static auto& recordings = *new HeldRecordings;  // to the end of the process: torch may be gone before
  return recordings;
}

int64_t hold(std::vector<Tensor> constants, const std::string& recording) {
  return held_recordings().add({std::move(constants), read_numbers(recording)});
}

int64_t release(int64_t held) { return held_recordings().release(held); }

std::vector<Tensor> run_held(const std::vector<Tensor>& inputs, int64_t held) {
  const std::shared_ptr<const HeldRecording> recording = held_recordings().find(held);
  return replay(recordable(), inputs, recording->constants, recording->numbers);
}

struct Implement {
  const stable::Library& library;

  template <auto Kernel>
  void op(const char* name) const {
    library.implement<Kernel>(name);
  }
};

const stable::RegisterAtLoad register_at_load{[] {
  const auto library = stable::Library::fragment("probquant");
  for (const char* schema : kSchemas) library.define(schema);
  const auto cpu = stable::Library::kernels("probquant", "CPU");
  for_each_op(Implement{cpu});
  cpu.implement<&run>("run");
  cpu.implement<&run_held>("run_held");
  const auto any = stable::Library::kernels("probquant", "CompositeExplicitAutograd");  // of no tensor, or where it lies does not matter
  any.implement<&hold>("hold");
  any.implement<&release>("release");
}};

}  // namespace
}  // namespace probquant::ops
