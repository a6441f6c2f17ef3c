// Voting in float32 for AMX: 32 candidates at a time, one location's or several whole locations'.
//
//   a_ih = softmax over the others j of 2-based logits (to_q x_i + q_bias) . (to_k x_j), heads h
//   m_i  = U x_i + mix_bias + sum over h, j of a_ihj (U_h x_j)              (mean zero over C, folded)
//   out  = maximum over i of  out m_i / sqrt(mean m_i^2 + epsilon) + out_bias
//
// Products with weights are of numbers in two parts of bfloat16, v = v_0 + v_1 with an error of 2^-17 v, and three of
// the four products are summed: x_1 w_0 + x_0 w_0 + x_0 w_1, as in conv_amx.cpp. The attention is float32 in AVX-512
// and costs each candidate its K neighbours, not 32: logits and softmax have a candidate in each lane, whose j-th
// neighbour's key is brought there by a permutation of the lanes; what is heard has C in the lanes.
#include "vote_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16")
#include "amx_tiles.h"
#include "lanes_avx512.h"
#include "vote_numbers.h"

namespace dmv_fast {
namespace {

constexpr int kRowsC = kVoteRows * kVoteWidth;
constexpr int kColumns = 32;                         // of a product
constexpr int kTileNumbers = 16 * 32;
constexpr int kWeights = 2 * kVoteWidth * kColumns;  // of a product, as tiles: [C / 32][w_0, w_1][2], see vote_cpu.h

struct alignas(64) VoteSplitScratch {
  uint16_t parts[2 * kRowsC];               // v_0 and v_1 of the candidates, then of their norms: each [32][C]
  float product[kVoteRows * kColumns];
  float queries[kColumns * kVoteRows];      // of two heads, [2][C/4][32]
  float keys[kColumns * kVoteRows];
  float attention[kVoteRows * kVoteRows];   // of a head, [j][32]: each candidate's to the j-th of its location
  float values[kRowsC];                     // of a head: U_h x, [32][C]
  float mixed[kRowsC];                      // [32][C]
  int32_t start[kVoteRows];                 // of each candidate's location, its first candidate
  int32_t place[kVoteRows];                 // of each candidate in its location
};

// 16 numbers, scaled.
inline void split(const float* x, float scale, uint16_t* parts) {
  const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(scale));
  const __m256bh v0 = _mm512_cvtneps_pbh(v), v1 = _mm512_cvtneps_pbh(_mm512_sub_ps(v, _mm512_cvtpbh_ps(v0)));
  _mm256_store_si256(reinterpret_cast<__m256i*>(parts), reinterpret_cast<const __m256i&>(v0));
  _mm256_store_si256(reinterpret_cast<__m256i*>(parts + kRowsC), reinterpret_cast<const __m256i&>(v1));
}

// parts [32][C] times the weights of 32 columns -> c [32][32], rows `stride` apart.
inline void multiply(const uint16_t* parts, const uint16_t* w, float* c, int64_t stride) {
  zero_sums();
  for (int step = 0; step < 2; ++step, parts += 32, w += 4 * kTileNumbers) {
    _tile_loadd(4, parts + kRowsC, kVoteWidth * 2);
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + kTileNumbers, 64);
    _tile_loadd(5, parts + kRowsC + 16 * kVoteWidth, kVoteWidth * 2);
    add_products();
    _tile_loadd(4, parts, kVoteWidth * 2);
    _tile_loadd(5, parts + 16 * kVoteWidth, kVoteWidth * 2);
    add_products();
    _tile_loadd(6, w + 2 * kTileNumbers, 64);
    _tile_loadd(7, w + 3 * kTileNumbers, 64);
    add_products();
  }
  store_sums(c, stride);
}

// U_h x of a head, or U x: [32][C].
inline void multiply_mix(const VoteSplitScratch& s, const uint16_t* mix, int head, float* to) {
  for (int i = 0; i < 2; ++i) multiply(s.parts, mix + (2 * head + i) * kWeights, to + i * kColumns, kVoteWidth);
}

// Queries or keys of two heads, transposed: [2][C/4][32].
inline void project(VoteSplitScratch& s, const uint16_t* w, float* to) {
  multiply(s.parts, w, s.product, kColumns);
  for (int row = 0; row < kVoteRows; row += 16)
    for (int column = 0; column < kColumns; column += 16)
      transpose16(
          reinterpret_cast<const uint32_t*>(s.product) + row * kColumns + column, kColumns,
          reinterpret_cast<uint32_t*>(to) + column * kVoteRows + row, kVoteRows);
}

// Logits of a head -> s.attention, minus infinity to itself; rows past the K-th, up to a multiple of four, hold
// anything. Candidates of one location alone (K > 16) all have the same neighbours.
template <bool kAlone>
inline void logits(const float* queries, const float* bias, const float* keys, int candidates, VoteSplitScratch& s) {
  constexpr int kTogether = 4;
  for (int first = 0; first < candidates; first += kTogether) {
    __m512 sum[kTogether][2];
    __m512i who[kTogether][2];
    for (int j = 0; j < kTogether; ++j)
      for (int half = 0; half < 2; ++half) {
        sum[j][half] = _mm512_setzero_ps();
        who[j][half] = _mm512_add_epi32(_mm512_load_si512(s.start + half * 16), _mm512_set1_epi32(first + j));
      }
    for (int c = 0; c < kHeadWidth; ++c) {
      const float *const query = queries + c * kVoteRows, *const key = keys + c * kVoteRows;
      const __m512 keys0 = _mm512_load_ps(key), keys1 = _mm512_load_ps(key + 16);
      for (int half = 0; half < 2; ++half) {
        const __m512 q = _mm512_add_ps(_mm512_load_ps(query + half * 16), _mm512_set1_ps(bias[c]));
        for (int j = 0; j < kTogether; ++j) {
          const __m512 k =
              kAlone ? _mm512_set1_ps(key[first + j]) : _mm512_permutex2var_ps(keys0, who[j][half], keys1);
          sum[j][half] = _mm512_fmadd_ps(q, k, sum[j][half]);
        }
      }
    }
    for (int j = 0; j < kTogether; ++j)
      for (int half = 0; half < 2; ++half) {
        const __m512i place = _mm512_load_si512(s.place + half * 16);
        const __mmask16 itself = _mm512_cmpeq_epi32_mask(place, _mm512_set1_epi32(first + j));
        float* const to = s.attention + (first + j) * kVoteRows + half * 16;
        _mm512_store_ps(to, _mm512_mask_mov_ps(sum[j][half], itself, _mm512_set1_ps(-__builtin_inff())));
      }
  }
}

// In place. The least power is 2^-100, which nobody hears: denormal numbers would take ten times longer.
inline void softmax(int candidates, VoteSplitScratch& s) {
  for (int half = 0; half < kVoteRows; half += 16) {
    float *const first = s.attention + half, *const end = first + candidates * kVoteRows;
    __m512 highest = _mm512_load_ps(first), sum = _mm512_setzero_ps();
    for (const float* a = first; a < end; a += kVoteRows) highest = _mm512_max_ps(highest, _mm512_load_ps(a));
    for (float* a = first; a < end; a += kVoteRows) {
      const __m512 shifted = _mm512_sub_ps(_mm512_load_ps(a), highest);
      const __m512 power = Lanes::exp2(_mm512_max_ps(_mm512_set1_ps(-100), shifted));
      _mm512_store_ps(a, power);
      sum = _mm512_add_ps(sum, power);
    }
    const __m512 scale = _mm512_div_ps(_mm512_set1_ps(1), sum);
    for (float* a = first; a < end; a += kVoteRows) _mm512_store_ps(a, _mm512_mul_ps(_mm512_load_ps(a), scale));
  }
}

// What `rows` candidates of a location hear, added to mixed [rows][C]: attention [K][32] times values [K][C].
template <int rows>
inline void hear(const float* attention, const float* values, int candidates, float* mixed) {
  constexpr int kVectors = kVoteWidth / 16;
  __m512 sum[rows][kVectors];
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_load_ps(mixed + i * kVoteWidth + v * 16);
  for (int j = 0; j < candidates; ++j, attention += kVoteRows, values += kVoteWidth)
    for (int i = 0; i < rows; ++i)
      for (int v = 0; v < kVectors; ++v)
        sum[i][v] = _mm512_fmadd_ps(_mm512_set1_ps(attention[i]), _mm512_load_ps(values + v * 16), sum[i][v]);
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < kVectors; ++v) _mm512_store_ps(mixed + i * kVoteWidth + v * 16, sum[i][v]);
}

// A head's part of what everybody hears.
inline void listen(int locations, int candidates, VoteSplitScratch& s) {
  for (int first = 0; first < locations * candidates; first += candidates)
    for (int i = first; i < first + candidates; i += 4) {
      const float *const attention = s.attention + i, *const values = s.values + first * kVoteWidth;
      float* const mixed = s.mixed + i * kVoteWidth;
      switch (first + candidates - i) {
        case 1: hear<1>(attention, values, candidates, mixed); break;
        case 2: hear<2>(attention, values, candidates, mixed); break;
        case 3: hear<3>(attention, values, candidates, mixed); break;
        default: hear<4>(attention, values, candidates, mixed);
      }
    }
}

// Layer norm over C of s.mixed, whose mean is zero, -> s.parts.
inline void normalise(const SplitVoting& call, VoteSplitScratch& s) {
  alignas(64) float scale[kVoteRows];
  for (int i = 0; i < kVoteRows; ++i) {
    __m512 squares = _mm512_setzero_ps();
    for (int c = 0; c < kVoteWidth; c += 16) {
      float* const place = s.mixed + i * kVoteWidth + c;
      const __m512 x = _mm512_add_ps(_mm512_load_ps(place), _mm512_loadu_ps(call.mix_bias + c));
      _mm512_store_ps(place, x);
      squares = _mm512_fmadd_ps(x, x, squares);
    }
    scale[i] = _mm512_reduce_add_ps(squares);
  }
  for (int i = 0; i < kVoteRows; i += 16) {
    const __m512 variance = _mm512_fmadd_ps(
        _mm512_load_ps(scale + i), _mm512_set1_ps(1.0f / kVoteWidth), _mm512_set1_ps(call.epsilon));
    _mm512_store_ps(scale + i, _mm512_div_ps(_mm512_set1_ps(1), _mm512_sqrt_ps(variance)));
  }
  for (int at = 0; at < kRowsC; at += 16) split(s.mixed + at, scale[at / kVoteWidth], s.parts + at);
}

// To V, and the maximum over each location's candidates.
inline void pool(const SplitVoting& call, int64_t first, int64_t last, VoteSplitScratch& s) {
  for (int64_t column = 0; column < call.value_width; column += kColumns) {
    multiply(s.parts, call.out + column / kColumns * kWeights, s.product, kColumns);
    const float* row = s.product;
    for (int64_t location = first; location < last; ++location) {
      __m512 highest[2] = {_mm512_load_ps(row), _mm512_load_ps(row + 16)};
      row += kColumns;
      for (int i = 1; i < call.candidates; ++i, row += kColumns)
        for (int v = 0; v < 2; ++v) highest[v] = _mm512_max_ps(highest[v], _mm512_load_ps(row + v * 16));
      float* const to = call.retrieved + location * call.value_width + column;
      for (int v = 0; v < 2; ++v)
        _mm512_storeu_ps(to + v * 16, _mm512_add_ps(highest[v], _mm512_loadu_ps(call.out_bias + column + v * 16)));
    }
  }
}

void vote_locations(const SplitVoting& call, int64_t first, int64_t last) {
  begin_tiles();
  VoteSplitScratch s;
  const int together = call.locations_together(), candidates = call.candidates;
  for (int i = 0; i < kVoteRows; ++i) s.place[i] = i % candidates, s.start[i] = i - s.place[i];
  const int heads = candidates == 1 ? 0 : call.heads;  // nobody to hear: only the part on the candidate itself

  for (int64_t location = first; location < last; location += together) {
    const int64_t end = location + together < last ? location + together : last;
    const int64_t present = (end - location) * candidates * kVoteWidth;
    const float* const rows = call.rows + location * candidates * kVoteWidth;
    for (int64_t at = 0; at < present; at += 16) split(rows + at, 1, s.parts + at);
    for (int part = 0; part < 2; ++part) __builtin_memset(s.parts + part * kRowsC + present, 0, (kRowsC - present) * 2);
    multiply_mix(s, call.mix, call.heads, s.mixed);
    for (int head = 0; head < heads; ++head) {
      if (head % 2 == 0) {
        project(s, call.to_q + head / 2 * kWeights, s.queries);
        project(s, call.to_k + head / 2 * kWeights, s.keys);
      }
      multiply_mix(s, call.mix, head, s.values);
      const int at = head % 2 * kHeadWidth * kVoteRows;
      (together == 1 ? logits<true> : logits<false>)(
          s.queries + at, call.q_bias + head * kHeadWidth, s.keys + at, candidates, s);
      softmax(candidates, s);
      listen(static_cast<int>(end - location), candidates, s);
    }
    normalise(call, s);
    pool(call, location, end, s);
  }
  end_tiles();
}

}  // namespace

VoteSplitLocations vote_split_amx() { return vote_locations; }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
