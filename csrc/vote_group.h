// The voting net (paper section 3.2 and supplement section 6) on 32 candidates at a time: one location's, or those of
// several whole locations, kept apart by a mask. Up to the layer norm everything runs transposed, a candidate a SIMD
// lane, so that softmax and layer norm need no sum across lanes. A candidate is mixed before it is heard: U_h x for all
// heads h, then one product sums over heads and neighbours. `Product` multiplies, bfloat16 in, float32 out:
//   left(a, count, b, take)    a [count][16][64] times b, pairs [32][32][2]: take(i, c [16][32]) for each i
//   right(a, b, count, take)   a [32][64] times b, count times pairs [32][16][2]: take(i, c [32][16]) for each i
//   logits(a, stride, b, c, between)   c[32][32] = a[32][32] * b, b pairs [16][32][2]; calls between(0) ..
//                              between(kPieces - 1) on its way, to hide other work under the matrix unit's time
//   add(a, b, steps, c)        c[32][32] += sum over steps of a[32][32] * b, pairs [16][32][2]; the next step's a lies
//                              kRowsC numbers on, its b 32 * 32
#pragma once

#include "vote_numbers.h"

namespace dmv_fast {
namespace {

constexpr int kRowsC = kVoteRows * kVoteWidth;

struct alignas(64) VoteScratch {
  uint16_t rows[kRowsC];                                // the candidates x
  uint16_t pairs[kRowsC];                               // x as pairs along C: [32][32][2]
  uint16_t keys[kVoteRows * kMaxHeads * kHeadWidth];
  uint16_t query_pairs[kMaxHeads * kRowsC / 2];         // a head: [16][32][2], its neighbour's half of the pair zero
  uint16_t values[kMaxHeads * kRowsC];                  // a head: U_h x, [C][32], candidates j and j + 16 side by side
  uint16_t weights[kMaxHeads * kVoteRows * kVoteRows];  // a head: softmax, pairs (j, j + 16) of who is heard
  uint16_t normed[kRowsC];                              // [32][C]
  float logits[2][kVoteRows * kVoteRows];               // of a head and the next: [32 heard][32 hearing]
  float powers[kVoteRows * kVoteRows];                  // two to those
  float mixed[kRowsC];                                  // [C][32]
  __mmask16 hearing[kVoteRows][2];                      // who hears each
};

constexpr int kPieces = 4;  // of the work between products

// x -> its pairs along C.
inline void turn_rows(VoteScratch& s) {
  constexpr int kWords = kVoteWidth / 2;
  auto* const words = reinterpret_cast<const uint32_t*>(s.rows);
  auto* const turned = reinterpret_cast<uint32_t*>(s.pairs);
  for (int row = 0; row < kVoteRows; row += 16)
    for (int word = 0; word < kWords; word += 16)
      transpose16(words + row * kWords + word, kWords, turned + word * kVoteRows + row, kVoteRows);
}

// Queries of a head, float32 [16][32] -> pairs. Two heads share a depth of 32, a head's own pairs lie at its half.
inline void store_queries(const float* from, const float* bias, uint16_t* to) {
  for (int row = 0; row < kHeadWidth; row += 2) {
    const __m512 even = _mm512_set1_ps(bias[row]), odd = _mm512_set1_ps(bias[row + 1]);
    for (int half = 0; half < 2; ++half) {
      const float* const query = from + row * kVoteRows + half * 16;
      _mm512_store_si512(
          to + row * kVoteRows + half * 32, pairs_of(_mm512_add_ps(_mm512_load_ps(query), even),
                                                     _mm512_add_ps(_mm512_load_ps(query + kVoteRows), odd)));
    }
  }
}

// Queries, keys and values of all heads, and what the candidate itself adds to what it hears.
template <class Product>
void project(Product& product, const Voting& call, int heads, VoteScratch& s) {
  const int width = heads * kHeadWidth;
  product.left(call.to_q, heads, s.pairs, [&](int head, const float* queries) {
    store_queries(queries, call.q_bias + head * kHeadWidth, s.query_pairs + (2 * head + head % 2) * 16 * kVoteRows);
  });
  product.left(call.mix, heads * 4, s.pairs, [&](int part, const float* values) {
    uint16_t* const to = s.values + part * 16 * kVoteRows;
    for (int row = 0; row < 16 * kVoteRows; row += kVoteRows)
      _mm512_store_si512(to + row, pairs_cut(_mm512_load_ps(values + row), _mm512_load_ps(values + row + 16)));
  });
  product.left(call.mix + call.heads * kVoteWidth * kVoteWidth, 4, s.pairs, [&](int part, const float* values) {
    float* const to = s.mixed + part * 16 * kVoteRows;
    for (int i = 0; i < 16 * kVoteRows; i += 16) _mm512_store_ps(to + i, _mm512_load_ps(values + i));
  });
  product.right(s.rows, call.to_k, heads, [&](int head, const float* keys) {
    for (int row = 0; row < kVoteRows; ++row) {
      const __m256bh key = _mm512_cvtneps_pbh(_mm512_load_ps(keys + row * kHeadWidth));
      auto* const to = reinterpret_cast<__m256i*>(s.keys + row * width + head * kHeadWidth);
      _mm256_store_si256(to, reinterpret_cast<const __m256i&>(key));
    }
  });
}

// The softmax of a head's logits. Powers of two of the logits as they are; logits too high or too low for that, which
// a trained network has not, are shifted first.
struct Softmax {
  const __mmask16 (&hearing)[kVoteRows][2];
  float *logits, *powers;
  uint16_t* weights;
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  __m512 scale[2] = {};

  // 0 .. kPieces - 1, in this order.
  void piece(int piece) {
    if (piece < 2) raise(piece * 16);
    if (piece == 1) finish();
    if (piece >= 2) store(piece % 2 * 8);
  }

 private:
  void raise(int first) {
    for (int j = first; j < first + 16; ++j)
      for (int half = 0; half < 2; ++half) {
        const int place = j * kVoteRows + half * 16;
        const __m512 power = exp2_rough(hearing[j][half], _mm512_load_ps(logits + place));
        _mm512_store_ps(powers + place, power);
        sum[half] = _mm512_add_ps(sum[half], power);
      }
  }
  void finish() {
    const __m512 least = _mm512_set1_ps(0x1p-60f), most = _mm512_set1_ps(0x1p60f);
    __mmask16 good = 0xffff;
    for (const auto& x : sum)
      good &= _mm512_cmp_ps_mask(x, least, _CMP_GT_OQ) & _mm512_cmp_ps_mask(x, most, _CMP_LT_OQ);
    if (__builtin_expect(good != 0xffff, 0)) shift();
    for (int half = 0; half < 2; ++half) scale[half] = _mm512_div_ps(_mm512_set1_ps(kCut * kCut), sum[half]);
  }
  __attribute__((noinline)) void shift() {
    for (int half = 0; half < 2; ++half) {
      float* const logit = logits + half * 16;
      __m512 highest = _mm512_set1_ps(-__builtin_inff());
      for (int j = 0; j < kVoteRows; ++j)
        highest = _mm512_mask_max_ps(highest, hearing[j][half], highest, _mm512_load_ps(logit + j * kVoteRows));
      for (int j = 0; j < kVoteRows; ++j)
        _mm512_store_ps(logit + j * kVoteRows, _mm512_sub_ps(_mm512_load_ps(logit + j * kVoteRows), highest));
      sum[half] = _mm512_setzero_ps();
    }
    raise(0);
    raise(16);
  }
  void store(int first) {
    for (int j = first; j < first + 8; ++j)
      for (int half = 0; half < 2; ++half) {
        const float* const power = powers + j * kVoteRows + half * 16;
        _mm512_store_si512(
            weights + j * 2 * kVoteRows + half * 32,
            pairs_cut(_mm512_mul_ps(_mm512_load_ps(power), scale[half]),
                      _mm512_mul_ps(_mm512_load_ps(power + 16 * kVoteRows), scale[half])));
      }
  }
};

// All heads' attention, and what is heard by it added to s.mixed. While one head's logits become weights, the next
// one's are made.
template <class Product>
void listen(Product& product, int heads, VoteScratch& s) {
  const auto logits = [&](int head, auto&& between) {
    product.logits(
        s.keys + head / 2 * 32, heads * kHeadWidth, s.query_pairs + head * kVoteRows * 32, s.logits[head % 2], between);
  };
  logits(0, [](int) {});
  for (int head = 0; head < heads; ++head) {
    Softmax softmax{s.hearing, s.logits[head % 2], s.powers, s.weights + head * kVoteRows * kVoteRows};
    if (head + 1 < heads)
      logits(head + 1, [&](int piece) { softmax.piece(piece); });
    else
      for (int piece = 0; piece < kPieces; ++piece) softmax.piece(piece);
  }
  for (int row = 0; row < kVoteWidth; row += 32)
    product.add(s.values + row * kVoteRows, s.weights, heads, s.mixed + row * kVoteRows);
}

// Layer norm over C of s.mixed [C][32], whose rows have mean zero already (folded) -> s.normed [32][C].
inline void normalise(const Voting& call, VoteScratch& s) {
  __m512 scale[2];
  for (int half = 0; half < 2; ++half) {
    __m512 squares = _mm512_setzero_ps();
    for (int c = 0; c < kVoteWidth; ++c) {
      float* const place = s.mixed + c * kVoteRows + half * 16;
      const __m512 x = _mm512_add_ps(_mm512_load_ps(place), _mm512_set1_ps(call.mix_bias[c]));
      _mm512_store_ps(place, x);
      squares = _mm512_fmadd_ps(x, x, squares);
    }
    const __m512 variance = _mm512_fmadd_ps(squares, _mm512_set1_ps(1.0f / kVoteWidth), _mm512_set1_ps(call.epsilon));
    scale[half] = _mm512_div_ps(_mm512_set1_ps(1), _mm512_sqrt_ps(variance));
  }
  for (int i = 0; i < kRowsC; i += 2 * kVoteRows)
    for (int half = 0; half < 2; ++half) {
      const float* const even = s.mixed + i + half * 16;
      const __m512 low = _mm512_mul_ps(_mm512_load_ps(even), scale[half]);
      const __m512 high = _mm512_mul_ps(_mm512_load_ps(even + kVoteRows), scale[half]);
      _mm512_store_si512(s.pairs + i + half * 32, pairs_of(low, high));
    }
  auto* const words = reinterpret_cast<const uint32_t*>(s.pairs);
  for (int row = 0; row < kVoteRows; row += 16)
    for (int word = 0; word < kVoteWidth / 2; word += 16)
      transpose16(
          words + word * kVoteRows + row, kVoteRows,
          reinterpret_cast<uint32_t*>(s.normed) + row * kVoteWidth / 2 + word, kVoteWidth / 2);
}

// To V, and the maximum over each location's candidates.
template <class Product>
void pool(Product& product, const Voting& call, int64_t first, int64_t last, VoteScratch& s) {
  product.right(s.normed, call.out, static_cast<int>(call.value_width / 16), [&](int part, const float* row) {
    const __m512 bias = _mm512_loadu_ps(call.out_bias + part * 16);
    for (int64_t location = first; location < last; ++location) {
      __m512 highest = _mm512_load_ps(row);
      row += 16;
      for (int i = 1; i < call.candidates; ++i, row += 16) highest = _mm512_max_ps(highest, _mm512_load_ps(row));
      const __m256bh value = _mm512_cvtneps_pbh(_mm512_add_ps(highest, bias));
      auto* const to = reinterpret_cast<__m256i*>(call.retrieved + location * call.value_width + part * 16);
      _mm256_storeu_si256(to, reinterpret_cast<const __m256i&>(value));
    }
  });
}

template <class Product>
void vote_locations(const Voting& call, int64_t first, int64_t last) {
  VoteScratch s;
  const int together = call.locations_together();
  __builtin_memset(s.query_pairs, 0, sizeof s.query_pairs);
  for (int j = 0; j < kVoteRows; ++j) {
    const int location = j / call.candidates;
    const uint64_t mates = ((uint64_t(1) << call.candidates) - 1) << (location * call.candidates);
    const uint32_t hears = location < together ? static_cast<uint32_t>(mates) & ~(uint32_t(1) << j) : uint32_t(1) << j;
    for (int half = 0; half < 2; ++half) s.hearing[j][half] = static_cast<__mmask16>(hears >> 16 * half);
  }
  const int heads = call.candidates == 1 ? 0 : call.heads;  // nobody to hear: only the part on the candidate itself

  Product product;
  for (int64_t location = first; location < last; location += together) {
    const int64_t end = location + together < last ? location + together : last;
    const int64_t present = (end - location) * call.candidates * kVoteWidth;
    __builtin_memcpy(s.rows, call.rows + location * call.candidates * kVoteWidth, present * 2);
    __builtin_memset(s.rows + present, 0, (kRowsC - present) * 2);
    turn_rows(s);
    project(product, call, heads, s);
    if (heads) listen(product, heads, s);
    normalise(call, s);
    pool(product, call, location, end, s);
  }
}

}  // namespace
}  // namespace dmv_fast
