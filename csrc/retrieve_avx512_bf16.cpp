// Retrieval for AVX-512 with its bfloat16 dot product.
#include "retrieve_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,bmi,popcnt")
#include "lanes_avx512.h"
#include "numbers.h"
#include "topk.h"
#include "retrieve_loop.h"
#include "product_bfloat16.h"

namespace dmv_fast {

RetrieveTiles avx512_bf16_kernel() { return retrieve_tiles<ProductBFloat16, BFloat16>; }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
