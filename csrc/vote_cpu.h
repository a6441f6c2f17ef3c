// Voting on the CPU: what the launcher (vote_cpu.cpp) and the kernels of each instruction set share.
#pragma once

#include <cstdint>

#include "cpu_isa.h"

namespace dmv_fast {

constexpr int kVoteWidth = 64;  // C
constexpr int kHeadWidth = 16;  // C / 4
constexpr int kVoteRows = 32;   // candidates worked on together: those of one location, or of several whole ones
constexpr int kMaxHeads = 8;

// One call. Matrices are bfloat16, "pairs" means [columns / 16][depth / 2][16][2], biases float32; see VoteWeights in
// dmv_fast/runtime/fold.py for what was multiplied into what.
struct Voting {
  const uint16_t* rows;      // [locations][candidates][C]
  const uint16_t* to_q;      // [heads * C/4][C]
  const float* q_bias;       // [heads * C/4]
  const uint16_t* to_k;      // pairs of [C][heads * C/4]
  const uint16_t* mix;       // [heads + 1][C][C]: what is heard by each head, then the candidate itself
  const float* mix_bias;     // [C]
  const uint16_t* out;       // pairs of [C][V]
  const float* out_bias;     // [V]
  uint16_t* retrieved;       // [locations][V]
  int64_t locations, value_width;
  int candidates, heads;
  float epsilon;             // of the layer norm

  int locations_together() const { return kVoteRows / candidates; }
};

// Locations first..last, last - first a multiple of locations_together() except at the end.
using VoteLocations = void (*)(const Voting& call, int64_t first, int64_t last);

VoteLocations vote_avx512_bf16();
VoteLocations vote_amx();

// One call in float32, of products of two bfloat16 parts of each number. Matrices are bfloat16, in both parts, as
// tiles: see _tiles_of_parts in dmv_fast/runtime/vote.py.
struct SplitVoting {
  const float* rows;       // [locations][candidates][C]
  const uint16_t* to_q;    // of [heads * C/4][C]
  const float* q_bias;     // [heads * C/4]
  const uint16_t* to_k;    // of [heads * C/4][C]
  const uint16_t* mix;     // of [(heads + 1) * C][C]: what is heard by each head, then the candidate itself
  const float* mix_bias;   // [C]
  const uint16_t* out;     // of [V][C]
  const float* out_bias;   // [V]
  float* retrieved;        // [locations][V]
  int64_t locations, value_width;
  int candidates, heads;
  float epsilon;           // of the layer norm

  int locations_together() const { return kVoteRows / candidates; }
};

using VoteSplitLocations = void (*)(const SplitVoting& call, int64_t first, int64_t last);

VoteSplitLocations vote_split_amx();

}  // namespace dmv_fast
