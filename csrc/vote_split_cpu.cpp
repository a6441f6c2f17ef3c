// dmv_fast::vote_split_cpu: the voting net in float32, its products made of two bfloat16 parts of each number.
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

VoteSplitLocations vote_split_kernel() {
#ifdef DMV_X86
  if (allowed(Isa::amx)) return vote_split_amx();
#endif
  return nullptr;
}

bool vote_split_cpu_runs() { return vote_split_kernel() != nullptr; }

Tensor vote_split_cpu(
    const Tensor& rows,      // [B, M, K, C] float32
    const Tensor& to_q,      // packed, bfloat16, of [H * C/4, C]; see _tiles_of_parts in dmv_fast/runtime/vote.py
    const Tensor& q_bias,    // [H * C/4] float32
    const Tensor& to_k,      // packed, of [H * C/4, C]
    const Tensor& mix,       // packed, of [(H + 1) * C, C]
    const Tensor& mix_bias,  // [C] float32
    const Tensor& out,       // packed, of [V, C]
    const Tensor& out_bias,  // [V] float32
    double epsilon)
{
  const VoteSplitLocations kernel = vote_split_kernel();
  STD_TORCH_CHECK(kernel, "vote_split_cpu: this processor has no AMX, or DMV_FAST_CPU_ISA names something else");
  STD_TORCH_CHECK(rows.dim() == 4 && rows.size(3) == kVoteWidth, "rows: should be (B, M, K, 64)");
  STD_TORCH_CHECK(rows.size(2) >= 1 && rows.size(2) <= kVoteRows, "rows: its K should be 1..32");
  SplitVoting call;
  call.locations = rows.size(0) * rows.size(1);
  call.candidates = static_cast<int>(rows.size(2));
  const int64_t width = q_bias.numel();
  call.heads = static_cast<int>(width / kHeadWidth);
  STD_TORCH_CHECK(
      width % (2 * kHeadWidth) == 0 && width >= 2 * kHeadWidth && width <= kMaxHeads * kHeadWidth,
      "q_bias: should be of 2, 4, 6 or 8 heads");
  call.value_width = out_bias.numel();
  STD_TORCH_CHECK(
      call.value_width > 0 && call.value_width % 32 == 0, "out_bias: its length should be a multiple of 32");
  constexpr ScalarType kHalf = ScalarType::BFloat16, kFull = ScalarType::Float;
  constexpr int64_t kRow = 2 * kVoteWidth;  // of packed weights
  call.rows = checked<float>(rows, "rows", kFull, call.locations * call.candidates * kVoteWidth);
  call.to_q = checked<uint16_t>(to_q, "to_q", kHalf, width * kRow);
  call.q_bias = checked<float>(q_bias, "q_bias", kFull, width);
  call.to_k = checked<uint16_t>(to_k, "to_k", kHalf, width * kRow);
  call.mix = checked<uint16_t>(mix, "mix", kHalf, (call.heads + 1) * kVoteWidth * kRow);
  call.mix_bias = checked<float>(mix_bias, "mix_bias", kFull, kVoteWidth);
  call.out = checked<uint16_t>(out, "out", kHalf, call.value_width * kRow);
  call.out_bias = checked<float>(out_bias, "out_bias", kFull, call.value_width);
  call.epsilon = static_cast<float>(epsilon);

  Tensor retrieved = torch::stable::new_empty(rows, {rows.size(0), rows.size(1), call.value_width});
  call.retrieved = static_cast<float*>(retrieved.mutable_data_ptr());
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
      "vote_split_cpu(Tensor rows, Tensor to_q, Tensor q_bias, Tensor to_k, Tensor mix, Tensor mix_bias, Tensor out,"
      " Tensor out_bias, float epsilon) -> Tensor");
  library.def("vote_split_cpu_runs() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CPU, library) {
  library.impl("vote_split_cpu", TORCH_BOX(&dmv_fast::vote_split_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CompositeExplicitAutograd, library) {
  library.impl("vote_split_cpu_runs", TORCH_BOX(&dmv_fast::vote_split_cpu_runs));
}
