// Some rows times a panel of 32 channels in whole numbers of 16 bits, and how rows become such: vpdpwssd adds both products
// of a pair of them in one instruction, where float32 takes two. Wants product_panel.h before it, and AVX512_VNNI.
//
// A row x is stored as round(x s), s = kLongestRow / |x|; a column w of weights likewise, so that |w| is at most 65,000
// (whole_panels in runtime/fold.py). By Cauchy-Schwarz no sum of their products then leaves 32 bits, and none has to be
// watched. Rounding x moves a sum by 1e-5 of |x||w| as a rule, and by sqrt(depth) / 65,534 of it at most. A NaN, an
// infinity or a number over 1e19 makes its row NaN; a row shorter than 1e-18 counts as zeros.
#pragma once

namespace dmv_fast {
namespace {

constexpr float kLongestRow = 32767.0f;  // so that no number of it leaves 16 bits
constexpr float kShortestRow = 1e-18f;   // whose squares are not yet denormal
constexpr int kRoundedTogether = 16;     // rows, whose lengths are found together

// The sum of each vector's lanes, in a lane of its own.
inline Vector sums_of_lanes(const Vector (&of)[kRoundedTogether]) {
  __m512 eight[8], four[4];
  for (int i = 0; i < 8; ++i)
    eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(of[i], of[i + 8], 0x44), _mm512_shuffle_f32x4(of[i], of[i + 8], 0xEE));
  for (int i = 0; i < 4; ++i)
    four[i] = _mm512_add_ps(
        _mm512_shuffle_f32x4(eight[i], eight[i + 4], 0x88), _mm512_shuffle_f32x4(eight[i], eight[i + 4], 0xDD));
  __m512d two[2];  // in each quarter, of two vectors a half of the lanes' sum and then the other
  for (int i = 0; i < 2; ++i)
    two[i] = _mm512_castps_pd(
        _mm512_add_ps(_mm512_unpacklo_ps(four[2 * i], four[2 * i + 1]), _mm512_unpackhi_ps(four[2 * i], four[2 * i + 1])));
  const __m512 sums = _mm512_add_ps(
      _mm512_castpd_ps(_mm512_unpacklo_pd(two[0], two[1])), _mm512_castpd_ps(_mm512_unpackhi_pd(two[0], two[1])));
  return _mm512_shuffle_f32x4(sums, sums, 0xD8);  // quarters lie in the order 0, 8, 4, 12
}

// Products of whole numbers.
struct Int16 {
  using Number = int16_t;
  static constexpr bool kRounds = true;

  // Of rows and of columns.
  struct Scale {
    const float *rows, *channels;
    Scale(const float* of_rows, int64_t row, const float* of_channels, int64_t channel)
        : rows(of_rows + row), channels(of_channels + channel) {}
    Vector operator()(int64_t row, int64_t channel, Vector sum) const {
      return Lanes::multiply(Lanes::multiply(sum, Lanes::fill(rows[row])), Lanes::load(channels + channel));
    }
  };

  // Rows, `from(i)`, to whole numbers at `to(i)` times a scale, put(i, scale).
  template <class From, class To, class Put>
  static void round_rows(int64_t rows, int64_t depth, From&& from, To&& to, Put&& put) {
    for (int64_t first = 0; first < rows; first += kRoundedTogether) {
      const int64_t some = rows - first < kRoundedTogether ? rows - first : kRoundedTogether;
      float scale[kRoundedTogether];
      round_some(
          some, depth, [&](int64_t i) { return from(first + i); }, [&](int64_t i) { return to(first + i); }, scale);
      for (int64_t i = 0; i < some; ++i) put(first + i, scale[i]);
    }
  }

 private:
  template <class From, class To>
  static void round_some(int64_t rows, int64_t depth, From&& from, To&& to, float (&scale)[kRoundedTogether]) {
    Vector squares[kRoundedTogether];
    for (int i = 0; i < kRoundedTogether; ++i) {
      squares[i] = Lanes::zero();
      if (i >= rows) continue;
      const float* const row = from(i);
      for (int64_t k = 0; k < depth; k += kWidth) {
        const Vector x = Lanes::load(row + k);
        squares[i] = Lanes::multiply_add(x, x, squares[i]);
      }
    }
    Vector length = _mm512_sqrt_ps(sums_of_lanes(squares));
    length = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(length, Lanes::fill(kShortestRow), _CMP_NLT_UQ), length);  // or NaN
    float fine[kRoundedTogether];
    Lanes::store(fine, Lanes::divide(Lanes::fill(kLongestRow), length));
    Lanes::store(scale, Lanes::multiply(length, Lanes::fill(1 / kLongestRow)));
    for (int64_t i = 0; i < rows; ++i) {
      const float* const row = from(i);
      int16_t* const whole = to(i);
      for (int64_t k = 0; k < depth; k += kWidth) {
        // What is not finite becomes 0x80000000, and so 0: the scale is then 0, NaN or infinite.
        const __m512i x = _mm512_cvtps_epi32(Lanes::multiply(Lanes::load(row + k), Lanes::fill(fine[i])));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(whole + k), _mm512_cvtepi32_epi16(x));
      }
    }
  }
};

// With the intrinsic GCC 12 copies every sum and keeps some in memory: 1.1 to 1.5 times as long.
inline __m512i add_products(__m512i sum, __m512i a, __m512i b) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

// put(row, channel, vector) for all of rows[kRowsTogether][depth] * b[depth / 2][32][2]
template <class Put>
inline void multiply_panel(const PanelRows<int16_t>& rows, const int16_t* b, Put&& put) {
  __m512i sum[kRowsTogether][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRowsTogether; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
  for (int64_t d = 0; d < rows.depth; d += 2, b += 2 * kPanel) {
    const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + kPanel);
    __builtin_prefetch(b + 2 * kAhead * kPanel, 0, 2);
    __builtin_prefetch(b + 2 * kAhead * kPanel + kPanel, 0, 2);
#pragma GCC unroll 8
    for (int r = 0; r < kRowsTogether; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, rows.at + r * rows.pitch + d, sizeof(pair));
      const __m512i spread = _mm512_set1_epi32(pair);
      sum[r][0] = add_products(sum[r][0], spread, b0);
      sum[r][1] = add_products(sum[r][1], spread, b1);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRowsTogether; ++r) {
    put(r, 0, _mm512_cvtepi32_ps(sum[r][0]));
    put(r, kWidth, _mm512_cvtepi32_ps(sum[r][1]));
  }
}

}  // namespace
}  // namespace dmv_fast
