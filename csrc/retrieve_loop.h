// The pass over the memory: for one thread's query tiles, chunk of keys by chunk of keys. Wants topk.h and numbers.h
// before it and works with any `Product`, the matrix product of 32 keys by 32 queries (product_*.h):
//   Element        what rows and packed queries hold (float, or bfloat16 as uint16_t)
//   kTogether      neighbouring depths that lie side by side in the packed queries
//   kDepthStep     rows are padded to a multiple of this depth
//   begin, end     what a thread has to do around its work
//   block(rows, stride, queries, depth, logits, between)
//                  logits[32 keys][32 queries]; calls between(0) .. between(kGroups - 1) somewhere on its way, so
//                  that the selection of the block before can hide under the matrix unit's time; for a Screen it calls
//                  between(0) at every step
// The product may be a rough one where a `Screen` (screen_int8.h) knows how far off it is at most, and makes exact
// what may be among the best.
#pragma once

namespace dmv_fast {
namespace {

constexpr int kGroups = kBlock / kGroup;
constexpr uint32_t kAllGroups = (uint32_t(1) << kGroups) - 1;
constexpr int64_t kMaxChunk = 1024;          // keys that stay in the L2 cache while all tiles pass over them:
constexpr int64_t kChunkBytes = 512 * 1024;  // as many as fill this

// [keys][depth] -> [keys padded to whole blocks][padded depth], zero where there is nothing.
template <class Source, class Element>
void pack_rows(const Source* from, int64_t stride, int64_t keys, int64_t depth, int64_t padded, Element* to) {
  for (int64_t key = 0; key < keys; ++key, from += stride, to += padded) {
    for (int64_t d = 0; d < depth; ++d) convert(to[d], from[d]);
    for (int64_t d = depth; d < padded; ++d) to[d] = 0;
  }
  const int64_t missing = (kBlock - keys % kBlock) % kBlock;
  __builtin_memset(to, 0, missing * padded * sizeof(Element));
}

// [queries][depth] -> [padded depth / together][kTile][together], zero where there is nothing.
template <int together, class Source, class Element>
void pack_queries(const Source* from, int64_t stride, int64_t queries, int64_t depth, int64_t padded, Element* to) {
  if (queries < kTile || depth < padded) __builtin_memset(to, 0, kTile * padded * sizeof(Element));
  const int64_t whole = depth / together * together;
  for (int64_t d = 0; d < whole; d += together)
    for (int64_t query = 0; query < queries; ++query)
      for (int j = 0; j < together; ++j) convert(to[d * kTile + query * together + j], from[query * stride + d + j]);
  for (int64_t d = whole; d < depth; ++d)
    for (int64_t query = 0; query < queries; ++query)
      convert(to[whole * kTile + query * together + d - whole], from[query * stride + d]);
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Whether rows cannot be multiplied where they lie: they have to be widened, or padded in depth.
template <class Product, class Source>
bool needs_packing(int64_t depth) {
  return sizeof(Source) != sizeof(typename Product::Element) || depth % Product::kDepthStep != 0;
}

// How queries are laid out for a product: so many numbers each, rows of which a product may want packed otherwise.
template <class Product>
struct QueryPacking {
  static int64_t numbers(int64_t padded) { return padded; }

  template <class Source>
  static void run(
      const Source* from, int64_t stride, int64_t queries, int64_t depth, int64_t padded,
      typename Product::Element* to) {
    pack_queries<Product::kTogether>(from, stride, queries, depth, padded, to);
  }
};

// Whether the memory has room for whole blocks, so that the last one is read where it lies, with anything behind its end.
template <class Product>
constexpr bool kWholeBlocks = false;

// Keys begin..end, read where they lie; what needs packing, or is no whole block, is packed first.
template <class Product, class Source>
struct Chunk {
  using Element = typename Product::Element;
  const Source* memory;
  int64_t memory_stride;
  Element* packed;
  int64_t depth, begin, end, packed_from;

  Chunk(const Retrieval& call, const Source* memory, int64_t begin, int64_t end, Element* packed)
      : memory(memory), memory_stride(call.key_row_stride), packed(packed), begin(begin), end(end) {
    depth = rounded_up(call.depth, Product::kDepthStep);
    const int64_t partial = kWholeBlocks<Product> ? 0 : (end - begin) % kBlock;
    packed_from = needs_packing<Product, Source>(call.depth) ? begin : end - partial;
    if (packed_from < end)
      pack_rows(memory + packed_from * memory_stride, memory_stride, end - packed_from, call.depth, depth, packed);
  }

  const Element* row(int64_t key) const {
    return key < packed_from ? reinterpret_cast<const Element*>(memory + key * memory_stride)
                             : packed + (key - packed_from) * depth;
  }
  int64_t stride(int64_t key) const { return key < packed_from ? memory_stride : depth; }

  template <class Between>
  void multiply(int64_t key, const Element* queries, float* logits, Between&& between) const {
    Product::block(row(key), stride(key), queries, depth, logits, between);
  }
};

// The screen of a product that is exact.
struct NoScreen {
  static constexpr bool kSums = true;  // every logit enters its query's sum
  struct Reach {
    template <class Chunk>
    explicit Reach(const Chunk&) {}
  };
  template <class Source, class Element>
  void start(const Source*, int64_t, int64_t, Element*, TileState&) {}
  void face(Reach) {}
  bool bounds() const { return true; }
  void lower(TileState&) const {}
  struct Found {
    uint32_t groups = kAllGroups;
  };
  Found list(const TileState&, const float*) const { return {}; }
  template <class Chunk, class Element>
  void multiply(Found, const Chunk&, int64_t, const Element*, float*) const {}
};

// One tile's pass over one chunk: the product of a block of keys is made while the block before is selected from.
template <class Chunk, class Element, class Screen>
struct Pass {
  const Chunk& chunk;
  const Element* queries;
  const Screen& screen;
  TileState& state;
  Pending& pending;
  float* logits;  // [keys of a chunk][kTile]
  int k;
  Running running{state};

  // The first chunk is multiplied whole before anything is selected: its logits give the first threshold.
  void first() {
    for (int64_t key = chunk.begin; key < chunk.end; key += kBlock)
      chunk.multiply(key, queries, logits + (key - chunk.begin) * kTile, [](int) {});
    if (screen.bounds()) {
      raise_threshold(state, logits, chunk.end - chunk.begin, k);
      screen.lower(state);
    }
    running.load_threshold(state);
    for (int64_t key = chunk.begin; key < chunk.end; key += kBlock) {
      float* const block = logits + (key - chunk.begin) * kTile;
      select(block, key, refine(block, key));
    }
    finish();
  }

  void later() {
    if constexpr (Screen::kSums)
      later_hidden();
    else
      later_screened();
  }

 private:
  void later_hidden() {
    float *before = logits, *now = logits + kBlock * kTile;
    chunk.multiply(chunk.begin, queries, before, [](int) {});
    cut_off(before, chunk.begin);
    int64_t key = chunk.begin;
    for (; key + kBlock < chunk.end; key += kBlock) {
      uint32_t found = 0;
      chunk.multiply(key + kBlock, queries, now, [&](int group) { found |= select_group(before, group); });
      note(before, key, found);
      cut_off(now, key + kBlock);
      float* const done = before;
      before = now;
      now = done;
    }
    select(before, key, kAllGroups);
    finish();
  }
  // What may be among the best is fetched while the next block is multiplied, and made exact afterwards.
  void later_screened() {
    float *now = logits, *next = logits + kBlock * kTile;
    chunk.multiply(chunk.begin, queries, now, [](int) {});
    for (int64_t key = chunk.begin; key < chunk.end; key += kBlock) {
      cut_off(now, key);
      const auto found = screen.list(state, now);
      if (key + kBlock < chunk.end) {
        auto fetch = screen.fetch(found, chunk, key);
        chunk.multiply(key + kBlock, queries, next, [&](int) { fetch(); });
      }
      screen.multiply(found, chunk, key, queries, now);
      select(now, key, found.groups);
      float* const done = now;
      now = next;
      next = done;
    }
    finish();
  }
  // Makes exact what may be among the best, and says in which groups that is.
  uint32_t refine(float* block, int64_t key) {
    cut_off(block, key);
    const auto found = screen.list(state, block);
    screen.multiply(found, chunk, key, queries, block);
    return found.groups;
  }
  uint32_t select_group(const float* block, int group) {
    const float* const logits = block + group * kGroup * kTile;
    const bool sums = Screen::kSums || !screen.bounds();
    return uint32_t(sums ? accumulate(running, logits) : beats(running, logits)) << group;
  }
  void note(const float* block, int64_t key, uint32_t found) {
    if (!found) return;
    append(state, pending, block, found, static_cast<int32_t>(key), k);
    running.load_threshold(state);
  }
  // Past the chunk's last key logits become -inf, which no screen, no sum and no list notices.
  void cut_off(float* block, int64_t key) {
    for (int64_t i = (chunk.end - key) * kTile; i < kBlock * kTile; ++i) block[i] = -__builtin_inff();
  }
  void select(float* block, int64_t key, uint32_t groups) {
    if (!groups) return;
    cut_off(block, key);  // once more: a screen may have multiplied the block anew
    uint32_t found = 0;
    for (; groups; groups &= groups - 1) found |= select_group(block, __builtin_ctz(groups));
    note(block, key, found);
  }
  void finish() {
    insert_pending(state, pending, k);
    running.store(state);
  }
};

template <class Product, class Source, class Screen = NoScreen>
void retrieve_tiles(const Retrieval& call, int64_t batch, int64_t first, int64_t last, Scratch& scratch) {
  using Element = typename Product::Element;
  const int64_t tiles = last - first, depth = rounded_up(call.depth, Product::kDepthStep);
  const int64_t keys = call.valid ? call.valid[batch] : call.count;

  const int64_t tile_numbers = kTile * QueryPacking<Product>::numbers(depth);
  const int64_t query_bytes = tiles * tile_numbers * sizeof(Element);
  const int64_t chunk_keys = smaller(kMaxChunk, kChunkBytes / (depth * sizeof(Element)) / kBlock * kBlock);
  const int64_t packed_keys = needs_packing<Product, Source>(call.depth) ? chunk_keys : kBlock;
  const int64_t row_bytes = packed_keys * depth * sizeof(Element);
  const int64_t logit_bytes = chunk_keys * kTile * sizeof(float);
  const int64_t tile_bytes = sizeof(TileState) + sizeof(Screen);
  char* bytes = scratch.reserve(query_bytes + row_bytes + logit_bytes + sizeof(Pending) + tiles * tile_bytes);
  Element* const queries = reinterpret_cast<Element*>(bytes);
  Element* const packed = reinterpret_cast<Element*>(bytes += query_bytes);
  float* const logits = reinterpret_cast<float*>(bytes += row_bytes);
  Pending& pending = *reinterpret_cast<Pending*>(bytes += logit_bytes);
  TileState* const states = reinterpret_cast<TileState*>(bytes += sizeof(Pending));
  Screen* const screens = reinterpret_cast<Screen*>(bytes += tiles * sizeof(TileState));
  __builtin_memset(pending.count, 0, sizeof pending.count);

  const auto* query = reinterpret_cast<const Source*>(call.query) + batch * call.query_batch_stride;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = (first + t) * kTile, present = smaller(kTile, call.queries - row);
    const Source* const first_row = query + row * call.query_row_stride;
    Element* const packed_tile = queries + t * tile_numbers;
    QueryPacking<Product>::run(first_row, call.query_row_stride, present, call.depth, depth, packed_tile);
    states[t].start(call.k, present);
    screens[t].start(first_row, call.query_row_stride, depth, packed_tile, states[t]);
  }

  const auto* memory = reinterpret_cast<const Source*>(call.keys) + batch * call.key_batch_stride;
  Product::begin();
  for (int64_t begin = 0; begin < keys; begin += chunk_keys) {
    const Chunk<Product, Source> chunk(call, memory, begin, smaller(begin + chunk_keys, keys), packed);
    const typename Screen::Reach reach(chunk);
    for (int64_t t = 0; t < tiles; ++t) {
      screens[t].face(reach);
      Pass<Chunk<Product, Source>, Element, Screen> pass{
          chunk, queries + t * tile_numbers, screens[t], states[t], pending, logits, call.k};
      if (begin == 0)
        pass.first();
      else
        pass.later();
    }
  }
  Product::end();

  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = (first + t) * kTile, place = (batch * call.queries + row) * call.k;
    if (!Screen::kSums) sum_best(states[t], call.k);
    write_results(states[t], smaller(kTile, call.queries - row), call.k, call.scores + place, call.indices + place);
  }
}

}  // namespace
}  // namespace dmv_fast
