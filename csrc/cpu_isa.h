// Which instruction sets the CPU kernels use: chosen at run time, one binary for all.
#pragma once

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define DMV_X86 1
#endif

// Everything between DMV_TARGET_BEGIN and DMV_TARGET_END is compiled for the named features. Include nothing but
// this project's own headers there: an inline function of the standard library compiled for AVX-512 could be the
// copy that the linker keeps for everybody.
#define DMV_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define DMV_TARGET_BEGIN(features) DMV_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define DMV_TARGET_END DMV_PRAGMA(clang attribute pop)
#else
#define DMV_TARGET_BEGIN(features) DMV_PRAGMA(GCC push_options) DMV_PRAGMA(GCC target(features))
#define DMV_TARGET_END DMV_PRAGMA(GCC pop_options)
#endif

namespace dmv_fast {

// Each runs wherever a later one does. avx512 has no bfloat16 product: bfloat16 is widened block by block, as on avx2.
enum class Isa { generic, avx2, avx512, avx512_bf16, amx };
constexpr int kIsas = 5;

const char* name_of(Isa isa);
bool runs_here(Isa isa);
const Isa* by_preference();  // all kIsas of them, the fastest first

// The fastest one that runs here, or the one that the environment variable DMV_FAST_CPU_ISA names (read at each
// call; throws where that one is unknown or does not run here).
Isa chosen_isa();

// Whether vpdpbusd runs here, of AVX512_VNNI: nearly all processors with AVX-512 but the first have it.
bool has_vnni();

// Whether a kernel that only one instruction set has may run: it runs here, and DMV_FAST_CPU_ISA names nothing below.
bool allowed(Isa isa);

}  // namespace dmv_fast
