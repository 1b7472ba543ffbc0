// A row of floats that is a sample of its own, held by one warp: value i is lane i % 32's, which is also the order in which NUMERICS.md
// sums floats up. Quantized before it leaves the registers. A row of stats has three columns in front of the channels', so that those begin
// within a sector.
#pragma once
#include "reduce.cuh"

namespace probquant::cuda {

/// Tag of a WarpRow whose values are still to come.
struct Unread {};

/// The first kHeld * 32 values stay in registers; `value`(i) gives those beyond whenever they are asked for.
template <class Value>
class WarpRow {
 public:
  static constexpr int kHeld = 32;

  __device__ WarpRow(int32_t count, Value value) : count_(count), value_(value) {
    for_each_held([&](int s, int32_t i) { held_[s] = value_(i); });
  }

  /// The row of map(i, value i).
  template <class Map>
  __device__ auto mapped(Map map) const {
    const auto value = [inner = value_, map](int32_t i) { return map(i, inner(i)); };
    WarpRow<decltype(value)> row(count_, value, Unread{});
    for_each_held([&](int s, int32_t i) { row.held_[s] = map(i, held_[s]); });
    return row;
  }

  /// visit(i, value i) for this lane's values, in order.
  template <class Visit>
  __device__ void for_each(Visit visit) const {
    for_each_held([&](int s, int32_t i) { visit(i, held_[s]); });
    for (int32_t i = kHeld * 32 + lane(); i < count_; i += 32) visit(i, value_(i));
  }

  /// Sum of term(value, partial sum) in the one order of floats, in every lane.
  template <class Term>
  __device__ float sum(Term term) const {
    float total = 0.0f;
    for_each([&](int32_t, float v) { total = term(v, total); });
    return warp_reduce(total, [](float a, float b) { return a + b; });
  }

 private:
  template <class>
  friend class WarpRow;
  __device__ WarpRow(int32_t count, Value value, Unread) : count_(count), value_(value) {}
  static __device__ int32_t lane() { return static_cast<int32_t>(threadIdx.x % 32); }
  template <class Visit>
  __device__ void for_each_held(Visit visit) const {
#pragma unroll
    for (int s = 0; s < kHeld; ++s)
      if (s * 32 + lane() < count_) visit(s, s * 32 + lane());
  }

  int32_t count_;
  Value value_;
  float held_[kHeld];
};

/// As quantize_row of core/front_end.h: a row of `channels` values with the parameters `fixed`, or its exact range.
template <class Value>
__device__ void quantize_row(const WarpRow<Value>& values, int64_t row, int32_t channels, bool valid, const float* fixed, const QuantizedOutput& y) {
  QParams qparams{kNan, 0};
  if (valid && fixed != nullptr) {
    qparams = fixed_qparams(fixed);
  } else if (valid) {
    Range r{kInfinity, -kInfinity};
    values.for_each([&](int32_t, float v) {
      r.lo = is_finite(v) ? min_f(v, r.lo) : -kInfinity;
      r.hi = max_f(v, r.hi);
    });
    r.lo = warp_reduce(r.lo, [](float a, float b) { return min_f(a, b); });
    r.hi = warp_reduce(r.hi, [](float a, float b) { return max_f(a, b); });
    qparams = qparams_from_range(r.lo, r.hi);
  }
  valid = valid_scale(qparams.scale);
  const float inverse_scale = valid ? 1.0f / qparams.scale : 0.0f;
  int64_t* stats = stats_row(y, row, channels);
  uint8_t* q = y.q + row * channels;
  Moments moments;
  values.for_each([&](int32_t i, float v) {
    const Code code = valid ? round_to_code(v * inverse_scale, qparams.zero_point) : Code{0, false};
    q[i] = code.q;
    moments.add(code.q);
    moments.clipped += code.clipped;
    if (!y.channel_stats) return;
    stats[kStatsSample + i] = code.q;
    stats[kStatsSample + channels + i] = int64_t{code.q} * code.q;
  });
  const auto add = [](int64_t a, int64_t b) { return a + b; };
  const int64_t sum = warp_reduce(int64_t{moments.sum}, add), squares = warp_reduce(int64_t{moments.squares}, add);
  const int64_t clipped = warp_reduce(int64_t{moments.clipped}, add);
  if (threadIdx.x % 32 != 0) return;
  y.scale[row] = valid ? qparams.scale : kNan;
  y.zero_point[row] = valid ? qparams.zero_point : 0;
  stats[kStatsSum] = sum;
  stats[kStatsSquares] = squares;
  stats[kStatsClipped] = valid ? clipped : -1;
}

}  // namespace probquant::cuda
