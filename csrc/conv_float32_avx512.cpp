// Convolutions in float32 for AVX-512.
#include "conv_float32.h"
#include "retrieve_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt")
#include "lanes_avx512.h"
#include "product_panel.h"
#include "conv_winograd.h"
#include "conv_pointwise.h"
#include "conv_pixels_float32.h"

namespace dmv_fast {

WinogradSteps winograd_avx512(int64_t stride) { return steps_of<Float32>(stride); }
PointwisePart pointwise_avx512() { return convolve_pointwise<Float32>; }
PixelsPart pixels_avx512() { return convolve_pixels; }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
