// A thread's own memory.
#pragma once

#include <cstdint>

namespace dmv_fast {

// So many bytes, 64-byte aligned, filled with anything; it grows to what was asked for most (8 MB or so in a thread
// that calls Winograd's convolution, 2 elsewhere) and is kept. Throws std::bad_alloc.
void* room_of(int64_t bytes);

}  // namespace dmv_fast
