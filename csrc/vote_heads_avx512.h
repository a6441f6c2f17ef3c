// Heads (see vote_float32.h) in the lanes of AVX-512: those of two candidates. Included inside a DMV_TARGET_BEGIN
// region.
#pragma once

namespace dmv_fast {
namespace {

struct Heads {
  static constexpr int kCandidates = 2;
  static __m512 load(const float* p, int64_t stride) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(p)), _mm256_loadu_ps(p + stride), 1);
  }
  static __m512 load_same(const float* p) { return _mm512_broadcast_f32x8(_mm256_loadu_ps(p)); }
  static void store(float* p, int64_t stride, __m512 v) {
    _mm256_storeu_ps(p, _mm512_castps512_ps256(v));
    _mm256_storeu_ps(p + stride, _mm512_extractf32x8_ps(v, 1));
  }
};

}  // namespace
}  // namespace dmv_fast
