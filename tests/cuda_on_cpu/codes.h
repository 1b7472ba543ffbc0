// Quantized tensors of the kernel tests: random ones to read, garbage to be overwritten, and their comparison.
#pragma once
#include <probquant/ops.h>

#include <cmath>

#include "buffers.h"
#include "core/numerics.h"

namespace cuda_on_cpu {

/// A quantized tensor with random parameters, some of them at their ends; `wild`: some invalid ones among them.
struct Activations {
  Buffer q, scale, zero_point, stats;

  Activations(int64_t sample_count, int64_t count, int64_t channels, bool wild, int64_t misalignment)
      : q(sample_count * count + misalignment, 1),
        scale(4 * sample_count, 2),
        zero_point(4 * sample_count, 3),
        stats(8 * probquant::stats_columns(channels, true) * sample_count, 4),
        samples(sample_count),
        count(count),
        channels(channels),
        columns(probquant::stats_columns(channels, true)),
        offset(misalignment) {
    const uint32_t kind = random_bits() % 4;
    for (int64_t i = 0; i < sample_count * count; ++i) data()[i] = static_cast<uint8_t>(kind == 0 ? random_bits() % 2 * 255 : random_bits() >> 8);
    const int32_t zero_points[] = {0, 255, 128, 7};
    const float bad[] = {probquant::kNan, probquant::kInfinity, 0.0f, -1.0f};
    for (int64_t n = 0; n < sample_count; ++n) {
      scale.as<float>()[n] = std::ldexp(1.0f + static_cast<float>(random_bits() % 1000) / 1000, -static_cast<int>(random_bits() % 8));
      zero_point.as<int32_t>()[n] = zero_points[random_bits() % 4];
      if (wild && random_bits() % 3 == 0) scale.as<float>()[n] = bad[random_bits() % 4];
      if (wild && random_bits() % 3 == 0) zero_point.as<int32_t>()[n] = random_bits() % 2 ? -9 : 1000;
    }
    probquant::moments(data(), sample_count, count, channels, true, stats.as<int64_t>(), probquant::serial_executor());
  }
  uint8_t* data() { return q.as<uint8_t>() + offset; }
  /// Other codes in the same place.
  void flip() {
    for (int64_t i = 0; i < samples * count; ++i) data()[i] = static_cast<uint8_t>(255 - data()[i] / 2);
    probquant::moments(data(), samples, count, channels, true, stats.as<int64_t>(), probquant::serial_executor());
  }
  probquant::QuantizedInput input() { return {data(), scale.as<float>(), zero_point.as<int32_t>(), stats.as<int64_t>(), columns}; }

 private:
  int64_t samples, count, channels, columns, offset;
};

/// The four outputs of an op.
struct Outputs {
  Buffer q, scale, zero_point, stats;
  bool channel_stats;

  Outputs(int64_t samples, int64_t count, int64_t channels, bool with_channels, uint8_t garbage)
      : q(samples * count, garbage),
        scale(samples * 4, garbage),
        zero_point(samples * 4, garbage),
        stats(samples * 8 * probquant::stats_columns(channels, with_channels), garbage),
        channel_stats(with_channels) {}
  void overwrite(uint8_t garbage) { q.fill(garbage), scale.fill(garbage), zero_point.fill(garbage), stats.fill(garbage); }
  probquant::QuantizedOutput pointers() { return {q.as<uint8_t>(), scale.as<float>(), zero_point.as<int32_t>(), stats.as<int64_t>(), channel_stats}; }
};

inline void compare(const std::string& what, const Outputs& wanted, const Outputs& got) {
  if (!wanted.scale.same(got.scale)) fail(what + ": scale");
  if (!wanted.zero_point.same(got.zero_point)) fail(what + ": zero_point");
  if (!wanted.q.same(got.q)) fail(what + ": q");
  if (!wanted.stats.same(got.stats)) fail(what + ": stats");
}

/// Floats with the same bits, or both NaN: which NaN an operation gives differs between processors.
inline bool same_floats(const Buffer& a, const Buffer& b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = a.as<float>()[i], y = b.as<float>()[i];
    if (std::memcmp(&x, &y, sizeof x) != 0 && !(std::isnan(x) && std::isnan(y))) return false;
  }
  return true;
}

}  // namespace cuda_on_cpu
