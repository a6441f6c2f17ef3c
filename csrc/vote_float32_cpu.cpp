// dmv_fast::vote_float32_cpu: the voting net over each location's candidates (paper section 3.2) in float32, straight from
// what is remembered of them; weights packed beforehand.
#include "checked.h"
#include "vote_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

namespace dmv_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool vote_int16_cpu_runs() {
#ifdef DMV_X86
  return allowed(Isa::avx512) && has_vnni();
#else
  return false;
#endif
}

VoteFloat32Locations kernel_of_call(bool whole) {
#ifdef DMV_X86
  if (whole) return vote_int16_avx512_vnni();
  if (allowed(Isa::avx512)) return vote_float32_avx512();
  if (allowed(Isa::avx2)) return vote_float32_avx2();
#endif
  return vote_float32_generic();
}

bool vote_float32_cpu_runs() { return true; }

Tensor vote_float32_cpu(
    const Tensor& values,      // [B, N, kSpread] float32, rows contiguous; see spread_rows in dmv_fast/runtime/vote.py
    const Tensor& null_value,  // [kSpread]
    const Tensor& query_part,  // [B, M, C]
    const Tensor& indices,     // [B, M, K] int32
    const Tensor& scores,      // [B, M, K] float32
    const Tensor& to_q,        // [8 * C/4 / 32, C, 32], see panels in fold.py
    const Tensor& q_bias,      // [8 * C/4]
    const Tensor& mix,         // [2 * C / 32, C, 32]
    const Tensor& mix_bias,    // [C]
    const Tensor& out,         // [V / 32, C, 32], or int16 [V / 32, C / 2, 32, 2], see whole_panels in fold.py ...
    const std::optional<Tensor>& out_scale,  // ... and these scales, [V]
    const Tensor& out_bias,    // [V]
    double epsilon)
{
  STD_TORCH_CHECK(
      values.dim() == 3 && values.size(2) == kSpread && values.scalar_type() == ScalarType::Float &&
          values.stride(2) == 1,
      "values: must be float32 (B, N, ", kSpread, "), rows contiguous");
  STD_TORCH_CHECK(
      indices.dim() == 3 && indices.size(0) == values.size(0) && indices.size(2) >= 1 && indices.size(2) <= kVoteRows,
      "indices: must be (B, M, K), K 1..32");
  STD_TORCH_CHECK(
      indices.scalar_type() == ScalarType::Int && indices.is_contiguous(), "indices: must be contiguous int32");
  Float32Voting call;
  call.queries = indices.size(1), call.candidates = static_cast<int>(indices.size(2));
  call.locations = indices.size(0) * call.queries;
  call.value_width = out_bias.numel(), call.epsilon = static_cast<float>(epsilon);
  STD_TORCH_CHECK(call.value_width > 0 && call.value_width % 32 == 0, "out_bias: its length must be a multiple of 32");
  constexpr ScalarType kFloat = ScalarType::Float;
  call.values = static_cast<const float*>(values.const_data_ptr());
  call.value_batch_stride = values.stride(0), call.value_row_stride = values.stride(1);
  call.null_value = checked<float>(null_value, "null_value", kFloat, kSpread);
  call.query_part = checked<float>(query_part, "query_part", kFloat, call.locations * kVoteWidth);
  call.indices = static_cast<const int32_t*>(indices.const_data_ptr());
  call.scores = checked<float>(scores, "scores", kFloat, indices.numel());
  call.to_q = checked<float>(to_q, "to_q", kFloat, kQuery * kVoteWidth);
  call.q_bias = checked<float>(q_bias, "q_bias", kFloat, kQuery);
  call.mix = checked<float>(mix, "mix", kFloat, 2 * kVoteWidth * kVoteWidth);
  call.mix_bias = checked<float>(mix_bias, "mix_bias", kFloat, kVoteWidth);
  const int64_t weights = call.value_width * kVoteWidth;
  STD_TORCH_CHECK(
      !out_scale || vote_int16_cpu_runs(),
      "out_scale: this processor has no AVX512_VNNI, or DMV_FAST_CPU_ISA rules it out");
  call.out = out_scale ? nullptr : checked<float>(out, "out", kFloat, weights);
  call.out_whole = out_scale ? checked<int16_t>(out, "out", ScalarType::Short, weights) : nullptr;
  call.out_scale = out_scale ? checked<float>(*out_scale, "out_scale", kFloat, call.value_width) : nullptr;
  call.out_bias = checked<float>(out_bias, "out_bias", kFloat, call.value_width);
  for (int64_t i = 0; i < indices.numel(); ++i)
    STD_TORCH_CHECK(call.indices[i] >= -1 && call.indices[i] < values.size(1), "indices: must lie in -1..N-1");

  Tensor retrieved = torch::stable::new_empty(values, {indices.size(0), call.queries, call.value_width});
  call.retrieved = static_cast<float*>(retrieved.mutable_data_ptr());
  const VoteFloat32Locations kernel = kernel_of_call(out_scale.has_value());
  const int64_t together = call.locations_together();
  const int64_t groups = (call.locations + together - 1) / together;
  torch::stable::parallel_for(0, groups, 8, [&](int64_t begin, int64_t end) {
    kernel(call, begin * together, std::min(end * together, call.locations));
  });
  return retrieved;
}

}  // namespace
}  // namespace dmv_fast

STABLE_TORCH_LIBRARY_FRAGMENT(dmv_fast, library) {
  library.def(
      "vote_float32_cpu(Tensor values, Tensor null_value, Tensor query_part, Tensor indices, Tensor scores, Tensor to_q,"
      " Tensor q_bias, Tensor mix, Tensor mix_bias, Tensor out, Tensor? out_scale, Tensor out_bias, float epsilon)"
      " -> Tensor");
  library.def("vote_float32_cpu_runs() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CPU, library) {
  library.impl("vote_float32_cpu", TORCH_BOX(&dmv_fast::vote_float32_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CompositeExplicitAutograd, library) {
  library.impl("vote_float32_cpu_runs", TORCH_BOX(&dmv_fast::vote_float32_cpu_runs));
}
