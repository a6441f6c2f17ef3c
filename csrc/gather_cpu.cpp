// dmv_fast::gather_candidates_cpu: retrieved values weighted and joined with the query's part (paper section 3.2).
#include "gather_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "numbers.h"
#include "gather_rows.h"

namespace dmv_fast {

Dtype dtype_of(const torch::stable::Tensor& tensor);  // retrieve_cpu.cpp

GatherRows gather_generic(Dtype dtype) { return gather_kernel(dtype); }

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor gather_candidates_cpu(
    const Tensor& values,      // [B, N, C], rows contiguous
    const Tensor& null_value,  // [C], contiguous
    const Tensor& query_part,  // [B, M, C], rows contiguous
    const Tensor& indices,     // [B, M, K] int32, contiguous
    const Tensor& scores)      // [B, M, K] float32, contiguous
{
  STD_TORCH_CHECK(
      values.dim() == 3 && null_value.dim() == 1 && query_part.dim() == 3 && indices.dim() == 3 && scores.dim() == 3,
      "values, null_value, query_part, indices, scores: wrong number of dimensions");
  const int64_t batches = values.size(0), count = values.size(1), width = values.size(2);
  const int64_t queries = indices.size(1), k = indices.size(2);
  STD_TORCH_CHECK(null_value.size(0) == width, "null_value: must be (C,)");
  STD_TORCH_CHECK(
      query_part.size(0) == batches && query_part.size(1) == queries && query_part.size(2) == width,
      "query_part: must be (B, M, C)");
  STD_TORCH_CHECK(
      indices.size(0) == batches && scores.size(0) == batches && scores.size(1) == queries && scores.size(2) == k,
      "indices, scores: must be (B, M, K)");
  STD_TORCH_CHECK(
      null_value.scalar_type() == values.scalar_type() && query_part.scalar_type() == values.scalar_type(),
      "null_value, query_part: their dtype must be values'");
  STD_TORCH_CHECK(
      indices.scalar_type() == ScalarType::Int && scores.scalar_type() == ScalarType::Float,
      "indices, scores: must be int32 and float32");
  STD_TORCH_CHECK(
      indices.is_contiguous() && scores.is_contiguous() && null_value.is_contiguous() &&
          (width <= 1 || (values.stride(2) == 1 && query_part.stride(2) == 1)),
      "values, null_value, query_part, indices, scores: rows must be contiguous");

  Gather call;
  call.indices = static_cast<const int32_t*>(indices.const_data_ptr());
  for (int64_t i = 0; i < batches * queries * k; ++i)
    STD_TORCH_CHECK(call.indices[i] >= -1 && call.indices[i] < count, "indices: must lie in -1..N-1");
  Tensor rows = torch::stable::new_empty(values, {batches, queries, k, width});
  call.values = values.const_data_ptr();
  call.null_value = null_value.const_data_ptr();
  call.query_part = query_part.const_data_ptr();
  call.scores = static_cast<const float*>(scores.const_data_ptr());
  call.rows = rows.mutable_data_ptr();
  call.queries = queries;
  call.k = k;
  call.width = width;
  call.value_batch_stride = values.stride(0);
  call.value_row_stride = values.stride(1);
  call.query_batch_stride = query_part.stride(0);
  call.query_row_stride = query_part.stride(1);

  GatherRows kernel = gather_generic(dtype_of(values));
#ifdef DMV_X86
  if (chosen_isa() >= Isa::avx2) kernel = gather_avx2(dtype_of(values));
#endif
  constexpr int64_t kNumbersAThread = 32768;  // below it, waking a thread costs more than it saves
  const int64_t grain = 1 + kNumbersAThread / (1 + k * width);
  torch::stable::parallel_for(
      0, batches * queries, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return rows;
}

}  // namespace
}  // namespace dmv_fast

STABLE_TORCH_LIBRARY_FRAGMENT(dmv_fast, library) {
  library.def(
      "gather_candidates_cpu(Tensor values, Tensor null_value, Tensor query_part, Tensor indices, Tensor scores)"
      " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CPU, library) {
  library.impl("gather_candidates_cpu", TORCH_BOX(&dmv_fast::gather_candidates_cpu));
}
