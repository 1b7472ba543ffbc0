// One product of tiles, as a function: compiled with the instructions, and against their emulation (see CMakeLists.txt).
#include "tiles_run.h"

#include <initializer_list>

#include "cpu/amx/tiles.h"

void PROBQUANT_RUN_TILES(const TileProduct& p) {
  using namespace probquant;
  TileConfiguration shape;
  for (int tile : {0, 1, 2, 3}) shape.set(tile, p.rows, 4 * p.columns);
  for (int tile : {4, 5}) shape.set(tile, p.rows, 4 * p.steps);
  for (int tile : {6, 7}) shape.set(tile, p.steps, 4 * p.columns);
  configure_tiles(shape);
  load_tile<3>(p.sums, p.sums_stride);
  load_tile<5>(p.x, p.x_stride);
  load_tile<7>(p.weights, p.weights_stride);
  multiply_tiles<3, 5, 7>();
  multiply_unsigned_tiles<3, 5, 7>();
  store_tile<3>(p.sums, p.sums_stride);
  load_tile<0>(p.weights, 0);
  zero_tile<0>();
  store_tile<0>(p.zeros, p.sums_stride);
  release_tiles();
}
