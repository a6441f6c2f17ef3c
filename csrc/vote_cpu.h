// Voting on the CPU: what the launcher (vote_cpu.cpp) and the kernels of each instruction set share.
#pragma once

#include <cstdint>

#include "cpu_isa.h"

namespace dmv_fast {

constexpr int kVoteWidth = 64;  // C
constexpr int kHeadWidth = 16;  // C / 4
constexpr int kVoteRows = 32;   // candidates worked on together: those of one location, or of several whole ones
constexpr int kMaxHeads = 8;

// One call, whose Number and Weight are bfloat16 (uint16_t) both, or float and bfloat16 for products of two bfloat16
// parts of each number, or float both. Matrices are packed by dmv_fast/runtime/vote.py: for bfloat16 to_q and mix as
// they are, the others as "pairs", [columns / 16][depth / 2][16][2]; for two parts all in both, as tiles; for float all
// as panels, [columns / 32][depth][32]. Biases are float32. See VoteWeights in dmv_fast/runtime/fold.py for what was
// multiplied into what.
template <class Number, class Weight>
struct VotingOf {
  // Of float there are always 8 heads, some maybe zero; to_q and to_k list number 0 of all heads, then number 1, ...
  static constexpr bool kAllHeads = sizeof(Weight) == 4;
  static constexpr int kMixes = kAllHeads ? 2 : 1;  // in `mix`, beside those of the heads

  const Number* rows;      // [locations][candidates][C]
  const Weight* to_q;      // of [heads * C/4][C]
  const float* q_bias;     // [heads * C/4]
  const Weight* to_k;      // of [heads * C/4][C]
  const Weight* mix;       // of [heads + kMixes][C][C]: what is heard by each head, the candidate itself, all summed
  const float* mix_bias;   // [C]
  const Weight* out;       // of [V][C]
  const float* out_bias;   // [V]
  Number* retrieved;       // [locations][V]
  int64_t locations, value_width;
  int candidates, heads;
  float epsilon;           // of the layer norm

  int locations_together() const { return kVoteRows / candidates; }
};
using Voting = VotingOf<uint16_t, uint16_t>;
using SplitVoting = VotingOf<float, uint16_t>;
using Float32Voting = VotingOf<float, float>;

// Locations first..last, last - first a multiple of locations_together() except at the end.
template <class Call>
using VoteLocationsOf = void (*)(const Call& call, int64_t first, int64_t last);
using VoteLocations = VoteLocationsOf<Voting>;
using VoteSplitLocations = VoteLocationsOf<SplitVoting>;
using VoteFloat32Locations = VoteLocationsOf<Float32Voting>;

VoteLocations vote_avx512_bf16();
VoteLocations vote_amx();
VoteSplitLocations vote_split_amx();
VoteFloat32Locations vote_float32_generic();
VoteFloat32Locations vote_float32_avx2();
VoteFloat32Locations vote_float32_avx512();

}  // namespace dmv_fast
