// Random layers on every instruction set of this processor, compared with the reference byte by byte.
//
//   fuzz_layers [seed] [cases] [seconds] [isa]     stops after so many cases or seconds, whichever comes first (0: no limit)
//
// Works below the front ends, on the kernel tables themselves: it links the sources, not the library. Every buffer that a
// kernel reads or writes ends at an unmapped page, and every output is preceded by bytes that must stay as they are.
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "tables.h"

namespace {

using namespace probquant;

constexpr int64_t kGuard = 64;

/// Memory whose last byte is followed by an unmapped page, and whose first is preceded by kGuard bytes of a pattern.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : bytes_(bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE), whole = (bytes + kGuard + page - 1) / page * page;
    mapped_ = whole + page;
    base_ = static_cast<uint8_t*>(mmap(nullptr, static_cast<size_t>(mapped_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + whole, static_cast<size_t>(page), PROT_NONE) != 0) {
      std::perror("mmap");
      std::exit(2);
    }
    data_ = base_ + whole - bytes;
    std::memset(data_ - kGuard, 0xa5, kGuard);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { munmap(base_, static_cast<size_t>(mapped_)); }

  template <class T = uint8_t>
  T* data() const { return reinterpret_cast<T*>(data_); }
  int64_t bytes() const { return bytes_; }
  bool guard_intact() const {
    for (int64_t i = -kGuard; i < 0; ++i)
      if (data_[i] != 0xa5) return false;
    return true;
  }

 private:
  uint8_t* base_;
  uint8_t* data_;
  int64_t bytes_, mapped_;
};

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t between(int64_t lo, int64_t hi) { return lo + static_cast<int64_t>(engine_() % static_cast<uint64_t>(hi - lo + 1)); }
  bool one_in(int64_t n) { return between(1, n) == 1; }
  float uniform(float lo, float hi) { return lo + (hi - lo) * static_cast<float>(engine_() >> 40) * (1.0f / 16777216.0f); }
  template <class T>
  T pick(std::initializer_list<T> from) { return from.begin()[between(0, static_cast<int64_t>(from.size()) - 1)]; }

 private:
  std::mt19937_64 engine_;
};

int64_t edge_size(Random& r, int64_t most) {
  if (r.one_in(2)) return r.between(1, std::min<int64_t>(most, 17));
  return std::min(most, r.pick<int64_t>({16, 24, 31, 32, 33, 40, 47, 48, 63, 64, 65, 96, 100, 127, 128, 129}));
}

Conv2dShape random_shape(Random& r) {
  Conv2dShape s;
  if (r.one_in(4)) {  // linear layers: tokens, or rows of one sample
    s = linear_shape(r.between(1, 30), r.one_in(2) ? 1 : r.between(1, 60), r.one_in(6) ? r.between(200, 700) : edge_size(r, 300), edge_size(r, 130));
    return s;
  }
  for (;;) {
    s = Conv2dShape{};
    s.batch = r.one_in(10) ? 0 : r.between(1, 4);
    s.in_height = r.one_in(6) ? 1 : r.between(1, 15);
    s.in_width = r.one_in(6) ? 1 : r.between(1, 15);
    if (r.one_in(8)) s.in_width = r.between(16, 40);
    s.kernel_height = r.one_in(3) ? 1 : r.between(1, 4);
    s.kernel_width = r.one_in(3) ? 1 : r.one_in(5) ? r.between(5, 12) : r.between(1, 4);
    if (r.one_in(40)) s.kernel_height = s.kernel_width = r.between(7, 17);
    s.stride_height = r.between(1, 3);
    s.stride_width = r.between(1, 3);
    s.dilation_height = r.one_in(3) ? r.between(2, 3) : 1;
    s.dilation_width = r.one_in(3) ? r.between(2, 3) : 1;
    const int64_t most = r.one_in(4) ? 6 : 2;  // padding larger than the kernel, too
    s.padding_top = r.one_in(3) ? 0 : r.between(0, most);
    s.padding_bottom = r.one_in(3) ? s.padding_top : r.between(0, most);
    s.padding_left = r.one_in(3) ? 0 : r.between(0, most);
    s.padding_right = r.one_in(3) ? s.padding_left : r.between(0, most);
    const int64_t kind = r.between(0, 9);
    if (kind < 2) {  // what Winograd's algorithm takes, when rows are enough
      s.kernel_height = s.kernel_width = 3;
      s.stride_height = s.stride_width = s.dilation_height = s.dilation_width = 1;
      s.in_channels = 16 * (r.one_in(10) ? r.between(16, 20) : r.between(1, 5));
      s.out_channels = edge_size(r, 70);
    } else if (kind < 6) {
      s.in_channels = r.one_in(30) ? r.between(250, 600) : r.one_in(3) ? r.between(1, 8) : edge_size(r, 70);
      s.out_channels = edge_size(r, 130);
    } else if (kind < 9) {  // grouped
      s.groups = r.one_in(2) ? r.between(2, 5) : r.between(6, 40);
      const bool narrow = r.one_in(2);  // what ResNeXt and RegNet have, and their relatives
      const int64_t inputs = narrow ? r.pick<int64_t>({4, 8, 16, 24, 32}) : r.between(2, 20);
      s.in_channels = s.groups * inputs;
      s.out_channels = s.groups * (!narrow ? r.between(1, 40) : r.one_in(4) ? r.pick<int64_t>({4, 8, 16, 32}) : inputs);
      if (narrow && r.one_in(2)) s.groups *= 4, s.in_channels *= 4, s.out_channels *= 4;
    } else {  // depthwise
      s.groups = edge_size(r, 130);
      s.in_channels = s.groups;
      s.out_channels = s.groups * r.between(1, 3);
    }
    const int64_t work = s.batch * s.out_height() * s.out_width() * s.out_channels * s.kernel_height * s.kernel_width * (s.in_channels / s.groups);
    if (s.out_height() > 0 && s.out_width() > 0 && work < 3000000) return s;
  }
}

float random_scale(Random& r) {
  if (r.one_in(100)) return r.pick({0.0f, -1.0f, kInfinity, kNan});
  if (r.one_in(20)) return r.pick({1.0f, 0.5f, kMinScale, 1e30f, 1e-30f});
  return r.uniform(0.001f, 0.1f);
}
int32_t random_zero_point(Random& r) { return static_cast<int32_t>(r.one_in(4) ? r.pick<int64_t>({0, 255}) : r.between(0, 255)); }

void fill_codes(Random& r, uint8_t* q, int64_t count) {
  const int64_t kind = r.between(0, 9);
  const auto same = static_cast<uint8_t>(kind == 0 ? 255 : r.between(0, 255));
  for (int64_t i = 0; i < count; ++i) q[i] = kind < 2 ? same : static_cast<uint8_t>(r.between(0, 255));
}

/// One output of a run, with everything a kernel may change.
struct Result {
  Buffer y, y_float, stats, range;
  Result(int64_t values, int64_t samples, int64_t columns)
      : y(values), y_float(values * 4), stats(samples * columns * 8), range(samples * 8) {
    std::memset(y.data(), 0x5a, static_cast<size_t>(y.bytes()));
    std::memset(y_float.data(), 0x5a, static_cast<size_t>(y_float.bytes()));
    std::memset(stats.data(), 0, static_cast<size_t>(stats.bytes()));
    for (int64_t n = 0; n < samples; ++n) range.data<float>()[2 * n] = kInfinity, range.data<float>()[2 * n + 1] = -kInfinity;
  }
  void attach(LayerProblem& p) const {
    p.y = y.data();
    p.y_float = y_float.data<float>();
    p.stats = stats.data<int64_t>();
    p.range = range.data<float>();
  }
};

template <class T>
bool same(T a, T b) { return a == b || (a != a && b != b); }  // any NaN equals any other; -0 equals 0

template <class T>
bool compare(const char* what, const Buffer& a, const Buffer& b) {
  const int64_t count = a.bytes() / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < count; ++i)
    if (!same(a.data<T>()[i], b.data<T>()[i])) {
      std::printf("%s[%ld]: reference %.9g, got %.9g\n", what, static_cast<long>(i), static_cast<double>(a.data<T>()[i]), static_cast<double>(b.data<T>()[i]));
      return false;
    }
  if (!a.guard_intact() || !b.guard_intact()) {
    std::printf("%s: written before its begin\n", what);
    return false;
  }
  return true;
}

bool compare(const Result& a, const Result& b) {
  return compare<uint8_t>("y", a.y, b.y) && compare<float>("y_float", a.y_float, b.y_float) && compare<int64_t>("stats", a.stats, b.stats) && compare<float>("range", a.range, b.range);
}

/// Random parts that cover the layer.
std::vector<LayerRange> random_parts(Random& r, const LayerProblem& p, bool split) {
  const int64_t rows = p.shape.batch * p.rows_per_sample, channels = p.shape.out_channels;
  std::vector<int64_t> row_cuts{0}, channel_cuts{0};
  while (row_cuts.back() < rows) row_cuts.push_back(split && r.one_in(2) ? r.between(row_cuts.back() + 1, rows) : rows);
  while (channel_cuts.back() < channels) {
    int64_t next = channels;
    if (split && r.one_in(2)) {  // the end of a random block behind the last cut
      const int64_t c = r.between(channel_cuts.back(), channels - 1), in_group = c % p.layout.group_channels;
      next = c - in_group + std::min(p.layout.group_channels, (in_group / kBlockChannels + 1) * kBlockChannels);
    }
    channel_cuts.push_back(next);
  }
  std::vector<LayerRange> parts;
  for (size_t i = 0; i + 1 < row_cuts.size(); ++i)
    for (size_t j = 0; j + 1 < channel_cuts.size(); ++j) parts.push_back({row_cuts[i], row_cuts[i + 1], channel_cuts[j], channel_cuts[j + 1]});
  return parts;
}

bool run_case(uint64_t seed, const std::vector<Kernels>& all) {
  Random r(seed);
  const Conv2dShape s = random_shape(r);
  LayerProblem p(s);
  p.out_height = s.out_height();
  p.out_width = s.out_width();
  p.rows_per_sample = p.out_height * p.out_width;
  p.activation = r.one_in(3) ? r.pick({Activation::silu, Activation::gelu, Activation::hardswish, Activation::sigmoid}) : Activation::clamp;
  p.activation_min = p.activation == Activation::clamp ? r.pick({-kInfinity, 0.0f, -1.0f}) : -kInfinity;
  p.activation_max = p.activation == Activation::clamp ? r.pick({kInfinity, kInfinity, 6.0f, 1.0f}) : kInfinity;
  p.channel_stats = r.one_in(4);
  const bool has_residual = p.activation == Activation::clamp && r.one_in(3);
  const int64_t values = s.batch * p.rows_per_sample * s.out_channels;

  const int64_t weights = s.out_channels * s.kernel_height * s.kernel_width * (s.in_channels / s.groups);
  std::vector<int8_t> weight(static_cast<size_t>(weights));
  const bool extreme = r.one_in(6);
  const int64_t largest = r.one_in(3) ? 64 : 127;  // up to 64, no two products of bytes overflow 16 bits
  for (int8_t& w : weight) w = static_cast<int8_t>(extreme ? r.pick<int64_t>({-largest, largest}) : r.between(-largest, largest));
  std::vector<float> scale(static_cast<size_t>(s.out_channels)), bias(static_cast<size_t>(s.out_channels));
  const bool wild = r.one_in(20);
  for (float& v : scale) v = r.one_in(50) ? 0.0f : wild && r.one_in(8) ? r.pick({-0.01f, 1e30f, kInfinity, -kInfinity, kNan}) : r.uniform(0.0005f, 0.02f);
  for (float& v : bias) v = wild && r.one_in(8) ? r.pick({1e38f, kInfinity, -kInfinity, kNan}) : r.uniform(-1.0f, 1.0f);
  const bool profiled = r.one_in(2);
  std::vector<float> profile(scale.size(), 1.0f);
  if (profiled)
    for (float& v : profile) v = std::ldexp(r.uniform(1.0f, 2.0f), static_cast<int>(r.between(-5, 2)));
  Buffer packed(packed_weight_bytes(weight_shape(s)));
  pack_weight(weight_shape(s), weight.data(), scale.data(), bias.data(), profiled ? profile.data() : nullptr, packed.data());
  p.packed_weight = packed.data();
  p.profile = reinterpret_cast<const PackedTrailer*>(packed.data() + p.layout.trailer_offset())->profile;

  Buffer x(s.batch * s.in_height * s.in_width * s.in_channels), residual(has_residual ? values : 0);
  fill_codes(r, x.data(), x.bytes());
  fill_codes(r, residual.data(), residual.bytes());
  p.x = x.data();
  p.residual = has_residual ? residual.data() : nullptr;

  std::vector<SampleEpilogue> inputs(static_cast<size_t>(s.batch)), units(inputs.size()), samples(inputs.size());
  const double spread = static_cast<double>(weights) / static_cast<double>(s.out_channels);
  for (size_t n = 0; n < samples.size(); ++n) {
    const float x_scale = random_scale(r), y_scale = r.one_in(4) ? random_scale(r) : x_scale * static_cast<float>(std::sqrt(spread)) * r.uniform(0.2f, 4.0f);
    inputs[n] = units[n] = samples[n] = sample_inputs(x_scale, random_zero_point(r), has_residual ? random_scale(r) : 1.0f, has_residual ? random_zero_point(r) : 0);
    set_output(units[n], {1.0f, 0}, p.activation_min, p.activation_max);
    set_output(samples[n], {y_scale, random_zero_point(r)}, p.activation_min, p.activation_max);
  }

  if (r.one_in(2)) p.upcoming = {packed.data(), packed.bytes()};
  const int64_t columns = stats_columns(s.out_channels, p.channel_stats);
  const Buffer held(p.layout.depthwise ? 0 : s.batch * p.rows_per_sample * p.layout.columns() * 4);
  const auto run = [&](const Kernels& k, const Result& fused, const Result& dynamic, bool split, bool holds, bool over_residual) {
    const auto run_split = [&](LayerKernel kernel) {
      for (const LayerRange& part : random_parts(r, p, split)) kernel(p, part);
    };
    p.held = nullptr;
    const uint8_t* const its_own = p.residual;
    const auto in_place = [&](const Result& to) {  // the output takes the residual's place
      if (!over_residual) return;
      std::memcpy(to.y.data(), residual.data(), residual.bytes());
      p.residual = to.y.data();
    };
    const LayerKernels& layer = k.layer(p.layout);
    p.samples = samples.data();
    fused.attach(p);
    in_place(fused);
    run_split(layer.quantized);
    p.residual = its_own;
    p.samples = inputs.data();
    run_split(layer.to_float);
    dynamic.attach(p);
    p.samples = units.data();
    const std::vector<LayerRange> parts = random_parts(r, p, split);
    if (holds) p.held = held.data<int32_t>();
    for (size_t i = 0; i < parts.size(); ++i) layer.range(p, parts[i]);
    in_place(dynamic);
    p.samples = samples.data();
    for (size_t i = parts.size(); i-- > 0;) layer.quantized(p, parts[i]);
    p.residual = its_own;
  };
  const Result expected(values, s.batch, columns), expected_dynamic(values, s.batch, columns);
  run(kReferenceKernels, expected, expected_dynamic, false, !p.layout.depthwise && r.one_in(2), false);
  for (const Kernels& table : all) {
    const Result got(values, s.batch, columns), got_dynamic(values, s.batch, columns);
    const bool holds = !p.layout.depthwise && r.one_in(2);
    const bool over_residual = has_residual && r.one_in(2);
    run(table, got, got_dynamic, r.one_in(2), holds, over_residual);
    if (compare(expected, got) && compare(expected_dynamic, got_dynamic) && held.guard_intact()) continue;
    std::printf("%s%s differs from the reference: batch %ld, in %ld x %ld x %ld, out %ld x %ld x %ld, kernel %ld x %ld, stride %ld %ld, padding %ld %ld %ld %ld, "
                "dilation %ld %ld, groups %ld, activation %d [%g, %g], residual %d%s, profile %d, channel_stats %d\n",
                table.name, holds ? ", holding sums," : "", s.batch, s.in_height, s.in_width, s.in_channels, p.out_height, p.out_width, s.out_channels, s.kernel_height, s.kernel_width,
                s.stride_height, s.stride_width, s.padding_top, s.padding_bottom, s.padding_left, s.padding_right, s.dilation_height, s.dilation_width, s.groups,
                static_cast<int>(p.activation), static_cast<double>(p.activation_min), static_cast<double>(p.activation_max), has_residual, over_residual ? " in place" : "", profiled, p.channel_stats);
    return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  const int64_t cases = argc > 2 ? std::atoll(argv[2]) : 1000;
  const double seconds = argc > 3 ? std::atof(argv[3]) : 0;
  const std::string only = argc > 4 ? argv[4] : "";
  std::vector<Kernels> all;
  for (const Kernels& table : tables())
    if (only.empty() || only == table.name) all.push_back(table);
  const auto start = std::chrono::steady_clock::now();
  int64_t done = 0;
  for (; cases == 0 || done < cases; ++done) {
    if (seconds > 0 && std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds) break;
    if (!run_case(seed + static_cast<uint64_t>(done), all)) {
      std::printf("reproduce with: fuzz_layers %llu 1\n", static_cast<unsigned long long>(seed + static_cast<uint64_t>(done)));
      return 1;
    }
  }
  std::printf("%lld cases passed on", static_cast<long long>(done));
  for (const Kernels& table : all) std::printf(" %s", table.name);
  std::printf("\n");
  return 0;
}
