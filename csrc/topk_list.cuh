// The k best (logit, index) pairs of one query row, held by one lane: a heap in shared memory with its worst
// pair on top. Place p of the list of lane i lies at [p][i], so that a warp's 32 lists meet no bank conflict
// whatever places they are at.
#pragma once

#include "mma_sm80.cuh"

namespace dmv_fast::gpu {

constexpr int kNull = -1;  // index of the null column, and of a place that no column took

// The order of the result: higher logits first, smaller indices first among equals. Total, so that the best k
// do not depend on the order in which columns come.
__device__ inline bool comes_before(float logit, int index, float other, int other_index) {
  return logit > other || (logit == other && index < other_index);
}

class TopList {
 public:
  // `logits` and `indices`: this lane's column of the warp's [k][32] arrays.
  __device__ TopList(float* logits, int* indices, int k) : logits_(logits), indices_(indices), k_(k) {
    for (int place = 0; place < k; ++place) set(place, -INFINITY, kNull);
  }

  // The k-th best logit so far, -inf as long as there are fewer: nothing below it can enter.
  __device__ float worst() const { return worst_; }

  __device__ void offer(float logit, int index) {
    if (!comes_before(logit, index, worst_, worst_index_)) return;
    replace_top(logit, index, k_);
    worst_ = logits_[0];
    worst_index_ = indices_[0];
  }

  // Brings the places into the order of the result. Offer nothing after that.
  __device__ void sort() {
    for (int last = k_ - 1; last > 0; --last) {
      const float logit = logits_[last * 32];
      const int index = indices_[last * 32];
      set(last, logits_[0], indices_[0]);
      replace_top(logit, index, last);
    }
  }

  __device__ float logit(int place) const { return logits_[place * 32]; }
  __device__ int index(int place) const { return indices_[place * 32]; }

 private:
  __device__ void set(int place, float logit, int index) {
    logits_[place * 32] = logit;
    indices_[place * 32] = index;
  }

  // Puts a pair in place of the worst of the first `size`, and the worst of what is left on top.
  __device__ void replace_top(float logit, int index, int size) {
    int hole = 0;
    for (int child = 1; child < size; child = 2 * hole + 1) {
      float below = this->logit(child);
      int below_index = this->index(child);
      if (child + 1 < size) {
        const float right = this->logit(child + 1);
        const int right_index = this->index(child + 1);
        if (comes_before(below, below_index, right, right_index)) {
          below = right;
          below_index = right_index;
          ++child;
        }
      }
      if (!comes_before(logit, index, below, below_index)) break;
      set(hole, below, below_index);
      hole = child;
    }
    set(hole, logit, index);
  }

  float* logits_;
  int* indices_;
  int k_;
  float worst_ = -INFINITY;
  int worst_index_ = kNull;
};

}  // namespace dmv_fast::gpu
