#define GR_ISA topk_avx512
#include "simd_avx512.h"
#include "topk_impl.h"

namespace gr {
const TopkKernels kTopkAvx512 = {"avx512", GR_ISA::score, GR_ISA::above};
}
