// bfloat16 and float16 as bits, to float32 and back, in code that the compiler turns into vectors. Included once for
// each instruction set, so that no copy of a function made for one of them can stand in for another's.
#pragma once

#include <cstdint>

namespace dmv_fast {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
inline float float_from(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

inline void convert(float& to, float from) { to = from; }
inline void convert(float& to, BFloat16 from) { to = float_from(uint32_t(from.bits) << 16); }
inline void convert(uint16_t& to, BFloat16 from) { to = from.bits; }

// Exponent and fraction moved to float32's places are the value divided by 2^112; all ones is infinity or NaN.
inline void convert(float& to, Float16 from) {
  const uint32_t magnitude = uint32_t(from.bits & 0x7fff) << 13;
  const uint32_t special = magnitude >= 0x7c00u << 13 ? 0xffu << 23 : 0u;
  to = float_from(bits_of(float_from(magnitude) * 0x1p112f) | special | uint32_t(from.bits & 0x8000) << 16);
}

// To nearest, ties to even; a NaN stays one.
inline void convert(BFloat16& to, float from) {
  const uint32_t bits = bits_of(from), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.bits = static_cast<uint16_t>(from != from ? 0x7fc0 : rounded);
}

// The same: adding 2^k with the right k leaves exactly float16's fraction (or its subnormals' last place) rounded in
// the low bits of a float32.
inline void convert(Float16& to, float from) {
  const uint32_t bits = bits_of(from), magnitude = bits & 0x7fffffff;
  const uint32_t subnormal = bits_of(float_from(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? 0x7c00 : half;
  half = magnitude > (255u << 23) ? 0x7e00 : half;
  to.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}

}  // namespace
}  // namespace dmv_fast
