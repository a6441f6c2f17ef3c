// Winograd's convolution on the CPU: what the launcher (conv_winograd_cpu.cpp) and the kernels of each instruction set
// (conv_winograd.h) share.
#pragma once

#include <cstdint>

#include "cpu_isa.h"

namespace dmv_fast {

constexpr int64_t kWeights = 36;    // matrices that a 3 x 3 kernel becomes
constexpr int64_t kPanel = 32;      // channels of out worked on together
constexpr int64_t kTileStep = 8;    // tiles are counted up to whole numbers of these
constexpr int64_t kCacheLine = 16;  // floats

struct TilePlace {
  int64_t crop, y, x;  // of its first pixel in out
};

// One call. Maps are [crops][height][width][channels], float32.
struct Winograd {
  const float* x;
  const float* weight;  // G w G': [kWeights][c_out / 32][c_in / groups][32]
  const float* bias;    // [c_out]
  float* out;
  const float* zeros;    // [c_in]: a pixel beyond the map
  float *points, *sums;  // of the tiles worked on together
  int64_t crops, height, width, c_in, rows, columns, c_out, groups, stride, padding, dilation;
  int64_t together;  // tiles
  bool add, relu;    // to what lies in out

  // A row's end and a plane's are a cache line apart from the next one's start: powers of two would share cache sets.
  int64_t pitch_in() const { return c_in + kCacheLine; }
  int64_t pitch_out() const { return c_out + kCacheLine; }
  int64_t plane_in() const { return together * pitch_in() + kCacheLine; }
  int64_t plane_out() const { return together * pitch_out() + kCacheLine; }

  int64_t points_across() const { return stride == 1 ? 6 : 9; }  // that a tile of 4 x 4 pixels takes
  int64_t points_of_all() const { return points_across() * points_across(); }
  int64_t down() const { return ((rows + dilation - 1) / dilation + 3) / 4; }
  int64_t across() const { return ((columns + dilation - 1) / dilation + 3) / 4; }
  int64_t tiles_a_crop() const { return dilation * dilation * down() * across(); }
  int64_t tiles() const { return crops * tiles_a_crop(); }
  TilePlace place(int64_t tile) const {
    const int64_t crop = tile / tiles_a_crop(), map = down() * across(), phase = tile % tiles_a_crop() / map;
    const int64_t y = tile % map / across(), x = tile % across();
    return {crop, phase / dilation + 4 * y * dilation, phase % dilation + 4 * x * dilation};
  }
};

// Each over a part of its units, for tiles `from_tile` on.
struct WinogradSteps {
  void (*tiles_to_points)(const Winograd& c, int64_t first_tile, int64_t last_tile, int64_t from_tile);
  void (*multiply_points)(const Winograd& c, int64_t first_unit, int64_t last_unit, int64_t tiles);
  void (*points_to_tiles)(const Winograd& c, int64_t first_tile, int64_t last_tile, int64_t from_tile);
};

// stride: 1 or 2
WinogradSteps winograd_avx2(int64_t stride);
WinogradSteps winograd_avx512(int64_t stride);

}  // namespace dmv_fast
