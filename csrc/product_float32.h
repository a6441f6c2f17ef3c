// 32 keys x 32 queries in float32: each key's number is spread over the lanes and multiplied into a row of queries.
// Wants a `Lanes` and retrieve_loop.h before it.
#pragma once

namespace dmv_fast {
namespace {

struct ProductFloat32 {
  using Element = float;
  static constexpr int kTogether = 1;
  static constexpr int64_t kDepthStep = 1;
  // Accumulators: enough to cover the latency of two multiply-add units, few enough for the registers.
  static constexpr int kRows = Lanes::kWidth == 16 ? 8 : Lanes::kWidth == 8 ? 2 : 1;

  static void begin() {}
  static void end() {}

  template <class Between>
  static void block(
      const float* rows, int64_t stride, const float* queries, int64_t depth, float* logits, Between&& between) {
    for (int group = 0; group < kGroups; ++group) between(group);
    for (int key = 0; key < kBlock; key += kRows) {
      typename Lanes::Vector sum[kRows][kVectors];
      for (auto& row : sum)
        for (auto& part : row) part = Lanes::zero();
      const float* const row = rows + key * stride;
      for (int64_t d = 0; d < depth; ++d)
        for (int i = 0; i < kVectors; ++i) {
          const auto query = Lanes::load(queries + d * kTile + i * Lanes::kWidth);
          for (int r = 0; r < kRows; ++r)
            sum[r][i] = Lanes::multiply_add(Lanes::fill(row[r * stride + d]), query, sum[r][i]);
        }
      for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < kVectors; ++i)
          Lanes::store(logits + (key + r) * kTile + i * Lanes::kWidth, sum[r][i]);
    }
  }
};

}  // namespace
}  // namespace dmv_fast
