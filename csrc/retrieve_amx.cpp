// Retrieval for AMX: tiles of 16 keys x 16 queries, of bfloat16, or of bytes that screen float32 keys. The keys are the
// left operand, whose rows a tile load takes straight from the memory bank; only the queries, which are few, are packed.
#include "retrieve_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,popcnt,avx512vnni,amx-tile,amx-bf16,amx-int8")
#include "amx_tiles.h"
#include "lanes_avx512.h"
#include "numbers.h"
#include "topk.h"
#include "retrieve_loop.h"
#include "product_float32.h"
#include "screen_int8.h"

namespace dmv_fast {
namespace {

struct ProductAmx {
  using Element = uint16_t;
  static constexpr int kTogether = 2;
  static constexpr int64_t kDepthStep = 32;

  static void begin() { begin_tiles(); }
  static void end() { end_tiles(); }

  // Two tiles of keys by two of queries: four products for four loads, which keeps the matrix unit busy.
  template <class Between>
  static void block(
      const uint16_t* rows, int64_t stride, const uint16_t* queries, int64_t depth, float* logits, Between&& between) {
    const int steps = static_cast<int>(depth / kDepthStep);
    zero_sums();
    for (int step = 0, group = 0, due = 0; step < steps; ++step) {
      const uint16_t* const query = queries + step * kDepthStep * kTile;
      const uint16_t* const row = rows + step * kDepthStep;
      _tile_loadd(4, row, stride * 2);
      _tile_loadd(6, query, kTile * 4);
      _tile_loadd(7, query + 32, kTile * 4);
      _tile_loadd(5, row + 16 * stride, stride * 2);
      add_products();
      for (due += kGroups; due >= steps; due -= steps) between(group++);
    }
    store_sums(logits, kTile);
  }
};

// Products of bytes, as keys and queries lie for them: a tile of keys is 64 numbers of 16, a tile of queries 16 times
// four numbers of 16.
struct MultiplyByteTiles {
  static void begin() { begin_tiles(); }
  static void end() { end_tiles(); }

  template <class Between>
  static void run(
      const KeyBlock& block, const QueryTile& tile, int64_t depth, float* logits, uintptr_t ahead, Between& between) {
    constexpr int kDepth = 64;  // of a tile
    if (depth % kDepth) return MultiplyBytes::run(block, tile, depth, logits, ahead, between);
    zero_sums();
    for (int64_t d = 0; d < depth; d += kDepth) {
      _tile_loadd(4, block.bytes + d, depth);
      _tile_loadd(6, tile.bytes + d * kTile, kTile * 4);
      _tile_loadd(7, tile.bytes + d * kTile + 64, kTile * 4);
      _tile_loadd(5, block.bytes + 16 * depth + d, depth);
      _tile_dpbsud(0, 4, 6);  // keys have a sign, queries have none
      _tile_dpbsud(1, 4, 7);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
    store_sums(logits, kTile);  // whole numbers yet
    const __m512 scale[2] = {_mm512_loadu_ps(tile.scale), _mm512_loadu_ps(tile.scale + 16)};
    for (int key = 0; key < kBlock; ++key) {
      for (int64_t d = 0; d < depth; d += kDepth) {
        __builtin_prefetch(reinterpret_cast<const char*>(ahead + key * depth + d), 0, 2);
        between(0);
      }
      float* const row = logits + key * kTile;
      MultiplyBytes::store_logits(block, key, {_mm512_load_si512(row), _mm512_load_si512(row + 16)}, scale, row);
    }
  }
};

}  // namespace

RetrieveTiles amx_kernel() { return retrieve_tiles<ProductAmx, BFloat16>; }
RetrieveTiles amx_screened_kernel() { return retrieve_tiles<ProductInt8<MultiplyByteTiles>, float, Int8Screen>; }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
