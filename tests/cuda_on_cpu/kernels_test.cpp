// Runs the CUDA kernels of csrc/cuda on the CPU and compares every byte they write with what the CPU kernels write: quantize,
// dequantize and moments, over odd shapes, layouts, dtypes and special values.
//
//   kernels_test [forward|backward|random] [seed]        exit status 0 if all is equal
//   kernels_test large                                   tensors of 28 x 28 x 64, without the checker; prints the profile
#include <probquant/cuda.h>

#include "codes.h"
#include "cudart.h"
#include "core/float_formats.h"
#include "core/numerics.h"
#include "cuda/launch.h"
#include "memory.h"

namespace {

using namespace probquant;

using cuda_on_cpu::Buffer;
using cuda_on_cpu::compare;
using cuda_on_cpu::fail;
using cuda_on_cpu::Outputs;
using cuda_on_cpu::random_bits;
using cuda_on_cpu::random_float;

int cases = 0;

const char* name(DType dtype) { return dtype == DType::float32 ? "float32" : dtype == DType::float16 ? "float16" : "bfloat16"; }
int64_t element_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

struct Shape {
  int64_t samples, rows, columns, channels;
  int64_t positions() const { return rows * columns; }
  int64_t count() const { return positions() * channels; }
};

std::string text(const Shape& s) {
  return "[" + std::to_string(s.samples) + ", " + std::to_string(s.rows) + ", " + std::to_string(s.columns) + ", " + std::to_string(s.channels) + "]";
}

enum class Layout { nhwc, nchw, crop, mirrored };
enum class Values { usual, one_nan, one_infinity, huge, tiny, constant, zeros, positive };
const char* const kValueNames[] = {"usual", "one NaN", "one infinity", "huge", "tiny", "constant", "zeros", "positive"};

/// A float tensor in some layout, in memory that holds nothing else (but for what a crop leaves out).
struct Image {
  FloatView view;
  Buffer memory;

  Image(const Shape& s, DType dtype, Layout layout, Values values)
      : memory(element_bytes(dtype) * s.samples * (s.rows + (layout == Layout::crop)) * (s.columns + 2 * (layout == Layout::crop)) * s.channels,
               0x7f) {
    const int64_t rows = s.rows + (layout == Layout::crop), columns = s.columns + 2 * (layout == Layout::crop);
    view.dtype = dtype;
    const int64_t size[4] = {s.samples, s.rows, s.columns, s.channels};
    const int64_t nhwc[4] = {rows * columns * s.channels, columns * s.channels, s.channels, 1};
    const int64_t nchw[4] = {rows * columns * s.channels, columns, 1, rows * columns};
    int64_t offset = 0;
    for (int i = 0; i < 4; ++i) view.size[i] = size[i], view.stride[i] = layout == Layout::nchw ? nchw[i] : nhwc[i];
    if (layout == Layout::crop) offset = view.stride[1] + view.stride[2];
    if (layout == Layout::mirrored && s.columns > 0) offset = (s.columns - 1) * view.stride[2], view.stride[2] = -view.stride[2];
    char* data = memory.as<char>() + offset * element_bytes(dtype);
    view.data = data;
    const int64_t special = s.samples * s.count() > 0 ? random_bits() % (s.samples * s.count()) : 0;
    int64_t i = 0;
    for (int64_t n = 0; n < s.samples; ++n)
      for (int64_t y = 0; y < s.rows; ++y)
        for (int64_t x = 0; x < s.columns; ++x)
          for (int64_t c = 0; c < s.channels; ++c, ++i) {
            float value = random_float();
            if (values == Values::huge) value *= 1.5e38f;
            if (values == Values::tiny) value *= 1e-38f;
            if (values == Values::constant) value = -0.375f;
            if (values == Values::zeros) value = random_bits() % 2 ? 0.0f : -0.0f;
            if (values == Values::positive) value = value * value + 1;
            if (i == special && values == Values::one_nan) value = kNan;
            if (i == special && values == Values::one_infinity) value = random_bits() % 2 ? kInfinity : -kInfinity;
            store_float(data, dtype, n * view.stride[0] + y * view.stride[1] + x * view.stride[2] + c * view.stride[3], value);
          }
  }
};

void test_quantize(const Shape& s, DType dtype, Layout layout, Values values, bool channel_stats, const float* scale, const int32_t* zero_point) {
  ++cases;
  Image x(s, dtype, layout, values);
  Outputs wanted(s.samples, s.count(), s.channels, channel_stats, 0x11), got(s.samples, s.count(), s.channels, channel_stats, 0xee);
  quantize(x.view, scale, zero_point, wanted.pointers(), serial_executor());
  Buffer workspace(cuda::workspace_bytes(s.samples, s.positions(), s.channels, channel_stats, scale == nullptr), 0xcc);
  const Buffer device_scale(scale, 1), device_zero_point(zero_point, 1);
  cuda::quantize(x.view, device_scale.as<float>(), device_zero_point.as<int32_t>(), got.pointers(), workspace.as<void>(), nullptr);
  const std::string what = "quantize " + text(s) + " " + name(dtype) + ", " + kValueNames[static_cast<int>(values)] + ", layout " +
                           std::to_string(static_cast<int>(layout)) + (channel_stats ? ", channel stats" : "") + (scale ? ", given scale" : "");
  compare(what, wanted, got);
}

void test_dequantize(int64_t samples, int64_t count, DType dtype) {
  ++cases;
  Buffer q(samples * count, 1), scale(samples * 4, 2), zero_point(samples * 4, 3);
  const float scales[] = {0.01f, 3e36f, 1e-38f, kNan, 0.0f, -1.0f, kInfinity, 7.7e-6f};
  const int32_t zero_points[] = {128, 0, 255, 3, -7, 1000};
  for (int64_t i = 0; i < samples * count; ++i) q.as<uint8_t>()[i] = static_cast<uint8_t>(random_bits() >> 8);
  for (int64_t n = 0; n < samples; ++n) scale.as<float>()[n] = scales[n % 8], zero_point.as<int32_t>()[n] = zero_points[n % 6];
  QuantizedInput x;
  x.q = q.as<uint8_t>(), x.scale = scale.as<float>(), x.zero_point = zero_point.as<int32_t>();
  Buffer wanted(samples * count * element_bytes(dtype), 0x11), got(samples * count * element_bytes(dtype), 0xee);
  dequantize(x, samples, count, dtype, wanted.as<void>(), serial_executor());
  cuda::dequantize(x, samples, count, dtype, got.as<void>(), nullptr);
  if (!wanted.same(got)) fail("dequantize [" + std::to_string(samples) + ", " + std::to_string(count) + "] " + name(dtype));
}

void test_moments(const Shape& s, bool channel_stats) {
  ++cases;
  Buffer q(s.samples * s.count(), 0);
  const bool all_255 = random_bits() % 4 == 0;
  for (int64_t i = 0; i < s.samples * s.count(); ++i) q.as<uint8_t>()[i] = static_cast<uint8_t>(all_255 ? 255 : random_bits() >> 8);
  const int64_t bytes = s.samples * 8 * stats_columns(s.channels, channel_stats);
  Buffer wanted(bytes, 0x11), got(bytes, 0xee);
  moments(q.as<uint8_t>(), s.samples, s.count(), s.channels, channel_stats, wanted.as<int64_t>(), serial_executor());
  Buffer workspace(cuda::workspace_bytes(s.samples, s.positions(), s.channels, channel_stats, false), 0xcc);
  const size_t first = cuda_on_cpu::enqueued().size();
  cuda::moments(q.as<uint8_t>(), s.samples, s.count(), s.channels, channel_stats, got.as<int64_t>(), workspace.as<void>(), nullptr);
  if (!wanted.same(got)) fail("moments " + text(s) + (channel_stats ? ", channel stats" : ""));
  // Once more, as a CUDA graph replays it: on other values, in the workspace as it was left.
  for (int64_t i = 0; i < s.samples * s.count(); ++i) q.as<uint8_t>()[i] = static_cast<uint8_t>(255 - q.as<uint8_t>()[i] / 2);
  moments(q.as<uint8_t>(), s.samples, s.count(), s.channels, channel_stats, wanted.as<int64_t>(), serial_executor());
  got.fill(0x99);
  cuda_on_cpu::replay(first);
  if (!wanted.same(got)) fail("replayed moments " + text(s) + (channel_stats ? ", channel stats" : ""));
}

/// Every value belongs to exactly one thread of one block.
void test_partition(int64_t samples, int64_t positions, int64_t channels, bool channel_stats = false) {
  ++cases;
  const cuda::Partition p = cuda::make_partition(samples, positions, channels, channel_stats);
  const bool right = p.threads % 32 == 0 && p.threads <= cuda::kMaxThreads && p.channel_lanes * p.position_lanes <= p.threads &&
                     int64_t{p.channel_lanes} * p.channel_tiles >= channels &&
                     int64_t{p.channel_lanes} * (p.channel_tiles - 1) < (channels > 0 ? channels : 1) &&
                     p.part_positions * p.position_parts >= positions &&
                     p.part_positions * (p.position_parts - 1) < (positions > 0 ? positions : 1) &&
                     p.part_positions <= (channel_stats ? 1 : p.position_lanes) * cuda::kMaxPerThread && p.blocks_per_sample() >= 1;
  if (!right) fail("partition of " + std::to_string(samples) + " x " + std::to_string(positions) + " x " + std::to_string(channels));
}

const Shape kShapes[] = {{1, 1, 1, 1},   {2, 7, 5, 3},   {0, 3, 3, 3},  {3, 4, 4, 64}, {2, 5, 3, 257},  {1, 1, 1, 1000}, {5, 1, 7, 96},
                         {2, 0, 3, 4},   {2, 3, 4, 0},   {1, 33, 31, 3}, {1, 64, 48, 3}, {40, 1, 1, 17}, {1, 1, 300, 1},  {1, 9, 11, 128},
                         {3, 13, 1, 31}, {2, 1, 13, 33}, {1, 2, 700, 5}};

int test_large() {
  cuda_on_cpu::options().check = false;
  cuda_on_cpu::options().profile = true;
  const Shape s{1, 28, 28, 64};
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    test_quantize(s, dtype, Layout::nhwc, Values::usual, true, nullptr, nullptr);
    test_dequantize(1, s.count(), dtype);
  }
  test_moments(s, true);
  cuda_on_cpu::print_profile(stdout);
  return cuda_on_cpu::summary(cases);
}

}  // namespace

int main(int argument_count, char** arguments) try {
  cuda_on_cpu::set_order(argument_count, arguments);
  if (argument_count > 1 && std::string(arguments[1]) == "large") return test_large();
  const DType dtypes[] = {DType::float32, DType::float16, DType::bfloat16};
  const Layout layouts[] = {Layout::nhwc, Layout::nchw, Layout::crop, Layout::mirrored};
  int turn = 0;
  for (const Shape& s : kShapes) {
    for (const DType dtype : dtypes) {
      test_quantize(s, dtype, layouts[turn++ % 4], Values::usual, true, nullptr, nullptr);
      test_quantize(s, dtype, layouts[turn++ % 4], Values::usual, false, nullptr, nullptr);
      const float scale = 0.0078f;
      const int32_t zero_point = 100;
      test_quantize(s, dtype, layouts[turn++ % 4], Values::usual, true, &scale, &zero_point);
    }
    for (const bool channel_stats : {false, true})
      if (s.channels > 0) test_moments(s, channel_stats);
  }
  for (int values = 1; values <= static_cast<int>(Values::positive); ++values)
    for (const DType dtype : dtypes)
      for (const Layout layout : layouts) test_quantize({3, 7, 9, 5}, dtype, layout, static_cast<Values>(values), true, nullptr, nullptr);
  const float scales[] = {kNan, 0.0f, -0.5f, kInfinity, 1e-40f, 1e-30f, 1e30f};
  const int32_t zero_points[] = {-3, 0, 255, 700};
  for (const float scale : scales)
    for (const int32_t zero_point : zero_points)
      for (const Values values : {Values::usual, Values::one_nan, Values::one_infinity}) {
        test_quantize({2, 5, 3, 7}, dtypes[turn % 3], Layout::nhwc, values, turn % 2 == 0, &scale, &zero_point);
        ++turn;
      }
  for (const DType dtype : dtypes)
    for (const int64_t count : {0, 1, 255, 256, 1027, 5000}) test_dequantize(9, count, dtype);
  if (cuda_on_cpu::options().order == cuda_on_cpu::Order::forward)  // more tiles than kMaxBlocksPerSample: half of all threads here, so once is enough
    test_quantize({1, 1, 1, 300007}, DType::float32, Layout::nhwc, Values::usual, true, nullptr, nullptr);
  for (int i = 0; i < 20000; ++i) {
    const auto size = [] { return static_cast<int64_t>(random_bits() % 4 ? random_bits() % 600 : random_bits() % 3000000); };
    test_partition(size(), size(), size(), i % 2 == 0);
  }

  test_partition(1, int64_t{1} << 33, 256);
  return cuda_on_cpu::summary(cases);
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
