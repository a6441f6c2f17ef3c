// The last step of the retrieval: what the splits found, and the null column, become scores and indices.
#pragma once

#include "retrieve_kernel.cuh"

namespace dmv_fast::gpu {

constexpr int kMergeWarps = 2;  // of a block, a query row each
constexpr int kLaneLists = (kMaxSplits + 1) / 32;

// Grows with the float, for all but NaN; both zeros have the same.
__device__ inline unsigned ordered_bits(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

// A warp a row. Every split left its candidates in order, so the next best is at the head of some list: k
// times the warp takes the best of all heads. The null column is one more list, with one entry.
__global__ void __launch_bounds__(32 * kMergeWarps) merge_splits(const Call call) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.x / 32;
  if (row >= static_cast<int64_t>(call.batches) * call.queries) return;
  const int count = valid_keys(call, row / call.queries);
  const int splits = (count + call.plan.split_keys - 1) / call.plan.split_keys;

  float largest = 0.0f, sum = lane == 0 ? 1.0f : 0.0f;
  const auto add = [&](float other_largest, float other_sum) {
    const float both = fmaxf(largest, other_largest);
    sum = sum * power_of_two((largest - both) * kLog2E) +
          other_sum * power_of_two((other_largest - both) * kLog2E);
    largest = both;
  };
  for (int split = lane; split < splits; split += 32) {
    const PartSum part = call.part_sums[row * call.plan.splits + split];
    add(part.largest, part.total);
  }
  for (int distance = 16; distance > 0; distance /= 2)
    add(__shfl_xor_sync(kAllLanes, largest, distance), __shfl_xor_sync(kAllLanes, sum, distance));
  // Fused multiply-adds round differently in the two lanes of a pair; equal logits need equal scores.
  sum = __shfl_sync(kAllLanes, sum, 0);

  float head[kLaneLists];
  int head_index[kLaneLists], taken[kLaneLists] = {};
  const auto read_head = [&](int list) {
    const int split = lane + 32 * list;
    const int64_t place = (row * call.plan.splits + split) * call.k + taken[list];
    const bool there = split < splits && taken[list] < call.k, is_null = split == splits && taken[list] == 0;
    head[list] = there ? call.part_logits[place] : is_null ? 0.0f : -INFINITY;
    head_index[list] = there ? call.part_indices[place] : kNull;
  };
#pragma unroll
  for (int list = 0; list < kLaneLists; ++list) read_head(list);
  float logit = -INFINITY;  // lane i keeps the i-th best
  int index = kNull;
  for (int place = 0; place < call.k; ++place) {
    float best = head[0];
    int best_index = head_index[0];
#pragma unroll
    for (int list = 1; list < kLaneLists; ++list) {
      if (comes_before(head[list], head_index[list], best, best_index)) {
        best = head[list];
        best_index = head_index[list];
      }
    }
    const unsigned top = __reduce_max_sync(kAllLanes, ordered_bits(best));
    const bool is_top = ordered_bits(best) == top;
    const int top_index = __reduce_min_sync(kAllLanes, is_top ? best_index : INT32_MAX);
    const unsigned winner = __ballot_sync(kAllLanes, is_top && best_index == top_index);
    best = __shfl_sync(kAllLanes, best, __ffs(winner) - 1);
    if (lane == place) {
      logit = best;
      index = top_index;
    }
#pragma unroll
    for (int list = 0; list < kLaneLists; ++list) {
      if (head[list] == best && head_index[list] == top_index) {
        ++taken[list];
        read_head(list);
      }
    }
  }
  // The exponential is approximate, but the order of the scores is promised. All of a row are NaN or none.
  float score = power_of_two((logit - largest) * kLog2E) / sum;
  for (int distance = 1; distance < 32; distance *= 2)
    score = fminf(score, __shfl_sync(kAllLanes, score, max(lane - distance, 0)));
  if (lane < call.k) {
    call.scores[row * call.k + lane] = score;
    call.indices[row * call.k + lane] = index;
  }
}

}  // namespace dmv_fast::gpu
