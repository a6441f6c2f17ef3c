// dmv_fast::retrieve_cuda: lays a call over the device and starts the two kernels on PyTorch's current
// stream.
//
// Nothing waits for the device and all memory comes from PyTorch's allocator, so that a CUDA graph can
// capture it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "retrieve_merge.cuh"

namespace dmv_fast::gpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Device device_of(int index) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

// A stride along which there is nothing to step does not count.
template <class Element>
Matrix matrix_of(const Tensor& tensor) {
  Matrix matrix{tensor.const_data_ptr(), tensor.size(0) > 1 ? tensor.stride(0) : 0,
                tensor.size(1) > 1 ? tensor.stride(1) : 0, false};
  matrix.aligned = is_aligned(matrix, tensor.size(2), sizeof(Element));
  return matrix;
}

template <class Element>
void run(Call call, const Tensor& query, const Tensor& keys) {
  const int device_index = query.get_device_index();
  call.query = matrix_of<Element>(query);
  call.keys = matrix_of<Element>(keys);
  const Device device = device_of(device_index);
  call.plan = plan_for<sizeof(Element)>(call.batches, call.queries, call.count, call.depth, call.k, device);
  const int64_t rows = static_cast<int64_t>(call.batches) * call.queries, parts = rows * call.plan.splits;
  const int64_t blocks = static_cast<int64_t>(call.batches) * call.plan.row_tiles * call.plan.splits;
  STD_TORCH_CHECK(rows < INT32_MAX && blocks < INT32_MAX, "query: has too many rows");

  const Tensor workspace = torch::stable::new_empty(query, {parts * (2 * call.k + 2)}, ScalarType::Float);
  call.part_logits = static_cast<float*>(workspace.mutable_data_ptr());
  call.part_indices = reinterpret_cast<int*>(call.part_logits + parts * call.k);
  call.part_sums = reinterpret_cast<PartSum*>(call.part_indices + parts * call.k);

  void* current;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_index, &current) == AOTI_TORCH_SUCCESS,
                  "query: its device has no current stream");
  const auto stream = static_cast<cudaStream_t>(current);
  if (blocks > 0) {
    const auto kernel = retrieve_split<Element>;
    // The same for every call: another thread's must not lower it before this one's launch.
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block));
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared));
    kernel<<<blocks, 32 * call.plan.warps, call.plan.shared_bytes, stream>>>(call);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  merge_splits<<<ceil_div(rows, kMergeWarps), 32 * kMergeWarps, 0, stream>>>(call);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> retrieve(const Tensor& query,  // [B, M, D], rows contiguous
                                    const Tensor& keys,   // [B, N, D], rows contiguous
                                    int64_t k,
                                    const std::optional<Tensor>& valid)  // [B] int32
{
  STD_TORCH_CHECK(query.dim() == 3 && keys.dim() == 3, "query, keys: must be (B, M, D) and (B, N, D)");
  const int64_t batches = query.size(0), queries = query.size(1), count = keys.size(1), depth = query.size(2);
  STD_TORCH_CHECK(keys.size(0) == batches && keys.size(2) == depth,
                  "keys: must be (B, N, D) as query says");
  STD_TORCH_CHECK(depth >= 1 && depth <= 512, "query: its last dimension must be 1..512");
  STD_TORCH_CHECK(k >= 1 && k <= 32, "k: must be 1..32");
  STD_TORCH_CHECK(batches < 1 << 30 && queries < 1 << 30, "query: has too many rows");
  STD_TORCH_CHECK(count < 1 << 30, "keys: has too many rows");
  STD_TORCH_CHECK(query.scalar_type() == keys.scalar_type(), "keys: its dtype must be query's");
  STD_TORCH_CHECK(depth == 1 || (query.stride(2) == 1 && keys.stride(2) == 1),
                  "query, keys: rows must be contiguous");
  STD_TORCH_CHECK(query.is_cuda() && keys.is_cuda() && keys.get_device_index() == query.get_device_index(),
                  "keys: must be on query's device");
  if (valid) {
    STD_TORCH_CHECK(valid->scalar_type() == ScalarType::Int && valid->dim() == 1 &&
                        valid->size(0) == batches && valid->is_contiguous() && valid->is_cuda() &&
                        valid->get_device_index() == query.get_device_index(),
                    "valid: must be int32 (B,) on query's device");
  }

  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Tensor scores = torch::stable::new_empty(query, {batches, queries, k}, ScalarType::Float);
  const Tensor indices = torch::stable::new_empty(query, {batches, queries, k}, ScalarType::Int);
  if (batches * queries == 0) return {scores, indices};
  Call call{};
  call.valid = valid ? static_cast<const int*>(valid->const_data_ptr()) : nullptr;
  call.batches = static_cast<int>(batches);
  call.queries = static_cast<int>(queries);
  call.count = static_cast<int>(count);
  call.depth = static_cast<int>(depth);
  call.k = static_cast<int>(k);
  call.scores = static_cast<float*>(scores.mutable_data_ptr());
  call.indices = static_cast<int*>(indices.mutable_data_ptr());
  switch (query.scalar_type()) {
    case ScalarType::Float:
      run<float>(call, query, keys);
      break;
    case ScalarType::BFloat16:
      run<BFloat16>(call, query, keys);
      break;
    case ScalarType::Half:
      run<Float16>(call, query, keys);
      break;
    default:
      STD_TORCH_CHECK(false, "query: its dtype must be float32, bfloat16 or float16");
  }
  return {scores, indices};
}

}  // namespace
}  // namespace dmv_fast::gpu

STABLE_TORCH_LIBRARY_FRAGMENT(dmv_fast, library) {
  library.def("retrieve_cuda(Tensor query, Tensor keys, int k, Tensor? valid) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CUDA, library) {
  library.impl("retrieve_cuda", TORCH_BOX(&dmv_fast::gpu::retrieve));
}
