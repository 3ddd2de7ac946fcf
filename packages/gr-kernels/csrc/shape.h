// How K and V of a head lie in a block, for the kernels of one instruction set.
#pragma once

#include "kernels.h"
#include "memory.h"

namespace gr {

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline Shape shape_of(const Kernels& kernels, int32_t d_model, int32_t heads, int32_t d_qk,
                      int32_t d_v) {
  Shape shape;
  shape.d_model = d_model;
  shape.heads = heads;
  shape.d_qk = d_qk;
  shape.d_v = d_v;
  shape.d_qk_padded = (int32_t)round_up(d_qk, kernels.step);
  shape.d_v_padded = (int32_t)round_up(d_v, kGroup);
  shape.k_head_bytes = aligned((int64_t)kBlockTokens * shape.d_qk_padded * kernels.element_bytes);
  shape.v_head_bytes = aligned((int64_t)kBlockTokens * shape.d_v_padded * kernels.element_bytes);
  return shape;
}

}  // namespace gr
