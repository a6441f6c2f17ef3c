// A CUDA block on one CPU thread, for running csrc/*.cuh without a GPU: every CUDA thread is a fibre that
// runs until it waits for its warp or block. Just what those kernels use is here, and only full warps.
//
// Made to fail where hardware may: an asynchronous copy ruins its target at once and lands when it is waited
// for; shared memory starts as NaN; a warp runs as far ahead of the others as barriers let it, and the order
// of warps and lanes can be turned round. A wait that not all can leave, or that lanes enter at different
// calls, ends the program. Under -fsanitize=thread a fibre counts as a thread, and only __syncthreads and
// __syncwarp order memory; under -fsanitize=address shared memory ends where the launch said.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// For the emulator's own bookkeeping: no part of the program under test.
#define DMV_UNSEEN __attribute__((no_sanitize("thread"), noinline))

struct float2 {
  float x, y;
};
struct __align__(16) float4 {
  float x, y, z, w;
};

namespace emulation {

constexpr int kMaxThreads = 128, kStackBytes = 256 << 10, kMaxShared = 232448;

struct Index {
  unsigned x;
};

struct Copy {
  uint32_t* target;
  const uint32_t* source;
  bool there;
};

struct Fibre {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* tsan = nullptr;
  const unsigned* watched = nullptr;  // may run on once this counter is not `until`
  unsigned until = 0;
  bool done = true;
  std::vector<std::vector<Copy>> groups;  // of asynchronous copies under way; the last one is open
};

struct Meeting {  // of a warp or a block
  unsigned arrived = 0, times = 0;
  const void* call = nullptr;
  float slots[2][32][12];  // by turns: nobody is more than one meeting ahead
  char order[2];           // addresses that stand for the happens-before of a barrier
};

inline Fibre fibres[kMaxThreads], host;
inline Meeting warps[kMaxThreads / 32], block;
inline Index thread_index, block_index, block_dim;
inline bool backwards = false;
inline int64_t bits_found = 0;  // calls of __ffs: the first kernel's are the logits that pass the filter
inline const std::function<void()>* kernel = nullptr;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulation: %s (block %u, thread %u)\n", why, block_index.x, thread_index.x);
  std::_Exit(3);
}

// Saves the registers that a call keeps and goes on with another stack.
extern "C" void emulation_switch(void** save, void* load);
#if !defined(__x86_64__)
#error "the emulation switches stacks on x86-64 only"
#endif
asm(R"(
.text
.globl emulation_switch
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

DMV_UNSEEN inline void go_to(Fibre& from, Fibre& to) {
  if (&to != &host) thread_index.x = static_cast<unsigned>(&to - fibres);
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  emulation_switch(&from.stack_pointer, to.stack_pointer);
}

// The next one that can run: of the own warp if possible.
DMV_UNSEEN inline Fibre& next_fibre() {
  const unsigned here = thread_index.x, count = block_dim.x;
  bool all_done = true;
  for (unsigned i = 1; i <= count + 32; ++i) {
    unsigned thread;
    if (i <= 32)
      thread = here / 32 * 32 + (backwards ? here + 32 - i : here + i) % 32;
    else
      thread = backwards ? count - 1 - (i - 33) : i - 33;
    Fibre& fibre = fibres[thread];
    if (fibre.done) continue;
    if (!fibre.watched || *fibre.watched != fibre.until) return fibre;
    all_done = false;
  }
  if (!all_done) fail("threads wait for others that ended, or wait elsewhere");
  return host;
}

DMV_UNSEEN inline void wait(const unsigned& counter, unsigned until) {
  Fibre& self = fibres[thread_index.x];
  self.watched = &counter;
  self.until = until;
  Fibre& next = next_fibre();
  if (&next != &self) go_to(self, next);
}

inline void happens_before(void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(address);
#endif
}

inline void happens_after(void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(address);
#endif
}

// All `count` threads come here before any goes on. Returns which of the two slot sets this meeting used.
DMV_UNSEEN inline unsigned meet(Meeting& meeting, unsigned count, const void* call, bool orders_memory) {
  const unsigned time = meeting.times, turn = time % 2;
  if (meeting.arrived == 0) meeting.call = call;
  if (meeting.call != call) fail("lanes of a warp meet in different calls");
  if (orders_memory) happens_before(&meeting.order[turn]);
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.times;
  } else {
    wait(meeting.times, time);
  }
  if (orders_memory) happens_after(&meeting.order[turn]);
  return turn;
}

// Every lane brings `n` numbers and sees all lanes'.
DMV_UNSEEN inline const float (&exchange(const float* mine, int n, const void* call))[32][12] {
  Meeting& warp = warps[thread_index.x / 32];
  for (int i = 0; i < n; ++i) warp.slots[warp.times % 2][thread_index.x % 32][i] = mine[i];
  return warp.slots[meet(warp, 32, call, false)];
}

template <class T>
T from_lane(T mine, unsigned lane, const void* call) {
  const float bits = std::bit_cast<float>(mine);
  return std::bit_cast<T>(exchange(&bits, 1, call)[lane % 32][0]);
}

DMV_UNSEEN inline void enter_fibre() {
  happens_after(&host.tsan);  // what the launch prepared, and all blocks before
  (*kernel)();
  Fibre& self = fibres[thread_index.x];
  self.done = true;
  for (const auto& group : self.groups)
    if (!group.empty()) fail("a copy that nobody waited for");
  happens_before(&host.tsan);
  go_to(self, next_fibre());
}

DMV_UNSEEN inline void prepare(Fibre& fibre) {
  if (!fibre.stack) fibre.stack = static_cast<char*>(std::aligned_alloc(4096, kStackBytes));
  void** top =
      reinterpret_cast<void**>(fibre.stack + kStackBytes) - 1;  // 8 off a multiple of 16, as at a call
  *--top = reinterpret_cast<void*>(&enter_fibre);
  fibre.stack_pointer = top - 6;
  fibre.watched = nullptr;
  fibre.done = false;
  fibre.groups.assign(1, {});
#if defined(__SANITIZE_THREAD__)
  if (!host.tsan) host.tsan = __tsan_get_current_fiber();
  if (!fibre.tsan) fibre.tsan = __tsan_create_fiber(0);
#endif
}

// kernel<<<blocks, threads, shared_bytes>>>()
DMV_UNSEEN inline void launch(unsigned blocks, unsigned threads, char* shared, int shared_bytes,
                              const std::function<void()>& body) {
  if (threads > kMaxThreads || threads % 32 != 0 || shared_bytes > kMaxShared) fail("launch out of range");
  kernel = &body;
  block_dim.x = threads;
  for (block_index.x = 0; block_index.x < blocks; ++block_index.x) {
    std::fill(shared, shared + shared_bytes, '\xff');
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(shared + shared_bytes, kMaxShared - shared_bytes);
#endif
    for (unsigned i = 0; i < threads; ++i) prepare(fibres[i]);
    thread_index.x = backwards ? threads - 1 : 0;
    happens_before(&host.tsan);
    go_to(host, fibres[thread_index.x]);
    happens_after(&host.tsan);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(shared, kMaxShared);
#endif
  }
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_dim

// ---- CUDA C++
// ------------------------------------------------------------------------------------------------------

inline int min(int a, int b) {
  return a < b ? a : b;
}
inline int max(int a, int b) {
  return a > b ? a : b;
}
DMV_UNSEEN inline int __ffs(int x) {
  ++emulation::bits_found;
  return __builtin_ffs(x);
}
inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}

inline void __syncthreads() {
  emulation::meet(emulation::block, blockDim.x, reinterpret_cast<void*>(&__syncthreads), true);
}
inline void __syncwarp() {
  emulation::meet(emulation::warps[threadIdx.x / 32], 32, reinterpret_cast<void*>(&__syncwarp), true);
}

#define DMV_CALL reinterpret_cast<const void*>(__PRETTY_FUNCTION__)

template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return emulation::from_lane(x, lane, DMV_CALL);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulation::from_lane(x, threadIdx.x ^ mask, DMV_CALL);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const float mine = vote;
  const auto& votes = emulation::exchange(&mine, 1, DMV_CALL);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= (votes[lane][0] != 0.0f ? 1u : 0u) << lane;
  return bits;
}
inline bool __any_sync(unsigned mask, bool vote) {
  return __ballot_sync(mask, vote) != 0;
}
template <class T, class Better>
T reduce(T x, Better better, const void* call) {
  const float mine = std::bit_cast<float>(x);
  const auto& all = emulation::exchange(&mine, 1, call);
  for (int lane = 0; lane < 32; ++lane) x = better(x, std::bit_cast<T>(all[lane][0]));
  return x;
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
  return reduce(x, [](unsigned a, unsigned b) { return std::max(a, b); }, DMV_CALL);
}
inline int __reduce_min_sync(unsigned, int x) {
  return reduce(x, [](int a, int b) { return std::min(a, b); }, DMV_CALL);
}

// ---- csrc/mma_sm80.cuh
// ---------------------------------------------------------------------------------------------

namespace dmv_fast::gpu {

inline void copy_async(void* target, const void* source, bool there) {
  if (reinterpret_cast<uintptr_t>(target) % 16 != 0) emulation::fail("copy_async: target is not aligned");
  if (there && reinterpret_cast<uintptr_t>(source) % 16 != 0)
    emulation::fail("copy_async: source is not aligned");
  const auto to = static_cast<uint32_t*>(target);
  for (int i = 0; i < 4; ++i) to[i] = 0xffffffff;
  emulation::fibres[threadIdx.x].groups.back().push_back({to, static_cast<const uint32_t*>(source), there});
}

inline void commit_copies() {
  emulation::fibres[threadIdx.x].groups.emplace_back();
}

template <int kPending>
void wait_for_copies() {
  auto& groups = emulation::fibres[threadIdx.x].groups;
  while (groups.size() > kPending + 1) {
    for (const emulation::Copy& copy : groups.front())
      for (int i = 0; i < 4; ++i) copy.target[i] = copy.there ? copy.source[i] : 0;
    groups.erase(groups.begin());
  }
}

inline void load_matrices(uint32_t (&fragment)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::fail("load_matrices: row is not aligned");
  float words[4];
  for (int i = 0; i < 4; ++i) words[i] = std::bit_cast<float>(static_cast<const uint32_t*>(row)[i]);
  const auto& rows = emulation::exchange(words, 4, DMV_CALL);
  const unsigned lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) fragment[i] = std::bit_cast<uint32_t>(rows[8 * i + lane / 4][lane % 4]);
}

inline float to_float(BFloat16 x) {
  return std::bit_cast<float>(uint32_t(x.bits) << 16);
}

inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31,
                 fraction = x.bits & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | fraction << 13);
  if (exponent != 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
  return std::copysign(std::ldexp(float(fraction), -24), std::bit_cast<float>(sign | 0x3f800000));
}

// Element (i, j) of a: row i, column j, in lane i % 8 * 4 + j / 2 % 4; of b: row j, column i, likewise.
template <class Element>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Element) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  float mine[12];
  for (int i = 0; i < 12; ++i) mine[i] = to_float(Element{static_cast<uint16_t>(words[i / 2] >> i % 2 * 16)});
  const auto& lanes = emulation::exchange(mine, 12, DMV_CALL);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int low_rows = i / 2, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int pair = k / 2 % 4, half = k / 8;
      const float row_element = lanes[lane / 4 * 4 + pair][(half * 2 + low_rows) * 2 + k % 2];
      const float column_element = lanes[column * 4 + pair][8 + half * 2 + k % 2];
      sum[i] += row_element * column_element;
    }
  }
}

inline float power_of_two(float x) {
  const float power = std::exp2(x);
  return power < 1.17549435e-38f ? 0.0f : power;  // the instruction flushes; NaN stays
}

}  // namespace dmv_fast::gpu
