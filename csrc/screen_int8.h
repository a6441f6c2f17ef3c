// Float32 retrieval at a third of its price. Numbers are there twice: as they are and, turned in space, as whole numbers
// from -127 to 127 times a scale of their row (dmv_fast/ops/screened.py). All keys are multiplied in bytes. That is off by
// at most
//   |q.k - q8.k8| <= |q||k - k8| + |q - q8||k8|
// (Cauchy-Schwarz), and how far each row is off, |k - k8|, is known. So a key whose q8.k8 lies more than that under the k-th
// best logit so far is out; the others, few among thousands, are multiplied in float32, before anything is selected.
// Wants product_float32.h before it, and the instructions of AVX512_VNNI. They, and AMX's tiles (retrieve_amx.cpp), add
// four products of bytes without sign and bytes with one, so a query's numbers are 128 larger than they are, and a key
// comes with 128 times the sum of its own.
#pragma once

namespace dmv_fast {
namespace {

// [kBlock][D] bytes, four numbers of each key, then [kBlock][D] float32.
struct KeyBlock {
  const int8_t* bytes;
  const float *scale, *shift;  // 128 times the sum of the bytes
  const float *error, *length, *keys;

  KeyBlock(const float* block, int64_t depth)
      : bytes(reinterpret_cast<const int8_t*>(block)), scale(block + kBlock * depth / 4), shift(scale + kBlock),
        error(shift + kBlock), length(error + kBlock), keys(length + kBlock) {}
};

// A tile of queries: three numbers of each, [D / 4][kTile][4] bytes, then [D][kTile] float32.
struct QueryTile {
  float *scale, *error, *length;
  uint8_t* bytes;
  float* queries;

  QueryTile(float* tile, int64_t depth)
      : scale(tile), error(scale + kTile), length(error + kTile), bytes(reinterpret_cast<uint8_t*>(length + kTile)),
        queries(length + kTile + kTile * depth / 4) {}
};

// By vpdpbusd.
struct MultiplyBytes {
  static constexpr int kRows = 8;

  static void begin() {}
  static void end() {}

  template <class Between>
  __attribute__((noinline)) static void run(
      const KeyBlock& block, const QueryTile& tile, int64_t depth, float* logits, uintptr_t ahead, Between& between) {
    const __m512 scale[2] = {_mm512_loadu_ps(tile.scale), _mm512_loadu_ps(tile.scale + 16)};
    for (int key = 0; key < kBlock; key += kRows) {
      __m512i sum[kRows][2];
      for (auto& row : sum) row[0] = row[1] = _mm512_setzero_si512();
      const int8_t* const row = block.bytes + key * depth;
      for (int64_t d = 0; d < depth; d += 4) {
        __builtin_prefetch(reinterpret_cast<const char*>(ahead + key * depth + d * kRows), 0, 2);
        between(0);
        const __m512i low = _mm512_loadu_si512(tile.bytes + d * kTile);
        const __m512i high = _mm512_loadu_si512(tile.bytes + d * kTile + 64);
        for (int r = 0; r < kRows; ++r) {
          int32_t four;
          __builtin_memcpy(&four, row + r * depth + d, 4);
          const __m512i spread = _mm512_set1_epi32(four);
          sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], low, spread);
          sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], high, spread);
        }
      }
      for (int r = 0; r < kRows; ++r) store_logits(block, key + r, sum[r], scale, logits + (key + r) * kTile);
    }
  }

  // A key's sums of products, `scale` of the queries -> its logits.
  static void store_logits(
      const KeyBlock& block, int key, const __m512i (&sum)[2], const __m512 (&scale)[2], float* logits) {
    const __m512i shift = _mm512_set1_epi32(static_cast<int32_t>(block.shift[key]));
    const __m512 of_key = _mm512_set1_ps(block.scale[key]);
    for (int i = 0; i < 2; ++i) {
      const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[i], shift));
      _mm512_store_ps(logits + 16 * i, _mm512_mul_ps(whole, _mm512_mul_ps(of_key, scale[i])));
    }
  }
};

// `Multiply`: begin and end, and run(block, tile, depth, logits, ahead, between), which also fetches the bytes at `ahead`.
template <class Multiply>
struct ProductInt8 : Multiply {
  using Element = float;
  static constexpr int64_t kDepthStep = 1;
  // Blocks whose bytes are fetched to L2 before they are needed: they do not lie one behind the other.
  static constexpr int64_t kAhead = 2;

  template <class Between>
  static void block(
      const float* rows, int64_t stride, const float* queries, int64_t depth, float* logits, Between&& between) {
    const uintptr_t ahead = reinterpret_cast<uintptr_t>(rows) + kAhead * kBlock * stride * sizeof(float);
    Multiply::run(KeyBlock(rows, depth), QueryTile(const_cast<float*>(queries), depth), depth, logits, ahead, between);
  }
};
template <class Multiply>
constexpr bool kWholeBlocks<ProductInt8<Multiply>> = true;

// As `turn` in dmv_fast/ops/screened.py, but for the factor.
inline void turn(float* row, int64_t depth) {
  for (int64_t half = 16; half < (depth & -depth); half *= 2)
    for (int64_t begin = 0; begin < depth; begin += 2 * half)
      for (int64_t d = begin; d < begin + half; ++d) {
        const float a = row[d], b = row[d + half];
        row[d] = a + b;
        row[d + half] = a - b;
      }
}

inline float greatest_size(const float* row, int64_t depth) {
  float most = 0.0f;
  for (int64_t d = 0; d < depth; ++d) most = __builtin_fabsf(row[d]) > most ? __builtin_fabsf(row[d]) : most;
  return most;
}

// One query, turned, as bytes 128 larger than its numbers, kTile * 4 apart for every four of them.
inline void round_to_bytes(const float* query, int64_t depth, int lane, const QueryTile& tile) {
  constexpr float kSmallest = 1e-35f;  // of what can be divided by
  float turned[kMaxDepth], nothing = 0.0f;  // NaN where the row has a number that is not finite
  for (int64_t d = 0; d < depth; ++d) nothing += query[d] * 0.0f;
  const float most = greatest_size(query, depth);
  const bool fits = most >= kSmallest && nothing == 0.0f;
  for (int64_t d = 0; d < depth; ++d) turned[d] = fits ? query[d] / most : 0.0f;
  turn(turned, depth);
  const float spread = greatest_size(turned, depth), fine = fits ? 127.0f / spread : 0.0f;
  const float factor = __builtin_sqrtf(16.0f / static_cast<float>(depth & -depth));
  const float scale = (fits ? most * (spread / 127.0f * factor) : 0.0f) + nothing;
  float square = 0.0f, off = 0.0f;
  for (int64_t d = 0; d < depth; ++d) {
    const float x = turned[d] * fine, whole = __builtin_rintf(x);
    square += x * x;
    off += (x - whole) * (x - whole);
    tile.bytes[d / 4 * 4 * kTile + lane * 4 + d % 4] = static_cast<uint8_t>(static_cast<int>(whole) + 128);
  }
  tile.scale[lane] = scale;
  tile.length[lane] = fits ? 1.001f * scale * __builtin_sqrtf(square) : depth * most + nothing;
  // 0.003: twice what turning can round off, 5e-7 of a row that is 2,900 long at the most in this scale.
  tile.error[lane] = fits ? scale * (1.001f * __builtin_sqrtf(off) + 0.003f) : tile.length[lane];
}

template <class Multiply>
struct QueryPacking<ProductInt8<Multiply>> {
  static int64_t numbers(int64_t depth) { return depth + depth / 4 + 3; }

  static void run(const float* from, int64_t stride, int64_t queries, int64_t depth, int64_t, float* to) {
    __builtin_memset(to, 0, kTile * numbers(depth) * sizeof(float));
    const QueryTile tile(to, depth);
    for (int lane = 0; lane < queries; ++lane) round_to_bytes(from + lane * stride, depth, lane, tile);
    pack_queries<1>(from, stride, queries, depth, depth, tile.queries);
  }
};

// Of a tile's queries.
struct Int8Screen {
  // Scores are of the best alone. A sum over all keys would be of bytes for most of them, and take a sixth of the time.
  static constexpr bool kSums = false;
  // Where more than these of a block's 1024 have to be multiplied, all of them together take less time.
  static constexpr int kMany = 400;

  // What of a chunk's keys all queries need: the greatest error and length.
  struct Reach {
    float error = 0.0f, length = 0.0f;

    template <class Chunk>
    explicit Reach(const Chunk& chunk) {
      for (int64_t key = chunk.begin; key < chunk.end; key += kBlock) {
        const KeyBlock block(chunk.row(key), chunk.depth);
        for (int64_t i = 0; i < smaller(kBlock, chunk.end - key); ++i) {
          error = larger(error, block.error[i]);
          length = larger(length, block.length[i]);
        }
      }
    }

    static float larger(float a, float b) { return b <= a ? a : b == b ? b : __builtin_inff(); }
  };

  float length[kTile], error[kTile], margin[kTile];
  const float* rows;
  int64_t stride;
  bool all;  // keys are multiplied in float32: no bound holds where their numbers, or the bounds, are not finite

  void start(const float* queries, int64_t row_stride, int64_t depth, float* packed, TileState& state) {
    rows = queries;
    stride = row_stride;
    const QueryTile tile(packed, depth);
    __builtin_memcpy(length, tile.length, sizeof length);
    __builtin_memcpy(error, tile.error, sizeof error);
    for (int lane = 0; lane < kTile; ++lane) state.sum[lane] += 0.0f * tile.scale[lane];  // NaN of a row with no numbers
  }

  // 4e-6: what float32 sums round off; 1e-30: what is left of rows so short that scales underflow. A query that has no
  // length spoils its own lane only. Where logits may overflow there is no bound.
  void face(const Reach& keys) {
    all = !(keys.error <= 3e38f && keys.length <= 3e38f);
    for (int lane = 0; lane < kTile; ++lane) {
      const float most = length[lane] * keys.error + error[lane] * (keys.length + keys.error);
      const bool known = length[lane] == length[lane];
      const float highest = length[lane] * keys.length;
      margin[lane] = known ? 1.001f * most + 4e-6f * highest + 1e-30f : __builtin_inff();
      all = all || (known && !(margin[lane] <= 1e37f && highest <= 1e38f));
    }
  }

  // Whether the products of bytes say anything.
  bool bounds() const { return !all; }

  // Thresholds found among products of bytes, so that they hold for float32 ones.
  void lower(TileState& state) const {
    for (int lane = 0; lane < kTile; ++lane) state.threshold[lane] -= margin[lane];
  }

  // What of a block may beat its threshold.
  struct Found {
    uint32_t groups = 0, keys = 0;  // with such places, a bit each
    int count = 0;
    int32_t places[kMaxPlaces];
  };

  Found list(const TileState& state, const float* logits) const {
    using Vector = typename Lanes::Vector;
    Found found;
    if (all) {
      found.groups = kAllGroups;
      found.count = kMany + 1;
      return found;
    }
    Vector bound[kVectors], highest[kVectors];
    for (int i = 0; i < kVectors; ++i)
      bound[i] = Lanes::subtract(
          Lanes::load(state.threshold + i * Lanes::kWidth), Lanes::load(margin + i * Lanes::kWidth));
    for (int group = 0; group < kGroups; ++group) {
      load_highest(highest, logits + group * kGroup * kTile);
      found.groups |= uint32_t(Lanes::any_above(highest, bound)) << group;
    }
    if (found.groups) found.count = list_places(logits, found.groups, bound, found.places);
    for (int i = 0; i < found.count; ++i) found.keys |= uint32_t(1) << found.places[i] / kTile;
    return found;
  }

  // Fetches the rows of the keys that were found to L2, a line a call: many at once hold up what comes after them.
  struct Fetch {
    const float* rows;
    int64_t depth, next;
    uint32_t keys;

    void operator()() {
      if (!keys) return;
      __builtin_prefetch(rows + __builtin_ctz(keys) * depth + next, 0, 2);
      next += 16;
      if (next < depth) return;
      next = 0;
      keys &= keys - 1;
    }
  };
  template <class Chunk>
  Fetch fetch(const Found& found, const Chunk& chunk, int64_t key) const {
    return {KeyBlock(chunk.row(key), chunk.depth).keys, chunk.depth, 0, found.keys};
  }

  template <class Chunk>
  void multiply(const Found& found, const Chunk& chunk, int64_t key, const float* queries, float* logits) const {
    if (found.count) multiply(found, KeyBlock(chunk.row(key), chunk.depth), queries, chunk.depth, logits);
  }

 private:
  __attribute__((noinline)) void multiply(
      const Found& found, const KeyBlock& block, const float* queries, int64_t depth, float* logits) const {
    if (found.count > kMany) {
      const QueryTile tile(const_cast<float*>(queries), depth);
      ProductFloat32::block(block.keys, depth, tile.queries, depth, logits, [](int) {});
      return;
    }
    for (int i = 0; i < found.count; ++i) {
      const int place = found.places[i];
      logits[place] = product_of(rows + place % kTile * stride, block.keys + place / kTile * depth, depth);
    }
  }

  static float product_of(const float* a, const float* b, int64_t depth) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int64_t d = 0; d < depth; d += 32) {
      even = _mm512_fmadd_ps(_mm512_loadu_ps(a + d), _mm512_loadu_ps(b + d), even);
      odd = _mm512_fmadd_ps(_mm512_loadu_ps(a + d + 16), _mm512_loadu_ps(b + d + 16), odd);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
  }
};

}  // namespace
}  // namespace dmv_fast
