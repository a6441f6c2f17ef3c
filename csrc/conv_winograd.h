// 3 x 3 convolution by Winograd's minimal filtering: out = A' [(G w G') * (B' x B)] A, in float32.
//
// Four by four pixels of out take 36 products a pair of channels, F(4 x 4, 3 x 3), where the sum itself has 144. With a
// stride of 2 they take 81: of nine pixels in a row the five even ones meet two taps, F(4, 2), and the four odd ones
// the third tap alone. With points at 0, +-sqrt(1/2), +-sqrt(2) and infinity (0 only for three taps) the rounding stays
// near that of the sum: 1e-6 of the largest number; a NaN fills its tile. A dilation of d makes d * d maps of every d-th
// pixel, each cut into tiles by itself. Wants a `Lanes` before it.
#pragma once

#include "conv_winograd_cpu.h"

namespace dmv_fast {
namespace {

using Vector = Lanes::Vector;
constexpr int kWidth = Lanes::kWidth;
constexpr int kRowsTogether = kWidth == 16 ? 8 : 4;  // times two vectors of channels: sums enough to hide the latency
constexpr float kRoot = 1.41421356f, kHalfRoot = 0.70710678f;

// What three taps and two have in common: the points +-sqrt(1/2) and +-sqrt(2) of x[0], x[step], x[2 step], x[3 step].
template <class Put>
inline void to_four_points(const Vector* x, int step, int first, Put&& put) {
  const Vector two = Lanes::fill(2), half = Lanes::fill(0.5f);
  const Vector root = Lanes::fill(kRoot), half_root = Lanes::fill(kHalfRoot);
  const Vector high = Lanes::subtract(x[3 * step], Lanes::multiply(two, x[step]));
  const Vector low = Lanes::subtract(x[3 * step], Lanes::multiply(half, x[step]));
  const Vector a = Lanes::multiply_subtract(half_root, x[2 * step], Lanes::multiply(root, x[0]));
  const Vector b = Lanes::multiply_subtract(root, x[2 * step], Lanes::multiply(half_root, x[0]));
  put(first, Lanes::add(high, a));
  put(first + 1, Lanes::subtract(high, a));
  put(first + 2, Lanes::add(low, b));
  put(first + 3, Lanes::subtract(low, b));
}

// And the way back: four pixels of their products m, added to what the other points give.
template <class Put>
inline void from_four_points(const Vector* m, const Vector (&onto)[4], Put&& put) {
  const Vector even_a = Lanes::add(m[0], m[1]), odd_a = Lanes::subtract(m[0], m[1]);
  const Vector even_b = Lanes::add(m[2], m[3]), odd_b = Lanes::subtract(m[2], m[3]);
  const Vector second = Lanes::multiply_add(Lanes::fill(kRoot), odd_b, onto[1]);
  const Vector third = Lanes::multiply_add(Lanes::fill(2), even_b, onto[2]);
  const Vector fourth = Lanes::multiply_add(Lanes::fill(2 * kRoot), odd_b, onto[3]);
  put(0, Lanes::add(onto[0], Lanes::add(even_a, even_b)));
  put(1, Lanes::multiply_add(Lanes::fill(kHalfRoot), odd_a, second));
  put(2, Lanes::multiply_add(Lanes::fill(0.5f), even_a, third));
  put(3, Lanes::multiply_add(Lanes::fill(kHalfRoot / 2), odd_a, fourth));
}

// B' x, A' m of a stride.
template <int kStride>
struct Row;

template <>
struct Row<1> {
  static constexpr int kPoints = 6;

  // put(i, i-th number of B' x)
  template <class Put>
  static void to_points(const Vector (&x)[6], Put&& put) {
    put(0, Lanes::multiply_add(Lanes::fill(-2.5f), x[2], Lanes::add(x[0], x[4])));
    to_four_points(x + 1, 1, 1, put);
    put(5, Lanes::multiply_add(Lanes::fill(-2.5f), x[3], Lanes::add(x[1], x[5])));
  }

  // put(i, i-th number of A' m)
  template <class Put>
  static void from_points(const Vector (&m)[6], Put&& put) {
    from_four_points(m + 1, {m[0], Lanes::zero(), Lanes::zero(), m[5]}, put);
  }
};

template <>
struct Row<2> {
  static constexpr int kPoints = 9;

  template <class Put>
  static void to_points(const Vector (&x)[9], Put&& put) {
    to_four_points(x, 2, 0, put);
    put(4, Lanes::multiply_add(Lanes::fill(-2.5f), x[4], Lanes::add(x[0], x[8])));
    for (int i = 0; i < 4; ++i) put(5 + i, x[2 * i + 1]);
  }

  template <class Put>
  static void from_points(const Vector (&m)[9], Put&& put) {
    from_four_points(m, {m[5], m[6], m[7], Lanes::add(m[4], m[8])}, put);
  }
};

// Tiles first..last of x, as points of their own: [points][tiles][channels].
template <int kStride>
void tiles_to_points(const Winograd& c, int64_t first, int64_t last, int64_t from_tile) {
  constexpr int kSide = Row<kStride>::kPoints;
  for (int64_t tile = first; tile < last; ++tile) {
    const TilePlace place = c.place(tile);
    const float* pixels[kSide * kSide];
    for (int i = 0; i < kSide * kSide; ++i) {
      const int64_t y = place.y * kStride - c.padding + i / kSide * c.dilation;
      const int64_t x = place.x * kStride - c.padding + i % kSide * c.dilation;
      const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width && tile < c.tiles();
      pixels[i] = inside ? c.x + ((place.crop * c.height + y) * c.width + x) * c.c_in : c.zeros;
    }
    float* const to = c.points + (tile - from_tile) * c.pitch_in();
    for (int64_t k = 0; k < c.c_in; k += kWidth) {
      Vector half[kSide][kSide];
      for (int column = 0; column < kSide; ++column) {
        Vector x[kSide];
        for (int row = 0; row < kSide; ++row) x[row] = Lanes::load(pixels[row * kSide + column] + k);
        Row<kStride>::to_points(x, [&](int row, Vector value) { half[row][column] = value; });
      }
      for (int row = 0; row < kSide; ++row)
        Row<kStride>::to_points(half[row], [&](int column, Vector value) {
          Lanes::store(to + (row * kSide + column) * c.plane_in() + k, value);
        });
    }
  }
}

// sums[rows][2 vectors] = a[rows][depth] * b[depth][32 channels, two vectors of them]
inline void product(const float* a, int64_t pitch, const float* b, int64_t depth, float* sums, int64_t out_pitch) {
  Vector sum[kRowsTogether][2];
  for (auto& row : sum) row[0] = row[1] = Lanes::zero();
  for (int64_t d = 0; d < depth; ++d, b += kPanel) {
    const Vector b0 = Lanes::load(b), b1 = Lanes::load(b + kWidth);
    for (int r = 0; r < kRowsTogether; ++r) {
      const Vector spread = Lanes::fill(a[r * pitch + d]);
      sum[r][0] = Lanes::multiply_add(spread, b0, sum[r][0]);
      sum[r][1] = Lanes::multiply_add(spread, b1, sum[r][1]);
    }
  }
  for (int r = 0; r < kRowsTogether; ++r) {
    Lanes::store(sums + r * out_pitch, sum[r][0]);
    Lanes::store(sums + r * out_pitch + kWidth, sum[r][1]);
  }
}

// Units first..last of the products: a unit is one of the points and 32 channels of out, over `tiles` tiles. Of nine
// points in a row the last four have the third tap's weights.
void multiply_points(const Winograd& c, int64_t first, int64_t last, int64_t tiles) {
  const int64_t panels = c.c_out / kPanel, per_group = panels / c.groups, depth = c.c_in / c.groups;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t point = unit / panels, panel = unit % panels, side = c.points_across();
    const int64_t row = point / side < 5 ? point / side : 5, column = point % side < 5 ? point % side : 5;
    const float* const a = c.points + point * c.plane_in() + panel / per_group * depth;
    const float* const b = c.weight + ((row * 6 + column) * panels + panel) * depth * kPanel;
    float* const sums = c.sums + point * c.plane_out() + panel * kPanel;
    for (int64_t tile = 0; tile < tiles; tile += kRowsTogether)
      for (int64_t half = 0; half < kPanel; half += 2 * kWidth)
        product(
            a + tile * c.pitch_in(), c.pitch_in(), b + half, depth, sums + tile * c.pitch_out() + half, c.pitch_out());
  }
}

// The sums of tiles first..last to pixels of out, with bias, what they are added to, and the rectifier.
template <int kStride>
void points_to_tiles(const Winograd& c, int64_t first, int64_t last, int64_t from_tile) {
  constexpr int kSide = Row<kStride>::kPoints;
  const Vector floor = Lanes::fill(c.relu ? 0.0f : -__builtin_inff());
  for (int64_t tile = first; tile < last; ++tile) {
    const TilePlace place = c.place(tile);
    const float* const from = c.sums + (tile - from_tile) * c.pitch_out();
    for (int64_t k = 0; k < c.c_out; k += kWidth) {
      Vector half[4][kSide];
      for (int column = 0; column < kSide; ++column) {
        Vector m[kSide];
        for (int row = 0; row < kSide; ++row) m[row] = Lanes::load(from + (row * kSide + column) * c.plane_out() + k);
        Row<kStride>::from_points(m, [&](int row, Vector value) { half[row][column] = value; });
      }
      const Vector bias = Lanes::load(c.bias + k);
      for (int row = 0; row < 4; ++row)
        Row<kStride>::from_points(half[row], [&](int column, Vector value) {
          const int64_t y = place.y + row * c.dilation, x = place.x + column * c.dilation;
          if (y >= c.rows || x >= c.columns) return;
          float* const to = c.out + ((place.crop * c.rows + y) * c.columns + x) * c.c_out + k;
          value = Lanes::add(value, bias);
          if (c.add) value = Lanes::add(value, Lanes::load(to));
          Lanes::store(to, Lanes::larger(floor, value));
        });
    }
  }
}

template <int kStride>
constexpr WinogradSteps kSteps{tiles_to_points<kStride>, multiply_points, points_to_tiles<kStride>};

WinogradSteps steps_of(int64_t stride) { return stride == 1 ? kSteps<1> : kSteps<2>; }

}  // namespace
}  // namespace dmv_fast
