// How one call of the CUDA retrieval is laid over a device. Plain C++: the launcher, the emulation and the
// static checks read the same plan.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dmv_fast::gpu {

constexpr int kWarpRows = 32;    // query rows of a warp: one lane keeps one row's list
constexpr int kRowBytes = 128;   // of a query or key row that one pipeline stage holds: a line of the cache
constexpr int kMaxSplits = 127;  // the merge kernel's warp reads 4 lists a lane, the null column among them
constexpr int kMaxStages = 4;
constexpr int kReservedBytes = 1024;  // of shared memory that the system takes of every block

// Keys of a tile: 128 make the tensor cores' operands last long enough (32 x 128 sums a warp); float32 has no
// use for that and needs the shared memory. A stage, kRowBytes of each key, is lent to the block's warps
// between two tiles, 4 KB each, hence the limit on warps.
template <int kElementBytes>
constexpr int kTileKeys = kElementBytes == 2 ? 128 : 64;
template <int kElementBytes>
constexpr int kMaxWarps = kTileKeys<kElementBytes> / 32;

struct Device {
  int multiprocessors;
  int shared_per_block;  // the most a block may ask for
  int shared_per_multiprocessor;
};

struct Plan {
  int warps;       // of a block, 32 query rows each
  int row_tiles;   // blocks along the queries
  int splits;      // blocks along the keys
  int split_keys;  // keys of a split, a multiple of the tile
  int stages;      // of the pipeline, 2 to kMaxStages
  int shared_bytes;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int64_t chunks_of(int64_t depth, int element_bytes) {
  return ceil_div(depth * element_bytes, kRowBytes);
}

// Query rows whole, key stages, and the rows' lists.
template <int kElementBytes>
constexpr int64_t shared_bytes(int64_t warps, int64_t stages, int64_t depth, int64_t k) {
  return warps * kWarpRows * (chunks_of(depth, kElementBytes) * kRowBytes + k * 8) +
         stages * kTileKeys<kElementBytes> * kRowBytes;
}

// Depends on capacities alone, never on how many keys are valid: a captured graph serves every length. 256 x
// 8192, depth 256, k = 4, 132 multiprocessors: 2 row tiles of 4 warps x 64 splits of one tile, 128 blocks;
// one block a multiprocessor has room for 4 stages. 1024 x 32768: 8 row tiles x 32 splits of 8 tiles, 256
// blocks, two a multiprocessor with 2 stages, so that one selects while the other multiplies.
template <int kElementBytes>
Plan plan_for(int64_t batches, int64_t queries, int64_t keys, int64_t depth, int64_t k,
              const Device& device) {
  constexpr int64_t kTile = kTileKeys<kElementBytes>;
  const auto bytes = [&](int64_t warps, int64_t stages) {
    return shared_bytes<kElementBytes>(warps, stages, depth, k);
  };
  const int64_t all_warps = ceil_div(queries, kWarpRows);
  int64_t warps = std::min<int64_t>(kMaxWarps<kElementBytes>, all_warps);
  while (warps > 1 && bytes(warps, 2) > device.shared_per_block) --warps;
  const int64_t row_tiles = ceil_div(all_warps, warps);
  warps = ceil_div(all_warps, row_tiles);

  const int64_t fitting = device.shared_per_multiprocessor / (bytes(warps, 2) + kReservedBytes);
  const int64_t per_multiprocessor =
      std::max<int64_t>(1, std::min<int64_t>(fitting, 8 / warps));  // 8: by registers
  const int64_t places = device.multiprocessors * per_multiprocessor;
  const int64_t tiles = ceil_div(keys, kTile);
  const int64_t wanted = std::clamp<int64_t>(places / (batches * row_tiles), 1, kMaxSplits);
  const int64_t split_tiles = std::max<int64_t>(1, ceil_div(tiles, wanted));
  const int64_t splits = ceil_div(tiles, split_tiles);

  const int64_t sharing = std::clamp<int64_t>(ceil_div(batches * row_tiles * splits, device.multiprocessors),
                                              1, per_multiprocessor);
  const int64_t room =
      std::min<int64_t>(device.shared_per_block, device.shared_per_multiprocessor / sharing - kReservedBytes);
  int64_t stages = 2;
  while (stages < kMaxStages && bytes(warps, stages + 1) <= room) ++stages;
  return {static_cast<int>(warps),  static_cast<int>(row_tiles),
          static_cast<int>(splits), static_cast<int>(split_tiles * kTile),
          static_cast<int>(stages), static_cast<int>(bytes(warps, stages))};
}

struct Matrix {
  const void* data;                  // [batch][row][depth], rows contiguous
  int64_t batch_stride, row_stride;  // elements
  bool aligned;                      // every row starts and ends at a multiple of 16 bytes
};

struct PartSum {
  float largest;  // logit, at least the null column's 0
  float total;    // of exp(logit - largest)
};

// What the kernels get.
struct Call {
  Matrix query, keys;
  const int* valid;  // [batch], how many leading keys exist; null: all
  int batches, queries, count, depth, k;
  Plan plan;
  float* part_logits;  // [batch][query][split][k], best first
  int* part_indices;   // likewise
  PartSum* part_sums;  // [batch][query][split]
  float* scores;       // [batch][query][k]
  int* indices;        // likewise
};

inline bool is_aligned(const Matrix& matrix, int64_t depth, int64_t element_bytes) {
  const int64_t strides = matrix.batch_stride | matrix.row_stride | depth;
  return (reinterpret_cast<uintptr_t>(matrix.data) | static_cast<uintptr_t>(strides * element_bytes)) % 16 ==
         0;
}

}  // namespace dmv_fast::gpu
