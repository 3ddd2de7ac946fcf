#define GR_ISA avx512
#include "simd_avx512.h"
#include "kernels_impl.h"
#include "isa.h"

namespace gr {
const Kernels kAvx512Float = GR_ISA::kernels<GR_ISA::F32>("avx512");
}
