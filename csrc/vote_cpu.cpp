// dmv_fast::vote_cpu and vote_split_cpu: the voting net over each location's candidates (paper section 3.2), in bfloat16,
// and in float32 by products of two bfloat16 parts of each number; weights
// folded beforehand.
#include "checked.h"
#include "vote_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

namespace dmv_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The best that runs here, up to what DMV_FAST_CPU_ISA names. Not chosen_isa(): an Intel processor without tiles
// prefers avx512 for the retrieval, which has no vote, while its bfloat16 instructions, slow as they are there, still
// beat PyTorch's many small products.
VoteLocations vote_kernel() {
#ifdef DMV_X86
  if (allowed(Isa::amx)) return vote_amx();
  if (allowed(Isa::avx512_bf16)) return vote_avx512_bf16();
#endif
  return nullptr;
}

VoteSplitLocations vote_split_kernel() {
#ifdef DMV_X86
  if (allowed(Isa::amx)) return vote_split_amx();
#endif
  return nullptr;
}

bool vote_cpu_runs() { return vote_kernel() != nullptr; }
bool vote_split_cpu_runs() { return vote_split_kernel() != nullptr; }

template <class Number>
constexpr ScalarType kTypeOf = sizeof(Number) == 2 ? ScalarType::BFloat16 : ScalarType::Float;

// parts: numbers in which each weight is packed.
template <class Number>
Tensor vote_by(
    VoteLocationsOf<VotingOf<Number>> kernel, int64_t parts, const Tensor& rows, const Tensor& to_q,
    const Tensor& q_bias, const Tensor& to_k, const Tensor& mix, const Tensor& mix_bias, const Tensor& out,
    const Tensor& out_bias, double epsilon) {
  STD_TORCH_CHECK(rows.dim() == 4 && rows.size(3) == kVoteWidth, "rows: must be (B, M, K, 64)");
  VotingOf<Number> call;
  call.locations = rows.size(0) * rows.size(1);
  call.candidates = static_cast<int>(rows.size(2));
  STD_TORCH_CHECK(rows.size(2) >= 1 && rows.size(2) <= kVoteRows, "rows: its K must be 1..32");
  const int64_t width = q_bias.numel();
  call.heads = static_cast<int>(width / kHeadWidth);
  call.value_width = out_bias.numel();
  STD_TORCH_CHECK(
      width % (2 * kHeadWidth) == 0 && width >= 2 * kHeadWidth && width <= kMaxHeads * kHeadWidth,
      "q_bias: must be of 2, 4, 6 or 8 heads");
  STD_TORCH_CHECK(
      call.value_width > 0 && call.value_width % 32 == 0, "out_bias: its length must be a multiple of 32");
  constexpr ScalarType kWeight = ScalarType::BFloat16, kFull = ScalarType::Float;
  const int64_t row = parts * kVoteWidth;  // of packed weights
  call.rows = checked<Number>(rows, "rows", kTypeOf<Number>, call.locations * call.candidates * kVoteWidth);
  call.to_q = checked<uint16_t>(to_q, "to_q", kWeight, width * row);
  call.q_bias = checked<float>(q_bias, "q_bias", kFull, width);
  call.to_k = checked<uint16_t>(to_k, "to_k", kWeight, width * row);
  call.mix = checked<uint16_t>(mix, "mix", kWeight, (call.heads + 1) * kVoteWidth * row);
  call.mix_bias = checked<float>(mix_bias, "mix_bias", kFull, kVoteWidth);
  call.out = checked<uint16_t>(out, "out", kWeight, call.value_width * row);
  call.out_bias = checked<float>(out_bias, "out_bias", kFull, call.value_width);
  call.epsilon = static_cast<float>(epsilon);

  Tensor retrieved = torch::stable::new_empty(rows, {rows.size(0), rows.size(1), call.value_width});
  call.retrieved = static_cast<Number*>(retrieved.mutable_data_ptr());
  const int64_t together = call.locations_together();
  const int64_t groups = (call.locations + together - 1) / together;
  torch::stable::parallel_for(0, groups, 8, [&](int64_t begin, int64_t end) {
    kernel(call, begin * together, std::min(end * together, call.locations));
  });
  return retrieved;
}

Tensor vote_cpu(
    const Tensor& rows,      // [B, M, K, C] bfloat16
    const Tensor& to_q,      // [H * C/4, C]
    const Tensor& q_bias,    // [H * C/4] float32
    const Tensor& to_k,      // [H * C / 64, C / 2, 16, 2]
    const Tensor& mix,       // [H + 1, C, C]
    const Tensor& mix_bias,  // [C] float32
    const Tensor& out,       // [V / 16, C / 2, 16, 2]
    const Tensor& out_bias,  // [V] float32
    double epsilon)
{
  const VoteLocations kernel = vote_kernel();
  STD_TORCH_CHECK(kernel, "vote_cpu: this processor has no bfloat16 instructions");
  return vote_by(kernel, 1, rows, to_q, q_bias, to_k, mix, mix_bias, out, out_bias, epsilon);
}

Tensor vote_split_cpu(
    const Tensor& rows,  // [B, M, K, C] float32
    const Tensor& to_q,  // as above; matrices in both parts, see _tiles_of_parts in dmv_fast/runtime/vote.py
    const Tensor& q_bias, const Tensor& to_k, const Tensor& mix, const Tensor& mix_bias, const Tensor& out,
    const Tensor& out_bias, double epsilon)
{
  const VoteSplitLocations kernel = vote_split_kernel();
  STD_TORCH_CHECK(kernel, "vote_split_cpu: this processor has no AMX, or DMV_FAST_CPU_ISA names something else");
  return vote_by(kernel, 2, rows, to_q, q_bias, to_k, mix, mix_bias, out, out_bias, epsilon);
}

}  // namespace
}  // namespace dmv_fast

STABLE_TORCH_LIBRARY_FRAGMENT(dmv_fast, library) {
  library.def(
      "vote_cpu(Tensor rows, Tensor to_q, Tensor q_bias, Tensor to_k, Tensor mix, Tensor mix_bias, Tensor out,"
      " Tensor out_bias, float epsilon) -> Tensor");
  library.def("vote_cpu_runs() -> bool");
  library.def(
      "vote_split_cpu(Tensor rows, Tensor to_q, Tensor q_bias, Tensor to_k, Tensor mix, Tensor mix_bias, Tensor out,"
      " Tensor out_bias, float epsilon) -> Tensor");
  library.def("vote_split_cpu_runs() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CPU, library) {
  library.impl("vote_cpu", TORCH_BOX(&dmv_fast::vote_cpu));
  library.impl("vote_split_cpu", TORCH_BOX(&dmv_fast::vote_split_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CompositeExplicitAutograd, library) {
  library.impl("vote_cpu_runs", TORCH_BOX(&dmv_fast::vote_cpu_runs));
  library.impl("vote_split_cpu_runs", TORCH_BOX(&dmv_fast::vote_split_cpu_runs));
}
