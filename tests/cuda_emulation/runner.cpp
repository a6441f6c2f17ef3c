// Runs the CUDA retrieval of csrc/ on emulated blocks: cases in on stdin, results out on stdout, until stdin
// ends. A case is a Case, then the elements of query, keys and valid; its result is the Plan, the scores and
// the indices.
#define DMV_EMULATE
#include <cstring>

#include "retrieve_merge.cuh"

namespace dmv_fast::gpu {

alignas(128) char shared[emulation::kMaxShared];

namespace {

struct CaseMatrix {
  int64_t elements, batch_stride, row_stride;
  int64_t misalignment;  // bytes by which the first element misses a multiple of 16
};

struct Case {
  CaseMatrix query, keys;
  int32_t dtype;  // 0 float32, 1 bfloat16, 2 float16
  int32_t batches, queries, count, depth, k;
  int32_t has_valid, backwards;
  Device device;
  int32_t unused;
};

void read(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) emulation::fail("the case is cut short");
}

// Bytes that end where the heap block ends, so that AddressSanitizer sees what is read or written beyond;
// 0xff.
class Bytes {
 public:
  explicit Bytes(size_t size, size_t misalignment = 0) : size_(size), block_(new char[size + misalignment]) {
    data_ = block_ + misalignment;
    std::memset(block_, 0xff, size + misalignment);
  }
  Bytes(const Bytes&) = delete;
  ~Bytes() { delete[] block_; }
  size_t size() const { return size_; }
  template <class T = char>
  T* data() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  size_t size_;
  char *block_, *data_;
};

template <class Element>
void run(const Case& wanted) {
  const Bytes query(wanted.query.elements * sizeof(Element), wanted.query.misalignment);
  const Bytes keys(wanted.keys.elements * sizeof(Element), wanted.keys.misalignment);
  const Bytes valid(wanted.has_valid ? wanted.batches * 4 : 0);
  for (const Bytes* input : {&query, &keys, &valid}) read(input->data(), input->size());

  Call call{{query.data(), wanted.query.batch_stride, wanted.query.row_stride, false},
            {keys.data(), wanted.keys.batch_stride, wanted.keys.row_stride, false},
            wanted.has_valid ? valid.data<int>() : nullptr,
            wanted.batches,
            wanted.queries,
            wanted.count,
            wanted.depth,
            wanted.k,
            plan_for<sizeof(Element)>(wanted.batches, wanted.queries, wanted.count, wanted.depth, wanted.k,
                                      wanted.device)};
  for (Matrix* matrix : {&call.query, &call.keys})
    matrix->aligned = is_aligned(*matrix, call.depth, sizeof(Element));
  const size_t rows = size_t(call.batches) * call.queries, parts = rows * call.plan.splits;
  const Bytes part_logits(parts * call.k * 4), part_indices(parts * call.k * 4),
      part_sums(parts * sizeof(PartSum));
  const Bytes scores(rows * call.k * 4), indices(rows * call.k * 4);
  call.part_logits = part_logits.data<float>();
  call.part_indices = part_indices.data<int>();
  call.part_sums = part_sums.data<PartSum>();
  call.scores = scores.data<float>();
  call.indices = indices.data<int>();

  emulation::backwards = wanted.backwards;
  emulation::bits_found = 0;
  emulation::launch(call.batches * call.plan.row_tiles * call.plan.splits, 32 * call.plan.warps, shared,
                    call.plan.shared_bytes, [&] { retrieve_split<Element>(call); });
  const int64_t offered = emulation::bits_found;
  emulation::launch(ceil_div(rows, kMergeWarps), 32 * kMergeWarps, shared, 0, [&] { merge_splits(call); });
  std::fwrite(&call.plan, sizeof(call.plan), 1, stdout);
  std::fwrite(&offered, sizeof(offered), 1, stdout);
  std::fwrite(scores.data(), 1, scores.size(), stdout);
  std::fwrite(indices.data(), 1, indices.size(), stdout);
  std::fflush(stdout);
}

}  // namespace
}  // namespace dmv_fast::gpu

int main() {
  using namespace dmv_fast::gpu;
  Case wanted;
  while (std::fread(&wanted, sizeof(wanted), 1, stdin) == 1) {
    if (wanted.dtype == 0)
      run<float>(wanted);
    else if (wanted.dtype == 1)
      run<BFloat16>(wanted);
    else
      run<Float16>(wanted);
  }
}
