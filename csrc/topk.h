// Streaming top-k and log-sum-exp over logits blocks [keys][kTile]. Wants a `Lanes` included before it.
//
// A lane is a query, so nothing is ever reduced across a vector: lists, thresholds and sums of 32 queries advance
// together. The null column (logit 0, index -1) is where each list starts, so the highest logit is never below 0 and
// the softmax's shift is always finite.
//
// A logit that beats its query's threshold, which becomes rare soon, is only noted (append); the notes of all
// queries enter their lists together, lane by lane again (insert_pending). Ties keep the order of the
// keys, so the smaller index comes first (but where a screen has summed equal keys in two ways).
#pragma once

namespace dmv_fast {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr int kBlock = 32;    // keys of one logits block
constexpr int kGroup = 4;     // keys that share one test against the threshold
constexpr int kPending = 16;  // notes a query can have before they have to enter its list
constexpr int kVectors = kTile / Lanes::kWidth;

// What streaming over the keys keeps of 32 queries.
struct TileState {
  float threshold[kTile];  // at most the k-th best logit; +inf in lanes past the last query, where nothing may enter
  float shift[kTile];      // highest logit so far * log2(e)
  float sum[kTile];        // sum of 2^(logit * log2(e) - shift), the null column's included
  float best[kMaxK][kTile];  // highest first
  int32_t index[kMaxK][kTile];

  void start(int k, int64_t queries) {
    for (int lane = 0; lane < kTile; ++lane) {
      shift[lane] = 0.0f;
      sum[lane] = 1.0f;
      for (int place = 0; place < k; ++place) {
        best[place][lane] = place == 0 ? 0.0f : -__builtin_inff();
        index[place][lane] = -1;
      }
      threshold[lane] = lane < queries ? best[k - 1][lane] : __builtin_inff();
    }
  }
};

// Logits that beat their thresholds, on their way into the lists; empty between chunks of keys.
struct Pending {
  float logit[kPending][kTile];
  int32_t index[kPending][kTile];
  int32_t count[kTile];
};

// What every logit meets of a TileState, in registers from block to block.
struct Running {
  using Vector = typename Lanes::Vector;
  Vector threshold[kVectors], shift[kVectors], sum[kVectors];

  explicit Running(const TileState& state) {
    load_threshold(state);
    for (int i = 0; i < kVectors; ++i) {
      shift[i] = Lanes::load(state.shift + i * Lanes::kWidth);
      sum[i] = Lanes::load(state.sum + i * Lanes::kWidth);
    }
  }
  void load_threshold(const TileState& state) {
    for (int i = 0; i < kVectors; ++i) threshold[i] = Lanes::load(state.threshold + i * Lanes::kWidth);
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
      sum[i] = Lanes::multiply(sum[i], Lanes::exp2(Lanes::subtract(old, shift[i])));  // by exactly 1 where it stays
    }
  }
};

// Of kGroup rows of logits each query's highest.
inline void load_highest(typename Lanes::Vector (&highest)[kVectors], const float* logits) {
  for (int i = 0; i < kVectors; ++i) {
    highest[i] = Lanes::load(logits + i * Lanes::kWidth);
    for (int key = 1; key < kGroup; ++key)
      highest[i] = Lanes::larger(highest[i], Lanes::load(logits + key * kTile + i * Lanes::kWidth));
  }
}

// Adds kGroup rows of logits to the sums. Returns whether any of them beats its query's threshold.
inline bool accumulate(Running& running, const float* logits) {
  using Vector = typename Lanes::Vector;
  Vector highest[kVectors], shifted[kVectors];
  load_highest(highest, logits);
  for (int i = 0; i < kVectors; ++i) shifted[i] = Lanes::multiply(highest[i], Lanes::fill(kLog2e));
  if (__builtin_expect(Lanes::any_above(shifted, running.shift), 0)) running.raise_shift(shifted);
  for (int i = 0; i < kVectors; ++i)
    for (int key = 0; key < kGroup; ++key) {
      const Vector x = Lanes::load(logits + key * kTile + i * Lanes::kWidth);
      const Vector t = Lanes::multiply_subtract(x, Lanes::fill(kLog2e), running.shift[i]);
      running.sum[i] = Lanes::add(running.sum[i], Lanes::exp2(t));
    }
  return Lanes::any_above(highest, running.threshold);
}

// Whether any of kGroup rows of logits beats its query's threshold.
inline bool beats(const Running& running, const float* logits) {
  typename Lanes::Vector highest[kVectors];
  load_highest(highest, logits);
  return Lanes::any_above(highest, running.threshold);
}

// A note of each query on its way down the lists, place by place: it stays behind what it does not beat, and what it
// does beat moves down a place.
struct Note {
  using Vector = typename Lanes::Vector;
  Vector logit, index, above = logit, above_index = index;
  typename Lanes::Mask moved = Lanes::no_lane();

  void pass(Vector& here, Vector& here_index) {
    const auto moves = Lanes::greater(logit, here);
    const Vector next = Lanes::choose(moves, Lanes::choose(moved, above, logit), here);
    const Vector next_index = Lanes::choose(moves, Lanes::choose(moved, above_index, index), here_index);
    above = here;
    above_index = here_index;
    moved = moves;
    here = next;
    here_index = next_index;
  }
};

// Everything pending enters the lists, two notes of each query at a time, and the thresholds follow.
inline void insert_pending(TileState& state, Pending& pending, int k) {
  using Vector = typename Lanes::Vector;
  static_assert(kPending % 2 == 0);
  int most = 0;
  for (int lane = 0; lane < kTile; ++lane) most = pending.count[lane] > most ? pending.count[lane] : most;
  most += most % 2;
  for (int note = 0; note < most; ++note)
    for (int lane = 0; lane < kTile; ++lane)
      if (note >= pending.count[lane]) pending.logit[note][lane] = -__builtin_inff();
  for (int note = 0; note < most; note += 2)
    for (int i = 0; i < kTile; i += Lanes::kWidth) {
      Note first{Lanes::load(pending.logit[note] + i), Lanes::load_bits(pending.index[note] + i)};
      Note second{Lanes::load(pending.logit[note + 1] + i), Lanes::load_bits(pending.index[note + 1] + i)};
      for (int place = 0; place < k; ++place) {
        Vector here = Lanes::load(state.best[place] + i);
        Vector here_index = Lanes::load_bits(state.index[place] + i);
        first.pass(here, here_index);
        second.pass(here, here_index);
        Lanes::store(state.best[place] + i, here);
        Lanes::store_bits(state.index[place] + i, here_index);
      }
    }
  for (int i = 0; i < kTile; i += Lanes::kWidth) {  // a list that is not full yet ends in -inf, which says nothing
    const Vector last = Lanes::load(state.best[k - 1] + i);
    Lanes::store(state.threshold + i, Lanes::larger(last, Lanes::load(state.threshold + i)));
  }
  __builtin_memset(pending.count, 0, sizeof pending.count);
}

// Lists the places in a block, in those groups of it whose bits are set, of what lies above its query's bound. Where
// and how many they are is what the processor cannot predict: no branch hangs on either.
inline int list_places(
    const float* logits, uint32_t groups, const typename Lanes::Vector (&bound)[kVectors], int32_t* places) {
  int found = 0;
  for (; groups; groups &= groups - 1) {
    const int first = __builtin_ctz(groups) * kGroup * kTile;
    for (int row = first; row < first + kGroup * kTile; row += kTile)
      found = Lanes::list_above(logits + row, bound, row, places, found);
  }
  return found;
}
constexpr int kMaxPlaces = kBlock * kTile + kTile;  // list_places may write a row more than it finds

// Notes what beats the thresholds, in those groups of a block whose bits are set.
// Out of line, to leave the registers of the loop around it alone.
__attribute__((noinline)) void append(
    TileState& state, Pending& pending, const float* logits, uint32_t groups, int32_t first_key, int k) {
  typename Lanes::Vector threshold[kVectors];
  for (int i = 0; i < kVectors; ++i) threshold[i] = Lanes::load(state.threshold + i * Lanes::kWidth);
  int32_t places[kMaxPlaces];
  const int found = list_places(logits, groups, threshold, places);
  for (int i = 0; i < found; ++i) {
    const int query = places[i] % kTile, note = pending.count[query]++;
    pending.logit[note][query] = logits[places[i]];
    pending.index[note][query] = first_key + places[i] / kTile;
    if (__builtin_expect(note + 1 == kPending, 0)) insert_pending(state, pending, k);
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
      for (int j = q & (p - 1); j + q < n; j += 2 * q)
        for (int i = j; i < j + q && i + q < n; ++i)
          if (((i ^ (i + q)) & -2 * p) == 0) order(x[i], x[i + q]);  // both in one pair of runs that merge
}

// Before the first logits are taken in: a threshold under which nobody can be among the k best, so that the lists
// need not work their way up through the first keys. Of 2p >= 2k groups of keys the p-th highest maximum is such a
// bound, because p different keys reach it.
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

// Where not every logit was summed: the lists less the best in them, and the sum over these. A sum that is no number before
// is none afterwards.
inline void sum_best(TileState& state, int k) {
  for (int i = 0; i < kTile; i += Lanes::kWidth) {
    const auto highest = Lanes::load(state.best[0] + i);
    auto sum = Lanes::multiply(Lanes::load(state.sum + i), Lanes::zero());
    for (int place = 0; place < k; ++place) {
      const auto less = Lanes::subtract(Lanes::load(state.best[place] + i), highest);
      sum = Lanes::add(sum, Lanes::exp2(Lanes::multiply(less, Lanes::fill(kLog2e))));
      Lanes::store(state.best[place] + i, less);
    }
    Lanes::store(state.shift + i, Lanes::zero());
    Lanes::store(state.sum + i, sum);
  }
}

// The first `queries` lanes' lists as rows of scores and indices.
inline void write_results(const TileState& state, int64_t queries, int k, float* scores, int32_t* indices) {
  float score[kMaxK][kTile];
  for (int i = 0; i < kTile; i += Lanes::kWidth) {
    const auto shift = Lanes::load(state.shift + i), sum = Lanes::load(state.sum + i);
    for (int place = 0; place < k; ++place) {
      const auto t = Lanes::multiply_subtract(Lanes::load(state.best[place] + i), Lanes::fill(kLog2e), shift);
      Lanes::store(score[place] + i, Lanes::divide(Lanes::exp2(t), sum));
    }
  }
  for (int64_t query = 0; query < queries; ++query)
    for (int place = 0; place < k; ++place) {
      scores[query * k + place] = score[place][query];
      indices[query * k + place] = state.index[place][query];
    }
}

}  // namespace
}  // namespace dmv_fast
