// Products of the float32 voting: some rows times 32 columns. Wants a `Lanes` before it.
#pragma once

#include "vote_cpu.h"

namespace dmv_fast {
namespace {

using Vector = Lanes::Vector;

constexpr int kColumns = 32;
constexpr int kVectors = kColumns / Lanes::kWidth;
constexpr int kPanel = kVoteWidth * kColumns;  // weights of a product
constexpr int kValues = kVoteRows * kColumns;  // of a head
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

// c = start + sum over `heads` of a b: a head's a is one number on, its b kValues.
template <class Left, int rows>
__attribute__((noinline)) void multiply_rows(
    const float* a, const float* b, int depth, int heads, ConstantColumns start, Columns c) {
  Vector sum[rows][kVectors];
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Lanes::load(start.at + r * start.stride + v * Lanes::kWidth);
  for (int head = 0; head < heads; ++head) {
    const float *left = a + head, *right = b + head * kValues;
    for (int d = 0; d < depth; ++d, left += Left::kStep, right += kColumns) {
      Vector row[kVectors];
      for (int v = 0; v < kVectors; ++v) row[v] = Lanes::load(right + v * Lanes::kWidth);
      for (int r = 0; r < rows; ++r) {
        const Vector x = Lanes::fill(left[r * Left::kRow]);
        for (int v = 0; v < kVectors; ++v) sum[r][v] = Lanes::multiply_add(x, row[v], sum[r][v]);
      }
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < kVectors; ++v) Lanes::store(c.at + r * c.stride + v * Lanes::kWidth, sum[r][v]);
}

template <class Left, int rows = kRowsAtOnce>
inline void multiply_some(
    int count, const float* a, const float* b, int depth, int heads, ConstantColumns start, Columns c) {
  if constexpr (rows > 1)
    if (count != rows) return multiply_some<Left, rows - 1>(count, a, b, depth, heads, start, c);
  multiply_rows<Left, rows>(a, b, depth, heads, start, c);
}

// The same for any number of rows, in equal shares.
template <class Left>
inline void multiply(
    int count, const float* a, const float* b, int depth, int heads, ConstantColumns start, Columns c) {
  const int shares = (count + kRowsAtOnce - 1) / kRowsAtOnce;
  for (int share = 0; share < shares; ++share) {
    const int first = count * share / shares, end = count * (share + 1) / shares;
    multiply_some<Left>(
        end - first, a + first * Left::kRow, b, depth, heads, {start.at + first * start.stride, start.stride},
        {c.at + first * c.stride, c.stride});
  }
}

}  // namespace
}  // namespace dmv_fast
