// The pass over the memory: for one thread's query tiles, chunk of keys by chunk of keys. Wants topk.h and numbers.h
// before it and works with any `Product`, the matrix product of 32 keys by 32 queries (product_*.h):
//   Element        what rows and packed queries hold (float, or bfloat16 as uint16_t)
//   kTogether      neighbouring depths that lie side by side in the packed queries
//   kDepthStep     rows are padded to a multiple of this depth
//   begin, end     what a thread has to do around its work
//   block(rows, stride, queries, depth, logits, between)
//                  logits[32 keys][32 queries]; calls between(0) .. between(kGroups - 1) somewhere on its way, so
//                  that the selection of the block before can hide under the matrix unit's time
#pragma once

namespace dmv_fast {
namespace {

constexpr int kBlock = 32;       // keys of one logits block
constexpr int kGroups = kBlock / kGroup;
constexpr int64_t kChunk = 512;  // keys that stay in the L2 cache while all tiles pass over them

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
    packed_from = needs_packing<Product, Source>(call.depth) ? begin : end - (end - begin) % kBlock;
    if (packed_from < end)
      pack_rows(memory + packed_from * memory_stride, memory_stride, end - packed_from, call.depth, depth, packed);
  }

  template <class Between>
  void multiply(int64_t key, const Element* queries, float* logits, Between&& between) const {
    if (key < packed_from)
      Product::block(
          reinterpret_cast<const Element*>(memory + key * memory_stride), memory_stride, queries, depth, logits, between);
    else
      Product::block(packed + (key - packed_from) * depth, depth, queries, depth, logits, between);
  }
};

// A block's selection: the sums group by group, and which groups hold something to insert once the block is through.
struct Selection {
  TileState& state;
  Running& running;
  const float* logits;
  uint32_t found = 0;

  void group(int g) {
    found |= uint32_t(accumulate(running, logits + g * kGroup * kTile, state.threshold)) << g;
  }
  void finish(int64_t first_key, int k) {
    for (; found; found &= found - 1) {
      const int g = __builtin_ctz(found);
      insert_survivors(state, logits + g * kGroup * kTile, static_cast<int32_t>(first_key + g * kGroup), k);
    }
  }
};

// Takes in one block of logits, `keys` of them real; the others become -inf, which no sum and no list notices.
inline void consume_block(TileState& state, Running& running, float* logits, int64_t first_key, int64_t keys, int k) {
  for (int64_t i = keys * kTile; i < kBlock * kTile; ++i) logits[i] = -__builtin_inff();
  Selection selection{state, running, logits};
  for (int g = 0; g < kGroups; ++g) selection.group(g);
  selection.finish(first_key, k);
}

// The first chunk is multiplied whole before anything is selected: its logits give the first threshold.
template <class Chunk, class Element>
void take_first(const Chunk& chunk, const Element* queries, TileState& state, float* logits, int k) {
  Running running(state);
  for (int64_t key = chunk.begin; key < chunk.end; key += kBlock)
    chunk.multiply(key, queries, logits + (key - chunk.begin) * kTile, [](int) {});
  raise_threshold(state, logits, chunk.end - chunk.begin, k);
  for (int64_t key = chunk.begin; key < chunk.end; key += kBlock)
    consume_block(
        state, running, logits + (key - chunk.begin) * kTile, key, smaller(kBlock, chunk.end - key), k);
  running.store(state);
}

// The others block by block, each selected from while the next is multiplied.
template <class Chunk, class Element>
void take(const Chunk& chunk, const Element* queries, TileState& state, float* logits, int k) {
  Running running(state);
  float *before = logits, *now = logits + kBlock * kTile;
  chunk.multiply(chunk.begin, queries, before, [](int) {});
  int64_t key = chunk.begin;
  for (; key + kBlock < chunk.end; key += kBlock) {
    Selection selection{state, running, before};
    chunk.multiply(key + kBlock, queries, now, [&](int group) { selection.group(group); });
    selection.finish(key, k);
    float* const done = before;
    before = now;
    now = done;
  }
  consume_block(state, running, before, key, chunk.end - key, k);
  running.store(state);
}

template <class Product, class Source>
void retrieve_tiles(const Retrieval& call, int64_t batch, int64_t first, int64_t last, Scratch& scratch) {
  using Element = typename Product::Element;
  const int64_t tiles = last - first, depth = rounded_up(call.depth, Product::kDepthStep);
  const int64_t keys = call.valid ? call.valid[batch] : call.count;

  const int64_t query_bytes = tiles * kTile * depth * sizeof(Element);
  const int64_t row_bytes = (needs_packing<Product, Source>(call.depth) ? kChunk : kBlock) * depth * sizeof(Element);
  const int64_t logit_bytes = kChunk * kTile * sizeof(float);
  char* bytes = scratch.reserve(query_bytes + row_bytes + logit_bytes + tiles * int64_t(sizeof(TileState)));
  Element* const queries = reinterpret_cast<Element*>(bytes);
  Element* const packed = reinterpret_cast<Element*>(bytes += query_bytes);
  float* const logits = reinterpret_cast<float*>(bytes += row_bytes);
  TileState* const states = reinterpret_cast<TileState*>(bytes += logit_bytes);

  const auto* query = reinterpret_cast<const Source*>(call.query) + batch * call.query_batch_stride;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = (first + t) * kTile, present = smaller(kTile, call.queries - row);
    pack_queries<Product::kTogether>(
        query + row * call.query_row_stride, call.query_row_stride, present, call.depth, depth,
        queries + t * kTile * depth);
    states[t].start(call.k, present);
  }

  const auto* memory = reinterpret_cast<const Source*>(call.keys) + batch * call.key_batch_stride;
  Product::begin();
  for (int64_t begin = 0; begin < keys; begin += kChunk) {
    const Chunk<Product, Source> chunk(call, memory, begin, smaller(begin + kChunk, keys), packed);
    for (int64_t t = 0; t < tiles; ++t) {
      if (begin == 0)
        take_first(chunk, queries + t * kTile * depth, states[t], logits, call.k);
      else
        take(chunk, queries + t * kTile * depth, states[t], logits, call.k);
    }
  }
  Product::end();

  for (int64_t row = first * kTile; row < smaller(last * kTile, call.queries); ++row) {
    const int64_t place = (batch * call.queries + row) * call.k;
    write_results(states[row / kTile - first], row % kTile, call.k, call.scores + place, call.indices + place);
  }
}

}  // namespace
}  // namespace dmv_fast
