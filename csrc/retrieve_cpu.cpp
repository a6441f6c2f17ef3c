// dmv_fast::retrieve_cpu: the K highest columns of softmax([0, q.k1 .. q.kN]) for every query (paper section 3.2).
#include "retrieve_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <optional>
#include <string>
#include <tuple>

namespace dmv_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Scratch::~Scratch() { std::free(bytes); }

char* Scratch::reserve(int64_t wanted) {
  constexpr int64_t kPage = 4096;
  if (wanted > size) {
    std::free(bytes);
    size = (wanted + kPage - 1) / kPage * kPage;
    bytes = static_cast<char*>(std::aligned_alloc(kPage, size));
    if (!bytes) {
      size = 0;
      throw std::bad_alloc();
    }
  }
  return bytes;
}

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "dtype: must be float32, bfloat16 or float16");
  }
}

namespace {

RetrieveTiles kernel_for(Isa isa, Dtype dtype) {
#ifdef DMV_X86
  const bool bf16 = dtype == Dtype::bfloat16;
  if (isa == Isa::amx && bf16) return amx_kernel();
  if (isa == Isa::avx512_bf16 && bf16) return avx512_bf16_kernel();
  if (isa >= Isa::avx512) return avx512_kernel(dtype);
  if (isa == Isa::avx2) return avx2_kernel(dtype);
#endif
  return generic_kernel(dtype);
}

std::tuple<Tensor, Tensor> retrieve_by(
    RetrieveTiles kernel, const Tensor& query, const Tensor& keys, int64_t k, const std::optional<Tensor>& valid,
    std::optional<int64_t> packed_width = {}) {
  STD_TORCH_CHECK(query.dim() == 3 && keys.dim() == 3, "query, keys: must be (B, M, D) and (B, N, D)");
  const int64_t batches = query.size(0);
  Retrieval call;
  call.queries = query.size(1);
  call.count = keys.size(1);
  call.depth = query.size(2);
  call.k = static_cast<int>(k);
  const int64_t key_width = packed_width.value_or(call.depth);
  STD_TORCH_CHECK(
      keys.size(0) == batches && keys.size(2) == key_width, "keys: must be (B, N, ", key_width, ") as query says");
  STD_TORCH_CHECK(call.depth >= 1 && call.depth <= kMaxDepth, "query: its last dimension must be 1..", kMaxDepth);
  STD_TORCH_CHECK(k >= 1 && k <= kMaxK, "k: must be 1..32");
  STD_TORCH_CHECK(query.scalar_type() == keys.scalar_type(), "keys: its dtype must be query's");
  STD_TORCH_CHECK(
      call.depth == 1 || (query.stride(2) == 1 && keys.stride(2) == 1), "query, keys: rows must be contiguous");
  call.query = static_cast<const char*>(query.const_data_ptr());
  call.keys = static_cast<const char*>(keys.const_data_ptr());
  call.query_batch_stride = query.stride(0);
  call.query_row_stride = query.stride(1);
  call.key_batch_stride = keys.stride(0);
  call.key_row_stride = keys.stride(1);
  call.valid = nullptr;
  if (valid) {
    STD_TORCH_CHECK(
        valid->scalar_type() == ScalarType::Int && valid->dim() == 1 && valid->size(0) == batches &&
            valid->is_contiguous(),
        "valid: must be int32 (B,)");
    call.valid = static_cast<const int32_t*>(valid->const_data_ptr());
    for (int64_t b = 0; b < batches; ++b)
      STD_TORCH_CHECK(
          call.valid[b] >= 0 && call.valid[b] <= call.count, "valid: must lie in 0..N");
  }

  Tensor scores = torch::stable::new_empty(query, {batches, call.queries, k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(query, {batches, call.queries, k}, ScalarType::Int);
  call.scores = static_cast<float*>(scores.mutable_data_ptr());
  call.indices = static_cast<int32_t*>(indices.mutable_data_ptr());

  // A query's result depends on nothing but its own row and the order of the keys (and, where keys are screened, on the
  // other queries of its tile), so neither the number of threads nor the way tiles fall to them changes a bit of it.
  const int64_t tiles = (call.queries + kTile - 1) / kTile;
  torch::stable::parallel_for(0, batches * tiles, 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    while (begin < end) {
      const int64_t batch = begin / tiles, first = begin % tiles;
      const int64_t last = std::min({tiles, first + end - begin, first + kMaxTiles});
      kernel(call, batch, first, last, scratch);
      begin += last - first;
    }
  });
  return {scores, indices};
}

std::tuple<Tensor, Tensor> retrieve_cpu(
    const Tensor& query,                 // [B, M, D], rows contiguous
    const Tensor& keys,                  // [B, N, D], rows contiguous
    int64_t k,
    const std::optional<Tensor>& valid)  // [B] int32
{
  return retrieve_by(kernel_for(chosen_isa(), dtype_of(query)), query, keys, k, valid);
}

RetrieveTiles screened_kernel() {
#ifdef DMV_X86
  const Isa isa = chosen_isa();
  if (isa == Isa::amx) return amx_screened_kernel();
  if ((isa == Isa::avx512 || isa == Isa::avx512_bf16) && has_vnni()) return avx512_vnni_screened_kernel();
#endif
  return nullptr;
}

bool retrieve_screened_cpu_runs() { return screened_kernel() != nullptr; }

// Float32 numbers with bytes before them, which tell which of them matter, see dmv_fast/ops/screened.py.
std::tuple<Tensor, Tensor> retrieve_screened_cpu(
    const Tensor& query,                 // [B, M, D] float32, D a multiple of 32, rows contiguous
    const Tensor& keys,                  // [B, N, 5 D / 4 + 4], N a multiple of 32 and contiguous along it
    int64_t k,
    const std::optional<Tensor>& valid)  // [B] int32
{
  const RetrieveTiles kernel = screened_kernel();
  STD_TORCH_CHECK(
      kernel, "retrieve_screened_cpu: this processor has no AVX-512 with products of bytes, or DMV_FAST_CPU_ISA names"
      " something else");
  STD_TORCH_CHECK(
      query.scalar_type() == ScalarType::Float && query.dim() == 3 && query.size(2) % 32 == 0,
      "query: must be float32 (B, M, D), D a multiple of 32");
  STD_TORCH_CHECK(
      keys.dim() == 3 && keys.size(1) % 32 == 0 && keys.stride(1) == keys.size(2),
      "keys: must be (B, N, 5 D / 4 + 4), N a multiple of 32, without gaps between them");
  return retrieve_by(kernel, query, keys, k, valid, query.size(2) / 4 * 5 + 4);
}

// What DMV_FAST_CPU_ISA may name on this machine, the fastest first.
std::string cpu_isas() {
  std::string names;
  for (int i = 0; i < kIsas; ++i)
    if (const Isa isa = by_preference()[i]; runs_here(isa))
      names += (names.empty() ? "" : " ") + std::string(name_of(isa));
  return names;
}

}  // namespace
}  // namespace dmv_fast

STABLE_TORCH_LIBRARY_FRAGMENT(dmv_fast, library) {
  library.def("retrieve_cpu(Tensor query, Tensor keys, int k, Tensor? valid) -> (Tensor, Tensor)");
  library.def("retrieve_screened_cpu(Tensor query, Tensor keys, int k, Tensor? valid) -> (Tensor, Tensor)");
  library.def("retrieve_screened_cpu_runs() -> bool");
  library.def("cpu_isas() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CPU, library) {
  library.impl("retrieve_cpu", TORCH_BOX(&dmv_fast::retrieve_cpu));
  library.impl("retrieve_screened_cpu", TORCH_BOX(&dmv_fast::retrieve_screened_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CompositeExplicitAutograd, library) {
  library.impl("retrieve_screened_cpu_runs", TORCH_BOX(&dmv_fast::retrieve_screened_cpu_runs));
  library.impl("cpu_isas", TORCH_BOX(&dmv_fast::cpu_isas));
}
