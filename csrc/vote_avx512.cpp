// Voting for AVX-512 with the bfloat16 dot-product instructions.
#include "vote_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#include "vote_group.h"

namespace dmv_fast {
namespace {

struct VoteBFloat16 {
  static void begin() {}
  static void end() {}

  static void block(
      const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t b_columns, int64_t depth, float* c,
      const float* start = nullptr) {
    constexpr int kRows = 8;
    for (int first = 0; first < 32; first += kRows, a += kRows * a_stride, c += kRows * kVoteRows) {
      __m512 sum[kRows][2];
      for (int r = 0; r < kRows; ++r)
        for (int half = 0; half < 2; ++half)
          sum[r][half] =
              start ? _mm512_loadu_ps(start + (first + r) * kVoteRows + half * 16) : _mm512_setzero_ps();
      for (int64_t d = 0; d < depth; d += 2) {
        const uint16_t* const pairs = b + d * b_columns;
        const __m512i low = _mm512_loadu_si512(pairs), high = _mm512_loadu_si512(pairs + 32);
        for (int r = 0; r < kRows; ++r) {
          int32_t pair;
          __builtin_memcpy(&pair, a + r * a_stride + d, 4);
          const __m512i spread = _mm512_set1_epi32(pair);
          const __m512bh& left = reinterpret_cast<const __m512bh&>(spread);
          sum[r][0] = _mm512_dpbf16_ps(sum[r][0], left, reinterpret_cast<const __m512bh&>(low));
          sum[r][1] = _mm512_dpbf16_ps(sum[r][1], left, reinterpret_cast<const __m512bh&>(high));
        }
      }
      for (int r = 0; r < kRows; ++r) {
        _mm512_storeu_ps(c + r * kVoteRows, sum[r][0]);
        _mm512_storeu_ps(c + r * kVoteRows + 16, sum[r][1]);
      }
    }
  }
};

}  // namespace

VoteLocations vote_avx512_bf16() { return vote_locations<VoteBFloat16>; }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
