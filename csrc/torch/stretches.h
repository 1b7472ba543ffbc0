// How a batch goes through a recording (recording.h): which stretches of its ops run op by op, each over all images, and which group by group,
// each over all ops.
//
// Op by op, every weight is read once, but what an op writes has left L2 before the next op reads it, once the images together outgrow it. Group by
// group it is still there, but the weights come from L3 again for each group. Bytes are bytes, so the plan is the one that moves the fewest from L3:
// an op moves its weights, once for each group, and of its activations what does not stay in L2; where the grouping changes, what lives on has to be
// put together. The early layers of ResNet-50 (1 MB of activations of an image to 70 KB of weights) go image by image, the late ones (250 KB to 2.4 MB)
// as one batch. With threads, groups go to different ones, which then need not meet behind every op.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace probquant::ops {

/// What an op moves, in bytes: estimates, which decide about time alone.
struct OpTraffic {
  double activations;  ///< of one image: read and written
  double behind;       ///< of one image: of activations that live on behind the op
  double weights;
  bool by_image;       ///< whether its results of an image depend on that image alone
};

/// Ops up to `end`, in so many groups of images; one group: op by op, each on all threads.
struct Stretch {
  size_t end;
  int64_t groups;
};

/// Of one core's L2; 1 MB where the system does not tell.
inline double l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return static_cast<double>(bytes);
#endif
  return 1 << 20;
}

struct StretchPlanner {
  int64_t batch, threads;
  double l2;

  /// Into how many groups a stretch may be split.
  std::vector<int64_t> groupings() const {
    std::vector<int64_t> result{1};
    for (int64_t groups = threads > 1 ? threads : 2; groups < batch; groups *= 2) result.push_back(groups);
    if (batch > 1 && batch >= threads) result.push_back(batch);
    return result;
  }

  /// Bytes that a thread moves from L3 for an op.
  double of_op(const OpTraffic& op, int64_t groups) const {
    if (groups > 1 && !op.by_image) return std::numeric_limits<double>::infinity();
    const int64_t rounds = groups == 1 ? 1 : (groups + threads - 1) / threads;
    const double images = static_cast<double>(batch) / static_cast<double>(groups == 1 ? threads : groups);
    const double activations = images * op.activations, kept = kOfL2 * l2;
    const double beyond = std::max(0.0, std::min(activations, activations + op.weights - kept));
    return static_cast<double>(rounds) * (op.weights + kCall + beyond) + (groups == 1 ? meeting() : 0);
  }
  /// The same, for another grouping behind the op: what lives on is written once more, which reads first, and is read from there.
  double of_change(const OpTraffic& op) const { return 3 * op.behind * static_cast<double>(batch) / static_cast<double>(threads) + meeting(); }

  /// The cheapest: a shortest path over ops and groupings, in a microsecond or two.
  std::vector<Stretch> plan(const std::vector<OpTraffic>& ops) const {
    if (ops.empty()) return {};
    const std::vector<int64_t> groups = groupings();
    std::vector<double> total(groups.size(), 0.0);  // up to an op, which has that grouping
    std::vector<size_t> before(ops.size() * groups.size());  // the grouping of the op before it then
    for (size_t i = 0; i < ops.size(); ++i) {
      const size_t cheapest = index_of_least(total);
      const double changed = i == 0 ? 0 : total[cheapest] + of_change(ops[i - 1]);
      for (size_t g = 0; g < groups.size(); ++g) {
        const bool stays = i == 0 || total[g] <= changed;
        before[i * groups.size() + g] = stays ? g : cheapest;
        total[g] = (stays ? total[g] : changed) + of_op(ops[i], groups[g]);
      }
    }
    size_t g = index_of_least(total);
    std::vector<Stretch> stretches{{ops.size(), groups[g]}};
    for (size_t i = ops.size() - 1; i > 0; --i) {
      const size_t from = before[i * groups.size() + g];
      if (from != g) stretches.push_back({i, groups[from]});
      g = from;
    }
    std::reverse(stretches.begin(), stretches.end());
    return stretches;
  }

 private:
  static constexpr double kOfL2 = 0.25;      // the rest holds weights to come, and values that no one reads any more, which leave late
  static constexpr double kCall = 20e3;      // an op's call: what L3 gives in 0.7 us
  static constexpr double kMeeting = 120e3;  // threads that wait for each other: 4 us

  double meeting() const { return threads > 1 ? kMeeting : 0; }
  static size_t index_of_least(const std::vector<double>& v) { return static_cast<size_t>(std::min_element(v.begin(), v.end()) - v.begin()); }
};

}  // namespace probquant::ops
