// Streaming top-k and log-sum-exp over logits blocks [keys][kTile]. Wants a `Lanes` included before it.
//
// A lane is a query, so nothing is ever reduced across a vector: the running list, the threshold a logit has to
// beat and the sum of exponentials of 32 queries advance together. The null column (logit 0, index -1) is where
// each list starts, so the highest logit is never below 0 and the softmax's shift is always finite.
#pragma once

namespace dmv_fast {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr int kGroup = 4;  // keys that share one test against the threshold
constexpr int kVectors = kTile / Lanes::kWidth;

// What streaming over the keys keeps of 32 queries.
struct TileState {
  float threshold[kTile];  // at most the k-th best logit; +inf in lanes past the last query, where nothing may enter
  float shift[kTile];      // highest logit known * log2(e)
  float sum[kTile];        // sum of 2^(logit * log2(e) - shift), the null column's included
  float best[kTile][kMaxK];  // highest first; equal logits in the order they came, so smaller indices first
  int32_t index[kTile][kMaxK];

  void start(int k, int64_t queries) {
    for (int lane = 0; lane < kTile; ++lane) {
      shift[lane] = 0.0f;
      sum[lane] = 1.0f;
      for (int place = 0; place < kMaxK; ++place) {
        best[lane][place] = place == 0 ? 0.0f : -__builtin_inff();
        index[lane][place] = -1;
      }
      threshold[lane] = lane < queries ? best[lane][k - 1] : __builtin_inff();
    }
  }
};

// The softmax's part of a TileState, in registers from block to block.
struct Running {
  using Vector = typename Lanes::Vector;
  Vector shift[kVectors], sum[kVectors];

  explicit Running(const TileState& state) {
    for (int i = 0; i < kVectors; ++i) {
      shift[i] = Lanes::load(state.shift + i * Lanes::kWidth);
      sum[i] = Lanes::load(state.sum + i * Lanes::kWidth);
    }
  }
  void store(TileState& state) const {
    for (int i = 0; i < kVectors; ++i) {
      Lanes::store(state.shift + i * Lanes::kWidth, shift[i]);
      Lanes::store(state.sum + i * Lanes::kWidth, sum[i]);
    }
  }
  void raise_shift(const Vector (&shifted)[kVectors]) {
    for (int i = 0; i < kVectors; ++i) {
      const Vector old = shift[i];
      shift[i] = Lanes::larger(shifted[i], old);
      sum[i] = Lanes::multiply(sum[i], Lanes::exp2(Lanes::subtract(old, shift[i])));  // times exactly 1 where it stays
    }
  }
};

// Adds kGroup rows of logits to the sums. Returns whether any of them beats its query's threshold.
inline bool accumulate(Running& running, const float* logits, const float* threshold) {
  using Vector = typename Lanes::Vector;
  Vector highest[kVectors], shifted[kVectors], bound[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    highest[i] = Lanes::load(logits + i * Lanes::kWidth);
    for (int key = 1; key < kGroup; ++key)
      highest[i] = Lanes::larger(highest[i], Lanes::load(logits + key * kTile + i * Lanes::kWidth));
    shifted[i] = Lanes::multiply(highest[i], Lanes::fill(kLog2e));
    bound[i] = Lanes::load(threshold + i * Lanes::kWidth);
  }
  if (__builtin_expect(Lanes::any_above(shifted, running.shift), 0)) running.raise_shift(shifted);
  for (int i = 0; i < kVectors; ++i)
    for (int key = 0; key < kGroup; ++key) {
      const Vector x = Lanes::load(logits + key * kTile + i * Lanes::kWidth);
      const Vector t = Lanes::multiply_subtract(x, Lanes::fill(kLog2e), running.shift[i]);
      running.sum[i] = Lanes::add(running.sum[i], Lanes::exp2(t));
    }
  return Lanes::any_above(highest, bound);
}

// Inserts what beats the thresholds among kGroup rows of logits, at least one of which does. One loop over all of
// them: how many there are is what the processor cannot predict, so it should have to guess that once only.
inline void insert_survivors(TileState& state, const float* logits, int32_t first_key, int k) {
  static_assert(kTile == 32 && kGroup == 4);
  uint64_t survivors = Lanes::above(logits, state.threshold) | Lanes::above(logits + kTile, state.threshold) << 32;
  uint64_t later =
      Lanes::above(logits + 2 * kTile, state.threshold) | Lanes::above(logits + 3 * kTile, state.threshold) << 32;
  int left = __builtin_popcountll(survivors) + __builtin_popcountll(later), key = 0;
  for (; left > 0; --left) {
    const bool turn = survivors == 0;
    survivors = turn ? later : survivors;
    key = turn ? 2 : key;
    const int position = __builtin_ctzll(survivors);
    survivors &= survivors - 1;
    const int row = key + position / kTile, query = position % kTile;
    float* const best = state.best[query];
    Lanes::insert(best, state.index[query], k, logits[row * kTile + query], first_key + row);
    // A list not yet full ends in -inf, which says nothing.
    if (best[k - 1] > state.threshold[query]) state.threshold[query] = best[k - 1];
  }
}

inline void order(typename Lanes::Vector& high, typename Lanes::Vector& low) {
  const auto a = high;
  high = Lanes::larger(a, low);
  low = Lanes::smaller(a, low);
}

// Batcher's odd-even merge sort, each lane by itself, highest first; n is a power of two.
inline void sort_lanes(typename Lanes::Vector* x, int n) {
  for (int p = 1; p < n; p *= 2)
    for (int q = p; q > 0; q /= 2)
      for (int j = q % p; j + q < n; j += 2 * q)
        for (int i = j; i < j + q && i + q < n; ++i)
          if (i / (2 * p) == (i + q) / (2 * p)) order(x[i], x[i + q]);
}

// Before the first logits are taken in: a threshold under which nobody can be among the k best, so that the lists
// need not work their way up through the first keys one by one. Of 2p >= 2k groups of keys the p-th highest maximum
// is such a bound, because p different keys reach it.
inline void raise_threshold(TileState& state, const float* logits, int64_t keys, int k) {
  using Vector = typename Lanes::Vector;
  int p = 1;
  while (p < k) p *= 2;
  const int groups = 2 * p;
  if (keys < 2 * groups) return;
  for (int i = 0; i < kTile; i += Lanes::kWidth, logits += Lanes::kWidth) {
    Vector maximum[2 * kMaxK];
    for (int g = 0; g < groups; ++g) {
      maximum[g] = Lanes::load(logits + g * kTile);
      for (int64_t key = g + groups; key < keys; key += groups)
        maximum[g] = Lanes::larger(maximum[g], Lanes::load(logits + key * kTile));
    }
    sort_lanes(maximum, p);
    sort_lanes(maximum + p, p);
    Vector bound = Lanes::larger(maximum[0], maximum[groups - 1]);
    for (int g = 1; g < p; ++g) bound = Lanes::smaller(bound, Lanes::larger(maximum[g], maximum[groups - 1 - g]));
    // Strictly under the bound, since a logit has to beat the threshold.
    const Vector under = Lanes::smaller(
        Lanes::multiply(bound, Lanes::fill(1.0f - 0x1p-20f)), Lanes::multiply(bound, Lanes::fill(1.0f + 0x1p-20f)));
    const Vector threshold = Lanes::load(state.threshold + i);
    Lanes::store(state.threshold + i, Lanes::larger(threshold, Lanes::subtract(under, Lanes::fill(1e-30f))));
  }
}

inline void write_results(const TileState& state, int lane, int k, float* scores, int32_t* indices) {
  const float share = 1.0f / state.sum[lane];
  float weight[kMaxK];
  for (int i = 0; i < kMaxK && i < k; i += Lanes::kWidth) {
    const auto t = Lanes::multiply_subtract(
        Lanes::load(state.best[lane] + i), Lanes::fill(kLog2e), Lanes::fill(state.shift[lane]));
    Lanes::store(weight + i, Lanes::exp2(t));
  }
  for (int place = 0; place < k; ++place) {
    scores[place] = weight[place] * share;
    indices[place] = state.index[lane][place];
  }
}

}  // namespace
}  // namespace dmv_fast
