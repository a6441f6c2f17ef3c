// Products of the float32 voting: some rows times 32 columns. Wants a `Lanes` before it.
#pragma once

#include "vote_cpu.h"

namespace dmv_fast {
namespace {

using Vector = Lanes::Vector;

constexpr int kColumns = 32;
constexpr int kVectors = kColumns / Lanes::kWidth;
constexpr int kWeights = kVoteWidth * kColumns;  // of a product
// Rows worked on at once: enough sums to cover the latency of two multiply-add units, few enough for the registers.
constexpr int kRowsAtOnce = Lanes::kWidth == 16 ? 12 : Lanes::kWidth == 8 ? 3 : 1;

// 32 columns of some rows.
struct Columns {
  float* at;
  int64_t stride;
};
struct ConstantColumns {
  const float* at;
  int64_t stride;
};

// c = start + a b; a's rows lie `apart`. Meanwhile is called for each of its columns.
template <int apart, int rows, class Meanwhile>
__attribute__((noinline)) void multiply_rows(
    const float* a, const float* b, int depth, ConstantColumns start, Columns c, Meanwhile& meanwhile) {
  Vector sum[rows][kVectors];
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Lanes::load(start.at + r * start.stride + v * Lanes::kWidth);
  for (int d = 0; d < depth; ++d, b += kColumns) {
    meanwhile();
    Vector row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = Lanes::load(b + v * Lanes::kWidth);
    for (int r = 0; r < rows; ++r) {
      const Vector x = Lanes::fill(a[r * apart + d]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Lanes::multiply_add(x, row[v], sum[r][v]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < kVectors; ++v) Lanes::store(c.at + r * c.stride + v * Lanes::kWidth, sum[r][v]);
}

template <int apart, int rows = kRowsAtOnce, class Meanwhile>
inline void multiply_some(
    int count, const float* a, const float* b, int depth, ConstantColumns start, Columns c, Meanwhile& meanwhile) {
  if constexpr (rows > 1)
    if (count != rows) return multiply_some<apart, rows - 1>(count, a, b, depth, start, c, meanwhile);
  multiply_rows<apart, rows>(a, b, depth, start, c, meanwhile);
}

// The same for any number of rows, in equal shares.
template <int apart, class Meanwhile>
inline void multiply(
    int count, const float* a, const float* b, int depth, ConstantColumns start, Columns c, Meanwhile& meanwhile) {
  const int shares = (count + kRowsAtOnce - 1) / kRowsAtOnce;
  for (int share = 0; share < shares; ++share) {
    const int first = count * share / shares, end = count * (share + 1) / shares;
    multiply_some<apart>(
        end - first, a + first * apart, b, depth, {start.at + first * start.stride, start.stride},
        {c.at + first * c.stride, c.stride}, meanwhile);
  }
}

}  // namespace
}  // namespace dmv_fast
