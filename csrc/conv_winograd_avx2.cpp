// Winograd's convolution for AVX2.
#include "conv_winograd_cpu.h"
#include "retrieve_cpu.h"

#ifdef DMV_X86
DMV_TARGET_BEGIN("avx2,fma")
#define DMV_LANES 8
#include "lanes_portable.h"
#include "conv_winograd.h"

namespace dmv_fast {

WinogradSteps winograd_avx2(int64_t stride) { return steps_of(stride); }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
