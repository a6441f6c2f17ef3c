// Retrieval for AVX-512 with its bfloat16 dot product.
#include "retrieve_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,bmi,popcnt")
#include "lanes_avx512.h"
#include "numbers.h"
#include "topk.h"
#include "retrieve_loop.h"

namespace dmv_fast {
namespace {

// Pairs of depths: vdpbf16ps adds both products of a key's pair, spread over the lanes, with 16 queries' pairs.
struct ProductBFloat16 {
  using Element = uint16_t;
  static constexpr int kTogether = 2;
  static constexpr int64_t kDepthStep = 2;
  static constexpr int kRows = 8;

  static void begin() {}
  static void end() {}

  template <class Between>
  static void block(
      const uint16_t* rows, int64_t stride, const uint16_t* queries, int64_t depth, float* logits, Between&& between) {
    for (int group = 0; group < kGroups; ++group) between(group);
    for (int key = 0; key < kBlock; key += kRows) {
      __m512 sum[kRows][2];
      for (auto& row : sum) row[0] = row[1] = _mm512_setzero_ps();
      const uint16_t* const row = rows + key * stride;
      for (int64_t d = 0; d < depth; d += 2) {
        const __m512bh low = reinterpret_cast<const __m512bh&>(queries[d * kTile]);
        const __m512bh high = reinterpret_cast<const __m512bh&>(queries[d * kTile + kTile]);
        for (int r = 0; r < kRows; ++r) {
          int32_t pair;
          __builtin_memcpy(&pair, row + r * stride + d, 4);
          const __m512i spread = _mm512_set1_epi32(pair);
          sum[r][0] = _mm512_dpbf16_ps(sum[r][0], reinterpret_cast<const __m512bh&>(spread), low);
          sum[r][1] = _mm512_dpbf16_ps(sum[r][1], reinterpret_cast<const __m512bh&>(spread), high);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        _mm512_store_ps(logits + (key + r) * kTile, sum[r][0]);
        _mm512_store_ps(logits + (key + r) * kTile + 16, sum[r][1]);
      }
    }
  }
};

}  // namespace

RetrieveTiles avx512_bf16_kernel() { return retrieve_tiles<ProductBFloat16, BFloat16>; }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
