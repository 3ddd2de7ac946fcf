// The op hstu_attention on plain tensors, with the attention kernels of the stack.
#pragma once

#include "gr_kernels.h"
#include "kernels.h"

namespace gr {

// Packs the keys into blocks, then goes through the queries. Throws std::bad_alloc.
void hstu_attention(const gr_attention_call& call, const Kernels& kernels);

}  // namespace gr
