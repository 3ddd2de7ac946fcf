#define GR_ISA topk_avx2
#include "simd_avx2.h"
#include "topk_impl.h"

namespace gr {
const TopkKernels kTopkAvx2 = {"avx2", GR_ISA::score, GR_ISA::above};
}
