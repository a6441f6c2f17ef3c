// What a warp does with a tile of logits while it lies in registers: online log-sum-exp, and a filter that
// lets through to the rows' lists only what is above the k-th best so far.
//
// A thread holds, of the warp's 32 rows, rows 8 r + lane / 4 (r = 0..3) and of each the columns
// 8 j + 2 (lane % 4) + c (c = 0, 1): the accumulators of mma.m16n8k16. Four lanes that share rows are a quad.
#pragma once

#include "topk_list.cuh"

namespace dmv_fast::gpu {

constexpr unsigned kAllLanes = 0xffffffff;
constexpr float kLog2E = 1.44269504088896340736f;

template <int kColumns>
struct LogitTile {
  static constexpr int kPieces = kColumns / 32;
  float value[2][kColumns / 8][4];

  // A piece is 32 columns; element i (0..7) is what the thread has of it in its row r.
  __device__ float& at(int r, int piece, int i) { return value[r / 2][4 * piece + i / 2][r % 2 * 2 + i % 2]; }
  __device__ static int column(int piece, int i, int lane) {
    return 32 * piece + i / 2 * 8 + lane % 4 * 2 + i % 2;
  }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) at(i % 4, i / 32, i / 4 % 8) = 0.0f;
  }

  // Takes out the columns from `count` on.
  __device__ void cut(int count, int lane) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      if (column(i / 32, i / 4 % 8, lane) >= count) at(i % 4, i / 32, i / 4 % 8) = -INFINITY;
  }
};

// The rank-th largest of the quad's four values; ranks above 4 count as 4.
__device__ inline float kth_of_quad(float x, int rank) {
  const float neighbour = __shfl_xor_sync(kAllLanes, x, 1);
  const float high = fmaxf(x, neighbour), low = fminf(x, neighbour);
  const float other_high = __shfl_xor_sync(kAllLanes, high, 2);
  const float other_low = __shfl_xor_sync(kAllLanes, low, 2);
  const float second_or_third = fminf(high, other_high), third_or_second = fmaxf(low, other_low);
  if (rank == 1) return fmaxf(high, other_high);
  if (rank == 2) return fmaxf(second_or_third, third_or_second);
  if (rank == 3) return fminf(second_or_third, third_or_second);
  return fminf(low, other_low);
}

// The next smaller float, for x above -inf.
__device__ inline float next_below(float x) {
  if (x == 0.0f) return __int_as_float(0x80000001);
  return __int_as_float(__float_as_int(x) + (x > 0.0f ? -1 : 1));
}

template <int kColumns>
class Selection {
 public:
  using Tile = LogitTile<kColumns>;
  static constexpr int kPieces = Tile::kPieces;

  // `rows`: how many of the warp's 32 rows exist. `logits`, `indices`: the warp's [k][32] arrays.
  __device__ Selection(int lane, int rows, float* logits, int* indices, int k)
      : lane_(lane), k_(k), list_(logits + lane, indices + lane, k) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      largest_[r] = 0.0f;  // the null column's logit; its exponential joins the sum in the merge
      sum_[r] = 0.0f;
      threshold_[r] = 8 * r + lane / 4 < rows ? -INFINITY : INFINITY;
    }
  }

  // Takes a tile whose first column is key `first`. `survivors`: [32][32] floats that are the warp's alone.
  __device__ void take(Tile& tile, int first, bool is_first_tile, float* survivors) {
    float peak[4][kPieces];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        peak[r][piece] = tile.at(r, piece, 0);
#pragma unroll
        for (int i = 1; i < 8; ++i) peak[r][piece] = fmaxf(peak[r][piece], tile.at(r, piece, i));
      }
    }
    add_exponentials(tile, peak);
    if (is_first_tile) bound_thresholds(tile);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      unsigned passed = 0;  // bit 8 r + i: element i of row r
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        if (peak[r][piece] > threshold_[r]) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if (tile.at(r, piece, i) > threshold_[r]) {
              survivors[(8 * r + i) * 32 + lane_] = tile.at(r, piece, i);
              passed |= 1u << (8 * r + i);
            }
          }
        }
      }
      if (__any_sync(kAllLanes, passed != 0)) insert(passed, survivors, first + 32 * piece);
    }
  }

  // Adds up the quads' columns and sorts the list. Lane r of a quad gets the sum of row 8 r + lane / 4.
  __device__ const TopList& finish(float& largest, float& sum) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float of_row = fmaxf(largest_[r], __shfl_xor_sync(kAllLanes, largest_[r], 1));
      of_row = fmaxf(of_row, __shfl_xor_sync(kAllLanes, of_row, 2));
      float scaled = sum_[r] * power_of_two((largest_[r] - of_row) * kLog2E);
      scaled += __shfl_xor_sync(kAllLanes, scaled, 1);
      scaled += __shfl_xor_sync(kAllLanes, scaled, 2);
      if (lane_ % 4 == r) {
        largest = of_row;
        sum = scaled;
      }
    }
    list_.sort();
    return list_;
  }

 private:
  // The difference comes before the scaling: a fused x log2(e) - m log2(e) would overflow at logits of 1e30.
  // A NaN or +inf makes the row's sum NaN.
  __device__ void add_exponentials(Tile& tile, const float (&peak)[4][kPieces]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float largest = largest_[r];
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) largest = fmaxf(largest, peak[r][piece]);
      float sum = sum_[r] * power_of_two((largest_[r] - largest) * kLog2E);
#pragma unroll
      for (int i = 0; i < kColumns / 4; ++i)
        sum += power_of_two((tile.at(r, i / 8, i % 8) - largest) * kLog2E);
      largest_[r] = largest;
      sum_[r] = sum;
    }
  }

  // All of the first tile would pass. Its columns fall into groups, at least k a row, and every group has a
  // member as large as its maximum: so the k-th largest maximum (k <= 4), or else the smallest, bounds the
  // k-th best logit from below. At k = 4 it leaves about 8 of 128 columns.
  __device__ void bound_thresholds(Tile& tile) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float group[8];
#pragma unroll
      for (int g = 0; g < 8; ++g) {
        group[g] = tile.at(r, 0, g);
#pragma unroll
        for (int piece = 1; piece < kPieces; ++piece) group[g] = fmaxf(group[g], tile.at(r, piece, g));
      }
#pragma unroll
      for (int half = 4; half >= 1; half /= 2) {
        if (k_ <= 4 * half) {
#pragma unroll
          for (int g = 0; g < 8; ++g)
            if ((g & half) == 0) group[g] = group[g + half] = fmaxf(group[g], group[g + half]);
        }
      }
      float lowest = group[0];
#pragma unroll
      for (int g = 1; g < 8; ++g) lowest = fminf(lowest, group[g]);
      const float bound = kth_of_quad(lowest, k_);
      if (bound > -INFINITY) threshold_[r] = fmaxf(threshold_[r], next_below(bound));
    }
  }

  // Lane 8 r + g serves row 8 r + g, whose elements quad g holds: its four bytes of `passed` say which of
  // them are in `survivors`. All of a piece's columns come before the next piece's, so from then on an equal
  // of the k-th best stands behind it, and the filter may ask for more than that.
  __device__ void insert(unsigned passed, const float* survivors, int first) {
    __syncwarp();  // the survivors are written
    const int r = lane_ / 8, quad = 4 * (lane_ % 8);
    unsigned waiting = 0;  // bit 8 q + i: element i of the quad's lane q
#pragma unroll
    for (int q = 0; q < 4; ++q)
      waiting |= (__shfl_sync(kAllLanes, passed, quad + q) >> (8 * r) & 0xff) << (8 * q);
    for (; waiting != 0; waiting &= waiting - 1) {
      const int bit = __ffs(waiting) - 1, q = bit / 8, i = bit % 8;
      list_.offer(survivors[(8 * r + i) * 32 + quad + q], first + Tile::column(0, i, q));
    }
#pragma unroll
    for (int row = 0; row < 4; ++row)
      threshold_[row] = fmaxf(threshold_[row], __shfl_sync(kAllLanes, list_.worst(), 8 * row + lane_ / 4));
    __syncwarp();  // the survivors are read
  }

  int lane_, k_;
  float largest_[4], sum_[4];  // of the thread's own columns
  float threshold_[4];         // of the rows; the same in the whole quad
  TopList list_;
};

}  // namespace dmv_fast::gpu
