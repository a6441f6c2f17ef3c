// The candidate gather for AVX2; it is bound by memory, wider vectors gain nothing.
#include "gather_cpu.h"

#ifdef DMV_X86
DMV_TARGET_BEGIN("avx2,fma,f16c")
#include "numbers.h"
#include "gather_rows.h"

namespace dmv_fast {

GatherRows gather_avx2(Dtype dtype) { return gather_kernel(dtype); }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
