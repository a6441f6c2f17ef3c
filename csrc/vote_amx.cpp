// Voting for AMX: 32 x 32 blocks by two tiles times two.
#include "vote_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16")
#include "vote_group.h"

namespace dmv_fast {
namespace {

struct VoteAmx {
  static void begin() {
    // A constant, because GCC takes _tile_loadconfig to read 8 bytes and drops stores to the other 56.
    struct alignas(64) Shapes {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Shapes kShapes;
    _tile_loadconfig(&kShapes);
  }
  static void end() { _tile_release(); }

  static void block(
      const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t b_columns, int64_t depth, float* c,
      const float* start = nullptr) {
    if (start) {
      _tile_loadd(0, start, kVoteRows * 4);
      _tile_loadd(1, start + 16, kVoteRows * 4);
      _tile_loadd(2, start + 16 * kVoteRows, kVoteRows * 4);
      _tile_loadd(3, start + 16 * kVoteRows + 16, kVoteRows * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t d = 0; d < depth; d += 32, a += 32, b += 32 * b_columns) {
      _tile_loadd(4, a, a_stride * 2);
      _tile_loadd(6, b, b_columns * 4);
      _tile_loadd(7, b + 32, b_columns * 4);
      _tile_loadd(5, a + 16 * a_stride, a_stride * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, kVoteRows * 4);
    _tile_stored(1, c + 16, kVoteRows * 4);
    _tile_stored(2, c + 16 * kVoteRows, kVoteRows * 4);
    _tile_stored(3, c + 16 * kVoteRows + 16, kVoteRows * 4);
  }
};

}  // namespace

VoteLocations vote_amx() { return vote_locations<VoteAmx>; }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
