// Voting on the CPU: what the launcher (vote_cpu.cpp) and the kernels of each instruction set share.
#pragma once

#include <cstdint>

#include "cpu_isa.h"

namespace dmv_fast {

constexpr int kVoteWidth = 64;  // C
constexpr int kHeadWidth = 16;  // C / 4
constexpr int kVoteRows = 32;   // candidates worked on together: those of one location, or of several whole ones
constexpr int kMaxHeads = 8;

// One call, whose Number is bfloat16 (uint16_t), or float for products of two bfloat16 parts of each number. Matrices are
// bfloat16, packed by dmv_fast/runtime/vote.py: for bfloat16 to_q and mix as they are, the others as "pairs",
// [columns / 16][depth / 2][16][2]; for two parts all in both, as tiles. Biases are float32. See VoteWeights in
// dmv_fast/runtime/fold.py for what was multiplied into what.
template <class Number>
struct VotingOf {
  const Number* rows;      // [locations][candidates][C]
  const uint16_t* to_q;    // of [heads * C/4][C]
  const float* q_bias;     // [heads * C/4]
  const uint16_t* to_k;    // of [heads * C/4][C]
  const uint16_t* mix;     // of [heads + 1][C][C]: what is heard by each head, the candidate itself
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

// A value as the float32 vote remembers it: to_q v and to_k v, of both number 0 of all 8 heads, then number 1 and so on;
// U_h v of all heads, 32 numbers of each, then the other 32; U v. Of heads that are missing it is zero.
constexpr int kQuery = kMaxHeads * kHeadWidth;
constexpr int kSpreadQueries = 0, kSpreadKeys = kQuery, kSpreadHeard = 2 * kQuery;
constexpr int kSpreadOwn = kSpreadHeard + kMaxHeads * kVoteWidth, kSpread = kSpreadOwn + kVoteWidth;

// One call in float32, matrices packed as panels, [columns / 32][depth][32].
struct Float32Voting {
  const float* values;      // [batch][count][kSpread]
  const float* null_value;  // [kSpread]
  const float* query_part;  // [locations][C]
  const int32_t* indices;   // [locations][candidates]: of values, -1 for the null column
  const float* scores;      // likewise
  const float* to_q;        // of [kQuery][C]
  const float* q_bias;      // [kQuery]
  const float* mix;         // of [2][C][C]: U, and all U_h with it
  const float* mix_bias;    // [C]
  const float* out;         // of [V][C]; null where it is in whole numbers:
  const int16_t* out_whole; // [V / 32][C / 2][32][2]
  const float* out_scale;   // [V]
  const float* out_bias;    // [V]
  float* retrieved;         // [locations][V]
  int64_t locations, queries, value_width, value_batch_stride, value_row_stride;  // queries: locations of a batch item
  int candidates;
  float epsilon;  // of the layer norm

  int locations_together() const { return kVoteRows / candidates; }
};

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
VoteFloat32Locations vote_int16_avx512_vnni();

}  // namespace dmv_fast
