// Retrieval on CUDA: the k highest columns of softmax([0, q.k1 .. q.kN]) for every query (paper section 3.2).
//
// A block keeps up to 128 query rows in shared memory and streams the keys of its split past them: warps of
// 32 rows, tiles of 128 keys, a tile in chunks of 128 bytes a key through a pipeline of asynchronous copies.
// Each tile's logits stay in registers for the selection (retrieve_select.cuh). Every split leaves k sorted
// candidates and a log-sum-exp a row, and the merge kernel (retrieve_merge.cuh) combines those that the valid
// keys reach. One source for sm_80 to sm_120; a path for Hopper's own instructions (TMA, wgmma) waits for a
// Hopper to measure it on.
#pragma once

#include "retrieve_plan.h"
#include "retrieve_select.cuh"

namespace dmv_fast::gpu {

__device__ inline int valid_keys(const Call& call, int batch) {
  return call.valid ? min(max(call.valid[batch], 0), call.count) : call.count;
}

// Where 16-byte unit `unit` (0..7) of row `row` lies in a chunk: exchanged within the row so that 8 rows'
// units of one column are in different banks.
__device__ inline int place_of(int row, int unit) {
  return row * kRowBytes + ((unit ^ (row & 7)) << 4);
}

// The warp starts copying one chunk, columns `column` up to column + kRowBytes / sizeof(Element), of 32 rows.
// Zeros stand for what is beyond row `there` or column `depth`.
template <class Element>
__device__ void copy_chunk(char* target, const Element* source, const Matrix& matrix, int there, int column,
                           int depth, int lane) {
  constexpr int kUnit = 16 / sizeof(Element);
  const int row = lane / 8, unit = lane % 8;
  const int elements = depth - column - unit * kUnit;  // of the lane's unit, if it is positive
  const int rows = elements > 0 ? there - row : 0;
  const Element* const from = source + row * matrix.row_stride + column + unit * kUnit;
  const int place = place_of(row, unit);
  if (matrix.aligned) {
#pragma unroll
    for (int i = 0; i < 32; i += 4)  // bit 2 of the row flips bit 2 of the unit's place
      copy_async(target + i * kRowBytes + (place ^ i % 8 * 16), from + i * matrix.row_stride, i < rows);
  } else {
    for (int i = 0; i < 32; i += 4) {
      Element* const to = reinterpret_cast<Element*>(target + i * kRowBytes + (place ^ i % 8 * 16));
      for (int e = 0; e < kUnit; ++e)
        to[e] = i < rows && e < elements ? from[i * matrix.row_stride + e] : Element{};
    }
  }
}

// tile += query chunk * key chunk^T; `query` is the warp's own 32 rows.
template <class Element, int kColumns>
__device__ void multiply(LogitTile<kColumns>& tile, const char* query, const char* keys, int lane) {
  const int query_place = place_of(lane % 16, lane / 16);
  const int key_place = place_of(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int step = 0; step < 4; ++step) {  // 16 columns of the depth, two units: the exclusive or reaches them
    uint32_t rows[2][4];
    load_matrices(rows[0], query + (query_place ^ step * 32));
    load_matrices(rows[1], query + 16 * kRowBytes + (query_place ^ step * 32));
#pragma unroll
    for (int pair = 0; pair < kColumns / 16; ++pair) {
      uint32_t columns[4];
      load_matrices(columns, keys + pair * 16 * kRowBytes + (key_place ^ step * 32));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply_add(tile.value[half][2 * pair], rows[half], columns[0], columns[1], Element{});
        multiply_add(tile.value[half][2 * pair + 1], rows[half], columns[2], columns[3], Element{});
      }
    }
  }
}

// The same in float32, on the ordinary units: tensor cores would round the inputs.
template <>
__device__ inline void multiply<float, 64>(LogitTile<64>& tile, const char* query, const char* keys,
                                           int lane) {
#pragma unroll 1
  for (int unit = 0; unit < 8; ++unit) {
    float4 row[4];
#pragma unroll
    for (int r = 0; r < 4; ++r)
      row[r] = *reinterpret_cast<const float4*>(query + place_of(8 * r + lane / 4, unit));
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int column = LogitTile<64>::column(i / 8, i % 8, lane);
      const float4 key = *reinterpret_cast<const float4*>(keys + place_of(column, unit));
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float& sum = tile.at(r, i / 8, i % 8);
        sum = fmaf(row[r].x, key.x, sum);
        sum = fmaf(row[r].y, key.y, sum);
        sum = fmaf(row[r].z, key.z, sum);
        sum = fmaf(row[r].w, key.w, sum);
      }
    }
  }
}

// Until all but the latest `stages` - 2 groups of copies are there.
__device__ inline void wait_for_stage(int stages) {
  if (stages == 2)
    wait_for_copies<0>();
  else if (stages == 3)
    wait_for_copies<1>();
  else
    wait_for_copies<2>();
}

// Grid: row tiles fastest, so that blocks which read the same keys run together, then splits, then batches.
template <class Element>
__global__ void __launch_bounds__(32 * kMaxWarps<sizeof(Element)>, 2) retrieve_split(const Call call) {
  constexpr int kColumns = kTileKeys<sizeof(Element)>;
  constexpr int kChunk = kRowBytes / sizeof(Element);  // columns of the depth that a stage holds
  extern __shared__ __align__(128) char shared[];
  const Plan& plan = call.plan;
  const int row_tile = blockIdx.x % plan.row_tiles, split = blockIdx.x / plan.row_tiles % plan.splits;
  const int batch = blockIdx.x / plan.row_tiles / plan.splits;
  const int begin = split * plan.split_keys, end = min(begin + plan.split_keys, valid_keys(call, batch));
  if (begin >= end) return;

  const int rows = blockDim.x;  // 32 a warp
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = row_tile * rows + warp * 32, rows_there = call.queries - first_row;  // the warp's own
  const int chunks = (call.depth + kChunk - 1) / kChunk;
  const auto* const query = static_cast<const Element*>(call.query.data) + batch * call.query.batch_stride +
                            first_row * call.query.row_stride;
  const auto* const keys = static_cast<const Element*>(call.keys.data) + batch * call.keys.batch_stride;

  char* const query_chunks = shared;                                  // [chunks][rows][kRowBytes]
  char* const key_stages = query_chunks + chunks * rows * kRowBytes;  // [stages][kColumns][kRowBytes]
  char* const lists = key_stages + plan.stages * kColumns * kRowBytes + warp * call.k * 256;
  Selection<kColumns> selection(lane, rows_there, reinterpret_cast<float*>(lists),
                                reinterpret_cast<int*>(lists + call.k * 128), call.k);

  // What comes next into the pipeline. The query's chunks travel beside the first tile's.
  int next_tile = begin, next_chunk = 0, next_stage = 0;
  const auto copy_next = [&] {
    if (next_tile < end) {
      const int column = next_chunk * kChunk;
      if (next_tile == begin)
        copy_chunk(query_chunks + (next_chunk * rows + warp * 32) * kRowBytes, query, call.query, rows_there,
                   column, call.depth, lane);
      for (int key = warp * 32; key < kColumns; key += rows)
        copy_chunk(key_stages + (next_stage * kColumns + key) * kRowBytes,
                   keys + (next_tile + key) * call.keys.row_stride, call.keys, end - next_tile - key, column,
                   call.depth, lane);
      if (++next_chunk == chunks) {
        next_chunk = 0;
        next_tile += kColumns;
      }
      if (++next_stage == plan.stages) next_stage = 0;
    }
    commit_copies();
  };
  for (int stage = 1; stage < plan.stages; ++stage) copy_next();

  int stage = 0;
  for (int tile = begin; tile < end; tile += kColumns) {
    LogitTile<kColumns> logits;
    logits.clear();
    char* keys_of_stage = nullptr;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait_for_stage(plan.stages);
      __syncthreads();  // the stage is there for all, and all are done with the one before
      copy_next();      // into that one
      keys_of_stage = key_stages + stage * kColumns * kRowBytes;
      multiply<Element>(logits, query_chunks + (chunk * rows + warp * 32) * kRowBytes, keys_of_stage, lane);
      if (++stage == plan.stages) stage = 0;
    }
    if (end - tile < kColumns) logits.cut(end - tile, lane);
    __syncthreads();  // all are done with the last stage: until the next one it is the warps' to write in
    selection.take(logits, tile, tile == begin, reinterpret_cast<float*>(keys_of_stage + warp * 4096));
  }

  PartSum sum;
  const TopList& list = selection.finish(sum.largest, sum.total);
  const auto part_of = [&](int row) {
    return (static_cast<int64_t>(batch) * call.queries + first_row + row) * plan.splits + split;
  };
  const int sum_row = lane % 4 * 8 + lane / 4;
  if (sum_row < rows_there) call.part_sums[part_of(sum_row)] = sum;
  if (lane < rows_there) {
    for (int place = 0; place < call.k; ++place) {
      call.part_logits[part_of(lane) * call.k + place] = list.logit(place);
      call.part_indices[part_of(lane) * call.k + place] = list.index(place);
    }
  }
}

}  // namespace dmv_fast::gpu
