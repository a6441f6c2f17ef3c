// 1 x 1 convolution: out = x w, a product of pixels and channels. Wants product_panel.h before it.
#pragma once

namespace dmv_fast {
namespace {

// `pixels` of x from `first` on, read by `stride`, to rows a cache line more than their length apart; zeros up to `whole`.
template <class Product, class Number>
void lay_out(const Pointwise& c, int64_t first, int64_t pixels, int64_t whole, Number* to, float* scales) {
  const auto from = [&](int64_t i) { return c.under(first + i); };
  const auto at = [&](int64_t i) { return to + i * c.pitch(); };
  if constexpr (Product::kRounds)
    Product::round_rows(pixels, c.c_in, from, at, [&](int64_t i, float scale) { scales[i] = scale; });
  else
    for (int64_t i = 0; i < pixels; ++i) __builtin_memcpy(at(i), from(i), c.c_in * sizeof(Number));
  __builtin_memset(to + pixels * c.pitch(), 0, (whole - pixels) * c.pitch() * sizeof(Number));
}

// room: of kPixelStep rows, and then their scales.
template <class Product>
void convolve_pointwise(const Pointwise& c, int64_t first, int64_t last, void* room) {
  using Number = typename Product::Number;
  Number* const rows = static_cast<Number*>(room);
  float* const scales = reinterpret_cast<float*>(rows + kPixelStep * c.pitch());
  const Number* const weight = static_cast<const Number*>(c.weight);
  const Vector floor = Lanes::fill(c.relu ? 0.0f : -__builtin_inff());
  for (int64_t until; first < last; first = until) {
    until = first + kPixelStep < last ? first + kPixelStep : last;
    const int64_t whole = (until - first + kRowsTogether - 1) / kRowsTogether * kRowsTogether;
    lay_out<Product>(c, first, until - first, whole, rows, scales);
    for (int64_t panel = 0; panel < c.c_out; panel += kPanel)
      for (int64_t row = 0; row < whole; row += kRowsTogether) {
        float* const out = c.out + (first + row) * c.c_out + panel;
        const int64_t left = until - first - row;
        const typename Product::Scale scale(scales, row, c.weight_scale, panel);
        multiply_panel(
            PanelRows<Number>{rows + row * c.pitch(), c.pitch(), c.c_in}, weight + panel * c.c_in,
            [&](int r, int64_t channel, Vector sum) {
              if (r >= left) return;
              float* const to = out + r * c.c_out + channel;
              sum = Lanes::add(scale(r, channel, sum), Lanes::load(c.bias + panel + channel));
              if (c.add) sum = Lanes::add(sum, Lanes::load(to));
              Lanes::store(to, Lanes::larger(floor, sum));
            });
      }
  }
}

}  // namespace
}  // namespace dmv_fast
