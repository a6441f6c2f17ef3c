// Voting for AMX: 32 x 32 blocks by two tiles times two.
#include "vote_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16")
#include "amx_tiles.h"
#include "vote_group.h"

namespace dmv_fast {
namespace {

class VoteAmx {
 public:
  VoteAmx() { begin_tiles(); }
  ~VoteAmx() { end_tiles(); }

  // All of b stays in tiles 2 to 5.
  template <class Take>
  void left(const uint16_t* a, int count, const uint16_t* b, Take&& take) {
    if (count == 0) return;
    finish_stores();
    _tile_loadd(2, b, 128);
    _tile_loadd(3, b + 32, 128);
    _tile_loadd(4, b + 16 * 64, 128);
    _tile_loadd(5, b + 16 * 64 + 32, 128);
    for (int i = 0; i < count; ++i, a += 16 * kVoteWidth) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_loadd(6, a, kVoteWidth * 2);
      _tile_loadd(7, a + 32, kVoteWidth * 2);
      _tile_dpbf16ps(0, 6, 2);
      _tile_dpbf16ps(1, 6, 3);
      _tile_dpbf16ps(0, 7, 4);
      _tile_dpbf16ps(1, 7, 5);
      _tile_stored(0, part_[i % 2], 128);
      _tile_stored(1, part_[i % 2] + 16, 128);
      if (i) take(i - 1, part_[(i - 1) % 2]);
    }
    take(count - 1, part_[(count - 1) % 2]);
  }

  // All of a stays in tiles 2 to 5.
  template <class Take>
  void right(const uint16_t* a, const uint16_t* b, int count, Take&& take) {
    if (count == 0) return;
    finish_stores();
    _tile_loadd(2, a, kVoteWidth * 2);
    _tile_loadd(3, a + 16 * kVoteWidth, kVoteWidth * 2);
    _tile_loadd(4, a + 32, kVoteWidth * 2);
    _tile_loadd(5, a + 16 * kVoteWidth + 32, kVoteWidth * 2);
    for (int i = 0; i < count; ++i, b += 16 * kVoteWidth) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + 512, 64);
      _tile_dpbf16ps(0, 2, 6);
      _tile_dpbf16ps(1, 3, 6);
      _tile_dpbf16ps(0, 4, 7);
      _tile_dpbf16ps(1, 5, 7);
      _tile_stored(0, part_[i % 2], 64);
      _tile_stored(1, part_[i % 2] + 256, 64);
      if (i) take(i - 1, part_[(i - 1) % 2]);
    }
    take(count - 1, part_[(count - 1) % 2]);
  }

  template <class Between>
  void logits(const uint16_t* a, int64_t stride, const uint16_t* b, float* c, Between&& between) {
    zero_sums();
    _tile_loadd(4, a, stride * 2);
    _tile_loadd(6, b, 128);
    _tile_loadd(7, b + 32, 128);
    _tile_loadd(5, a + 16 * stride, stride * 2);
    _tile_dpbf16ps(0, 4, 6);
    between(0);
    _tile_dpbf16ps(1, 4, 7);
    between(1);
    _tile_dpbf16ps(2, 5, 6);
    between(2);
    _tile_dpbf16ps(3, 5, 7);
    between(3);
    store_sums(c, kVoteRows);
  }

  void add(const uint16_t* a, const uint16_t* b, int steps, float* c) {
    load_sums(c);
    for (int i = 0; i < steps; ++i, a += kRowsC, b += 32 * 32) {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 128);
      _tile_loadd(7, b + 32, 128);
      _tile_loadd(5, a + 16 * 32, 64);
      add_products();
    }
    store_sums(c, kVoteRows);
  }

 private:
  static void load_sums(const float* c) {
    finish_stores();
    _tile_loadd(0, c, kVoteRows * 4);
    _tile_loadd(1, c + 16, kVoteRows * 4);
    _tile_loadd(2, c + 16 * kVoteRows, kVoteRows * 4);
    _tile_loadd(3, c + 16 * kVoteRows + 16, kVoteRows * 4);
  }

  alignas(64) float part_[2][16 * kVoteRows];
};

}  // namespace

VoteLocations vote_amx() { return vote_locations<VoteAmx>; }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
