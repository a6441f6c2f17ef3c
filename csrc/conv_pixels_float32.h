// conv1 and its max pool in float32: out = relu(bias + max over 3 x 3 of (sum over 7 x 7 x 3 of (pixel - mean) * w)).
//
// One row of the 7 x 7 window is 21 numbers side by side, and the next pixel's window starts 6 numbers on: seven pieces
// of overlapping rows, multiplied where they lie. Bias and rectifier change no order, so they wait for the maximum.
// Wants product_panel.h before it.
#pragma once

namespace dmv_fast {
namespace {

constexpr int64_t kKernel = 7, kBeside = 3, kColours = 3;

// Rows from..from + count of the crop, pixel - mean, with zeros, the mean colour, around.
inline void lay_out(const PixelsFloat32& c, int64_t crop, int64_t from, int64_t count, float* to) {
  const int64_t numbers = c.width * kColours, beside = kBeside * kColours;
  for (int64_t y = from; y < from + count; ++y, to += c.row_numbers()) {
    const bool inside = y >= 0 && y < c.height;
    const int64_t left = inside ? beside : c.row_numbers();
    for (int64_t i = 0; i < left; ++i) to[i] = 0;
    if (!inside) continue;
    for (int64_t i = 0; i < beside; ++i) to[beside + numbers + i] = 0;
    const uint8_t* const row = c.crops + (crop * c.height + y) * numbers;
    for (int64_t i = 0; i < numbers; i += kColours)
      for (int64_t j = 0; j < kColours; ++j) to[beside + i + j] = float(row[i + j]) - c.mean[j];
  }
}

// One row of conv1's sums: [width / 2][c_out].
inline void sum_row(const PixelsFloat32& c, const float* pixels, float* sums) {
  constexpr int64_t kWindow = 2 * kColours, kPiece = kKernel * kColours;
  for (int64_t panel = 0; panel < c.c_out; panel += kPanel)
    for (int64_t x = 0; x < c.width / 2; x += kRowsTogether) {
      float* const to = sums + x * c.c_out + panel;
      multiply_panel(
          {pixels + x * kWindow, kWindow, kPiece, kKernel, c.row_numbers()}, c.weight + panel * kKernel * kPiece,
          [&](int row, int64_t channel, Vector sum) { Lanes::store(to + row * c.c_out + channel, sum); });
    }
}

// One row of out from three of sums; at the crop's upper edge the first is the second again.
inline void pool_row(const PixelsFloat32& c, const float* const (&sums)[3], float* out) {
  const auto column = [&](int64_t at) {
    return Lanes::larger(Lanes::larger(Lanes::load(sums[0] + at), Lanes::load(sums[1] + at)), Lanes::load(sums[2] + at));
  };
  for (int64_t o = 0; o < c.c_out; o += kWidth) {
    const Vector bias = Lanes::load(c.bias + o);
    Vector before = column(o);
    for (int64_t x = 0; x < c.width / 4; ++x) {
      const int64_t at = 2 * x * c.c_out + o;
      const Vector after = column(at + c.c_out), most = Lanes::larger(Lanes::larger(before, column(at)), after);
      Lanes::store(out + x * c.c_out + o, Lanes::larger(Lanes::zero(), Lanes::add(most, bias)));
      before = after;
    }
  }
}

void convolve_pixels(const PixelsFloat32& c, int64_t crop, int64_t first, int64_t last, float* room) {
  const int64_t above = 2 * first - 1, size = c.sum_numbers();
  float* const pixels = room + 3 * size;
  lay_out(c, crop, 2 * above - kBeside, c.read_rows(last - first), pixels);
  const auto row = [&](int64_t r) {  // three rows of sums are kept
    float* const to = room + (r + 3) % 3 * size;
    sum_row(c, pixels + 2 * (r - above) * c.row_numbers(), to);
    return to;
  };
  const float* before = above >= 0 ? row(above) : nullptr;
  float* out = c.out + (crop * (c.height / 4) + first) * (c.width / 4) * c.c_out;
  for (int64_t y = first; y < last; ++y, out += c.width / 4 * c.c_out) {
    const float *middle = row(2 * y), *after = row(2 * y + 1);
    pool_row(c, {before ? before : middle, middle, after}, out);
    before = after;
  }
}

}  // namespace
}  // namespace dmv_fast
