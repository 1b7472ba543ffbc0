#pragma once
#include <cstdint>

/// sums += x weights, of signed weights and then of unsigned ones. Distances between rows in bytes.
struct TileProduct {
  int64_t rows, columns, steps;  ///< steps: of 4 inputs
  const uint8_t* x;
  const uint8_t* weights;
  uint8_t* sums;
  uint8_t* zeros;  ///< gets a tile that was cleared
  int64_t x_stride, weights_stride, sums_stride;
};

void run_tiles_native(const TileProduct& product);
void run_tiles_emulated(const TileProduct& product);
