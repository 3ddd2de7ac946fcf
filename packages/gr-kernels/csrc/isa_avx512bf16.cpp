#define GR_ISA avx512bf16
#include "simd_avx512.h"
#include "kernels_impl.h"
#include "isa.h"

namespace gr {
const Kernels kAvx512Bf16 = GR_ISA::kernels<GR_ISA::Bf16>("avx512bf16");
}
