// The instruction sets that there are kernels for, and which of them this processor has.
#pragma once

#include "kernels.h"

namespace gr {

extern const Kernels kAmxBf16, kAvx512Bf16, kAvx512Float, kAvx2Float;

// Multiplies a pair of tiles, and says whether the result is right.
bool amx_self_test();

// Why the kernels for AMX are not offered, empty if they are.
const char* amx_absence();

// Kernels for a dtype, best first, that this processor can run; ends with null.
const Kernels* const* kernels_for(int dtype);

}  // namespace gr
