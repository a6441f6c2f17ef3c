// The voting net's numbers in AVX-512: to bfloat16 and its pairs, powers of two, transposing. Included inside a
// DMV_TARGET_BEGIN region.
#pragma once

namespace dmv_fast {
namespace {

// float32 lanes of two rows, rounded to bfloat16 (ties away from zero), as pairs. vcvtne2ps2bf16 and the permutation
// that it wants take half as long again.
inline __m512i pairs_of(__m512 even, __m512 odd) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
  const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
  return _mm512_ternarylogic_epi32(low, high, upper, 0xf8);  // low | (high & upper)
}

// The same in one instruction, but cut off, not rounded: too small by kCut on the average, no more scattered.
inline __m512i pairs_cut(__m512 even, __m512 odd) {
  const __m512i halves = _mm512_broadcast_i32x4(_mm_set_epi8(0, 0, 15, 14, 0, 0, 11, 10, 0, 0, 7, 6, 0, 0, 3, 2));
  return _mm512_mask_shuffle_epi8(
      _mm512_castps_si512(odd), 0x3333333333333333, _mm512_castps_si512(even), halves);
}
constexpr float kCut = 1.00282f;  // 1 + 2^-8 / (2 ln 2)

// 2^t in the lanes of the mask, relative error 2e-3, half of what cutting the result off to bfloat16 scatters it by;
// else 0.
inline __m512 exp2_rough(__mmask16 mask, __m512 t) {
  constexpr int kFractionAboveFloor = 0x09;
  const __m512 f = _mm512_reduce_ps(t, kFractionAboveFloor);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.33718932f), f, _mm512_set1_ps(0.6576367f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.00172461f));
  return _mm512_maskz_scalef_ps(mask, p, t);
}

// 16 x 16 words of 32 bits: to[j][i] = from[i][j]. Strides in words.
inline void transpose16(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * from_stride);
  for (int i = 0; i < 16; i += 4) {
    const __m512i low0 = _mm512_unpacklo_epi32(a[i], a[i + 1]), high0 = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    const __m512i low1 = _mm512_unpacklo_epi32(a[i + 2], a[i + 3]), high1 = _mm512_unpackhi_epi32(a[i + 2], a[i + 3]);
    b[i] = _mm512_unpacklo_epi64(low0, low1);
    b[i + 1] = _mm512_unpackhi_epi64(low0, low1);
    b[i + 2] = _mm512_unpacklo_epi64(high0, high1);
    b[i + 3] = _mm512_unpackhi_epi64(high0, high1);
  }
  for (int i = 0; i < 4; ++i) {  // b[4 q + i] holds, in each quarter p, column 4 p + i of rows 4 q .. 4 q + 3
    const __m512i even01 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), odd01 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(even01, even23, 0x88));
    _mm512_storeu_si512(to + (i + 4) * to_stride, _mm512_shuffle_i32x4(odd01, odd23, 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_stride, _mm512_shuffle_i32x4(even01, even23, 0xdd));
    _mm512_storeu_si512(to + (i + 12) * to_stride, _mm512_shuffle_i32x4(odd01, odd23, 0xdd));
  }
}

}  // namespace
}  // namespace dmv_fast
