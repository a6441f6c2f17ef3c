// Convolutions of float32 maps on the CPU: what the launchers (conv_winograd_cpu.cpp, conv_pointwise_cpu.cpp,
// conv_pixels_float32_cpu.cpp) and the kernels of each instruction set (conv_winograd.h, conv_pointwise.h,
// conv_pixels_float32.h) share. Maps are [crops][height][width][channels].
#pragma once

#include <cstdint>

#include "cpu_isa.h"

namespace dmv_fast {

constexpr int64_t kWeights = 36;    // matrices that a 3 x 3 kernel becomes
constexpr int64_t kPanel = 32;      // channels of out worked on together
constexpr int64_t kTileStep = 8;    // tiles are counted up to whole numbers of these
constexpr int64_t kLineBytes = 64;  // of a cache line ...
constexpr int64_t kCacheLine = 16;  // ... and floats

// Of products of whole numbers, int16 (product_panel_int16.h): whether they run, and the most channels whose rounding leaves
// sums under 2^31.
inline bool convolve_int16_cpu_runs() { return allowed(Isa::avx512) && has_vnni(); }
constexpr int64_t kMostRounded = 4096;

struct TilePlace {
  int64_t crop, y, x;  // of its first pixel in out
};

// One call of a 3 x 3 kernel.
struct Winograd {
  const float* x;
  const void* weight;         // G w G': [kWeights][c_out / 32][c_in / groups][32]; int16: two of c_in side by side
  const float* weight_scale;  // int16: [kWeights][c_out]
  const float* bias;          // [c_out]
  float* out;
  const float* zeros;  // [c_in]: a pixel beyond the map
  void* points;        // of the tiles worked on together
  float* sums;
  float* point_scale;  // int16: [points_of_all][together]
  float* rounding;     // int16: a tile's points in float32, in room for each part of the work
  int64_t number;      // bytes of one of weight and of points: of float or int16_t
  int64_t crops, height, width, c_in, rows, columns, c_out, groups, stride, padding, dilation;
  int64_t together;  // tiles
  bool add, relu;    // to what lies in out

  // A row's end and a plane's are a cache line apart from the next one's start: powers of two would share cache sets.
  int64_t pitch_in() const { return c_in + kLineBytes / number; }
  int64_t pitch_out() const { return c_out + kCacheLine; }
  int64_t plane_in() const { return together * pitch_in() + kLineBytes / number; }
  int64_t plane_out() const { return together * pitch_out() + kCacheLine; }

  int64_t points_across() const { return stride == 1 ? 6 : 9; }  // that a tile of 4 x 4 pixels takes
  int64_t points_of_all() const { return points_across() * points_across(); }
  int64_t plane_rounding() const { return c_in + kCacheLine; }
  int64_t rounding_of_part() const { return number == sizeof(int16_t) ? points_of_all() * plane_rounding() : 0; }
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
  void (*tiles_to_points)(const Winograd& c, int64_t first_tile, int64_t last_tile, int64_t from_tile, int64_t part);
  void (*multiply_points)(const Winograd& c, int64_t first_unit, int64_t last_unit, int64_t tiles);
  void (*points_to_tiles)(const Winograd& c, int64_t first_tile, int64_t last_tile, int64_t from_tile);
};

// stride: 1 or 2
WinogradSteps winograd_avx2(int64_t stride);
WinogradSteps winograd_avx512(int64_t stride);
WinogradSteps winograd_int16(int64_t stride);  // AVX512_VNNI

// One call of a 1 x 1 kernel. A stride leaves rows and columns of x out.
struct Pointwise {
  const float* x;
  const void* weight;         // [c_out / 32][c_in][32]; int16: two of c_in side by side
  const float* weight_scale;  // int16: [c_out]
  const float* bias;          // [c_out]
  float* out;
  int64_t number;  // bytes of one of weight, and of a row's that is multiplied with it: of float or int16_t
  int64_t crops, height, width, c_in, rows, columns, c_out, stride;
  bool add, relu;  // to what lies in out

  int64_t pitch() const { return c_in + kLineBytes / number; }
  int64_t pixels() const { return crops * rows * columns; }
  const float* under(int64_t pixel) const {  // which pixel of x one of out is made of
    const int64_t row = pixel / columns, crop = row / rows;
    return x + ((crop * height + row % rows * stride) * width + pixel % columns * stride) * c_in;
  }
};

// Pixels first..last of out, at most kPixelStep at a time; room: 64-byte aligned, for as many rows of pitch() numbers and
// a float each.
using PointwisePart = void (*)(const Pointwise& call, int64_t first, int64_t last, void* room);
constexpr int64_t kPixelStep = 32;

PointwisePart pointwise_avx2();
PointwisePart pointwise_avx512();
PointwisePart pointwise_int16();  // AVX512_VNNI

constexpr int kPixelPoints = 13;  // matrices that a 7 x 7 kernel of stride 2 becomes, and rows of points under four of sums
constexpr int kRowsOfGroup = 13;  // of pixels, under the same four

// conv1 with the max pool behind it: 7 x 7 of stride 2 on pixels, then 3 x 3 of stride 2.
struct PixelsFloat32 {
  const uint8_t* crops;  // [crops][height][width][3]
  const float* weight;   // [c_out / 32][kPixelPoints x 7 x 3][32]
  const float* bias;     // [c_out]
  const float* mean;     // [3]: what a pixel outside of the crop is
  float* out;            // [crops][height / 4][width / 4][c_out]
  int64_t height, width, c_out;

  // Of a row of pixels with three beside it on either side, up to a whole number of cache lines.
  int64_t row_numbers() const { return ((width + 6) * 3 + kCacheLine - 1) / kCacheLine * kCacheLine; }
  int64_t sum_numbers() const { return width / 2 * c_out; }
  int64_t room_numbers() const { 
    return (kRowsOfGroup + kPixelPoints) * row_numbers() + kPixelPoints * kTileStep * kPanel + 8 * sum_numbers();
  }
};

// Rows first..last of one crop's out; room: 64-byte aligned, for `room_numbers` floats.
using PixelsPart = void (*)(const PixelsFloat32& call, int64_t crop, int64_t first, int64_t last, float* room);

PixelsPart pixels_avx2();
PixelsPart pixels_avx512();

}  // namespace dmv_fast
