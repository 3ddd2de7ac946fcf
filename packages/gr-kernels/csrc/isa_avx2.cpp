#define GR_ISA avx2
#include "simd_avx2.h"
#include "kernels_impl.h"
#include "isa.h"

namespace gr {
const Kernels kAvx2Float = GR_ISA::kernels<GR_ISA::F32>("avx2");
}
