// Retrieval for AVX-512: float32 product, bfloat16 and float16 widened block by block.
#include "retrieve_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,popcnt,f16c")
#include "lanes_avx512.h"
#include "numbers.h"
#include "topk.h"
#include "retrieve_loop.h"
#include "product_float32.h"

namespace dmv_fast {

RetrieveTiles avx512_kernel(Dtype dtype) {
  if (dtype == Dtype::float32) return retrieve_tiles<ProductFloat32, float>;
  return dtype == Dtype::bfloat16 ? retrieve_tiles<ProductFloat32, BFloat16> : retrieve_tiles<ProductFloat32, Float16>;
}

}  // namespace dmv_fast
DMV_TARGET_END
#endif
