// The probe: which output positions of a sample are computed first, and how the range seen there is widened. Positions are
// rows in row-major order; a sample has the same probe alone or in a batch, on any thread count.
#pragma once
#include "numerics.h"

namespace probquant {

inline constexpr int64_t kProbeRows = 16;   ///< rows of a segment: a few register tiles
inline constexpr int64_t kProbeShare = 16;  ///< one row in so many is probed, and at least two segments
inline constexpr int64_t kProbeWhole = 64;  ///< a sample with fewer rows is probed whole: half of it would be anyway

/// Rows [begin, end) of a sample.
struct RowSpan {
  int64_t begin, end;
};

PROBQUANT_HOST_DEVICE constexpr bool probes_whole(int64_t rows) { return rows < kProbeWhole; }

PROBQUANT_HOST_DEVICE constexpr int64_t probe_segments(int64_t rows) {
  if (probes_whole(rows)) return 1;
  const int64_t segments = (rows + kProbeRows * kProbeShare - 1) / (kProbeRows * kProbeShare);
  return segments < 2 ? 2 : segments;
}

PROBQUANT_HOST_DEVICE constexpr int64_t probe_segment_rows(int64_t rows) { return probes_whole(rows) ? rows : kProbeRows; }

/// Segment i of a sample: one in every stratum of equal size, at a place that golden-ratio steps give, so that segments
/// do not line up with the columns of an image.
PROBQUANT_HOST_DEVICE constexpr RowSpan probe_segment(int64_t rows, int64_t i) {
  if (probes_whole(rows)) return {0, rows};
  const int64_t segments = probe_segments(rows), begin = rows * i / segments, end = rows * (i + 1) / segments;
  const auto places = static_cast<uint64_t>(end - begin - kProbeRows + 1);
  const uint64_t step = static_cast<uint32_t>(static_cast<uint64_t>(i + 1) * 2654435769u);
  const int64_t first = begin + static_cast<int64_t>((step * places) >> 32);
  return {first, first + kProbeRows};
}

// Positions in a probe predictor: shares of the seen range's width by which it is widened below and above.
inline constexpr int64_t kProbeBelow = 0, kProbeAbove = 1, kProbePredictorSize = 2;

/// Parameters from the range [lo, hi] of the outputs seen.
PROBQUANT_HOST_DEVICE inline QParams probe_qparams(float lo, float hi, bool whole, const float* predictor, Activation kind, float activation_min,
                                                   float activation_max, ProfileSpan span) {
  if (!whole) {
    const float width = hi - lo;
    lo = fmaf(-predictor[kProbeBelow], width, lo);
    hi = fmaf(predictor[kProbeAbove], width, hi);
    if (!is_finite(lo) || !is_finite(hi)) return {kNan, 0};
    float least, largest;
    activation_bounds(kind, activation_min, activation_max, span, least, largest);
    lo = clamp_f(lo, least, largest);
    hi = clamp_f(hi, least, largest);
  }
  return qparams_from_range(lo, hi);
}

}  // namespace probquant
