// Winograd's convolution for AVX-512.
#include "conv_winograd_cpu.h"
#include "retrieve_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt")
#include "lanes_avx512.h"
#include "conv_winograd.h"

namespace dmv_fast {

WinogradSteps winograd_avx512(int64_t stride) { return steps_of(stride); }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
