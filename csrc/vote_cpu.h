// Voting on the CPU: what the launcher (vote_cpu.cpp) and the kernels of each instruction set share.
#pragma once

#include <cstdint>

#include "cpu_isa.h"

namespace dmv_fast {

constexpr int kVoteWidth = 64;  // C
constexpr int kHeadWidth = 16;  // C / 4
constexpr int kVoteRows = 32;   // candidates worked on together: those of one location, or of several whole ones
constexpr int kMaxHeads = 8;

// One call. Number is bfloat16 (uint16_t) or, for products of two bfloat16 parts of each number, float. Matrices are
// bfloat16 and packed by dmv_fast/runtime/vote.py: for bfloat16 to_q and mix as they are, the others as "pairs",
// [columns / 16][depth / 2][16][2]; for float all in both parts, as tiles. Biases are float32. See VoteWeights in
// dmv_fast/runtime/fold.py for what was multiplied into what.
template <class Number>
struct VotingOf {
  const Number* rows;      // [locations][candidates][C]
  const uint16_t* to_q;    // of [heads * C/4][C]
  const float* q_bias;     // [heads * C/4]
  const uint16_t* to_k;    // of [heads * C/4][C]
  const uint16_t* mix;     // of [heads + 1][C][C]: what is heard by each head, then the candidate itself
  const float* mix_bias;   // [C]
  const uint16_t* out;     // of [V][C]
  const float* out_bias;   // [V]
  Number* retrieved;       // [locations][V]
  int64_t locations, value_width;
  int candidates, heads;
  float epsilon;           // of the layer norm

  int locations_together() const { return kVoteRows / candidates; }
};
using Voting = VotingOf<uint16_t>;
using SplitVoting = VotingOf<float>;

// Locations first..last, last - first a multiple of locations_together() except at the end.
template <class Number>
using VoteLocationsOf = void (*)(const VotingOf<Number>& call, int64_t first, int64_t last);
using VoteLocations = VoteLocationsOf<uint16_t>;
using VoteSplitLocations = VoteLocationsOf<float>;

VoteLocations vote_avx512_bf16();
VoteLocations vote_amx();
VoteSplitLocations vote_split_amx();

}  // namespace dmv_fast
