// Retrieval for AMX: bfloat16 tiles of 16 keys x 16 queries. The keys are the left operand, whose rows a tile load
// takes straight from the memory bank; only the queries, which are few, are packed into pairs.
#include "retrieve_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,popcnt,amx-tile,amx-bf16")
#include "amx_tiles.h"
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

// Numbers in two parts, whose sum is meant: three of their four products, which share their tiles. Queries are rows of
// first parts, then of second ones; keys are tiles already: of 16 keys [depth / 32][2 parts][16][32] (pack_keys in
// dmv_fast/ops/packed.py), which takes a fifth less time than rows far apart do.
struct ProductAmxSplit : ProductAmx {
  static constexpr int64_t kDepthStep = 64;

  template <class Between>
  static void block(
      const uint16_t* keys, int64_t stride, const uint16_t* queries, int64_t depth, float* logits, Between&& between) {
    constexpr int kTileNumbers = 16 * 32;
    const int steps = static_cast<int>(depth / kDepthStep);
    const uint16_t* const second_queries = queries + depth / 2 * kTile;
    zero_sums();
    for (int step = 0, group = 0, due = 0; step < steps; ++step, keys += 2 * kTileNumbers) {
      const uint16_t* const query = queries + step * 32 * kTile;
      const uint16_t* const second_query = second_queries + step * 32 * kTile;
      _tile_loadd(4, keys + kTileNumbers, 64);
      _tile_loadd(6, query, kTile * 4);
      _tile_loadd(7, query + 32, kTile * 4);
      _tile_loadd(5, keys + 16 * stride + kTileNumbers, 64);
      add_products();
      _tile_loadd(4, keys, 64);
      _tile_loadd(5, keys + 16 * stride, 64);
      add_products();
      _tile_loadd(6, second_query, kTile * 4);
      _tile_loadd(7, second_query + 32, kTile * 4);
      add_products();
      for (due += kGroups; due >= steps; due -= steps) between(group++);
    }
    store_sums(logits, kTile);
  }
};

}  // namespace

RetrieveTiles amx_kernel() { return retrieve_tiles<ProductAmx, BFloat16>; }
RetrieveTiles amx_split_kernel() { return retrieve_tiles<ProductAmxSplit, BFloat16>; }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
