#include "isa.h"

#include "gr_kernels.h"

#ifdef __linux__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gr {

namespace {

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

const char* find_amx() {
#if defined(GR_TILES_EMULATED)
  return amx_self_test() ? "" : "a product on emulated tiles was wrong";
#elif defined(GR_WITHOUT_AMX) || !defined(__linux__)
  return "built without it";
#else
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 22 & 1)) {
    return "the processor has none";
  }
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return "the system saves no registers";
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;
  if ((low & kTileState) != kTileState) return "the system does not save tiles";
  // Linux grants the tiles' registers, 8 KiB in every signal frame, to processes that ask.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return "Linux refuses tiles";
  return amx_self_test() ? "" : "a product on tiles was wrong";
#endif
}

struct Found {
  const Kernels* bfloat16[3] = {};
  const Kernels* float32[3] = {};
  const char* amx_absence = "";

  Found() {
    __builtin_cpu_init();
    int b = 0, f = 0;
    const bool avx512 = has_avx512(), bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    amx_absence = bf16 ? find_amx() : "the processor has none";
#ifndef GR_WITHOUT_AMX
    if (!*amx_absence) bfloat16[b++] = &kAmxBf16;
#endif
    if (bf16) bfloat16[b++] = &kAvx512Bf16;
    if (avx512) float32[f++] = &kAvx512Float;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      float32[f++] = &kAvx2Float;
    }
  }
};

const Found& found() {
  static const Found once;
  return once;
}

}  // namespace

const Kernels* const* kernels_for(int dtype) {
  return dtype == GR_BFLOAT16 ? found().bfloat16 : found().float32;
}

const char* amx_absence() { return found().amx_absence; }

}  // namespace gr
