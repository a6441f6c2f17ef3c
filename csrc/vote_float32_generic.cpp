// Voting in float32 in plain C++: whatever vectors the compiler's baseline has.
#include "gather_cpu.h"
#include "lanes_portable.h"
#include "vote_heads_portable.h"
#include "vote_float32.h"

namespace dmv_fast {

VoteFloat32Locations vote_float32_generic() { return vote_locations<OutFloat32>; }

}  // namespace dmv_fast
