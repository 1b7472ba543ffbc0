// The tile instructions, as functions with internal linkage. GCC's intrinsics do not say which memory they touch: GCC 12 drops the
// stores that fill a configuration, and may move others past a tile's load. Compiled for less than AMX, the tiles are emulated
// (tests/cpp/emulated_amx).
#pragma once
#include <cstdint>

namespace probquant {
namespace {

constexpr int kTiles = 8;
constexpr int64_t kTileBytes = 64;  ///< of a row, at most; a tile has up to 16

/// The operand of LDTILECFG, palette 1.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t tile_rows, int64_t bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};
static_assert(sizeof(TileConfiguration) == 64, "as LDTILECFG reads it");

}  // namespace
}  // namespace probquant

#if defined(__AMX_INT8__)

namespace probquant {
namespace {

inline void configure_tiles(const TileConfiguration& configuration) { asm volatile("ldtilecfg %0" : : "m"(configuration)); }
inline void release_tiles() { asm volatile("tilerelease"); }

/// Rows of memory, `stride` bytes apart, into a tile, and back.
template <int tile>
inline void load_tile(const void* memory, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(memory), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void store_tile(void* memory, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(memory), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

/// sum[i][j] += the four products of dword k of x[i] (unsigned) and dword j of weights[k] (signed), over k. Sums wrap.
template <int sum, int x, int weights>
inline void multiply_tiles() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(x), "i"(weights));
}
/// The same of two unsigned factors.
template <int sum, int x, int weights>
inline void multiply_unsigned_tiles() {
  asm volatile("tdpbuud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(x), "i"(weights));
}

}  // namespace
}  // namespace probquant

#else
#include <emulated_tiles.h>
#endif
