#include "cpu_isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>

#if defined(DMV_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dmv_fast {
namespace {

#ifdef DMV_AMX_EMULATED  // tests/amx_emulation
constexpr bool kAmxEmulated = true;
#else
constexpr bool kAmxEmulated = false;
#endif

// Linux hands the 8 KB of tile registers only to a process that asks; the answer holds for all its threads.
bool amx_granted() {
#if defined(DMV_X86) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

#ifdef DMV_X86
bool has_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  unsigned eax = 7, ebx, ecx = 0, edx;  // leaf 7: the compiler's own list does not know the tiles before GCC 13
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return (~edx & (kBf16 | kTile | kInt8)) == 0;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt");
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_avx2();
}
#endif

bool detect(Isa isa) {
#ifdef DMV_X86
  __builtin_cpu_init();
  switch (isa) {
    case Isa::amx:
      return detect(Isa::avx512_bf16) && __builtin_cpu_supports("avx512vnni") &&
          (kAmxEmulated || (has_amx() && amx_granted()));
    case Isa::avx512_bf16: return has_avx512() && __builtin_cpu_supports("avx512bf16");
    case Isa::avx512: return has_avx512();
    case Isa::avx2: return has_avx2();
    case Isa::generic: return true;
  }
#endif
  return isa == Isa::generic;
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::amx: return "amx";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::generic: break;
  }
  return "generic";
}

bool runs_here(Isa isa) {
  static const bool runs[] = {
      detect(Isa::generic), detect(Isa::avx2), detect(Isa::avx512), detect(Isa::avx512_bf16), detect(Isa::amx)};
  return runs[static_cast<int>(isa)];
}

bool has_vnni() {
#ifdef DMV_X86
  static const bool has = runs_here(Isa::avx512) && __builtin_cpu_supports("avx512vnni");
  return has;
#else
  return false;
#endif
}

// Intel's processors take two and a half cycles for what one of AMD's does in one: there the float32 product of
// widened numbers is the faster (256 x 8192 x 256 on one core of a Xeon: 6.8 ms against 12.0).
const Isa* by_preference() {
  static constexpr Isa kIntel[] = {Isa::amx, Isa::avx512, Isa::avx512_bf16, Isa::avx2, Isa::generic};
  static constexpr Isa kOthers[] = {Isa::amx, Isa::avx512_bf16, Isa::avx512, Isa::avx2, Isa::generic};
#ifdef DMV_X86
  static const bool intel = __builtin_cpu_is("intel");
  return intel ? kIntel : kOthers;
#else
  return kOthers;
#endif
}

Isa chosen_isa() {
  const char* wanted = std::getenv("DMV_FAST_CPU_ISA");
  for (int i = 0; i < kIsas; ++i) {
    const Isa isa = by_preference()[i];
    if (wanted && *wanted ? std::strcmp(wanted, name_of(isa)) == 0 : runs_here(isa)) {
      STD_TORCH_CHECK(runs_here(isa), "DMV_FAST_CPU_ISA: ", wanted, " does not run on this processor");
      return isa;
    }
  }
  STD_TORCH_CHECK(
      false, "DMV_FAST_CPU_ISA: ", wanted, " is unknown, it must be amx, avx512_bf16, avx512, avx2 or generic");
}

bool allowed(Isa isa) {
  const char* wanted = std::getenv("DMV_FAST_CPU_ISA");
  return (!wanted || !*wanted || chosen_isa() >= isa) && runs_here(isa);
}

}  // namespace dmv_fast
