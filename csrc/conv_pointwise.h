// 1 x 1 convolution in float32: out = x w, a product of pixels and channels. Wants product_panel.h before it.
#pragma once

namespace dmv_fast {
namespace {

// Pixels first..last of x, read by `stride`, with rows a cache line more than their length apart; zeros up to whole steps.
inline int64_t lay_out(const Pointwise& c, int64_t first, int64_t last, float* to) {
  const int64_t whole = (last - first + kRowsTogether - 1) / kRowsTogether * kRowsTogether;
  for (int64_t pixel = first; pixel < first + whole; ++pixel, to += c.pitch()) {
    const float* const from = c.under(pixel);
    for (int64_t k = 0; k < c.c_in; k += kWidth)
      Lanes::store(to + k, pixel < last ? Lanes::load(from + k) : Lanes::zero());
  }
  return whole;
}

void convolve_pointwise(const Pointwise& c, int64_t first, int64_t last, float* room) {
  const Vector floor = Lanes::fill(c.relu ? 0.0f : -__builtin_inff());
  for (int64_t until; first < last; first = until) {
    until = first + kPixelStep < last ? first + kPixelStep : last;
    const int64_t whole = lay_out(c, first, until, room);
    for (int64_t panel = 0; panel < c.c_out; panel += kPanel)
      for (int64_t row = 0; row < whole; row += kRowsTogether) {
        float* const out = c.out + (first + row) * c.c_out + panel;
        const int64_t rows = until - first - row;
        multiply_panel(
            {room + row * c.pitch(), c.pitch(), c.c_in}, c.weight + panel * c.c_in,
            [&](int r, int64_t channel, Vector sum) {
              if (r >= rows) return;
              float* const to = out + r * c.c_out + channel;
              sum = Lanes::add(sum, Lanes::load(c.bias + panel + channel));
              if (c.add) sum = Lanes::add(sum, Lanes::load(to));
              Lanes::store(to, Lanes::larger(floor, sum));
            });
      }
  }
}

}  // namespace
}  // namespace dmv_fast
