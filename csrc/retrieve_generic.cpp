// Retrieval in plain C++: whatever vectors the compiler's baseline has.
#include "retrieve_cpu.h"

#include "lanes_portable.h"
#include "numbers.h"
#include "topk.h"
#include "retrieve_loop.h"
#include "product_float32.h"

namespace dmv_fast {

RetrieveTiles generic_kernel(Dtype dtype) {
  if (dtype == Dtype::float32) return retrieve_tiles<ProductFloat32, float>;
  return dtype == Dtype::bfloat16 ? retrieve_tiles<ProductFloat32, BFloat16> : retrieve_tiles<ProductFloat32, Float16>;
}

}  // namespace dmv_fast
