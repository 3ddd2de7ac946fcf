#include "isa.h"

#include "gr_kernels.h"

namespace gr {

namespace {

struct Found {
  const Kernels* bfloat16[2] = {};
  const Kernels* float32[3] = {};

  Found() {
    __builtin_cpu_init();
    int b = 0, f = 0;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) bfloat16[b++] = &kAvx512Bf16;
    if (avx512) float32[f++] = &kAvx512Float;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      float32[f++] = &kAvx2Float;
    }
  }
};

}  // namespace

const Kernels* const* kernels_for(int dtype) {
  static const Found found;
  return dtype == GR_BFLOAT16 ? found.bfloat16 : found.float32;
}

}  // namespace gr
