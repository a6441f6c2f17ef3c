// Some rows times a panel of 32 channels, the inner loop of the convolutions: in float32. Wants a `Lanes` before it.
#pragma once

#include "conv_float32.h"

namespace dmv_fast {
namespace {

using Vector = Lanes::Vector;
constexpr int kWidth = Lanes::kWidth;
constexpr int kRowsTogether = kWidth == 16 ? 8 : 4;  // times two vectors of channels: sums enough to hide the latency
// Lines of weights fetched to L2 before they are needed, 32 KB: a core's own prefetching does not reach beyond a page.
// 2 to 7 % of a frame; 3 KB are too few, 64 KB and fetching to L1 gain less.
constexpr int64_t kAhead = 256;

// Products of float32 numbers, as they are.
struct Float32 {
  using Number = float;
  static constexpr bool kRounds = false;

  struct Scale {  // of sums
    Scale(const float*, int64_t, const float*, int64_t) {}
    Vector operator()(int64_t, int64_t, Vector sum) const { return sum; }
  };
};

// kRowsTogether rows of `depth` numbers, `pitch` apart.
template <class Number>
struct PanelRows {
  const Number* at;
  int64_t pitch, depth;
};

// put(row, channel, vector) for all of rows[kRowsTogether][depth] * b[depth][32]
template <class Put>
inline void multiply_panel(const PanelRows<float>& rows, const float* b, Put&& put) {
  for (int64_t half = 0; half < kPanel; half += 2 * kWidth) {
    Vector sum[kRowsTogether][2];
    for (auto& row : sum) row[0] = row[1] = Lanes::zero();
    const float* line = b + half;
    for (int64_t d = 0; d < rows.depth; ++d, line += kPanel) {
      const Vector b0 = Lanes::load(line), b1 = Lanes::load(line + kWidth);
      __builtin_prefetch(line + kAhead * kPanel, 0, 2);
      __builtin_prefetch(line + kAhead * kPanel + kWidth, 0, 2);
      for (int r = 0; r < kRowsTogether; ++r) {
        const Vector spread = Lanes::fill(rows.at[r * rows.pitch + d]);
        sum[r][0] = Lanes::multiply_add(spread, b0, sum[r][0]);
        sum[r][1] = Lanes::multiply_add(spread, b1, sum[r][1]);
      }
    }
    for (int r = 0; r < kRowsTogether; ++r) {
      put(r, half, sum[r][0]);
      put(r, half + kWidth, sum[r][1]);
    }
  }
}

}  // namespace
}  // namespace dmv_fast
