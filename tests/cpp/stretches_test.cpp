// The plan of a batch's stretches against every possible one.
#include <cmath>
#include <cstdio>
#include <random>

#include "torch/stretches.h"

using namespace probquant::ops;

namespace {

double cost(const StretchPlanner& planner, const std::vector<OpTraffic>& ops, const std::vector<int64_t>& groups) {
  double total = 0;
  for (size_t i = 0; i < ops.size(); ++i) {
    if (i > 0 && groups[i] != groups[i - 1]) total += planner.of_change(ops[i - 1]);
    total += planner.of_op(ops[i], groups[i]);
  }
  return total;
}

double least(const StretchPlanner& planner, const std::vector<OpTraffic>& ops, std::vector<int64_t>& groups) {
  if (groups.size() == ops.size()) return cost(planner, ops, groups);
  double best = std::numeric_limits<double>::infinity();
  for (const int64_t grouping : planner.groupings()) {
    groups.push_back(grouping);
    best = std::min(best, least(planner, ops, groups));
    groups.pop_back();
  }
  return best;
}

int fail(const char* what) {
  std::printf("failed: %s\n", what);
  return 1;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  const auto up_to = [&](int64_t most) { return static_cast<double>(random() % static_cast<uint64_t>(most)); };
  size_t split = 0;
  for (int i = 0; i < 500; ++i) {
    const StretchPlanner planner{2 + static_cast<int64_t>(random() % 9), 1 + static_cast<int64_t>(random() % 3), 1e6};
    std::vector<OpTraffic> ops(1 + random() % 5);
    for (OpTraffic& op : ops) {
      const bool early = random() % 2 == 0;
      op = {up_to(early ? 2000000 : 100000), up_to(100000), up_to(early ? 100000 : 3000000), random() % 8 != 0};
    }
    std::vector<int64_t> groups, none;
    for (const Stretch& stretch : planner.plan(ops)) {
      if (stretch.end <= groups.size() || stretch.end > ops.size()) return fail("stretches follow each other");
      groups.resize(stretch.end, stretch.groups);
    }
    if (groups.size() != ops.size()) return fail("stretches reach the last op");
    if (std::abs(cost(planner, ops, groups) - least(planner, ops, none)) > 1) return fail("no other plan moves less");
    split += planner.plan(ops).size() > 1;
  }
  if (split < 100) return fail("plans of several stretches were among them");
  // Many activations and few weights, then the reverse.
  const std::vector<Stretch> plan = StretchPlanner{8, 1, 2e6}.plan({{1e6, 8e5, 4e4, true}, {1e6, 2e5, 4e4, true}, {1e5, 1e5, 2e6, true}, {1e5, 1e5, 2e6, true}});
  if (plan.size() != 2 || plan[0].end != 2 || plan[0].groups != 8 || plan[1].groups != 1) return fail("image by image, then as a batch");
  std::printf("ok\n");
  return 0;
}
