// Convolutions for AVX512_VNNI whose products are those of whole numbers of 16 bits.
#include "conv_float32.h"
#include "retrieve_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,popcnt")
#include "lanes_avx512.h"
#include "product_panel.h"
#include "product_panel_int16.h"
#include "conv_winograd.h"
#include "conv_pointwise.h"

namespace dmv_fast {

WinogradSteps winograd_int16(int64_t stride) { return steps_of<Int16>(stride); }
PointwisePart pointwise_int16() { return convolve_pointwise<Int16>; }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
