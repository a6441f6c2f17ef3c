// The tile instructions of AMX (amx-tile, amx-bf16, amx-int8) in AVX-512, for running csrc/*amx* on a processor without them. Put
// before each source by the compiler's -include; csrc/cpu_isa.cpp then takes AMX for granted.
//
// Made to fail where the processor does: what the manual calls an invalid instruction or a fault ends the program. A tile
// is zero past what was loaded, tiles are a thread's own, and none outlives the release. It is stricter in one thing: who
// configures has to release before the next one does.
#pragma once

#define DMV_AMX_EMULATED 1

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace amx_emulation {

struct Tiles {
  int rows[8] = {}, bytes[8] = {};
  bool configured = false;
  alignas(64) unsigned char data[8][16][64] = {};
};
inline thread_local Tiles tiles;

inline void require(bool holds) {
  if (!holds) __builtin_trap();  // the processor's #UD or #GP
}

inline void loadconfig(const void* memory) {
  unsigned char config[64];
  std::memcpy(config, memory, 64);
  require(!tiles.configured);  // the processor would allow it
  require(config[0] == 1 && config[1] == 0);
  for (int i = 2; i < 64; ++i) require(config[i] == 0 || (16 <= i && i < 32) || (48 <= i && i < 56));  // reserved
  tiles.configured = true;
  for (int tile = 0; tile < 8; ++tile) {
    tiles.bytes[tile] = config[16 + 2 * tile] | config[17 + 2 * tile] << 8;
    tiles.rows[tile] = config[48 + tile];
    require(tiles.bytes[tile] <= 64 && tiles.rows[tile] <= 16);
    require((tiles.bytes[tile] == 0) == (tiles.rows[tile] == 0));
  }
}

inline void release() { tiles = Tiles(); }

inline void loadd(int tile, const void* base, int64_t stride) {
  require(tiles.configured && tiles.rows[tile] > 0);
  std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
  for (int row = 0; row < tiles.rows[tile]; ++row) {
    std::memcpy(tiles.data[tile][row], static_cast<const char*>(base) + row * stride, tiles.bytes[tile]);
  }
}

inline void stored(int tile, void* base, int64_t stride) {
  require(tiles.configured && tiles.rows[tile] > 0);
  for (int row = 0; row < tiles.rows[tile]; ++row) {
    std::memcpy(static_cast<char*>(base) + row * stride, tiles.data[tile][row], tiles.bytes[tile]);
  }
}

inline void zero(int tile) {
  require(tiles.configured && tiles.rows[tile] > 0);
  std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}

// What products ask of their tiles: n columns of 32 bits, m rows, k rows of the right one.
inline void require_shapes(int to, int left, int right) {
  require(tiles.configured && to != left && to != right && left != right);
  require(tiles.bytes[left] / 4 == tiles.rows[right] && tiles.rows[to] == tiles.rows[left]);
  require(tiles.bytes[to] == 64 && tiles.bytes[right] == 64);
}

// to[m][n] += sum over k of left[m][2k] right[k][2n] + left[m][2k + 1] right[k][2n + 1]: the even and the odd products
// are summed apart, each fused, then together onto `to`. Denormal numbers count as zero, and come out as zero.
__attribute__((target("avx512f,avx512bw"), noinline)) inline void dpbf16ps(int to, int left, int right) {
  require_shapes(to, left, right);
  constexpr unsigned kMasked = 0x1f80, kDenormalsAreZero = 0x0040, kFlushToZero = 0x8000;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kMasked | kDenormalsAreZero | kFlushToZero);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int m = 0; m < tiles.rows[to]; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < tiles.rows[right]; ++k) {
      int pair;
      std::memcpy(&pair, tiles.data[left][m] + 4 * k, 4);
      const __m512i both = _mm512_set1_epi32(pair), other = _mm512_load_si512(tiles.data[right][k]);
      even = _mm512_fmadd_ps(
          _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(other, 16)), even);
      odd = _mm512_fmadd_ps(
          _mm512_castsi512_ps(_mm512_and_si512(both, high)), _mm512_castsi512_ps(_mm512_and_si512(other, high)), odd);
    }
    float* const sums = reinterpret_cast<float*>(tiles.data[to][m]);
    _mm512_store_ps(sums, _mm512_add_ps(_mm512_load_ps(sums), _mm512_add_ps(even, odd)));
  }
  _mm_setcsr(before);
}

// to[m][n] += sum over k and i of left[m][4k + i] right[k][4n + i], whole numbers with a sign on the left, without on
// the right.
__attribute__((target("avx512f,avx512vnni"), noinline)) inline void dpbsud(int to, int left, int right) {
  require_shapes(to, left, right);
  for (int m = 0; m < tiles.rows[to]; ++m) {
    __m512i sum = _mm512_load_si512(tiles.data[to][m]);
    for (int k = 0; k < tiles.rows[right]; ++k) {
      int four;
      std::memcpy(&four, tiles.data[left][m] + 4 * k, 4);
      sum = _mm512_dpbusd_epi32(sum, _mm512_load_si512(tiles.data[right][k]), _mm512_set1_epi32(four));
    }
    _mm512_store_si512(tiles.data[to][m], sum);
  }
}

}  // namespace amx_emulation

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig amx_emulation::loadconfig
#define _tile_release amx_emulation::release
#define _tile_loadd amx_emulation::loadd
#define _tile_stored amx_emulation::stored
#define _tile_zero amx_emulation::zero
#define _tile_dpbf16ps amx_emulation::dpbf16ps
#define _tile_dpbsud amx_emulation::dpbsud
