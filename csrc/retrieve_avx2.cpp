// Retrieval for AVX2: float32 product, bfloat16 and float16 widened block by block.
#include "retrieve_cpu.h"

#ifdef DMV_X86
DMV_TARGET_BEGIN("avx2,fma,f16c,bmi,popcnt")
#define DMV_LANES 8
#include "lanes_portable.h"
#include "numbers.h"
#include "topk.h"
#include "retrieve_loop.h"
#include "product_float32.h"

namespace dmv_fast {

RetrieveTiles avx2_kernel(Dtype dtype) {
  if (dtype == Dtype::float32) return retrieve_tiles<ProductFloat32, float>;
  return dtype == Dtype::bfloat16 ? retrieve_tiles<ProductFloat32, BFloat16> : retrieve_tiles<ProductFloat32, Float16>;
}

}  // namespace dmv_fast
DMV_TARGET_END
#endif
