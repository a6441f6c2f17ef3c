// Voting in float32 for AVX2.
#include "gather_cpu.h"
#include "vote_cpu.h"

#ifdef DMV_X86
DMV_TARGET_BEGIN("avx2,fma")
#define DMV_LANES 8
#include "lanes_portable.h"
#include "vote_heads_portable.h"
#include "vote_float32.h"

namespace dmv_fast {

VoteFloat32Locations vote_float32_avx2() { return vote_locations<OutFloat32>; }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
