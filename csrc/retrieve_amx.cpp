// Retrieval for AMX: bfloat16 tiles of 16 keys x 16 queries. The keys are the left operand, whose rows a tile load
// takes straight from the memory bank; only the queries, which are few, are packed into pairs.
#include "retrieve_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,popcnt,amx-tile,amx-bf16")
#include "lanes_avx512.h"
#include "numbers.h"
#include "topk.h"
#include "retrieve_loop.h"

namespace dmv_fast {
namespace {

struct ProductAmx {
  using Element = uint16_t;
  static constexpr int kTogether = 2;
  static constexpr int64_t kDepthStep = 32;

  static void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    _tile_loadconfig(&shapes);
  }
  static void end() { _tile_release(); }

  // Two tiles of keys by two of queries: four products for four loads, which keeps the matrix unit busy.
  template <class Between>
  static void block(
      const uint16_t* rows, int64_t stride, const uint16_t* queries, int64_t depth, float* logits, Between&& between) {
    const int steps = static_cast<int>(depth / kDepthStep);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int step = 0, group = 0, due = 0; step < steps; ++step) {
      const uint16_t* const query = queries + step * kDepthStep * kTile;
      const uint16_t* const row = rows + step * kDepthStep;
      _tile_loadd(4, row, stride * 2);
      _tile_loadd(6, query, kTile * 4);
      _tile_loadd(7, query + 32, kTile * 4);
      _tile_loadd(5, row + 16 * stride, stride * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      for (due += kGroups; due >= steps; due -= steps) between(group++);
    }
    _tile_stored(0, logits, kTile * 4);
    _tile_stored(1, logits + 16, kTile * 4);
    _tile_stored(2, logits + 16 * kTile, kTile * 4);
    _tile_stored(3, logits + 16 * kTile + 16, kTile * 4);
  }
};

}  // namespace

RetrieveTiles amx_kernel() { return retrieve_tiles<ProductAmx, BFloat16>; }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
