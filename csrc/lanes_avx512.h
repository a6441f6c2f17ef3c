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
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector multiply_subtract(Vector a, Vector b, Vector c) { return _mm512_fmsub_ps(a, b, c); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  static Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static Vector smaller(Vector a, Vector b) { return _mm512_min_ps(a, b); }
  static Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }

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

  // Bit i says x[i] > bound[i], for kTile lanes.
  static uint64_t above(const float* x, const float* bound) {
    const uint32_t low = _mm512_cmp_ps_mask(load(x), load(bound), _CMP_GT_OQ);
    const uint32_t high = _mm512_cmp_ps_mask(load(x + 16), load(bound + 16), _CMP_GT_OQ);
    return low | high << 16;
  }
  static bool any_above(const Vector (&x)[2], const Vector (&bound)[2]) {
    return (_mm512_cmp_ps_mask(x[0], bound[0], _CMP_GT_OQ) | _mm512_cmp_ps_mask(x[1], bound[1], _CMP_GT_OQ)) != 0;
  }

  // Puts (x, id) into lists of kMaxK places sorted from the highest down, behind what equals it, and drops the last.
  // Only the first 16 places are kept up where k does not reach further.
  static void insert(float* best, int32_t* index, int k, float x, int32_t id) {
    const Vector score = fill(x);
    const __m512i number = _mm512_set1_epi32(id);
    const Vector low = load(best);
    const __m512i low_index = _mm512_loadu_si512(index);
    const uint32_t before = _mm512_cmp_ps_mask(low, score, _CMP_GE_OQ);
    const __mmask16 moved = static_cast<__mmask16>(~(before + 1));
    store(best, _mm512_mask_expand_ps(score, moved, low));
    _mm512_storeu_si512(index, _mm512_mask_expand_epi32(number, moved, low_index));
    if (k <= 16) return;
    const Vector high = load(best + 16);
    const __m512i high_index = _mm512_loadu_si512(index + 16);
    const uint32_t before_high = _mm512_cmp_ps_mask(high, score, _CMP_GE_OQ);
    // What enters the upper half at its front: the lower half's last, unless the new one belongs up here.
    const bool up = before == 0xffff;
    const Vector carry = up ? score : _mm512_permutexvar_ps(_mm512_set1_epi32(15), low);
    const __m512i carry_index = up ? number : _mm512_permutexvar_epi32(_mm512_set1_epi32(15), low_index);
    const __mmask16 moved_high = static_cast<__mmask16>(up ? ~(before_high + 1) : ~1u);
    store(best + 16, _mm512_mask_expand_ps(carry, moved_high, high));
    _mm512_storeu_si512(index + 16, _mm512_mask_expand_epi32(carry_index, moved_high, high_index));
  }
};

}  // namespace
}  // namespace dmv_fast
