// conv1 and its max pool in float32: out = relu(bias + max over 3 x 3 of (sum over 7 x 7 x 3 of (pixel - mean) * w)).
//
// One row of the 7 x 7 window is 21 numbers side by side, and the next pixel's window starts 6 numbers on: pieces of
// overlapping rows, multiplied where they lie. Down the rows it is Winograd's minimal filtering (see conv_winograd.h):
// with the stride of 2 even rows meet four taps and odd rows three, so four rows of sums take the products of 7 + 6 rows
// of points, F(4, 4) and F(4, 3), where the sum itself has 28. Points are +-1/2, +-1, +-2 and infinity, and those of
// conv_winograd.h; rounding is twice that of the sum. Bias and rectifier change no order, so they wait for the maximum.
// Wants product_panel.h and conv_winograd.h before it.
#pragma once

namespace dmv_fast {
namespace {

constexpr int64_t kBeside = 3, kColours = 3, kPiece = 7 * kColours;
constexpr int kFourTaps = 7;  // points of even rows

// A row of the crop, pixel - mean, with zeros, the mean colour, around.
inline void lay_out_row(const PixelsFloat32& c, int64_t crop, int64_t y, float* to) {
  const int64_t numbers = c.width * kColours, beside = kBeside * kColours;
  const bool inside = y >= 0 && y < c.height;
  for (int64_t i = 0; i < (inside ? beside : c.row_numbers()); ++i) to[i] = 0;
  if (!inside) return;
  const uint8_t* const row = c.crops + (crop * c.height + y) * numbers;
  for (int64_t i = 0; i < numbers; i += kColours)
    for (int64_t j = 0; j < kColours; ++j) to[beside + i + j] = float(row[i + j]) - c.mean[j];
  for (int64_t i = beside + numbers; i < c.row_numbers(); ++i) to[i] = 0;
}

// Of x(0), x(1), .. x(5): their points at both signs of a root r. Its square and those of the other two are roots of
// t^3 - 5.25 t^2 + 5.25 t - 1; `sum` and `product` are those of the other two squares.
template <class Load, class Put>
inline void to_pair_of_six(float root, float sum, float product, Load&& x, int first, Put&& put) {
  const auto part = [&](int i) {  // x(i + 4) - sum x(i + 2) + product x(i)
    return Lanes::multiply_add(
        Lanes::fill(-sum), x(i + 2), Lanes::multiply_add(Lanes::fill(product), x(i), x(i + 4)));
  };
  const Vector odd = part(1), even = Lanes::multiply(Lanes::fill(root), part(0));
  put(first, Lanes::add(odd, even));
  put(first + 1, Lanes::subtract(odd, even));
}

// Thirteen rows of pixels, `step` apart, to as many rows of points.
inline void rows_to_points(const float* rows, int64_t step, float* points) {
  for (int64_t i = 0; i < step; i += kWidth) {
    const auto even = [&](int row) { return Lanes::load(rows + 2 * row * step + i); };
    const auto odd = [&](int row) { return Lanes::load(rows + (2 * row + 1) * step + i); };
    const auto put = [&](int point, Vector value) { Lanes::store(points + point * step + i, value); };
    const auto put_odd = [&](int point, Vector value) { put(kFourTaps + point, value); };
    to_pair_of_six(0.5f, 5.0f, 4.0f, even, 0, put);
    to_pair_of_six(1.0f, 4.25f, 1.0f, even, 2, put);
    to_pair_of_six(2.0f, 1.25f, 0.25f, even, 4, put);
    const Vector middle = Lanes::subtract(even(2), even(4));
    put(6, Lanes::multiply_add(Lanes::fill(5.25f), middle, Lanes::subtract(even(6), even(0))));
    Row<1>::to_points<0>(odd, put_odd);
    Row<1>::to_points<1>(odd, put_odd);
    Row<1>::to_points<2>(odd, put_odd);
    Row<1>::to_points<3>(odd, put_odd);
  }
}

// a x + y + b z
inline Vector weighted(float a, Vector x, Vector y, float b, Vector z) {
  return Lanes::multiply_add(Lanes::fill(a), x, Lanes::multiply_add(Lanes::fill(b), z, y));
}

// Products m(0) .. m(12) of all points to put(row, vector) of four rows of sums.
template <class Load, class Put>
inline void points_to_rows(Load&& m, Put&& put) {
  Vector rows[4];
  const Vector s1 = Lanes::add(m(0), m(1)), s2 = Lanes::add(m(2), m(3)), s3 = Lanes::add(m(4), m(5));
  const Vector d1 = Lanes::subtract(m(0), m(1)), d2 = Lanes::subtract(m(2), m(3)), d3 = Lanes::subtract(m(4), m(5));
  rows[0] = Lanes::add(s1, Lanes::add(s2, s3));
  rows[1] = weighted(0.5f, d1, d2, 2.0f, d3);
  rows[2] = weighted(0.25f, s1, s2, 4.0f, s3);
  rows[3] = Lanes::add(m(6), weighted(0.125f, d1, d2, 8.0f, d3));
  const auto odd = [&](int i) { return m(kFourTaps + i); };
  const auto add = [&](int row, Vector value) { put(row, Lanes::add(rows[row], value)); };
  Row<1>::from_points<0>(odd, add);
  Row<1>::from_points<1>(odd, add);
}

// Four rows of conv1's sums, each [width / 2][c_out], from the points of the pixels under them.
// products: room for kPixelPoints * kRowsTogether * kPanel numbers.
inline void sum_rows(const PixelsFloat32& c, const float* points, float* const (&sums)[4], float* products) {
  constexpr int64_t kWindow = 2 * kColours, kOfPoint = kRowsTogether * kPanel;
  for (int64_t panel = 0; panel < c.c_out; panel += kPanel)
    for (int64_t x = 0; x < c.width / 2; x += kRowsTogether) {
      for (int64_t point = 0; point < kPixelPoints; ++point) {
        float* const to = products + point * kOfPoint;
        multiply_panel(
            {points + point * c.row_numbers() + x * kWindow, kWindow, kPiece},
            c.weight + (panel * kPixelPoints + point * kPanel) * kPiece,
            [&](int pixel, int64_t channel, Vector sum) { Lanes::store(to + pixel * kPanel + channel, sum); });
      }
      for (int64_t i = 0; i < kOfPoint; i += kWidth) {
        const int64_t at = (x + i / kPanel) * c.c_out + panel + i % kPanel;
        points_to_rows(
            [&](int point) { return Lanes::load(products + point * kOfPoint + i); },
            [&](int row, Vector value) { Lanes::store(sums[row] + at, value); });
      }
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
  const int64_t row = c.row_numbers(), size = c.sum_numbers();
  float* const pixels = room;
  float* const points = pixels + kRowsOfGroup * row;
  float* const products = points + kPixelPoints * row;
  float* const kept = products + kPixelPoints * kRowsTogether * kPanel;  // eight rows of sums, one after the other anew
  float* out = c.out + (crop * (c.height / 4) + first) * (c.width / 4) * c.c_out;
  // Rows of sums in fours, as any share of the crop has them, so that a row is rounded alike in all: 2 first - 1 is in
  // the first four. Above the crop's upper edge there is none; what is made there is not looked at.
  const int64_t begin = first / 2 * 4 - 1;
  const auto sums = [&](int64_t y) { return kept + (y - begin) % 8 * size; };
  int64_t next = begin;
  for (int64_t y = first; y < last; ++y, out += c.width / 4 * c.c_out) {
    for (; next <= 2 * y + 1; next += 4) {
      const int64_t under = 2 * next - kBeside, again = next == begin ? 0 : kRowsOfGroup - 8;
      for (int64_t i = 0; i < again * row; ++i) pixels[i] = pixels[8 * row + i];
      for (int64_t i = again; i < kRowsOfGroup; ++i) lay_out_row(c, crop, under + i, pixels + i * row);
      rows_to_points(pixels, row, points);
      sum_rows(c, points, {sums(next), sums(next + 1), sums(next + 2), sums(next + 3)}, products);
    }
    pool_row(c, {sums(y > 0 ? 2 * y - 1 : 0), sums(2 * y), sums(2 * y + 1)}, out);
  }
}

}  // namespace
}  // namespace dmv_fast
