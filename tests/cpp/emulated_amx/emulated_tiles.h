// The tile instructions of csrc/cpu/amx/tiles.h in plain C++, each a transcript of its operation in the Intel 64 and IA-32
// Architectures Software Developer's Manual, volume 2. What the processor answers with an exception, ends the program.
// tiles_test.cpp compares it with the instructions.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace probquant {
namespace {

struct EmulatedTiles {
  bool configured = false;
  TileConfiguration shape;
  uint8_t data[kTiles][16][kTileBytes];
};

inline EmulatedTiles& emulated_tiles() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}

inline void require_tiles(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "emulated tiles: %s\n", what);
  std::abort();
}

inline void configure_tiles(const TileConfiguration& configuration) {
  EmulatedTiles& t = emulated_tiles();
  require_tiles(configuration.palette == 1 && configuration.start_row == 0, "palette 1, from row 0 on");
  for (int i = 0; i < 16; ++i) {
    require_tiles(configuration.rows[i] <= 16 && configuration.row_bytes[i] <= kTileBytes, "up to 16 rows of up to 64 bytes");
    require_tiles((configuration.rows[i] == 0) == (configuration.row_bytes[i] == 0), "rows and bytes, or none of either");
    require_tiles(i < kTiles || configuration.rows[i] == 0, "8 tiles");
  }
  t.configured = true;
  t.shape = configuration;
  std::memset(t.data, 0, sizeof t.data);
}

inline void release_tiles() { emulated_tiles().configured = false; }

template <int tile>
inline void load_tile(const void* memory, int64_t stride) {
  EmulatedTiles& t = emulated_tiles();
  require_tiles(t.configured && t.shape.rows[tile] > 0, "a load of a tile that is not configured");
  std::memset(t.data[tile], 0, sizeof t.data[tile]);
  for (int64_t row = 0; row < t.shape.rows[tile]; ++row)
    std::memcpy(t.data[tile][row], static_cast<const uint8_t*>(memory) + row * stride, t.shape.row_bytes[tile]);
}

template <int tile>
inline void zero_tile() {
  EmulatedTiles& t = emulated_tiles();
  require_tiles(t.configured && t.shape.rows[tile] > 0, "a tile to clear that is not configured");
  std::memset(t.data[tile], 0, sizeof t.data[tile]);
}

template <int tile>
inline void store_tile(void* memory, int64_t stride) {
  const EmulatedTiles& t = emulated_tiles();
  require_tiles(t.configured && t.shape.rows[tile] > 0, "a store of a tile that is not configured");
  for (int64_t row = 0; row < t.shape.rows[tile]; ++row)
    std::memcpy(static_cast<uint8_t*>(memory) + row * stride, t.data[tile][row], t.shape.row_bytes[tile]);
}

/// Weights are of type Factor.
template <class Factor, int sum, int x, int weights>
inline void multiply_factors() {
  EmulatedTiles& t = emulated_tiles();
  const TileConfiguration& shape = t.shape;
  require_tiles(t.configured && shape.rows[sum] > 0 && sum != x && sum != weights && x != weights, "three configured tiles");
  require_tiles(shape.rows[sum] == shape.rows[x] && shape.row_bytes[sum] == shape.row_bytes[weights] && shape.row_bytes[x] == 4 * shape.rows[weights] &&
                    shape.row_bytes[sum] % 4 == 0,
                "shapes that can be multiplied");
  for (int i = 0; i < shape.rows[sum]; ++i)
    for (int j = 0; j < shape.row_bytes[sum] / 4; ++j) {
      uint32_t total;
      std::memcpy(&total, t.data[sum][i] + 4 * j, 4);
      for (int k = 0; k < shape.row_bytes[x]; ++k) {
        const int product = t.data[x][i][k] * static_cast<Factor>(t.data[weights][k / 4][4 * j + k % 4]);
        total += static_cast<uint32_t>(product);
      }
      std::memcpy(t.data[sum][i] + 4 * j, &total, 4);
    }
  std::memset(t.data[sum] + shape.rows[sum], 0, static_cast<size_t>(16 - shape.rows[sum]) * kTileBytes);
}
template <int sum, int x, int weights>
inline void multiply_tiles() {
  multiply_factors<int8_t, sum, x, weights>();
}
template <int sum, int x, int weights>
inline void multiply_unsigned_tiles() {
  multiply_factors<uint8_t, sum, x, weights>();
}

}  // namespace
}  // namespace probquant
