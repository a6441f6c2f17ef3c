// 3 x 3 convolution by Winograd's minimal filtering: out = A' [(G w G') * (B' x B)] A.
//
// Four by four pixels of out take 36 products a pair of channels, F(4 x 4, 3 x 3), where the sum itself has 144. With a
// stride of 2 they take 81: of nine pixels in a row the five even ones meet two taps, F(4, 2), and the four odd ones
// the third tap alone. With points at 0, +-sqrt(1/2), +-sqrt(2) and infinity (0 only for three taps) the rounding stays
// near that of the sum: 1e-6 of the largest number; a NaN fills its tile. A dilation of d makes d * d maps of every d-th
// pixel, each cut into tiles by itself. `Product` is how B' x B and G w G' are multiplied: Float32 or Int16. Wants
// product_panel.h before it, and product_panel_int16.h for that.
#pragma once

namespace dmv_fast {
namespace {

constexpr float kRoot = 1.41421356f, kHalfRoot = 0.70710678f;

// Of x(0), x(1), x(2), x(3): their points at both signs of a root r, put(first) and put(first + 1). r^2 is `square`.
template <class Load, class Put>
inline void to_pair(float root, float square, Load&& x, int first, Put&& put) {
  const Vector even = Lanes::subtract(x(3), Lanes::multiply(Lanes::fill(1 / square), x(1)));
  const Vector odd = Lanes::multiply_subtract(Lanes::fill(root), x(2), Lanes::multiply(Lanes::fill(1 / root), x(0)));
  put(first, Lanes::add(even, odd));
  put(first + 1, Lanes::subtract(even, odd));
}

// And the way back, of which a group is pixels 0 and 2 or 1 and 3: of products m(0) .. m(3) of those points, added to what
// the others give.
template <int kGroup, class Load, class Put>
inline void from_four_points(Load&& m, Vector first, Vector second, Put&& put) {
  const Vector a = kGroup == 0 ? Lanes::add(m(0), m(1)) : Lanes::subtract(m(0), m(1));
  const Vector b = kGroup == 0 ? Lanes::add(m(2), m(3)) : Lanes::subtract(m(2), m(3));
  if constexpr (kGroup == 0) {
    put(0, Lanes::add(first, Lanes::add(a, b)));
    put(2, Lanes::multiply_add(Lanes::fill(0.5f), a, Lanes::multiply_add(Lanes::fill(2), b, second)));
  } else {
    put(1, Lanes::multiply_add(Lanes::fill(kHalfRoot), a, Lanes::multiply_add(Lanes::fill(kRoot), b, first)));
    put(3, Lanes::multiply_add(Lanes::fill(kHalfRoot / 2), a, Lanes::multiply_add(Lanes::fill(2 * kRoot), b, second)));
  }
}

// B' x, A' m of a stride. Points come in groups, of which one after the other is made, so that a group of rows of
// points stays in registers.
template <int kStride>
struct Row;

template <>
struct Row<1> {
  static constexpr int kPoints = 6, kGroups = 4;
  static constexpr int kFirst[kGroups + 1] = {0, 1, 3, 5, 6};

  // put(i, i-th number of B' x) of a group
  template <int kGroup, class Load, class Put>
  static void to_points(Load&& x, Put&& put) {
    if constexpr (kGroup == 0) put(0, Lanes::multiply_add(Lanes::fill(-2.5f), x(2), Lanes::add(x(0), x(4))));
    if constexpr (kGroup == 1) to_pair(kHalfRoot, 0.5f, [&](int i) { return x(i + 1); }, 1, put);
    if constexpr (kGroup == 2) to_pair(kRoot, 2.0f, [&](int i) { return x(i + 1); }, 3, put);
    if constexpr (kGroup == 3) put(5, Lanes::multiply_add(Lanes::fill(-2.5f), x(3), Lanes::add(x(1), x(5))));
  }

  // put(i, i-th number of A' m) of a group
  template <int kGroup, class Load, class Put>
  static void from_points(Load&& m, Put&& put) {
    const auto four = [&](int i) { return m(i + 1); };
    if constexpr (kGroup == 0)
      from_four_points<0>(four, m(0), Lanes::zero(), put);
    else
      from_four_points<1>(four, Lanes::zero(), m(5), put);
  }
};

template <>
struct Row<2> {
  static constexpr int kPoints = 9, kGroups = 4;
  static constexpr int kFirst[kGroups + 1] = {0, 2, 4, 5, 9};

  template <int kGroup, class Load, class Put>
  static void to_points(Load&& x, Put&& put) {
    if constexpr (kGroup == 0) to_pair(kHalfRoot, 0.5f, [&](int i) { return x(2 * i); }, 0, put);
    if constexpr (kGroup == 1) to_pair(kRoot, 2.0f, [&](int i) { return x(2 * i); }, 2, put);
    if constexpr (kGroup == 2) put(4, Lanes::multiply_add(Lanes::fill(-2.5f), x(4), Lanes::add(x(0), x(8))));
    if constexpr (kGroup == 3)
      for (int i = 0; i < 4; ++i) put(5 + i, x(2 * i + 1));
  }

  template <int kGroup, class Load, class Put>
  static void from_points(Load&& m, Put&& put) {
    if constexpr (kGroup == 0)
      from_four_points<0>(m, m(5), m(7), put);
    else
      from_four_points<1>(m, m(6), Lanes::add(m(4), m(8)), put);
  }
};

// A group of rows of a tile's points: down the columns of pixels, then along each row.
template <int kStride, int kGroup>
inline void group_to_points(const float* const* pixels, int64_t k, float* to, int64_t plane) {
  using Line = Row<kStride>;
  constexpr int kSide = Line::kPoints, kFirst = Line::kFirst[kGroup], kRows = Line::kFirst[kGroup + 1] - kFirst;
  Vector half[kRows][kSide];
#pragma GCC unroll 9
  for (int column = 0; column < kSide; ++column)
    Line::template to_points<kGroup>(
        [&](int row) { return Lanes::load(pixels[row * kSide + column] + k); },
        [&](int row, Vector value) { half[row - kFirst][column] = value; });
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
    const auto x = [&](int column) { return half[row][column]; };
    const auto put = [&](int column, Vector value) {
      Lanes::store(to + ((kFirst + row) * kSide + column) * plane + k, value);
    };
    Line::template to_points<0>(x, put);
    Line::template to_points<1>(x, put);
    Line::template to_points<2>(x, put);
    Line::template to_points<3>(x, put);
  }
}

// Tiles first..last of x, as points of their own: [points][tiles][channels].
template <int kStride, class Product>
void tiles_to_points(const Winograd& c, int64_t first, int64_t last, int64_t from_tile, int64_t part) {
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
    auto* const points = static_cast<typename Product::Number*>(c.points) + (tile - from_tile) * c.pitch_in();
    float* to;
    int64_t plane;
    if constexpr (Product::kRounds)
      to = c.rounding + part * c.rounding_of_part(), plane = c.plane_rounding();
    else
      to = points, plane = c.plane_in();
    for (int64_t k = 0; k < c.c_in; k += kWidth) {
      group_to_points<kStride, 0>(pixels, k, to, plane);
      group_to_points<kStride, 1>(pixels, k, to, plane);
      group_to_points<kStride, 2>(pixels, k, to, plane);
      group_to_points<kStride, 3>(pixels, k, to, plane);
    }
    if constexpr (Product::kRounds)
      Product::round_rows(
          c.points_of_all(), c.c_in, [&](int64_t i) { return to + i * plane; },
          [&](int64_t i) { return points + i * c.plane_in(); },
          [&](int64_t i, float scale) { c.point_scale[i * c.together + tile - from_tile] = scale; });
  }
}

// Units first..last of the products: a unit is one of the points and 32 channels of out, over `tiles` tiles. Of nine
// points in a row the last four have the third tap's weights.
template <class Product>
void multiply_points(const Winograd& c, int64_t first, int64_t last, int64_t tiles) {
  const int64_t panels = c.c_out / kPanel, per_group = panels / c.groups, depth = c.c_in / c.groups;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t point = unit / panels, panel = unit % panels, side = c.points_across();
    const int64_t row = point / side < 5 ? point / side : 5, column = point % side < 5 ? point % side : 5;
    using Number = typename Product::Number;
    const int64_t weight = (row * 6 + column) * panels + panel;
    const Number* const a = static_cast<const Number*>(c.points) + point * c.plane_in() + panel / per_group * depth;
    const Number* const b = static_cast<const Number*>(c.weight) + weight * depth * kPanel;
    float* const sums = c.sums + point * c.plane_out() + panel * kPanel;
    for (int64_t tile = 0; tile < tiles; tile += kRowsTogether) {
      float* const to = sums + tile * c.pitch_out();
      const typename Product::Scale scale(c.point_scale, point * c.together + tile, c.weight_scale, weight * kPanel);
      multiply_panel(
          PanelRows<Number>{a + tile * c.pitch_in(), c.pitch_in(), depth}, b,
          [&](int row, int64_t channel, Vector sum) {
            Lanes::store(to + row * c.pitch_out() + channel, scale(row, channel, sum));
          });
    }
  }
}

// Two rows of a tile's pixels: down the columns of points, then along each row.
template <int kStride, int kGroup, class Put>
inline void group_to_pixels(const float* from, int64_t plane, Put&& put) {
  constexpr int kSide = Row<kStride>::kPoints;
  Vector half[2][kSide];
#pragma GCC unroll 9
  for (int column = 0; column < kSide; ++column)
    Row<kStride>::template from_points<kGroup>(
        [&](int row) { return Lanes::load(from + (row * kSide + column) * plane); },
        [&](int row, Vector value) { half[row / 2][column] = value; });
#pragma GCC unroll 2
  for (int row = 0; row < 2; ++row) {
    const auto m = [&](int column) { return half[row][column]; };
    const auto here = [&](int column, Vector value) { put((2 * row + kGroup) * 4 + column, value); };
    Row<kStride>::template from_points<0>(m, here);
    Row<kStride>::template from_points<1>(m, here);
  }
}

// The sums of tiles first..last to pixels of out, with bias, what they are added to, and the rectifier.
template <int kStride>
void points_to_tiles(const Winograd& c, int64_t first, int64_t last, int64_t from_tile) {
  const Vector floor = Lanes::fill(c.relu ? 0.0f : -__builtin_inff());
  const bool add = c.add;
  for (int64_t tile = first; tile < last; ++tile) {
    const TilePlace place = c.place(tile);
    const float* const from = c.sums + (tile - from_tile) * c.pitch_out();
    float* pixels[16];  // null beyond the map
    for (int i = 0; i < 16; ++i) {
      const int64_t y = place.y + i / 4 * c.dilation, x = place.x + i % 4 * c.dilation;
      const bool inside = y < c.rows && x < c.columns;
      pixels[i] = inside ? c.out + ((place.crop * c.rows + y) * c.columns + x) * c.c_out : nullptr;
    }
    for (int64_t k = 0; k < c.c_out; k += kWidth) {
      const Vector bias = Lanes::load(c.bias + k);
      const auto put = [&](int pixel, Vector value) {
        float* const to = pixels[pixel];
        if (!to) return;
        value = Lanes::add(value, bias);
        if (add) value = Lanes::add(value, Lanes::load(to + k));
        Lanes::store(to + k, Lanes::larger(floor, value));
      };
      group_to_pixels<kStride, 0>(from + k, c.plane_out(), put);
      group_to_pixels<kStride, 1>(from + k, c.plane_out(), put);
    }
  }
}

template <int kStride, class Product>
constexpr WinogradSteps kSteps{tiles_to_points<kStride, Product>, multiply_points<Product>, points_to_tiles<kStride>};

template <class Product>
WinogradSteps steps_of(int64_t stride) {
  return stride == 1 ? kSteps<1, Product> : kSteps<2, Product>;
}

}  // namespace
}  // namespace dmv_fast
