// The voting net (paper section 3.2 and supplement section 6) on 32 candidates at a time: one location's, or those of
// several whole locations, kept apart by a mask. Everything runs transposed, a candidate a SIMD lane, so that softmax
// and layer norm need no sum across lanes. `Product::block` multiplies 32 x 32 blocks:
//   block(a, a_stride, b, b_columns, depth, c, start)
//   c[32][32] = a[32][depth] * b + start, b in pairs [depth / 2][b_columns][2], start [32][32] or null for nothing;
//   bfloat16 in, float32 out; strides in elements
#pragma once

namespace dmv_fast {
namespace {

constexpr int kRowsC = kVoteRows * kVoteWidth;

// float32 lanes of two rows, rounded to bfloat16 (ties away from zero), as pairs. vcvtne2ps2bf16 and the permutation
// that it wants take half as long again.
inline __m512i pairs_of(__m512 even, __m512 odd) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
  const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
  return _mm512_ternarylogic_epi32(low, high, upper, 0xf8);  // low | (high & upper)
}

// 2^t for t <= 0, relative error 1e-4: less than half of what rounding the result to bfloat16 costs.
inline __m512 exp2_rough(__m512 t) {
  constexpr int kFractionAboveFloor = 0x09;
  const __m512 f = _mm512_reduce_ps(t, kFractionAboveFloor);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.0790214f), f, _mm512_set1_ps(0.2242416f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6967367f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999014f));
  return _mm512_scalef_ps(p, t);
}

// 16 x 16 words of 32 bits: to[j][i] = from[i][j]. Strides in words.
inline void transpose16(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * from_stride);
  for (int i = 0; i < 16; i += 4) {
    const __m512i low0 = _mm512_unpacklo_epi32(a[i], a[i + 1]), high0 = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    const __m512i low1 = _mm512_unpacklo_epi32(a[i + 2], a[i + 3]), high1 = _mm512_unpackhi_epi32(a[i + 2], a[i + 3]);
    b[i] = _mm512_unpacklo_epi64(low0, low1);
    b[i + 1] = _mm512_unpackhi_epi64(low0, low1);
    b[i + 2] = _mm512_unpacklo_epi64(high0, high1);
    b[i + 3] = _mm512_unpackhi_epi64(high0, high1);
  }
  for (int i = 0; i < 4; ++i) {  // b[4 q + i] holds, in each quarter p, column 4 p + i of rows 4 q .. 4 q + 3
    const __m512i even01 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), odd01 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(even01, even23, 0x88));
    _mm512_storeu_si512(to + (i + 4) * to_stride, _mm512_shuffle_i32x4(odd01, odd23, 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_stride, _mm512_shuffle_i32x4(even01, even23, 0xdd));
    _mm512_storeu_si512(to + (i + 12) * to_stride, _mm512_shuffle_i32x4(odd01, odd23, 0xdd));
  }
}

struct alignas(64) VoteScratch {
  uint16_t rows[kRowsC];                           // the candidates x
  uint16_t across[kRowsC];                         // their transpose [C][32]
  uint16_t keys[kVoteRows * kMaxHeads * kHeadWidth];
  uint16_t query_pairs[kMaxHeads * kRowsC / 2];    // a head: [16][32][2], the half of its neighbour in the pair zero
  uint16_t weight_pairs[kVoteRows * kVoteRows];    // softmax numerators of a head, pairs along who is heard
  uint16_t heard[(kMaxHeads + 1) * kRowsC];        // pairs of [heads * C + C][32]: B operand of `mix`
  uint16_t normed[kRowsC];                         // [32][C]
  float block[kRowsC];                             // what Product::block wrote last, [64][32] at most
  float mask[kVoteRows * kVoteRows];               // [32 heard][32 hearing]: 0, or very low for who is not heard
};

// `scale`: one factor a lane. float32 [64][32] -> pairs [32][32][2].
inline void store_pairs(const float* from, const __m512 (&scale)[2], uint16_t* to) {
  for (int row = 0; row < kVoteWidth; row += 2)
    for (int half = 0; half < 2; ++half) {
      const float* const even = from + row * kVoteRows + half * 16;
      const __m512 low = _mm512_mul_ps(_mm512_load_ps(even), scale[half]);
      const __m512 high = _mm512_mul_ps(_mm512_load_ps(even + kVoteRows), scale[half]);
      _mm512_store_si512(to + row * kVoteRows + half * 32, pairs_of(low, high));
    }
}

// x -> its pairs along C (also the last part of `heard`) and its transpose.
inline void turn_rows(VoteScratch& s, uint16_t* pairs) {
  constexpr int kWords = kVoteWidth / 2;
  auto* const words = reinterpret_cast<const uint32_t*>(s.rows);
  auto* const turned = reinterpret_cast<uint32_t*>(pairs);
  for (int row = 0; row < kVoteRows; row += 16)
    for (int word = 0; word < kWords; word += 16)
      transpose16(words + row * kWords + word, kWords, turned + word * kVoteRows + row, kVoteRows);
  for (int word = 0; word < kWords; ++word)
    for (int half = 0; half < 2; ++half) {
      const __m512i both = _mm512_load_si512(turned + word * kVoteRows + half * 16);
      auto* const row = reinterpret_cast<__m256i*>(s.across + 2 * word * kVoteRows) + half;
      _mm256_store_si256(row, _mm512_cvtepi32_epi16(both));
      _mm256_store_si256(row + 2, _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
    }
}

// Keys row by row, queries as pairs. Two heads share a depth of 32: a head's own pairs lie at its half of it.
template <class Product>
void project(const Voting& call, const uint16_t* pairs, VoteScratch& s) {
  const int width = call.heads * kHeadWidth;
  for (int column = 0; column < width; column += 32) {
    Product::block(s.rows, kVoteWidth, call.to_k + column * 2, width, kVoteWidth, s.block);
    for (int row = 0; row < kVoteRows; ++row) {
      const float* const key = s.block + row * kVoteRows;
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_load_ps(key + 16), _mm512_load_ps(key));
      _mm512_store_si512(s.keys + row * width + column, reinterpret_cast<const __m512i&>(both));
    }
    Product::block(call.to_q + column * kVoteWidth, kVoteWidth, pairs, kVoteRows, kVoteWidth, s.block);
    uint16_t* const head = s.query_pairs + column / kHeadWidth * kVoteRows * 32;
    for (int row = 0; row < 32; row += 2) {
      const __m512 even = _mm512_set1_ps(call.q_bias[column + row]), odd = _mm512_set1_ps(call.q_bias[column + row + 1]);
      uint16_t* const to = head + row / kHeadWidth * kVoteRows * 32 + row * kVoteRows;
      for (int half = 0; half < 2; ++half) {
        const float* const query = s.block + row * kVoteRows + half * 16;
        _mm512_store_si512(
            to + half * 32, pairs_of(_mm512_add_ps(_mm512_load_ps(query), even),
                                     _mm512_add_ps(_mm512_load_ps(query + kVoteRows), odd)));
      }
    }
  }
}

// Logits [32 heard][32 hearing] of a head -> numerators as pairs, and one over their sum.
inline void softmax(VoteScratch& s, __m512 (&scale)[2]) {
  const float* const logits = s.block;
  __m512 highest[2][2];  // two chains a half, or they wait for each other
  for (int j = 0; j < 2; ++j)
    for (int half = 0; half < 2; ++half) highest[j][half] = _mm512_load_ps(logits + j * kVoteRows + half * 16);
  for (int j = 2; j < kVoteRows; ++j)
    for (int half = 0; half < 2; ++half)
      highest[j % 2][half] = _mm512_max_ps(highest[j % 2][half], _mm512_load_ps(logits + j * kVoteRows + half * 16));
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int half = 0; half < 2; ++half) highest[0][half] = _mm512_max_ps(highest[0][half], highest[1][half]);
  for (int j = 0; j < kVoteRows; j += 2)
    for (int half = 0; half < 2; ++half) {
      const float* const logit = logits + j * kVoteRows + half * 16;
      const __m512 even = exp2_rough(_mm512_sub_ps(_mm512_load_ps(logit), highest[0][half]));
      const __m512 odd = exp2_rough(_mm512_sub_ps(_mm512_load_ps(logit + kVoteRows), highest[0][half]));
      sum[half] = _mm512_add_ps(sum[half], _mm512_add_ps(even, odd));
      _mm512_store_si512(s.weight_pairs + j * kVoteRows + half * 32, pairs_of(even, odd));
    }
  for (int half = 0; half < 2; ++half) scale[half] = _mm512_div_ps(_mm512_set1_ps(1), sum[half]);
}

// All heads' attention -> `heard`, who hears whom weighted but not yet mixed.
template <class Product>
void listen(int heads, VoteScratch& s) {
  for (int head = 0; head < heads; ++head) {
    Product::block(
        s.keys + head / 2 * 32, heads * kHeadWidth, s.query_pairs + head * kVoteRows * 32, kVoteRows, 32, s.block, s.mask);
    __m512 scale[2];
    softmax(s, scale);
    for (int row = 0; row < kVoteWidth; row += 32)
      Product::block(
          s.across + row * kVoteRows, kVoteRows, s.weight_pairs, kVoteRows, kVoteRows, s.block + row * kVoteRows);
    store_pairs(s.block, scale, s.heard + head * kRowsC);
  }
}

// Layer norm over C of s.block [C][32], whose rows have mean zero already (folded) -> s.normed [32][C].
inline void normalise(const Voting& call, VoteScratch& s) {
  __m512 scale[2];
  for (int half = 0; half < 2; ++half) {
    __m512 squares = _mm512_setzero_ps();
    for (int c = 0; c < kVoteWidth; ++c) {
      float* const place = s.block + c * kVoteRows + half * 16;
      const __m512 x = _mm512_add_ps(_mm512_load_ps(place), _mm512_set1_ps(call.mix_bias[c]));
      _mm512_store_ps(place, x);
      squares = _mm512_fmadd_ps(x, x, squares);
    }
    const __m512 variance = _mm512_fmadd_ps(squares, _mm512_set1_ps(1.0f / kVoteWidth), _mm512_set1_ps(call.epsilon));
    scale[half] = _mm512_div_ps(_mm512_set1_ps(1), _mm512_sqrt_ps(variance));
  }
  uint16_t* const pairs = s.across;
  store_pairs(s.block, scale, pairs);
  auto* const words = reinterpret_cast<const uint32_t*>(pairs);
  for (int row = 0; row < kVoteRows; row += 16)
    for (int word = 0; word < kVoteWidth / 2; word += 16)
      transpose16(
          words + word * kVoteRows + row, kVoteRows,
          reinterpret_cast<uint32_t*>(s.normed) + row * kVoteWidth / 2 + word, kVoteWidth / 2);
}

// To V, and the maximum over each location's candidates.
template <class Product>
void pool(const Voting& call, int64_t first, int64_t last, VoteScratch& s) {
  for (int64_t column = 0; column < call.value_width; column += 32) {
    Product::block(s.normed, kVoteWidth, call.out + column * 2, call.value_width, kVoteWidth, s.block);
    const float* row = s.block;
    for (int64_t location = first; location < last; ++location) {
      __m512 low = _mm512_load_ps(row), high = _mm512_load_ps(row + 16);
      for (row += kVoteRows; row < s.block + (location - first + 1) * call.candidates * kVoteRows; row += kVoteRows) {
        low = _mm512_max_ps(low, _mm512_load_ps(row));
        high = _mm512_max_ps(high, _mm512_load_ps(row + 16));
      }
      low = _mm512_add_ps(low, _mm512_loadu_ps(call.out_bias + column));
      high = _mm512_add_ps(high, _mm512_loadu_ps(call.out_bias + column + 16));
      const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
      _mm512_storeu_si512(call.retrieved + location * call.value_width + column, reinterpret_cast<const __m512i&>(both));
    }
  }
}

template <class Product>
void vote_locations(const Voting& call, int64_t first, int64_t last) {
  VoteScratch s;
  const int together = call.locations_together();
  __builtin_memset(s.query_pairs, 0, sizeof s.query_pairs);
  for (int j = 0; j < kVoteRows; ++j) {
    const int location = j / call.candidates;
    const uint64_t mates = ((uint64_t(1) << call.candidates) - 1) << (location * call.candidates);
    const uint32_t hears = location < together ? static_cast<uint32_t>(mates) & ~(uint32_t(1) << j) : 0;
    for (int i = 0; i < kVoteRows; ++i) s.mask[j * kVoteRows + i] = (hears >> i & 1) ? 0.0f : -1e30f;
  }
  const int heads = call.candidates == 1 ? 0 : call.heads;  // nobody to hear: only the part on the candidate itself
  uint16_t* const pairs = s.heard + heads * kRowsC;
  const uint16_t* const mix = call.mix + (call.heads - heads) * kVoteWidth;

  Product::begin();
  for (int64_t location = first; location < last; location += together) {
    const int64_t end = location + together < last ? location + together : last;
    const int64_t present = (end - location) * call.candidates * kVoteWidth;
    __builtin_memcpy(s.rows, call.rows + location * call.candidates * kVoteWidth, present * 2);
    __builtin_memset(s.rows + present, 0, (kRowsC - present) * 2);
    turn_rows(s, pairs);
    if (heads) project<Product>(call, pairs, s);
    listen<Product>(heads, s);
    for (int row = 0; row < kVoteWidth; row += 32) {
      const int64_t stride = (call.heads + 1) * kVoteWidth;
      Product::block(
          mix + row * stride, stride, s.heard, kVoteRows, (heads + 1) * kVoteWidth, s.block + row * kVoteRows);
    }
    normalise(call, s);
    pool<Product>(call, location, end, s);
  }
  Product::end();
}

}  // namespace
}  // namespace dmv_fast
