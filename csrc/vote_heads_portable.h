// Heads (see vote_float32.h) in lanes that hold those of one candidate at most. Wants a `Lanes` before it.
#pragma once

namespace dmv_fast {
namespace {

struct Heads {
  static constexpr int kCandidates = 1;
  static Lanes::Vector load(const float* p, int64_t) { return Lanes::load(p); }
  static Lanes::Vector load_same(const float* p) { return Lanes::load(p); }
  static void store(float* p, int64_t, Lanes::Vector v) { Lanes::store(p, v); }
};

}  // namespace
}  // namespace dmv_fast
