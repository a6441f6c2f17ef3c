// Voting in float32: a group of whole locations at a time, their K candidates x_0 .. x_K-1.
//
//   a_ih = softmax over the others j of 2-based logits (to_q x_i + q_bias) . (to_k x_j), heads h
//   m_i  = U x_i + mix_bias + sum over h, j of a_ihj (U_h x_j)              (mean zero over C, folded)
//   out  = maximum over i of  out m_i / sqrt(mean m_i^2 + epsilon) + out_bias
//
// A candidate is x_i = w_i v_i + p, of a remembered value v_i, its weight and what the location adds for itself. So all
// that is linear in it was found when the value was remembered: `values` hold to_q v, to_k v, U_h v and U v side by side,
// and what is left to multiply is p, once for a location, the attention and `out`. At K = 32 these are two fifths of all
// products. As each head's attention sums to one, with d_j = x_j - x_0 and `all` = U + sum over h of U_h it is
//
//   m_i  = all x_0 + mix_bias + U d_i + sum over h, j > 0 of a_ihj (U_h d_j)
//
// and the logits of d_j are those of x_j less the one of x_0: keys and values are needed of K - 1 candidates only. A row's
// numbers lie in the lanes. Of queries and keys it is number 0 of all 8 heads, then number 1 of all heads and so on, so
// that neither logits nor softmax need a sum across lanes.
// Wants gather_cpu.h and a `Lanes` before it, and `Heads`, vectors of the 8 heads of kCandidates candidates or of a part of
// one's:
//   load(p, stride)      those of a candidate at p and of the next one, `stride` numbers on
//   load_same(p)         those at p for each candidate
//   store(p, stride, v)  the counterpart of load
#pragma once

#include "vote_product.h"

namespace dmv_fast {
namespace {

constexpr int kKeysAtOnce = 4;
constexpr int kMates = 2 * Heads::kCandidates;          // candidates whose logits and softmax are found together
constexpr int kLogits = kMates * kMaxHeads;             // of mates, to a neighbour
constexpr int kLogitVectors = kLogits / Lanes::kWidth;
constexpr int kAttention = kVoteRows * kMaxHeads + 16;  // of a candidate; 16 more, for rows in other cache sets
constexpr int kHeard = kMaxHeads * kColumns;            // numbers that a candidate's heads pass on to half of the columns
constexpr float kNoBias[kQuery] = {};

// One of K: what is remembered of its value, and its weight.
struct Candidate {
  const float* value;
  float weight;
};

struct alignas(64) VoteFloat32Scratch {
  Candidate candidates[kVoteRows];
  float location_queries[kVoteRows * kQuery];               // of each location: to_q p + q_bias
  float shared[kVoteRows * kVoteWidth];                     // and all p + mix_bias
  float firsts[kVoteRows * kSpread];                        // and w_0 of what is remembered of v_0
  float queries[(kVoteRows + kMates) * kQuery];             // [candidate][C/4][8]
  float keys[(kVoteRows + kKeysAtOnce) * kQuery];           // of d_1 .. d_K-1 of each location
  float logits[(kVoteRows + kKeysAtOnce) * kLogits];        // of mates: [j][kMates][8]
  float attention[(kVoteRows + kMates) * kAttention];       // [candidate][j][8]
  float values[kVoteRows * kHeard];                         // [j][head]: half of U_h d_j
  float mixed[kVoteRows * kVoteWidth];                      // [candidate][C]
  float product[kVoteRows * kColumns];
};

struct Nothing {
  void operator()() {}
};

// Fetches what is remembered of the next group's candidates to L2, a line a call: rows lie anywhere in a memory of tens of
// MB, and many lines asked for at once hold up what comes after them.
struct Ahead {
  const float* rows[kVoteRows];
  int count = 0, row = 0, first_number, number;

  Ahead(const Float32Voting& call, int64_t first)
      : first_number(call.candidates > 1 ? 0 : kSpreadOwn), number(first_number) {
    const int64_t end = call.locations * call.candidates;
    for (int64_t i = first; i < end && count < kVoteRows; ++i) {
      const int32_t index = call.indices[i];
      const float* const values = call.values + i / (call.queries * call.candidates) * call.value_batch_stride;
      if (index >= 0) rows[count++] = values + index * call.value_row_stride;
    }
  }
  void operator()() {
    if (row == count) return;
    __builtin_prefetch(rows[row] + number, 0, 2);
    number += 16;
    if (number >= kSpread) number = first_number, ++row;
  }
};

// x [count][C] times weights of `columns`, plus a bias -> to [count][columns].
template <class Meanwhile = Nothing>
inline void project(
    int count, const float* x, const float* weights, const float* bias, int columns, float* to,
    Meanwhile&& meanwhile = {}) {
  for (int column = 0; column < columns; column += kColumns, weights += kWeights)
    multiply<kVoteWidth>(count, x, weights, kVoteWidth, {bias + column, 0}, {to + column, columns}, meanwhile);
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

// Who the candidates are, and of each location's first w_0 times all that is remembered of it.
inline void gather(const Float32Voting& call, int64_t first, int locations, VoteFloat32Scratch& s) {
  Candidate* candidate = s.candidates;
  for (int64_t location = first; location < first + locations; ++location) {
    const float *const values = call.values + location / call.queries * call.value_batch_stride;
    const float* const scores = call.scores + location * call.candidates;
    const float scale = weight_scale(scores, call.candidates);
    for (int i = 0; i < call.candidates; ++i) {
      const int32_t index = call.indices[location * call.candidates + i];
      *candidate++ = {index < 0 ? call.null_value : values + index * call.value_row_stride, scores[i] * scale};
    }
    const Candidate& zeroth = candidate[-call.candidates];
    float* const to = s.firsts + (location - first) * kSpread;
    const Vector weight = Lanes::fill(zeroth.weight);
    for (int c = call.candidates > 1 ? kSpreadKeys : kSpreadOwn; c < kSpread; c += Lanes::kWidth)
      Lanes::store(to + c, Lanes::multiply(weight, Lanes::load(zeroth.value + c)));
  }
}

// put(c, weight * value - first) for the numbers from..from + count of what is remembered of a candidate.
template <class Put>
inline void apart(const Candidate& candidate, const float* first, int from, int count, Put&& put) {
  const Vector weight = Lanes::fill(candidate.weight);
  for (int c = 0; c < count; c += Lanes::kWidth)
    put(c, Lanes::multiply_subtract(weight, Lanes::load(candidate.value + from + c), Lanes::load(first + from + c)));
}

// Queries of all candidates and keys of all but each location's first.
inline void ask(int locations, int candidates, const float* location_queries, VoteFloat32Scratch& s) {
  float *query = s.queries, *key = s.keys;
  for (int location = 0; location < locations; ++location, location_queries += kQuery) {
    const float* const first = s.firsts + location * kSpread;
    for (int i = 0; i < candidates; ++i, query += kQuery) {
      const Candidate& candidate = s.candidates[location * candidates + i];
      const Vector weight = Lanes::fill(candidate.weight);
      for (int c = 0; c < kQuery; c += Lanes::kWidth) {
        const Vector value = Lanes::load(candidate.value + kSpreadQueries + c);
        Lanes::store(query + c, Lanes::multiply_add(weight, value, Lanes::load(location_queries + c)));
      }
      if (i == 0) continue;
      apart(candidate, first, kSpreadKeys, kQuery, [&](int c, Vector x) { Lanes::store(key + c, x); });
      key += kQuery;
    }
  }
}

// s.mixed before anything is heard: all x_0 + mix_bias + U d_i.
inline void begin_mixed(int locations, int candidates, const float* shared, VoteFloat32Scratch& s) {
  float* to = s.mixed;
  for (int location = 0; location < locations; ++location, shared += kVoteWidth) {
    const float* const first = s.firsts + location * kSpread;
    const float* const own = to;
    for (int c = 0; c < kVoteWidth; c += Lanes::kWidth) {
      Vector sum = Lanes::add(Lanes::load(shared + c), Lanes::load(first + kSpreadOwn + c));
      const float* heard = first + kSpreadHeard + c / kColumns * kMaxHeads * kColumns + c % kColumns;
      for (int head = 0; head < kMaxHeads; ++head) sum = Lanes::add(sum, Lanes::load(heard + head * kColumns));
      Lanes::store(to + c, sum);
    }
    for (int i = 1; i < candidates; ++i)
      apart(s.candidates[location * candidates + i], first, kSpreadOwn, kVoteWidth, [&](int c, Vector x) {
        Lanes::store(to + i * kVoteWidth + c, Lanes::add(Lanes::load(own + c), x));
      });
    to += candidates * kVoteWidth;
  }
}

// What all heads of each candidate hear, added to s.mixed.
inline void listen(int locations, int candidates, Ahead& ahead, VoteFloat32Scratch& s) {
  const int others = candidates - 1;
  for (int column = 0; column < kVoteWidth; column += kColumns) {
    float* value = s.values;
    for (int location = 0; location < locations; ++location)
      for (int i = 1; i < candidates; ++i, value += kHeard)
        apart(
            s.candidates[location * candidates + i], s.firsts + location * kSpread, kSpreadHeard + column * kMaxHeads,
            kHeard, [&](int c, Vector x) { Lanes::store(value + c, x); });
    for (int location = 0; location < locations; ++location) {
      float* const mixed = s.mixed + location * candidates * kVoteWidth + column;
      multiply<kAttention>(
          candidates, s.attention + location * candidates * kAttention + kMaxHeads,
          s.values + location * others * kHeard, others * kMaxHeads, {mixed, kVoteWidth}, {mixed, kVoteWidth}, ahead);
    }
  }
}

// s.mixed of locations of one candidate, which hears nobody: U x + mix_bias.
inline void alone(int locations, const float* shared, VoteFloat32Scratch& s) {
  for (int location = 0; location < locations; ++location)
    for (int c = 0; c < kVoteWidth; c += Lanes::kWidth) {
      const int at = location * kVoteWidth + c;
      Lanes::store(
          s.mixed + at, Lanes::add(Lanes::load(shared + at), Lanes::load(s.firsts + location * kSpread + kSpreadOwn + c)));
    }
}

// What a row of s.mixed is multiplied with in a layer norm over C; its mean is zero already (folded).
inline float norm_scale(const float* row, float epsilon) {
  Vector squares = Lanes::zero();
  for (int c = 0; c < kVoteWidth; c += Lanes::kWidth) {
    const Vector x = Lanes::load(row + c);
    squares = Lanes::multiply_add(x, x, squares);
  }
  float lanes[Lanes::kWidth], sum = 0;
  Lanes::store(lanes, squares);
  for (float x : lanes) sum += x;
  return 1 / __builtin_sqrtf(sum / kVoteWidth + epsilon);
}

// Of each location the maximum over its candidates' s.product -> retrieved, after finish(location, column, maximum).
template <class Finish>
inline void pool(
    const Float32Voting& call, int64_t first, int locations, int64_t column, const VoteFloat32Scratch& s,
    Finish&& finish) {
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
      const int64_t at = v * Lanes::kWidth;
      finish(location, column + at, highest[v]);
      Lanes::store(to + at, Lanes::add(highest[v], Lanes::load(call.out_bias + column + at)));
    }
  }
}

// The last layer, to V, in float32.
struct OutFloat32 {
  static void run(const Float32Voting& call, int64_t first, int locations, Ahead& ahead, VoteFloat32Scratch& s) {
    const int rows = locations * call.candidates;
    for (float* row = s.mixed; row < s.mixed + rows * kVoteWidth; row += kVoteWidth) {
      const Vector scale = Lanes::fill(norm_scale(row, call.epsilon));
      for (int c = 0; c < kVoteWidth; c += Lanes::kWidth)
        Lanes::store(row + c, Lanes::multiply(Lanes::load(row + c), scale));
    }
    for (int64_t column = 0; column < call.value_width; column += kColumns) {
      project(rows, s.mixed, call.out + column * kVoteWidth, kNoBias, kColumns, s.product, ahead);
      pool(call, first, locations, column, s, [](int, int64_t, Vector&) {});
    }
  }
};

template <class Out>
void vote_locations(const Float32Voting& call, int64_t first, int64_t last) {
  VoteFloat32Scratch s;
  const int together = call.locations_together(), block = kVoteRows / together * together;
  const float* const mix = call.mix + (call.candidates > 1) * kVoteWidth * kVoteWidth;
  for (int64_t begin = first, end; begin < last; begin = end) {
    end = begin + block < last ? begin + block : last;
    const float* const parts = call.query_part + begin * kVoteWidth;
    project(end - begin, parts, mix, call.mix_bias, kVoteWidth, s.shared);
    if (call.candidates > 1) project(end - begin, parts, call.to_q, call.q_bias, kQuery, s.location_queries);
    for (int64_t location = begin; location < end; location += together) {
      const int locations = static_cast<int>(location + together < end ? together : end - location);
      const float* const shared = s.shared + (location - begin) * kVoteWidth;
      Ahead ahead(call, (location + together) * call.candidates);
      gather(call, location, locations, s);
      if (call.candidates == 1) {
        alone(locations, shared, s);
      } else {
        ask(locations, call.candidates, s.location_queries + (location - begin) * kQuery, s);
        attend(locations, call.candidates, s);
        begin_mixed(locations, call.candidates, shared, s);
        listen(locations, call.candidates, ahead, s);
      }
      Out::run(call, location, locations, ahead, s);
    }
  }
}

}  // namespace
}  // namespace dmv_fast
