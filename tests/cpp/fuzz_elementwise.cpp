// Fuzzes the kernels of every instruction set that this machine has against the reference table: depthwise layers, patch
// sums, quantize, dequantize, moments, mark_codes, lookup, add, mul, pooling windows, LayerNorm, attention. Every buffer ends at an unmapped page, outputs are
// compared byte by byte, written ranges included.
//
//   fuzz_elementwise [seed] [cases, or seconds with a trailing s] [isa]
//
// Prints the parameters of the first case that differs and exits 1, else "N cases passed".
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "core/float_formats.h"
#include "tables.h"

namespace probquant {
namespace {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  /// Uniform in [lo, hi].
  int64_t range(int64_t lo, int64_t hi) { return lo + static_cast<int64_t>(next() % static_cast<uint64_t>(hi - lo + 1)); }
  bool chance(int64_t one_in) { return range(1, one_in) == 1; }
  float uniform(float lo, float hi) { return lo + (hi - lo) * static_cast<float>(next() >> 40) * 0x1p-24f; }

 private:
  uint64_t state_;
};

/// Memory whose last byte is followed by an unmapped page, filled with a pattern.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count, int fill = 0xa5) : count_(count) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = static_cast<size_t>(count) * sizeof(T);
    mapped_ = (bytes + page - 1) / page * page + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + page, mapped_ - 2 * page, PROT_READ | PROT_WRITE) != 0) std::abort();
    data_ = reinterpret_cast<T*>(base_ + mapped_ - page - bytes);
    std::memset(data_, fill, bytes);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, mapped_); }

  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return count_; }

 private:
  int64_t count_;
  size_t mapped_;
  char* base_;
  T* data_;
};

void fill_codes(Random& random, Guarded<uint8_t>& q) {
  const int64_t kind = random.range(0, 5), centre = random.range(0, 255);
  for (int64_t i = 0; i < q.size(); ++i)
    q[i] = static_cast<uint8_t>(kind == 0   ? 255
                                : kind == 1 ? 0
                                : kind == 2 ? std::min<int64_t>(255, std::max<int64_t>(0, centre + random.range(-4, 4)))
                                            : random.range(0, 255));
}

/// One case: what it is, for the report, and the first difference.
struct Case {
  std::string text;
  bool failed = false;

  template <class T>
  void compare(const char* what, Guarded<T>& expected, Guarded<T>& actual) {
    if (failed || std::memcmp(expected.data(), actual.data(), static_cast<size_t>(expected.size()) * sizeof(T)) == 0) return;
    for (int64_t i = 0; i < expected.size(); ++i)
      if (std::memcmp(&expected[i], &actual[i], sizeof(T)) != 0) {
        char line[160];
        std::snprintf(line, sizeof line, "\n  %s[%lld] is %.9g, want %.9g", what, static_cast<long long>(i), static_cast<double>(actual[i]),
                      static_cast<double>(expected[i]));
        text += line;
        failed = true;
        return;
      }
  }
  template <class T>
  void add(const char* name, T value) {
    char number[32];
    if constexpr (std::is_floating_point_v<T>) std::snprintf(number, sizeof number, "%.9g", static_cast<double>(value));
    else std::snprintf(number, sizeof number, "%lld", static_cast<long long>(value));
    text += std::string(" ") + name + "=" + number;
  }
};

/// The sign and payload of a NaN are not specified.
void unify_nan(Guarded<float>& values) {
  for (int64_t i = 0; i < values.size(); ++i)
    if (values[i] != values[i]) values[i] = kNan;
}
/// Nor is the sign of a zero that is a minimum or maximum.
void unify_range(Guarded<float>& values) {
  unify_nan(values);
  for (int64_t i = 0; i < values.size(); ++i)
    if (values[i] == 0.0f) values[i] = 0.0f;
}

constexpr float kInf = std::numeric_limits<float>::infinity();

int64_t some_channels(Random& random) {
  static const int64_t kEdges[] = {1, 2, 3, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 80, 96, 127, 128, 129, 144, 160};
  return random.chance(2) ? kEdges[random.range(0, 20)] : random.range(1, 100);
}

float some_scale(Random& random) {
  return random.chance(3) ? std::ldexp(1.0f, static_cast<int>(random.range(-8, 2))) : random.uniform(0.001f, 0.2f);
}

SampleEpilogue some_epilogue(Random& random, bool residual, float activation_min, float activation_max, float y_scale) {
  const float invalid = random.chance(30) ? kNan : 1.0f;
  SampleEpilogue e = sample_inputs(some_scale(random) * invalid, static_cast<int32_t>(random.range(-3, 258)), residual ? some_scale(random) : 1.0f,
                                   residual ? static_cast<int32_t>(random.range(0, 255)) : 0);
  set_output(e, {y_scale, static_cast<int32_t>(random.chance(2) ? 0 : random.range(0, 255))}, activation_min, activation_max);
  return e;
}

void some_bounds(Random& random, float& lo, float& hi) {
  const int64_t kind = random.range(0, 5);
  lo = kind == 0 ? -kInf : kind == 4 ? random.uniform(-2, 2) : 0.0f;
  hi = kind == 2 ? 6.0f : kind == 4 ? lo + random.uniform(0, 3) : kInf;
  if (kind == 5) lo = -kInf, hi = random.uniform(-20, 20);
}

// ---------------------------------------------------------------------------------------------------------------------

void fuzz_depthwise(Random& random, const Kernels& table, Case& c) {
  Conv2dShape s;
  const int64_t multiplier = random.chance(20) ? random.range(2, 3) : 1;
  s.in_channels = s.groups = some_channels(random) + 1;
  s.out_channels = s.in_channels * multiplier;
  s.batch = random.range(1, 3);
  const int64_t size = random.chance(6) ? random.range(30, 80) : random.range(1, 16);
  s.in_height = random.chance(3) ? random.range(1, 12) : size;
  s.in_width = size;
  static const int64_t kKernels[] = {3, 3, 3, 5, 5, 7, 1, 2, 4, 6, 9};
  s.kernel_height = kKernels[random.range(0, 10)];
  s.kernel_width = random.chance(4) ? kKernels[random.range(0, 10)] : s.kernel_height;
  s.stride_height = random.chance(3) ? random.range(1, 3) : 1;
  s.stride_width = random.chance(6) ? random.range(1, 3) : s.stride_height;
  s.dilation_height = random.chance(8) ? random.range(1, 3) : 1;
  s.dilation_width = random.chance(8) ? random.range(1, 12) : s.dilation_height;
  const bool same = random.chance(2);
  s.padding_top = same ? s.kernel_height / 2 : random.range(0, s.kernel_height + 1);
  s.padding_bottom = same ? s.kernel_height / 2 : random.range(0, s.kernel_height + 1);
  s.padding_left = same ? s.kernel_width / 2 : random.range(0, s.kernel_width + 1);
  s.padding_right = same ? s.kernel_width / 2 : random.range(0, s.kernel_width + 1);
  while (s.out_height() <= 0) ++s.in_height;
  while (s.out_width() <= 0) ++s.in_width;

  LayerProblem p(s);
  p.out_height = s.out_height();
  p.out_width = s.out_width();
  p.rows_per_sample = p.out_height * p.out_width;
  const int64_t rows = s.batch * p.rows_per_sample, outputs = rows * s.out_channels, taps = s.kernel_height * s.kernel_width;
  Guarded<uint8_t> x(s.batch * s.in_height * s.in_width * s.in_channels), packed(packed_weight_bytes(weight_shape(s))), residual(outputs);
  fill_codes(random, x);
  fill_codes(random, residual);
  std::vector<int8_t> weight(static_cast<size_t>(s.out_channels * taps));
  std::vector<float> scale(static_cast<size_t>(s.out_channels)), bias(scale.size());
  const int64_t largest = random.chance(3) ? 3 : 127;
  for (int8_t& w : weight) w = static_cast<int8_t>(random.chance(3) ? largest : random.range(-largest, largest));
  const bool huge = random.chance(20);
  for (float& v : scale) v = some_scale(random) * (huge ? 1e9f : 1.0f) * (random.chance(20) ? -1.0f : 1.0f);
  const bool no_bias = random.chance(3);
  for (float& v : bias) v = no_bias ? 0.0f : random.uniform(-1, 1);
  pack_weight(weight_shape(s), weight.data(), scale.data(), bias.data(), nullptr, packed.data());

  p.x = x.data();
  p.packed_weight = packed.data();
  p.activation = static_cast<Activation>(random.chance(2) ? 0 : random.range(0, 4));
  p.residual = p.activation == Activation::clamp && random.chance(4) ? residual.data() : nullptr;
  some_bounds(random, p.activation_min, p.activation_max);
  const float y_scale = random.chance(4) ? std::ldexp(1.0f, static_cast<int>(random.range(-2, 6))) : random.uniform(0.01f, 20.0f);
  std::vector<SampleEpilogue> samples;
  for (int64_t n = 0; n < s.batch; ++n) samples.push_back(some_epilogue(random, p.residual != nullptr, p.activation_min, p.activation_max, y_scale));
  p.samples = samples.data();
  p.channel_stats = random.chance(4);

  LayerRange range{0, rows, 0, s.out_channels};
  if (random.chance(2)) {
    range.row_begin = random.range(0, rows - 1);
    range.row_end = random.range(range.row_begin + 1, rows);
  }
  if (random.chance(3)) {
    const int64_t blocks = (s.out_channels + kBlockChannels - 1) / kBlockChannels, begin = random.range(0, blocks - 1);
    range.channel_begin = begin * kBlockChannels;
    range.channel_end = std::min(s.out_channels, random.range(begin + 1, blocks) * kBlockChannels);
  }

  c.text = "depthwise";
  c.add("batch", s.batch), c.add("in_height", s.in_height), c.add("in_width", s.in_width), c.add("channels", s.in_channels);
  c.add("multiplier", multiplier), c.add("kernel_height", s.kernel_height), c.add("kernel_width", s.kernel_width);
  c.add("stride_height", s.stride_height), c.add("stride_width", s.stride_width), c.add("dilation_height", s.dilation_height);
  c.add("dilation_width", s.dilation_width), c.add("padding_top", s.padding_top), c.add("padding_bottom", s.padding_bottom);
  c.add("padding_left", s.padding_left), c.add("padding_right", s.padding_right), c.add("activation", static_cast<int64_t>(p.activation));
  c.add("activation_min", p.activation_min), c.add("activation_max", p.activation_max), c.add("residual", p.residual != nullptr);
  c.add("y_scale", y_scale), c.add("zero_point", samples[0].y_zero_point), c.add("row_begin", range.row_begin), c.add("row_end", range.row_end);
  c.add("channel_begin", range.channel_begin), c.add("channel_end", range.channel_end), c.add("channel_stats", p.channel_stats);

  const int64_t columns = stats_columns(s.out_channels, p.channel_stats);
  Guarded<uint8_t> y(outputs), y_expected(outputs);
  Guarded<int64_t> stats(s.batch * columns, 0), stats_expected(s.batch * columns, 0);
  Guarded<float> floats(outputs), floats_expected(outputs), extremes(2 * s.batch), extremes_expected(2 * s.batch);
  p.held = nullptr;
  for (int64_t n = 0; n < s.batch; ++n)
    for (Guarded<float>* e : {&extremes, &extremes_expected}) (*e)[2 * n] = kInf, (*e)[2 * n + 1] = -kInf;
  const auto run = [&](const LayerKernels& kernels, Guarded<uint8_t>& codes, Guarded<int64_t>& moments, Guarded<float>& values, Guarded<float>& minmax) {
    p.y = codes.data(), p.stats = moments.data(), p.y_float = values.data(), p.range = minmax.data();
    kernels.quantized(p, range);
    kernels.to_float(p, range);
    kernels.range(p, range);
  };
  run(kReferenceKernels.depthwise, y_expected, stats_expected, floats_expected, extremes_expected);
  run(table.depthwise, y, stats, floats, extremes);
  for (Guarded<float>* values : {&floats, &floats_expected}) unify_nan(*values);
  for (Guarded<float>* values : {&extremes, &extremes_expected}) unify_range(*values);
  c.compare("y_float", floats_expected, floats);
  c.compare("y", y_expected, y);
  c.compare("stats", stats_expected, stats);
  c.compare("range", extremes_expected, extremes);
}

void fuzz_patch_sums(Random& random, const Kernels& table, Case& c) {
  Conv2dShape s;
  const int64_t kind = random.range(0, 3);  // dense, depthwise, grouped, dense with few channels
  const int64_t base = kind == 3 ? random.range(1, 4) : some_channels(random);
  s.groups = kind == 1 ? base : kind == 2 ? random.range(2, 5) : 1;
  s.in_channels = kind == 2 ? s.groups * random.range(1, 70) : base;
  s.out_channels = s.groups;
  s.batch = 1;
  s.in_height = random.range(1, 20);
  s.in_width = random.range(1, 20);
  s.kernel_height = random.range(1, 7);
  s.kernel_width = random.chance(3) ? random.range(1, 7) : s.kernel_height;
  s.stride_height = random.range(1, 3);
  s.stride_width = random.chance(4) ? random.range(1, 3) : s.stride_height;
  s.dilation_height = random.chance(6) ? random.range(1, 3) : 1;
  s.dilation_width = random.chance(6) ? random.range(1, 3) : 1;
  s.padding_top = random.range(0, s.kernel_height);
  s.padding_bottom = random.range(0, s.kernel_height);
  s.padding_left = random.range(0, s.kernel_width);
  s.padding_right = random.range(0, s.kernel_width);
  while (s.out_height() <= 0) ++s.in_height;
  while (s.out_width() <= 0) ++s.in_width;
  const auto zero_point = static_cast<int32_t>(random.range(0, 255));
  const int64_t gamma = random.range(1, 5);
  const bool per_group = random.chance(2);
  c.text = "patch_sums";
  c.add("in_height", s.in_height), c.add("in_width", s.in_width), c.add("in_channels", s.in_channels), c.add("groups", s.groups);
  c.add("kernel_height", s.kernel_height), c.add("kernel_width", s.kernel_width), c.add("stride_height", s.stride_height);
  c.add("stride_width", s.stride_width), c.add("dilation_height", s.dilation_height), c.add("dilation_width", s.dilation_width);
  c.add("padding_top", s.padding_top), c.add("padding_bottom", s.padding_bottom), c.add("padding_left", s.padding_left);
  c.add("padding_right", s.padding_right), c.add("zero_point", zero_point), c.add("gamma", gamma), c.add("per_group", per_group);

  Guarded<uint8_t> x(s.in_height * s.in_width * s.in_channels);
  fill_codes(random, x);
  constexpr int64_t kFields = sizeof(PatchSums) / sizeof(int64_t);
  const int64_t groups = per_group ? s.groups : 1;
  Guarded<int64_t> sums(groups * kFields, 0), expected(groups * kFields, 0);
  kReferenceKernels.patch_sums(s, x.data(), zero_point, gamma, per_group, reinterpret_cast<PatchSums*>(expected.data()));
  table.patch_sums(s, x.data(), zero_point, gamma, per_group, reinterpret_cast<PatchSums*>(sums.data()));
  c.compare("sums", expected, sums);
}

/// A finite, small, tied, huge or not finite value.
float some_float(Random& random, int64_t odd_values) {
  if (odd_values && random.chance(odd_values)) {
    static const float kOdd[] = {kNan, kInf, -kInf, 3e38f, -3e38f, 0.0f, -0.0f, 1e-40f, -1e-44f, 65504.0f, 65520.0f};
    return kOdd[random.range(0, 10)];
  }
  if (random.chance(3)) return static_cast<float>(random.range(-600, 600)) * 0.5f;
  return random.uniform(-140.0f, 140.0f);
}

void fuzz_quantize(Random& random, const Kernels& table, Case& c) {
  QuantizeProblem p{};
  p.dtype = static_cast<DType>(random.range(0, 2));
  p.size[0] = random.range(1, 9);
  p.size[1] = random.chance(8) ? random.range(100, 400) : random.range(1, 40);
  p.size[2] = random.chance(3) ? random.range(1, 4) : some_channels(random);
  const int64_t order = random.range(0, 3);  // dense rows, planes (NCHW), padded rows, any
  int64_t extent;
  if (order == 1) {
    p.stride[1] = 1, p.stride[0] = p.size[1] + (random.chance(3) ? random.range(0, 5) : 0), p.stride[2] = p.stride[0] * p.size[0];
  } else {
    p.stride[2] = order == 3 ? random.range(1, 3) : 1;
    p.stride[1] = p.size[2] * p.stride[2] + (order == 0 ? 0 : random.range(0, 3));
    p.stride[0] = p.size[1] * p.stride[1] + (order == 0 ? 0 : random.range(0, 3));
  }
  extent = (p.size[0] - 1) * p.stride[0] + (p.size[1] - 1) * p.stride[1] + (p.size[2] - 1) * p.stride[2] + 1;
  const int64_t begin = random.chance(3) ? random.range(0, p.size[0] - 1) : 0, end = random.range(begin + 1, p.size[0]);
  const int64_t odd_values = random.chance(3) ? 0 : random.range(20, 3000);
  const float inverse_scale = 1.0f / some_scale(random) * (random.chance(3) ? 0.01f : 1.0f);
  const auto zero_point = static_cast<int32_t>(random.range(0, 255));
  const bool channel_stats = random.chance(3);
  c.text = "quantize";
  c.add("dtype", static_cast<int64_t>(p.dtype)), c.add("size0", p.size[0]), c.add("size1", p.size[1]), c.add("size2", p.size[2]);
  c.add("stride0", p.stride[0]), c.add("stride1", p.stride[1]), c.add("stride2", p.stride[2]), c.add("begin", begin), c.add("end", end);
  c.add("inverse_scale", inverse_scale), c.add("zero_point", zero_point), c.add("channel_stats", channel_stats);

  const auto run = [&](auto& x) {
    for (int64_t i = 0; i < x.size(); ++i) store_float(x.data(), p.dtype, i, some_float(random, odd_values));
    p.x = x.data();
    Guarded<float> range(2), range_expected(2);
    kReferenceKernels.float_range(p, begin, end, &range_expected[0], &range_expected[1]);
    table.float_range(p, begin, end, &range[0], &range[1]);
    const int64_t count = p.size[0] * p.size[1] * p.size[2], columns = stats_columns(p.size[2], channel_stats);
    Guarded<uint8_t> q(count), q_expected(count);
    Guarded<int64_t> stats(columns, 0), stats_expected(columns, 0);
    kReferenceKernels.quantize(p, begin, end, inverse_scale, zero_point, q_expected.data(), stats_expected.data(), channel_stats);
    table.quantize(p, begin, end, inverse_scale, zero_point, q.data(), stats.data(), channel_stats);
    c.compare("q", q_expected, q);
    c.compare("stats", stats_expected, stats);
    unify_range(range);
    unify_range(range_expected);
    c.compare("range", range_expected, range);
  };
  if (p.dtype == DType::float32) {
    Guarded<float> x(extent);
    run(x);
  } else {
    Guarded<uint16_t> x(extent);
    run(x);
  }
}

void fuzz_dequantize(Random& random, const Kernels& table, Case& c) {
  const int64_t count = random.chance(3) ? random.range(1, 3000) : random.range(1, 200);
  const auto dtype = static_cast<DType>(random.range(0, 2));
  const auto zero_point = static_cast<int32_t>(random.range(0, 255));
  static const float kScales[] = {kNan, 1e-43f, 1e-38f, 3e38f, 300.0f, 6e-8f, 1e-7f};
  const float scale = random.chance(3) ? kScales[random.range(0, 6)] : some_scale(random);
  c.text = "dequantize";
  c.add("count", count), c.add("dtype", static_cast<int64_t>(dtype)), c.add("zero_point", zero_point), c.add("scale", scale);
  Guarded<uint8_t> q(count);
  fill_codes(random, q);
  const auto run = [&](auto& y, auto& expected) {
    kReferenceKernels.dequantize(q.data(), count, scale, zero_point, dtype, expected.data());
    table.dequantize(q.data(), count, scale, zero_point, dtype, y.data());
    c.compare("y", expected, y);
  };
  if (dtype == DType::float32) {
    Guarded<float> y(count), expected(count);
    run(y, expected);
  } else {
    Guarded<uint16_t> y(count), expected(count);
    run(y, expected);
  }
}

void fuzz_moments(Random& random, const Kernels& table, Case& c) {
  const int64_t channels = some_channels(random), rows = random.chance(10) ? random.range(1, 3000) : random.range(1, 30);
  const bool channel_stats = random.chance(2);
  c.text = "moments";
  c.add("rows", rows), c.add("channels", channels), c.add("channel_stats", channel_stats);
  Guarded<uint8_t> q(rows * channels);
  fill_codes(random, q);
  const int64_t columns = stats_columns(channels, channel_stats);
  Guarded<int64_t> stats(columns, 0), expected(columns, 0);
  kReferenceKernels.moments(q.data(), q.size(), channels, channel_stats, expected.data());
  table.moments(q.data(), q.size(), channels, channel_stats, stats.data());
  c.compare("stats", expected, stats);

  Guarded<bool> seen(256, 0), seen_expected(256, 0);
  kReferenceKernels.mark_codes(q.data(), q.size(), seen_expected.data());
  table.mark_codes(q.data(), q.size(), seen.data());
  c.compare("seen", seen_expected, seen);
}

void fuzz_lookup(Random& random, const Kernels& table, Case& c) {
  const int64_t channels = some_channels(random), rows = random.range(1, 40);
  const int64_t q_stride = channels + (random.chance(2) ? 0 : random.range(1, 40)), y_stride = channels + (random.chance(2) ? 0 : random.range(1, 40));
  const bool channel_stats = random.chance(2);
  c.text = "lookup";
  c.add("rows", rows), c.add("channels", channels), c.add("q_stride", q_stride), c.add("y_stride", y_stride), c.add("channel_stats", channel_stats);
  Guarded<uint8_t> q((rows - 1) * q_stride + channels), y((rows - 1) * y_stride + channels), y_expected(y.size());
  fill_codes(random, q);
  Code codes[256];
  for (Code& code : codes) code = {static_cast<uint8_t>(random.range(0, 255)), random.chance(4)};
  Guarded<int64_t> stats(3, 0), expected(3, 0), sums(2 * channels, 0), sums_expected(2 * channels, 0);
  kReferenceKernels.lookup(q.data(), rows, channels, q_stride, codes, y_expected.data(), y_stride, expected.data(),
                           channel_stats ? sums_expected.data() : nullptr, channel_stats ? sums_expected.data() + channels : nullptr);
  table.lookup(q.data(), rows, channels, q_stride, codes, y.data(), y_stride, stats.data(), channel_stats ? sums.data() : nullptr,
               channel_stats ? sums.data() + channels : nullptr);
  c.compare("y", y_expected, y);
  c.compare("stats", expected, stats);
  c.compare("channel sums", sums_expected, sums);
}

void fuzz_add(Random& random, const Kernels& table, Case& c) {
  const int64_t channels = some_channels(random), rows = random.range(1, 40), count = rows * channels;
  float activation_min, activation_max;
  some_bounds(random, activation_min, activation_max);
  const float y_scale = some_scale(random) * (random.chance(10) ? 1e-12f : 2.0f);
  const SampleEpilogue e = some_epilogue(random, true, activation_min, activation_max, y_scale);
  const bool channel_stats = random.chance(3);
  c.text = "add";
  c.add("rows", rows), c.add("channels", channels), c.add("activation_min", activation_min), c.add("activation_max", activation_max);
  c.add("a_scale", e.x_scale), c.add("b_scale", e.residual_scale), c.add("y_scale", y_scale), c.add("a_zero_point", e.x_zero_point);
  c.add("b_zero_point", e.residual_zero_point), c.add("y_zero_point", e.y_zero_point), c.add("channel_stats", channel_stats);
  Guarded<uint8_t> a(count), b(count), y(count), y_expected(count);
  fill_codes(random, a);
  fill_codes(random, b);
  const int64_t columns = stats_columns(channels, channel_stats);
  Guarded<int64_t> stats(columns, 0), expected(columns, 0);
  kReferenceKernels.add(a.data(), b.data(), count, channels, e, y_expected.data(), expected.data(), channel_stats);
  table.add(a.data(), b.data(), count, channels, e, y.data(), stats.data(), channel_stats);
  c.compare("y", y_expected, y);
  c.compare("stats", expected, stats);
  Guarded<float> range(2), range_expected(2);
  kReferenceKernels.add_range(a.data(), b.data(), count, e, activation_min, activation_max, &range_expected[0], &range_expected[1]);
  table.add_range(a.data(), b.data(), count, e, activation_min, activation_max, &range[0], &range[1]);
  unify_range(range);
  unify_range(range_expected);
  c.compare("range", range_expected, range);
}

void fuzz_mul(Random& random, const Kernels& table, Case& c) {
  const int64_t channels = some_channels(random), rows = random.range(1, 40), count = rows * channels;
  const bool per_channel = random.chance(2);
  const float y_scale = some_scale(random) * (random.chance(10) ? 1e-12f : 2.0f);
  const SampleEpilogue e = some_epilogue(random, true, -kInfinity, kInfinity, y_scale);
  const bool channel_stats = random.chance(3);
  c.text = "mul";
  c.add("rows", rows), c.add("channels", channels), c.add("per_channel", per_channel), c.add("scale", e.x_scale), c.add("y_scale", y_scale);
  c.add("a_zero_point", e.x_zero_point), c.add("b_zero_point", e.residual_zero_point), c.add("y_zero_point", e.y_zero_point);
  c.add("channel_stats", channel_stats);
  Guarded<uint8_t> a(count), b(per_channel ? channels : count), y(count), y_expected(count);
  fill_codes(random, a);
  fill_codes(random, b);
  const int64_t columns = stats_columns(channels, channel_stats), b_step = per_channel ? 0 : channels;
  Guarded<int64_t> stats(columns, 0), expected(columns, 0);
  kReferenceKernels.mul(a.data(), b.data(), rows, channels, b_step, e, y_expected.data(), expected.data(), channel_stats);
  table.mul(a.data(), b.data(), rows, channels, b_step, e, y.data(), stats.data(), channel_stats);
  c.compare("y", y_expected, y);
  c.compare("stats", expected, stats);
  Guarded<float> range(2), range_expected(2);
  kReferenceKernels.mul_range(a.data(), b.data(), rows, channels, b_step, e, &range_expected[0], &range_expected[1]);
  table.mul_range(a.data(), b.data(), rows, channels, b_step, e, &range[0], &range[1]);
  unify_range(range);
  unify_range(range_expected);
  c.compare("range", range_expected, range);
}

void fuzz_pool(Random& random, const Kernels& table, Case& c) {
  const int64_t channels = some_channels(random), rows = random.range(0, 8), columns = random.range(0, 8);
  const int64_t column_step = channels * random.range(1, 3), row_step = column_step * (columns + random.range(0, 3));
  Guarded<uint8_t> x(rows * columns == 0 ? 1 : (rows - 1) * row_step + (columns - 1) * column_step + channels), y(channels), y_expected(channels);
  fill_codes(random, x);
  Guarded<int32_t> sums(channels), sums_expected(channels);
  const float share = 1.0f / static_cast<float>(std::max<int64_t>(1, rows * columns) + random.range(0, 3));
  SampleEpilogue e = some_epilogue(random, false, -kInf, kInf, some_scale(random));
  const auto offset = static_cast<int32_t>(rows * columns) * e.x_zero_point;
  c.text = "pool";
  c.add("channels", channels), c.add("rows", rows), c.add("columns", columns), c.add("row_step", row_step), c.add("column_step", column_step);
  c.add("share", share), c.add("x_scale", e.x_scale), c.add("y_zero_point", e.y_zero_point);
  kReferenceKernels.window_max(x.data(), rows, columns, row_step, column_step, channels, y_expected.data());
  table.window_max(x.data(), rows, columns, row_step, column_step, channels, y.data());
  c.compare("maximum", y_expected, y);
  kReferenceKernels.window_sums(x.data(), rows, columns, row_step, column_step, channels, sums_expected.data());
  table.window_sums(x.data(), rows, columns, row_step, column_step, channels, sums.data());
  c.compare("sums", sums_expected, sums);
  Guarded<float> range(2), range_expected(2);
  kReferenceKernels.average_range(sums.data(), channels, offset, share, e, &range_expected[0], &range_expected[1]);
  table.average_range(sums.data(), channels, offset, share, e, &range[0], &range[1]);
  unify_range(range);
  unify_range(range_expected);
  c.compare("range", range_expected, range);
  Guarded<int64_t> clipped(1), clipped_expected(1);
  clipped_expected[0] = kReferenceKernels.average(sums.data(), channels, offset, share, e, y_expected.data());
  clipped[0] = table.average(sums.data(), channels, offset, share, e, y.data());
  c.compare("average", y_expected, y);
  c.compare("clipped", clipped_expected, clipped);
}

void fill_floats(Random& random, Guarded<float>& values) {
  const float spread = std::ldexp(1.0f, static_cast<int>(random.range(-6, 6))), shift = random.uniform(-3.0f, 3.0f);
  for (int64_t i = 0; i < values.size(); ++i) values[i] = shift + spread * random.uniform(-1.0f, 1.0f);
}

void fuzz_layer_norm(Random& random, const Kernels& table, Case& c) {
  const int64_t channels = some_channels(random), rows = random.range(1, 3), row = random.range(0, rows - 1);
  const bool codes = random.chance(2), residual = random.chance(2), affine = random.chance(2);
  const bool in_place = residual && random.chance(2);
  c.text = "layer_norm";
  c.add("channels", channels), c.add("row", row), c.add("codes", codes), c.add("residual", residual), c.add("affine", affine), c.add("in_place", in_place);
  Guarded<uint8_t> q(rows * channels);
  Guarded<float> x(rows * channels), added(rows * channels), weight(channels), bias(channels);
  fill_codes(random, q);
  for (Guarded<float>* values : {&x, &added, &weight, &bias}) fill_floats(random, *values);
  LayerNormProblem p{channels, codes ? q.data() : nullptr, x.data(), residual ? added.data() : nullptr, affine ? weight.data() : nullptr,
                           affine ? bias.data() : nullptr, 1e-5f};
  const QParams qparams{some_scale(random), static_cast<int32_t>(random.range(0, 255))};
  Guarded<float> sum(rows * channels), sum_expected(rows * channels), y(channels), y_expected(channels);
  for (Guarded<float>* sums : {&sum, &sum_expected}) std::copy_n(added.data(), rows * channels, sums->data());
  kReferenceKernels.layer_norm(p, row, qparams, sum_expected.data() + row * channels, y_expected.data());
  if (in_place) p.residual = sum.data();
  table.layer_norm(p, row, qparams, sum.data() + row * channels, y.data());
  c.compare("sum", sum_expected, sum);
  c.compare("y", y_expected, y);
}

void fuzz_attention(Random& random, const Kernels& table, Case& c) {
  const int64_t head_dim = random.chance(4) ? 64 * random.range(1, 2) : random.chance(2) ? some_channels(random) : random.chance(20) ? random.range(250, 600) : random.range(1, 40);
  const AttentionShape shape{random.range(1, 2), random.range(1, 40), random.chance(2) ? some_channels(random) : random.range(1, 40), random.range(1, 3), head_dim};
  const int64_t image = random.range(0, shape.batch - 1), begin = random.range(0, shape.queries - 1);
  const int64_t end = random.range(begin + 1, std::min(shape.queries, begin + kAttentionQueries));
  c.text = "attention";
  c.add("batch", shape.batch), c.add("queries", shape.queries), c.add("keys", shape.keys), c.add("heads", shape.heads), c.add("head_dim", head_dim);
  c.add("image", image), c.add("begin", begin), c.add("end", end);
  const int64_t queries = shape.batch * shape.queries, keys = shape.batch * shape.keys;
  Guarded<uint8_t> q(queries * shape.channels()), k(keys * shape.channels()), v(keys * shape.channels());
  Guarded<float> q_scale(queries), k_scale(keys), v_scale(keys);
  Guarded<int32_t> q_zero(queries), k_zero(keys), v_zero(keys);
  for (Guarded<uint8_t>* codes : {&q, &k, &v}) fill_codes(random, *codes);
  for (Guarded<float>* scales : {&q_scale, &k_scale, &v_scale})
    for (int64_t i = 0; i < scales->size(); ++i) (*scales)[i] = some_scale(random);
  for (Guarded<int32_t>* zeros : {&q_zero, &k_zero, &v_zero})
    for (int64_t i = 0; i < zeros->size(); ++i) (*zeros)[i] = static_cast<int32_t>(random.range(-3, 258));
  const auto input = [](Guarded<uint8_t>& codes, Guarded<float>& scale, Guarded<int32_t>& zero_point) {
    QuantizedInput x;
    x.q = codes.data(), x.scale = scale.data(), x.zero_point = zero_point.data();
    return x;
  };
  AttentionProblem p{shape, input(q, q_scale, q_zero), input(k, k_scale, k_zero), input(v, v_scale, v_zero), random.uniform(1e-5f, 0.01f), nullptr};
  const int64_t packed_size = shape.batch * shape.heads * (p.keys().size() + p.values().size());
  Guarded<int16_t> packed(packed_size), packed_expected(packed_size);
  Guarded<char> scratch(AttentionScratch::bytes(shape)), scratch_expected(scratch.size());
  Guarded<float> y((end - begin) * shape.channels()), y_expected(y.size());
  const auto run = [&](const Kernels& kernels, Guarded<int16_t>& keys_and_values, Guarded<char>& memory, Guarded<float>& out) {
    p.packed = keys_and_values.data();
    for (int64_t i = 0; i < shape.batch; ++i)
      for (int64_t head = 0; head < shape.heads; ++head) kernels.attention_pack(p, i, head);
    kernels.attention(p, image, begin, end, AttentionScratch(shape, memory.data()), out.data());
  };
  run(kReferenceKernels, packed_expected, scratch_expected, y_expected);
  run(table, packed, scratch, y);
  if (std::strncmp(table.name, "amx", 3) != 0) c.compare("packed", packed_expected, packed);  // AMX packs tiles of its own
  c.compare("y", y_expected, y);
}

using Fuzz = void (*)(Random&, const Kernels&, Case&);
constexpr Fuzz kFuzzers[] = {fuzz_depthwise, fuzz_depthwise, fuzz_patch_sums, fuzz_quantize, fuzz_dequantize, fuzz_moments, fuzz_lookup, fuzz_add, fuzz_mul, fuzz_pool, fuzz_layer_norm, fuzz_attention};
constexpr int64_t kFuzzerCount = sizeof kFuzzers / sizeof kFuzzers[0];

int run(uint64_t seed, int64_t cases, double seconds, const std::string& only) {
  const std::vector<Kernels> all = tables();
  const auto start = std::chrono::steady_clock::now();
  int64_t passed = 0;
  for (int64_t i = 0; cases < 0 || i < cases; ++i) {
    if (cases < 0 && std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds) break;
    for (const Kernels& kernels : all) {
      if (!only.empty() && only != kernels.name) continue;
      Random random(seed * 0x2545f4914f6cdd1du + static_cast<uint64_t>(i));
      Case c;
      kFuzzers[i % kFuzzerCount](random, kernels, c);
      if (c.failed) {
        std::printf("seed %llu, case %lld, %s: %s\n", static_cast<unsigned long long>(seed), static_cast<long long>(i), kernels.name, c.text.c_str());
        return 1;
      }
      ++passed;
    }
  }
  std::printf("%lld cases passed\n", static_cast<long long>(passed));
  return 0;
}

}  // namespace
}  // namespace probquant

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  const std::string amount = argc > 2 ? argv[2] : "2000";
  const bool timed = !amount.empty() && amount.back() == 's';
  return probquant::run(seed, timed ? -1 : std::strtoll(amount.c_str(), nullptr, 10), timed ? std::strtod(amount.c_str(), nullptr) : 0,
                        argc > 3 ? argv[3] : "");
}
