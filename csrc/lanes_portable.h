// float32 lanes as the compiler's own vectors (GCC, Clang): SSE2 or NEON as they come, AVX2 inside its target region.
#pragma once

#include "retrieve_cpu.h"

#ifndef DMV_LANES
#define DMV_LANES 4
#endif

namespace dmv_fast {
namespace {

struct Lanes {
  static constexpr int kWidth = DMV_LANES;
  typedef float Vector __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
  typedef int32_t Integers __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
  static constexpr int kVectors = kTile / kWidth;

  static Vector zero() { return Vector{}; }
  static Vector fill(float x) { return x - Vector{}; }
  static Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
  static void store(float* p, Vector a) { *reinterpret_cast<Vector*>(p) = a; }
  static Vector load_bits(const int32_t* p) { return *reinterpret_cast<const Vector*>(p); }
  static void store_bits(int32_t* p, Vector a) { *reinterpret_cast<Vector*>(p) = a; }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
  static Vector multiply_subtract(Vector a, Vector b, Vector c) { return a * b - c; }
  static Vector add(Vector a, Vector b) { return a + b; }
  static Vector subtract(Vector a, Vector b) { return a - b; }
  static Vector multiply(Vector a, Vector b) { return a * b; }
  static Vector divide(Vector a, Vector b) { return a / b; }
  static Vector smaller(Vector a, Vector b) { return a < b ? a : b; }
  static Vector larger(Vector a, Vector b) { return a > b ? a : b; }

  using Mask = Integers;
  static Mask no_lane() { return Integers{}; }
  static Mask greater(Vector a, Vector b) { return a > b; }
  static Vector choose(Mask mask, Vector a, Vector b) { return mask ? a : b; }

  // 2^t for t <= 0 (a little above by rounding), relative error 1e-7; 0 below 2^-126, NaN stays NaN,
  // and 0 gives 1 exactly.
  static Vector exp2(Vector t) {
    const Integers under = t < -126.0f;
    const Vector safe = under ? Vector{} : t;
    Integers whole = __builtin_convertvector(safe, Integers);
    whole += __builtin_convertvector(whole, Vector) > safe;  // a comparison is -1 where true: floor from truncation
    const Vector f = safe - __builtin_convertvector(whole, Vector);
    Vector p = 0.0018671304f * f + 0.00901702978f;
    p = p * f + 0.0557999127f;
    p = p * f + 0.240164444f;
    p = p * f + 0.693151295f;
    p = p * f + 1.0f;
    const Integers scale = (whole + 127) << 23;
    return under ? Vector{} : p * reinterpret_cast<const Vector&>(scale);
  }

  // Appends first + lane to the `count` numbers in `list` for each of kTile lanes with x > bound; returns their number.
  static int list_above(const float* x, const Vector (&bound)[kVectors], int first, int32_t* list, int count) {
    for (int i = 0; i < kVectors; ++i) {
      const Integers above = load(x + i * kWidth) > bound[i];
      for (int lane = 0; lane < kWidth; ++lane) {
        list[count] = first + i * kWidth + lane;
        count -= above[lane];
      }
    }
    return count;
  }
  static bool any_above(const Vector (&x)[kVectors], const Vector (&bound)[kVectors]) {
    Integers found = x[0] > bound[0];
    for (int i = 1; i < kVectors; ++i) found |= x[i] > bound[i];
    int32_t any = 0;
    for (int lane = 0; lane < kWidth; ++lane) any |= found[lane];
    return any != 0;
  }
};

}  // namespace
}  // namespace dmv_fast
