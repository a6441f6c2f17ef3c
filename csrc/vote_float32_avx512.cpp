// Voting in float32 for AVX-512.
#include "gather_cpu.h"
#include "vote_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include "lanes_avx512.h"
#include "vote_heads_avx512.h"
#include "vote_float32.h"

namespace dmv_fast {

VoteFloat32Locations vote_float32_avx512() { return vote_locations<OutFloat32>; }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
