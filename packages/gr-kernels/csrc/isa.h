// The instruction sets that there are kernels for, and which of them this processor has.
#pragma once

#include "kernels.h"

namespace gr {

extern const Kernels kAvx512Bf16, kAvx512Float, kAvx2Float;

// Kernels for a dtype, best first, that this processor can run; ends with null.
const Kernels* const* kernels_for(int dtype);

}  // namespace gr
