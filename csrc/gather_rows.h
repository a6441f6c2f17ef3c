// The candidate gather's loops, for whichever instruction set includes them. Wants gather_cpu.h and numbers.h before.
#pragma once

namespace dmv_fast {
namespace {

// rows = k * score / sum(scores) * value + query part
template <class T>
void gather_rows(const Gather& call, int64_t begin, int64_t end) {
  for (int64_t place = begin; place < end; ++place) {
    const int64_t batch = place / call.queries;
    const T* const values = static_cast<const T*>(call.values) + batch * call.value_batch_stride;
    const T* const query = static_cast<const T*>(call.query_part) + batch * call.query_batch_stride +
        place % call.queries * call.query_row_stride;
    const float* const scores = call.scores + place * call.k;
    const float scale = weight_scale(scores, call.k);
    for (int64_t i = 0; i < call.k; ++i) {
      const int32_t index = call.indices[place * call.k + i];
      const T* const value =
          index < 0 ? static_cast<const T*>(call.null_value) : values + index * call.value_row_stride;
      T* const row = static_cast<T*>(call.rows) + (place * call.k + i) * call.width;
      const float weight = scores[i] * scale;
      for (int64_t c = 0; c < call.width; ++c) {
        float x, q;
        convert(x, value[c]);
        convert(q, query[c]);
        convert(row[c], weight * x + q);
      }
    }
  }
}

inline GatherRows gather_kernel(Dtype dtype) {
  if (dtype == Dtype::float32) return gather_rows<float>;
  return dtype == Dtype::bfloat16 ? gather_rows<BFloat16> : gather_rows<Float16>;
}

}  // namespace
}  // namespace dmv_fast
