// Voting for AVX-512 with the bfloat16 dot-product instructions.
#include "vote_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#include "vote_group.h"

namespace dmv_fast {
namespace {

class VoteBFloat16 {
 public:
  template <class Take>
  void left(const uint16_t* a, int count, const uint16_t* b, Take&& take) {
    for (int i = 0; i < count; ++i, a += 16 * kVoteWidth) {
      multiply<16, 2>(a, kVoteWidth, b, kVoteWidth, nullptr, part_);
      take(i, part_);
    }
  }

  template <class Take>
  void right(const uint16_t* a, const uint16_t* b, int count, Take&& take) {
    for (int i = 0; i < count; ++i, b += 16 * kVoteWidth) {
      multiply<32, 1>(a, kVoteWidth, b, kVoteWidth, nullptr, part_);
      take(i, part_);
    }
  }

  template <class Between>
  void logits(const uint16_t* a, int64_t stride, const uint16_t* b, float* c, Between&& between) {
    for (int piece = 0; piece < kPieces; ++piece) between(piece);
    multiply<32, 2>(a, stride, b, 32, nullptr, c);
  }

  void add(const uint16_t* a, const uint16_t* b, int steps, float* c) {
    for (int i = 0; i < steps; ++i, a += kRowsC, b += 32 * 32) multiply<32, 2>(a, 32, b, 32, c, c);
  }

 private:
  // c[rows][16 * vectors] = a[rows][depth] * b + start, b in pairs; nothing where start is null.
  template <int rows, int vectors>
  static void multiply(
      const uint16_t* a, int64_t stride, const uint16_t* b, int64_t depth, const float* start, float* c) {
    constexpr int kTogether = 16 / vectors, kColumns = 16 * vectors;
    for (int first = 0; first < rows; first += kTogether, a += kTogether * stride) {
      __m512 sum[kTogether][vectors];
      for (int r = 0; r < kTogether; ++r)
        for (int i = 0; i < vectors; ++i)
          sum[r][i] = start ? _mm512_load_ps(start + (first + r) * kColumns + i * 16) : _mm512_setzero_ps();
      for (int64_t d = 0; d < depth; d += 2) {
        __m512i right[vectors];
        for (int i = 0; i < vectors; ++i) right[i] = _mm512_loadu_si512(b + d * kColumns + i * 32);
        for (int r = 0; r < kTogether; ++r) {
          int32_t pair;
          __builtin_memcpy(&pair, a + r * stride + d, 4);
          const __m512i spread = _mm512_set1_epi32(pair);
          for (int i = 0; i < vectors; ++i)
            sum[r][i] = _mm512_dpbf16_ps(
                sum[r][i], reinterpret_cast<const __m512bh&>(spread), reinterpret_cast<const __m512bh&>(right[i]));
        }
      }
      for (int r = 0; r < kTogether; ++r)
        for (int i = 0; i < vectors; ++i) _mm512_store_ps(c + (first + r) * kColumns + i * 16, sum[r][i]);
    }
  }

  alignas(64) float part_[16 * kVoteRows];
};

}  // namespace

VoteLocations vote_avx512_bf16() { return vote_locations<VoteBFloat16>; }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
