// 32 keys x 32 queries in bfloat16: vdpbf16ps adds both products of a key's pair of depths, spread over the lanes, with
// 16 queries' pairs. Wants retrieve_loop.h before it.
#pragma once

namespace dmv_fast {
namespace {

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
    multiply(rows, stride, queries, depth, logits);
  }

  // Out of line: inlined here and there, GCC keeps the queries in registers at some places only, and takes twice the time
  // at the others.
  __attribute__((noinline)) static void multiply(
      const uint16_t* rows, int64_t stride, const uint16_t* queries, int64_t depth, float* logits) {
    for (int key = 0; key < kBlock; key += kRows, logits += kRows * kTile) {
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
      for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < 2; ++i) _mm512_store_ps(logits + r * kTile + 16 * i, sum[r][i]);
    }
  }
};

}  // namespace
}  // namespace dmv_fast
