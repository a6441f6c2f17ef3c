// Tiles that all AMX kernels use alike: eight of 16 rows of 64 bytes, four sums of two left by two right operands.
// Included inside a DMV_TARGET_BEGIN region.
#pragma once

namespace dmv_fast {
namespace {

inline void begin_tiles() {
  // A constant, because GCC takes _tile_loadconfig to read 8 bytes and drops stores to the other 56.
  struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static constexpr Shapes kShapes;
  _tile_loadconfig(&kShapes);
}
inline void end_tiles() { _tile_release(); }

// GCC does not know that _tile_loadd reads memory: stores before this are done before it.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

// What products begin with.
inline void zero_sums() {
  finish_stores();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Tiles 4 and 5 on the left, 6 and 7 on the right.
inline void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// 32 x 32 sums, `stride` numbers from row to row.
inline void store_sums(float* to, int64_t stride) {
  _tile_stored(0, to, stride * 4);
  _tile_stored(1, to + 16, stride * 4);
  _tile_stored(2, to + 16 * stride, stride * 4);
  _tile_stored(3, to + 16 * stride + 16, stride * 4);
}

}  // namespace
}  // namespace dmv_fast
