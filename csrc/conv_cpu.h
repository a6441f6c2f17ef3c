// Convolution on the CPU: what the launcher (conv_cpu.cpp) and the kernel (conv_amx.cpp) share.
#pragma once

#include <cstdint>

#include "cpu_isa.h"

namespace dmv_fast {

constexpr int64_t kChunk = 32;                 // channels of a product's depth, and output channels worked on together
constexpr int64_t kSegment = 16;               // pixels of a row in one tile
constexpr int64_t kTileNumbers = 16 * kChunk;  // bfloat16 numbers in one tile

// One call. Maps are [crops][height][width][channels], bfloat16 where parts is 1, float32 where it is 2. out = scale *
// convolution + bias: weights that are bfloat16 numbers stay such with a batch norm behind them.
struct Convolving {
  const void* x;
  const uint16_t* weight;  // [c_out / 32][kernel][c_in / groups / 32][kernel][weight_parts][2 tiles][16 pairs][16][2]
  const float *scale, *bias;  // [c_out]
  void* out;
  int64_t crops, height, width, c_in;  // of x, of which every `skip`th row and column is read
  int64_t rows, columns, c_out, groups;
  int64_t kernel, stride, padding, dilation, skip;
  int parts, weight_parts;
  bool add, relu;  // to what lies in out
  int64_t band;    // rows of out worked on together

  int64_t reach() const { return (kernel - 1) * dilation + 1; }
  int64_t read_rows() const { return (height + skip - 1) / skip; }
  int64_t read_columns() const { return (width + skip - 1) / skip; }
  // The laid out input: [rows of x][c_in / 32][parts][columns of x and padding][32]
  int64_t plane() const { return (read_columns() + 2 * padding) * kChunk; }
  int64_t row_step() const { return c_in / kChunk * parts * plane(); }
  int64_t per_block() const { return kernel * kernel * (c_in / groups / kChunk) * weight_parts * 2 * kTileNumbers; }
};

// Some rows and blocks of 32 channels of one crop.
struct ConvolvingPart {
  int64_t crop, first_row, last_row, first_block, last_block;
};

// room: 64-byte aligned, for what `band` rows of out read and a tile more.
using ConvolvePart = void (*)(const Convolving& call, const ConvolvingPart& part, uint16_t* room);

// (1, 1), (2, 1) or (2, 2)
ConvolvePart convolve_amx(int parts, int weight_parts);

// conv1 with the max pool behind it: 7 x 7 of stride 2 on pixels, then 3 x 3 of stride 2.
struct PixelConvolving {
  const uint8_t* crops;    // [crops][height][width][3]
  const uint16_t* weight;  // [c_out / 32][7 rows][parts][2 tiles][16 pairs][16][2]
  const float *bias, *mean;  // [c_out], [3]: what a pixel outside of the crop is
  void* out;               // [crops][height / 4][width / 4][c_out], bfloat16 where parts is 1, else float32
  int64_t height, width, c_out;
  int parts;

  // A laid out row of pixels: three beside it on either side, and what the last tile reads behind.
  int64_t row_numbers() const { return ((width + 6) * 3 + kChunk - 1) / kChunk * kChunk + kChunk; }
  int64_t read_rows(int64_t rows) const { return 4 * rows + 7; }  // for so many of out
};

// Rows first..last of one crop's out; room: 64-byte aligned, for `read_rows` rows and three of conv1's results.
using ConvolvePixels = void (*)(
    const PixelConvolving& call, int64_t crop, int64_t first, int64_t last, uint16_t* room);

ConvolvePixels convolve_pixels_amx(int parts);

bool convolve_cpu_runs();

}  // namespace dmv_fast
