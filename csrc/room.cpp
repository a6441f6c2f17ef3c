#include "room.h"

#include <memory>
#include <new>

namespace dmv_fast {

void* room_of(int64_t bytes) {
  struct Free {
    void operator()(void* room) const { operator delete(room, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<void, Free> room;
  thread_local int64_t size = 0;
  if (size < bytes) {
    room.reset();
    size = 0;
    room.reset(operator new(bytes, std::align_val_t(64)));
    size = bytes;
  }
  return room.get();
}

}  // namespace dmv_fast
