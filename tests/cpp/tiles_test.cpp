// The emulated tiles (emulated_amx) give what the tile instructions give: random shapes, bytes and distances between rows. Where the
// processor has no AMX there is nothing to compare with, and the emulation only runs.
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/features.h"
#include "tiles_run.h"

int main() {
  const bool native = probquant::detected_isa() >= probquant::Isa::amx;
  std::mt19937_64 engine(1);
  const auto between = [&](int64_t lo, int64_t hi) { return lo + static_cast<int64_t>(engine() % static_cast<uint64_t>(hi - lo + 1)); };
  for (int turn = 0; turn < 2000; ++turn) {
    TileProduct p;
    p.rows = between(1, 16), p.columns = between(1, 16), p.steps = between(1, 16);
    p.x_stride = between(0, 1) ? 4 * p.steps + between(0, 40) : 0;  // 0: every row is the same
    p.weights_stride = 4 * p.columns + between(0, 40);
    p.sums_stride = 4 * p.columns + between(0, 40);
    const auto bytes = [&](int64_t count) {
      std::vector<uint8_t> v(static_cast<size_t>(count));
      for (uint8_t& b : v) b = static_cast<uint8_t>(turn % 4 == 0 ? between(0, 1) * 255 : between(0, 255));  // sums wrap in any case
      return v;
    };
    const std::vector<uint8_t> x = bytes(16 * p.x_stride + 64), weights = bytes(16 * p.weights_stride + 64), sums = bytes(16 * p.sums_stride + 64);
    std::vector<uint8_t> got[2] = {sums, sums}, zeros[2] = {sums, sums};
    p.x = x.data(), p.weights = weights.data();
    for (int i = 0; i < 1 + native; ++i) {
      p.sums = got[i].data(), p.zeros = zeros[i].data();
      (i == 0 ? run_tiles_emulated : run_tiles_native)(p);
    }
    if (native && (got[0] != got[1] || zeros[0] != zeros[1])) {
      std::printf("%ld rows, %ld columns, %ld steps, distances %ld %ld %ld: emulation and instructions differ\n", static_cast<long>(p.rows),
                  static_cast<long>(p.columns), static_cast<long>(p.steps), static_cast<long>(p.x_stride), static_cast<long>(p.weights_stride),
                  static_cast<long>(p.sums_stride));
      return 1;
    }
  }
  std::printf(native ? "passed\n" : "no AMX to compare with: the emulation ran\n");
  return 0;
}
