// float32 lanes of AVX-512. Included inside a DMV_TARGET_BEGIN region.
#pragma once

#include "retrieve_cpu.h"

namespace dmv_fast {
namespace {

struct Lanes {
  using Vector = __m512;
  static constexpr int kWidth = 16;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector fill(float x) { return _mm512_set1_ps(x); }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector a) { _mm512_storeu_ps(p, a); }
  static Vector load_bits(const int32_t* p) { return _mm512_loadu_ps(p); }
  static void store_bits(int32_t* p, Vector a) { _mm512_storeu_ps(p, a); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector multiply_subtract(Vector a, Vector b, Vector c) { return _mm512_fmsub_ps(a, b, c); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  static Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static Vector divide(Vector a, Vector b) { return _mm512_div_ps(a, b); }
  static Vector smaller(Vector a, Vector b) { return _mm512_min_ps(a, b); }
  static Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }

  using Mask = __mmask16;
  static Mask no_lane() { return 0; }
  static Mask greater(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static Vector choose(Mask mask, Vector a, Vector b) { return _mm512_mask_mov_ps(b, mask, a); }  // mask ? a : b

  // 2^t, relative error 1e-7: 2^(t - floor(t)) by polynomial, 2^floor(t) by scaling. -inf gives 0, NaN stays
  // NaN, and 0 gives 1 exactly.
  static Vector exp2(Vector t) {
    constexpr int kFractionAboveFloor = 0x09;
    const Vector f = _mm512_reduce_ps(t, kFractionAboveFloor);
    Vector p = _mm512_fmadd_ps(fill(0.0018671304f), f, fill(0.00901702978f));
    p = _mm512_fmadd_ps(p, f, fill(0.0557999127f));
    p = _mm512_fmadd_ps(p, f, fill(0.240164444f));
    p = _mm512_fmadd_ps(p, f, fill(0.693151295f));
    p = _mm512_fmadd_ps(p, f, fill(1.0f));
    return _mm512_scalef_ps(p, t);
  }

  // Appends first + lane to the `count` numbers in `list` for each of kTile lanes with x > bound; returns their number.
  static int list_above(const float* x, const Vector (&bound)[2], int first, int32_t* list, int count) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int i = 0; i < 2; ++i) {
      const __mmask16 above = _mm512_cmp_ps_mask(load(x + 16 * i), bound[i], _CMP_GT_OQ);
      const __m512i number = _mm512_add_epi32(lane, _mm512_set1_epi32(first + 16 * i));
      _mm512_storeu_si512(list + count, _mm512_maskz_compress_epi32(above, number));
      count += __builtin_popcount(above);
    }
    return count;
  }
  static bool any_above(const Vector (&x)[2], const Vector (&bound)[2]) {
    return (_mm512_cmp_ps_mask(x[0], bound[0], _CMP_GT_OQ) | _mm512_cmp_ps_mask(x[1], bound[1], _CMP_GT_OQ)) != 0;
  }
};

}  // namespace
}  // namespace dmv_fast
