// Plain types of the public C++ API. No torch, no CUDA header, no allocation.
//
// An activation travels as (q, scale, zero_point, stats):
//   q           uint8, images as NHWC, rows as [..., K]
//   scale       float32 [samples], > 0           x = scale * (q - zero_point)
//   zero_point  int32   [samples], 0..255
//   stats       int64   [samples, stats_columns], see below
// A sample is one image, or one row (token) of a linear layer. csrc/NUMERICS.md is the normative text.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(_WIN32)
#error "probquant supports ELF platforms only"
#endif
#define PROBQUANT_API __attribute__((visibility("default")))

namespace probquant {

/// Every front end throws this when an argument is wrong; the message names the argument, its value and what was wanted.
class PROBQUANT_API Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message);
  ~Error() override;
};

/// Element types on the float side of quantize and dequantize.
enum class DType : int32_t { float32 = 0, float16 = 1, bfloat16 = 2 };

/// How a layer's output gets its scale and zero point. The predictor's layout follows from it (float32 values):
///   none              the output stays float32; predictor []
///   fixed             static quantization; predictor [scale, zero_point]
///   dynamic           exact minimum and maximum of the finished output, per sample; predictor []
///   gaussian          one law for all weights; predictor [alpha, beta, rho, mean_w, var_w, mean_b, var_b]
///   gaussian_channel  one law per output channel; predictor [alpha, beta, rho, mean_w[O], var_w[O], bias[O]]
///   probe             exact range of a sixteenth of the positions, computed first, widened; predictor [below, above]
///   channel           one law per input channel, from the input's channel moments; predictor
///                     [alpha, beta, rho, mean_b, var_b, within, between, mean_w[C], square_w[C]], or, for depthwise layers, one
///                     per output channel: [alpha, beta, rho, mean_w[O], square_w[O], bias[O]]
/// The gaussian ones are the probabilistic strategy of arXiv 2505.10689: the range is predicted from the layer's input.
enum class Strategy : int32_t { none = 0, fixed = 1, dynamic = 2, gaussian = 3, gaussian_channel = 4, probe = 5, channel = 6 };

/// Function fused behind a layer. `clamp` covers the identity, ReLU and ReLU6 through its bounds; the others are
/// evaluated in float before the one rounding.
enum class Activation : int32_t { clamp = 0, silu = 1, gelu = 2, hardswish = 3, sigmoid = 4 };

enum class Pool : int32_t { max = 0, average = 1 };

// Columns of a row of stats.
inline constexpr int64_t kStatsSum = 0;      ///< sum of q
inline constexpr int64_t kStatsSquares = 1;  ///< sum of q^2
inline constexpr int64_t kStatsClipped = 2;  ///< values saturated at 0 or 255 that the activation did not ask for; -1: invalid scale
inline constexpr int64_t kStatsSample = 3;   ///< columns without channel stats; with them follow sum q [C] and sum q^2 [C]

constexpr int64_t stats_columns(int64_t channels, bool channel_stats) {
  return kStatsSample + (channel_stats ? 2 * channels : 0);
}

/// Runs work on several threads. `parallel_for` calls body(argument, begin, end) over disjoint ranges that cover
/// [0, count), each at least one long, and returns when all are done. Results never depend on the split.
struct Executor {
  void (*parallel_for)(void* self, int64_t count, void (*body)(void* argument, int64_t begin, int64_t end), void* argument);
  void* self;
  int threads;  ///< how many ranges can run at once; a hint for splitting
};

/// Runs everything in the calling thread.
PROBQUANT_API const Executor& serial_executor();
/// A small pool of std::threads, started at the first use, as many as the CPUs this process may run on.
PROBQUANT_API const Executor& default_executor();

/// A quantized activation that is read.
struct QuantizedInput {
  const uint8_t* q = nullptr;
  const float* scale = nullptr;
  const int32_t* zero_point = nullptr;
  const int64_t* stats = nullptr;  ///< read by the gaussian strategies, and with channel moments by Strategy::channel
  int64_t stats_stride = kStatsSample;
};

/// Where an op writes its quantized output.
struct QuantizedOutput {
  uint8_t* q = nullptr;
  float* scale = nullptr;
  int32_t* zero_point = nullptr;
  int64_t* stats = nullptr;
  bool channel_stats = false;  ///< also write the moments of every channel (see stats_columns)
};

}  // namespace probquant
