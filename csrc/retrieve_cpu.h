// Retrieval on the CPU: what the launcher (retrieve_cpu.cpp) and the kernels of each instruction set share.
#pragma once

#include <cstdint>

#include "cpu_isa.h"

namespace dmv_fast {

constexpr int kMaxK = 32;
constexpr int64_t kMaxDepth = 512;
constexpr int kTile = 32;       // queries side by side: a logits block is [keys][kTile], one SIMD lane a query
constexpr int kMaxTiles = 16;   // tiles that share one pass over the keys; bounds a thread's scratch

enum class Dtype { float32, bfloat16, float16 };

// One call. Strides are in elements; rows (the depth axis) are contiguous.
struct Retrieval {
  const char* query;  // [batch][queries][depth]
  const char* keys;   // [batch][count][depth]
  int64_t queries, count, depth;
  int64_t query_batch_stride, query_row_stride, key_batch_stride, key_row_stride;
  const int32_t* valid;  // [batch] or null
  int k;
  float* scores;     // [batch][queries][k]
  int32_t* indices;  // [batch][queries][k]
};

// Streams all keys past query tiles first..last (last - first <= kMaxTiles) of one batch item. `scratch` grows to
// what is needed, belongs to the calling thread and is kept for its next call.
struct Scratch;
using RetrieveTiles = void (*)(const Retrieval& call, int64_t batch, int64_t first, int64_t last, Scratch& scratch);

RetrieveTiles generic_kernel(Dtype dtype);
RetrieveTiles avx2_kernel(Dtype dtype);
RetrieveTiles avx512_kernel(Dtype dtype);
RetrieveTiles avx512_bf16_kernel();  // bfloat16 only; the rest is avx512's
RetrieveTiles amx_kernel();
// Of float32 queries, and of keys in bytes and in float32.
RetrieveTiles amx_screened_kernel();
RetrieveTiles avx512_vnni_screened_kernel();

// Cache-line aligned bytes, at most 4 MB a thread. Growing may fail; that throws std::bad_alloc.
struct Scratch {
  char* bytes = nullptr;
  int64_t size = 0;
  char* reserve(int64_t wanted);
  ~Scratch();
};

}  // namespace dmv_fast
