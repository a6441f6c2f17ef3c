// Retrieval in float32 for AVX-512 with products of bytes, which screen the keys.
#include "retrieve_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi,popcnt")
#include "lanes_avx512.h"
#include "numbers.h"
#include "topk.h"
#include "retrieve_loop.h"
#include "product_float32.h"
#include "screen_int8.h"

namespace dmv_fast {

RetrieveTiles avx512_vnni_screened_kernel() { return retrieve_tiles<ProductInt8<MultiplyBytes>, float, Int8Screen>; }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
