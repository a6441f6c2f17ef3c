// Float32 retrieval at about the price of bfloat16. Numbers are there twice, rounded to bfloat16 and as they are
// (dmv_fast/ops/packed.py): of a query in its row, so packed queries have [D / 2][kTile] pairs, then [D][kTile] float32; of
// keys in blocks, [kBlock][D] bfloat16, then [kBlock][D] float32, as what is streamed has to lie side by side. All keys are
// multiplied in bfloat16. That is off by at most
//   |q.k - q0.k0| <= |q0||k - k0| + |q - q0||k| <= (2 u + u^2) |q0||k0|
// (Cauchy-Schwarz), as rounding changes a number by u = 2^-8 of what it becomes at most. So a key whose q0.k0 lies more
// than that under the k-th best logit so far is out; the others, few among thousands, are multiplied in float32, before
// anything is selected. Wants product_bfloat16.h and product_float32.h before it.
#pragma once

namespace dmv_fast {
namespace {

constexpr float kMostOff = 1.02f * 0x1p-7f;  // 2 u + u^2, and what up to 2 x 512 additions in float32 round off

// The bfloat16 third of a block. depth: of a row, in the room of bfloat16 numbers.
struct ProductRounded : ProductBFloat16 {
  static constexpr int64_t kDepthStep = 96;

  template <class Between>
  static void block(
      const uint16_t* rows, int64_t, const uint16_t* queries, int64_t depth, float* logits, Between&& between) {
    ProductBFloat16::block(rows, depth / 3, queries, depth / 3, logits, between);
  }
};
template <>
constexpr bool kWholeBlocks<ProductRounded> = true;

// |row|^2 in bfloat16.
inline float square_of(const uint16_t* row, int64_t depth) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t d = 0; d < depth; d += 32) {
    const __m512i x = _mm512_loadu_si512(row + d);
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<const __m512bh&>(x), reinterpret_cast<const __m512bh&>(x));
  }
  return _mm512_reduce_add_ps(sum);
}

// A little more, for rows whose squares underflow.
inline float length_of(float square) { return __builtin_sqrtf(square) + 0x1p-58f; }

inline float product_of(const float* a, const float* b, int64_t depth) {
  __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
  for (int64_t d = 0; d < depth; d += 32) {
    even = _mm512_fmadd_ps(_mm512_loadu_ps(a + d), _mm512_loadu_ps(b + d), even);
    odd = _mm512_fmadd_ps(_mm512_loadu_ps(a + d + 16), _mm512_loadu_ps(b + d + 16), odd);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
}

// Behind so many bfloat16 numbers.
inline const float* float32_part(const uint16_t* rows, int64_t numbers) {
  return reinterpret_cast<const float*>(rows + numbers);
}

// Of a tile's queries.
struct RoundedScreen {
  // Where more than these of a block's 1024 have to be multiplied, all of them together take less time.
  static constexpr int kMany = 400;

  // What of a chunk's keys all queries need: the greatest length.
  struct Reach {
    float length;

    template <class Chunk>
    explicit Reach(const Chunk& chunk) {
      const int64_t depth = chunk.depth / 3;
      float most = 0.0f;
      for (int64_t key = chunk.begin; key < chunk.end; ++key) {
        const float here = square_of(chunk.row(key - key % kBlock) + key % kBlock * depth, depth);
        most = here <= most ? most : here == here ? here : __builtin_inff();
      }
      length = length_of(most);
    }
  };

  float length[kTile], margin[kTile];
  const uint16_t* rows;
  int64_t stride;

  void start(const BFloat16* queries, int64_t row_stride, int64_t present, int64_t depth) {
    rows = reinterpret_cast<const uint16_t*>(queries);
    stride = row_stride;
    for (int lane = 0; lane < kTile; ++lane)
      length[lane] = lane < present ? length_of(square_of(rows + lane * stride, depth / 3)) : 0.0f;
  }

  // Lengths that are not finite say nothing: all keys are looked at.
  void face(const Reach& keys) {
    for (int lane = 0; lane < kTile; ++lane) {
      const float most = kMostOff * length[lane] * keys.length;
      margin[lane] = most == most ? most : __builtin_inff();
    }
  }

  // Thresholds found among bfloat16 products, so that they hold for float32 ones.
  void lower(TileState& state) const {
    for (int lane = 0; lane < kTile; ++lane) state.threshold[lane] -= margin[lane];
  }

  template <class Chunk>
  void refine(const TileState& state, const Chunk& chunk, int64_t key, const uint16_t* queries, float* logits) const {
    using Vector = typename Lanes::Vector;
    Vector bound[kVectors], highest[kVectors];
    for (int i = 0; i < kVectors; ++i)
      bound[i] = Lanes::subtract(
          Lanes::load(state.threshold + i * Lanes::kWidth), Lanes::load(margin + i * Lanes::kWidth));
    uint32_t groups = 0;
    for (int group = 0; group < kGroups; ++group) {
      load_highest(highest, logits + group * kGroup * kTile);
      groups |= uint32_t(Lanes::any_above(highest, bound)) << group;
    }
    if (groups) multiply(bound, groups, chunk.row(key), queries, chunk.depth / 3, logits);
  }

 private:
  __attribute__((noinline)) void multiply(
      const typename Lanes::Vector (&bound)[kVectors], uint32_t groups, const uint16_t* block, const uint16_t* queries,
      int64_t depth, float* logits) const {
    const float* const keys = float32_part(block, kBlock * depth);
    int32_t places[kMaxPlaces];
    const int found = list_places(logits, groups, bound, places);
    if (found > kMany) {
      ProductFloat32::block(keys, depth, float32_part(queries, kTile * depth), depth, logits, [](int) {});
      return;
    }
    for (int i = 0; i < found; ++i) {
      const uint16_t* const query = rows + places[i] % kTile * stride;
      logits[places[i]] = product_of(float32_part(query, depth), keys + places[i] / kTile * depth, depth);
    }
  }
};

}  // namespace
}  // namespace dmv_fast
