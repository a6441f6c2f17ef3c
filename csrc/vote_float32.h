// Voting in float32: a group of whole locations at a time, their K candidates x_0 .. x_K-1.
//
//   a_ih = softmax over the others j of 2-based logits (to_q x_i + q_bias) . (to_k x_j), heads h
//   m_i  = U x_i + mix_bias + sum over h, j of a_ihj (U_h x_j)              (mean zero over C, folded)
//   out  = maximum over i of  out m_i / sqrt(mean m_i^2 + epsilon) + out_bias
//
// As each head's attention sums to one, with d_j = x_j - x_0 and `all` = U + sum over h of U_h it is
//
//   m_i  = all x_0 + mix_bias + U d_i + sum over h, j > 0 of a_ihj (U_h d_j)
//
// and the logits of d_j are those of x_j less the one of x_0: keys and values are needed of K - 1 candidates only,
// which at K = 4 saves a seventh of all products. A row's numbers lie in the lanes. Of queries and keys it is number 0
// of all 8 heads, then number 1 of all heads and so on, so that neither logits nor softmax need a sum across lanes.
// Wants a `Lanes` before it, and `Heads`, vectors of the 8 heads of kCandidates candidates or of a part of one's:
//   load(p, stride)      those of a candidate at p and of the next one, `stride` numbers on
//   load_same(p)         those at p for each candidate
//   store(p, stride, v)  the counterpart of load
#pragma once

#include "vote_product.h"

namespace dmv_fast {
namespace {

constexpr int kMatrix = kVoteWidth * kVoteWidth;
constexpr int kQuery = kMaxHeads * kHeadWidth;
constexpr int kKeysAtOnce = 4;
constexpr int kMates = 2 * Heads::kCandidates;          // candidates whose logits and softmax are found together
constexpr int kLogits = kMates * kMaxHeads;             // of mates, to a neighbour
constexpr int kLogitVectors = kLogits / Lanes::kWidth;
constexpr int kAttention = kVoteRows * kMaxHeads + 16;  // of a candidate; 16 more, for rows in other cache sets
constexpr float kNoBias[kQuery] = {};

// What a product takes from the left.
struct Candidates {
  static constexpr int kRow = kVoteWidth, kStep = 1;
};
struct Attention {
  static constexpr int kRow = kAttention, kStep = kMaxHeads;
};

struct alignas(64) VoteFloat32Scratch {
  float firsts[kVoteRows * kVoteWidth];                     // x_0 of each location
  float apart[kVoteRows * kVoteWidth];                      // d_1 .. d_K-1 of each location
  float queries[(kVoteRows + kMates) * kQuery];             // [candidate][C/4][8]
  float keys[(kVoteRows + kKeysAtOnce) * kQuery];           // of `apart`
  float logits[(kVoteRows + kKeysAtOnce) * kLogits];        // of mates: [j][kMates][8]
  float attention[(kVoteRows + kMates) * kAttention];       // [candidate][j][8]
  float values[kMaxHeads * kValues];                        // of `apart`: a head: half of U_h d
  float shared[kVoteRows * kVoteWidth];                     // of each location: all x_0 + mix_bias
  float mixed[kVoteRows * kVoteWidth];                      // [candidate][C]
  float product[kVoteRows * kVoteWidth];
};

// x [count][C] times weights of `columns`, plus a bias -> to [count][columns].
inline void project(int count, const float* x, const float* weights, const float* bias, int columns, float* to) {
  for (int column = 0; column < columns; column += kColumns, weights += kPanel)
    multiply<Candidates>(count, x, weights, kVoteWidth, 1, {bias + column, 0}, {to + column, columns});
}

// 2-based logits of mates, to the difference of each neighbour and the first one -> s.logits.
inline void find_logits(const float* queries, const float* keys, int candidates, VoteFloat32Scratch& s) {
  constexpr int kParts = kMaxHeads * Heads::kCandidates / Lanes::kWidth;  // of the heads
  for (int i = 0; i < kLogits; i += Lanes::kWidth) Lanes::store(s.logits + i, Lanes::zero());
  for (int part = 0; part < kParts; ++part)
    for (int j = 1; j < candidates; j += kKeysAtOnce) {
      const float *query = queries + part * Lanes::kWidth, *key = keys + (j - 1) * kQuery + part * Lanes::kWidth;
      Vector sum[kKeysAtOnce][2];
      for (auto& x : sum) x[0] = x[1] = Lanes::zero();
      for (int c = 0; c < kHeadWidth; ++c, query += kMaxHeads, key += kMaxHeads) {
        const Vector first = Heads::load(query, kQuery);
        const Vector second = Heads::load(query + Heads::kCandidates * kQuery, kQuery);
        for (int i = 0; i < kKeysAtOnce; ++i) {
          const Vector k = Heads::load_same(key + i * kQuery);
          sum[i][0] = Lanes::multiply_add(first, k, sum[i][0]);
          sum[i][1] = Lanes::multiply_add(second, k, sum[i][1]);
        }
      }
      float* const to = s.logits + j * kLogits + part * Lanes::kWidth;
      for (int i = 0; i < kKeysAtOnce; ++i) {
        Lanes::store(to + i * kLogits, sum[i][0]);
        Lanes::store(to + i * kLogits + kLogits / 2, sum[i][1]);
      }
    }
}

// Their softmax -> attention. The least power is 2^-100, which nobody hears: denormal numbers would take ten times
// longer.
inline void softmax(int candidates, VoteFloat32Scratch& s, float* attention) {
  const auto logit = [&](int j, int v) { return s.logits + j * kLogits + v * Lanes::kWidth; };
  Vector highest[kLogitVectors], sum[kLogitVectors], scale[kLogitVectors];
  for (int v = 0; v < kLogitVectors; ++v) highest[v] = Lanes::load(logit(0, v)), sum[v] = Lanes::zero();
  for (int j = 1; j < candidates; ++j)
    for (int v = 0; v < kLogitVectors; ++v) highest[v] = Lanes::larger(highest[v], Lanes::load(logit(j, v)));
  for (int j = 0; j < candidates; ++j)
    for (int v = 0; v < kLogitVectors; ++v) {
      const Vector shifted = Lanes::subtract(Lanes::load(logit(j, v)), highest[v]);
      const Vector power = Lanes::exp2(Lanes::larger(Lanes::fill(-100), shifted));
      Lanes::store(logit(j, v), power);
      sum[v] = Lanes::add(sum[v], power);
    }
  for (int v = 0; v < kLogitVectors; ++v) scale[v] = Lanes::divide(Lanes::fill(1), sum[v]);
  for (int j = 1; j < candidates; ++j)
    for (int v = 0; v < kLogitVectors; ++v) {
      float* const to = attention + v * Lanes::kWidth / kMaxHeads * kAttention + v * Lanes::kWidth % kMaxHeads;
      Heads::store(to + j * kMaxHeads, kAttention, Lanes::multiply(Lanes::load(logit(j, v)), scale[v]));
    }
}

// Whom each candidate hears -> s.attention. A location's last mates may be nobody of it; what they get is overwritten.
inline void attend(int locations, int candidates, VoteFloat32Scratch& s) {
  for (int location = 0; location < locations; ++location)
    for (int i = 0; i < candidates; i += kMates) {
      const int row = location * candidates + i;
      find_logits(s.queries + row * kQuery, s.keys + location * (candidates - 1) * kQuery, candidates, s);
      for (int mate = 0; mate < kMates; ++mate)
        for (int head = 0; head < kMaxHeads; ++head)
          s.logits[(i + mate) * kLogits + mate * kMaxHeads + head] = -__builtin_inff();
      softmax(candidates, s, s.attention + row * kAttention);
    }
}

// What all heads of each candidate hear, added to s.mixed.
inline void listen(const Float32Voting& call, int locations, VoteFloat32Scratch& s) {
  const int candidates = call.candidates, others = candidates - 1;
  for (int column = 0; column < kVoteWidth; column += kColumns) {
    for (int head = 0; head < call.heads; ++head)
      project(
          locations * others, s.apart, call.mix + head * kMatrix + column * kVoteWidth, kNoBias, kColumns,
          s.values + head * kValues);
    for (int location = 0; location < locations; ++location) {
      float* const mixed = s.mixed + location * candidates * kVoteWidth + column;
      multiply<Attention>(
          candidates, s.attention + location * candidates * kAttention + kMaxHeads,
          s.values + location * others * kColumns, others, call.heads, {mixed, kVoteWidth}, {mixed, kVoteWidth});
    }
  }
}

// Candidates to what is the same for a location and what sets the others apart from its first.
inline void set_apart(const float* rows, int locations, int candidates, VoteFloat32Scratch& s) {
  float* apart = s.apart;
  for (int location = 0; location < locations; ++location, rows += candidates * kVoteWidth) {
    __builtin_memcpy(s.firsts + location * kVoteWidth, rows, kVoteWidth * sizeof(float));
    for (int i = kVoteWidth; i < candidates * kVoteWidth; i += Lanes::kWidth, apart += Lanes::kWidth)
      Lanes::store(apart, Lanes::subtract(Lanes::load(rows + i), Lanes::load(rows + i % kVoteWidth)));
  }
}

// s.mixed before anything is heard: of d_i (s.product) and of the location.
inline void begin_mixed(int locations, int candidates, VoteFloat32Scratch& s) {
  const float* own = s.product;
  float* to = s.mixed;
  for (int location = 0; location < locations; ++location) {
    const float* const shared = s.shared + location * kVoteWidth;
    for (int c = 0; c < kVoteWidth; ++c) *to++ = shared[c];
    for (int i = 1; i < candidates; ++i)
      for (int c = 0; c < kVoteWidth; ++c) *to++ = shared[c] + *own++;
  }
}

// Layer norm over C of s.mixed, whose rows have mean zero already (folded), in place.
inline void normalise(int rows, float epsilon, VoteFloat32Scratch& s) {
  for (float* row = s.mixed; row < s.mixed + rows * kVoteWidth; row += kVoteWidth) {
    Vector squares = Lanes::zero();
    for (int c = 0; c < kVoteWidth; c += Lanes::kWidth) {
      const Vector x = Lanes::load(row + c);
      squares = Lanes::multiply_add(x, x, squares);
    }
    float lanes[Lanes::kWidth], sum = 0;
    Lanes::store(lanes, squares);
    for (float x : lanes) sum += x;
    const Vector scale = Lanes::fill(1 / __builtin_sqrtf(sum / kVoteWidth + epsilon));
    for (int c = 0; c < kVoteWidth; c += Lanes::kWidth)
      Lanes::store(row + c, Lanes::multiply(Lanes::load(row + c), scale));
  }
}

// To V, and the maximum over each location's candidates.
inline void pool(const Float32Voting& call, int64_t first, int locations, VoteFloat32Scratch& s) {
  for (int64_t column = 0; column < call.value_width; column += kColumns) {
    project(locations * call.candidates, s.mixed, call.out + column * kVoteWidth, kNoBias, kColumns, s.product);
    const float* row = s.product;
    for (int location = 0; location < locations; ++location) {
      Vector highest[kVectors];
      for (int v = 0; v < kVectors; ++v) highest[v] = Lanes::load(row + v * Lanes::kWidth);
      row += kColumns;
      for (int i = 1; i < call.candidates; ++i, row += kColumns)
        for (int v = 0; v < kVectors; ++v)
          highest[v] = Lanes::larger(highest[v], Lanes::load(row + v * Lanes::kWidth));
      float* const to = call.retrieved + (first + location) * call.value_width + column;
      for (int v = 0; v < kVectors; ++v) {
        const Vector bias = Lanes::load(call.out_bias + column + v * Lanes::kWidth);
        Lanes::store(to + v * Lanes::kWidth, Lanes::add(highest[v], bias));
      }
    }
  }
}

void vote_locations(const Float32Voting& call, int64_t first, int64_t last) {
  VoteFloat32Scratch s;
  const int together = call.locations_together(), candidates = call.candidates;
  const float *const itself = call.mix + call.heads * kMatrix, *const all = itself + kMatrix;
  for (int64_t location = first; location < last; location += together) {
    const int locations = static_cast<int>(location + together < last ? together : last - location);
    const int rows = locations * candidates, others = rows - locations;
    const float* const x = call.rows + location * candidates * kVoteWidth;
    if (candidates == 1) {  // nobody to hear: only the part on the candidate itself
      project(rows, x, itself, call.mix_bias, kVoteWidth, s.mixed);
    } else {
      set_apart(x, locations, candidates, s);
      project(rows, x, call.to_q, call.q_bias, kQuery, s.queries);
      project(others, s.apart, call.to_k, kNoBias, kQuery, s.keys);
      attend(locations, candidates, s);
      project(locations, s.firsts, all, call.mix_bias, kVoteWidth, s.shared);
      project(others, s.apart, itself, kNoBias, kVoteWidth, s.product);
      begin_mixed(locations, candidates, s);
      listen(call, locations, s);
    }
    normalise(rows, call.epsilon, s);
    pool(call, location, locations, s);
  }
}

}  // namespace
}  // namespace dmv_fast
