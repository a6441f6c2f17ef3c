// The candidate gather on the CPU: what the launcher (gather_cpu.cpp) and the kernels share.
#pragma once

#include "retrieve_cpu.h"

namespace dmv_fast {

// One call; everything contiguous but for the batch and row strides (in elements) given.
struct Gather {
  const void* values;      // [batch][count][width]
  const void* null_value;  // [width]
  const void* query_part;  // [batch][queries][width]
  const int32_t* indices;  // [batch][queries][k]
  const float* scores;     // [batch][queries][k]
  void* rows;              // [batch][queries][k][width]
  int64_t queries, k, width;
  int64_t value_batch_stride, value_row_stride, query_batch_stride, query_row_stride;
};

// What a score is multiplied by to be its candidate's weight: k over the sum of all k scores.
inline float weight_scale(const float* scores, int64_t k) {
  float sum = 0.0f;
  for (int64_t i = 0; i < k; ++i) sum += scores[i];
  return static_cast<float>(k) / sum;
}

// Writes the rows of queries begin..end, counted through all batch items.
using GatherRows = void (*)(const Gather& call, int64_t begin, int64_t end);

GatherRows gather_generic(Dtype dtype);
GatherRows gather_avx2(Dtype dtype);

}  // namespace dmv_fast
