// Convolutions in float32 for AVX2.
#include "conv_float32.h"
#include "retrieve_cpu.h"

#ifdef DMV_X86
DMV_TARGET_BEGIN("avx2,fma")
#define DMV_LANES 8
#include "lanes_portable.h"
#include "product_panel.h"
#include "conv_winograd.h"
#include "conv_pointwise.h"
#include "conv_pixels_float32.h"

namespace dmv_fast {

WinogradSteps winograd_avx2(int64_t stride) { return steps_of<Float32>(stride); }
PointwisePart pointwise_avx2() { return convolve_pointwise<Float32>; }
PixelsPart pixels_avx2() { return convolve_pixels; }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
