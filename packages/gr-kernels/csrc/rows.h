// Rows of the caller's tensors (tokens, heads, width) in float32 or bfloat16, as the kernels take
// them: in float32, the heads one after another.
#pragma once

#include <cstdint>
#include <cstring>

#include "gr_kernels.h"

namespace gr {

struct Rows {
  int32_t dtype;
  const void* data;
  int64_t token_stride, head_stride;  // elements
  int32_t heads, width;

  // One token's heads; `scratch` holds them where they do not lie like that already.
  const float* of(int64_t token, float* scratch) const {
    // Of their own, because writing to `scratch` might change this for all that the compiler knows.
    const int32_t count = heads, columns = width;
    const int64_t stride = head_stride;
    if (dtype == GR_FLOAT32) {
      const float* row = (const float*)data + token * token_stride;
      if (stride == columns) return row;
      for (int32_t h = 0; h < count; ++h) {
        std::memcpy(scratch + (int64_t)h * columns, row + h * stride, 4 * (int64_t)columns);
      }
      return scratch;
    }
    const uint16_t* row = (const uint16_t*)data + token * token_stride;
    for (int32_t h = 0; h < count; ++h) {
      const uint16_t* from = row + h * stride;
      float* to = scratch + (int64_t)h * columns;
      for (int32_t c = 0; c < columns; ++c) {
        const uint32_t bits = (uint32_t)from[c] << 16;
        std::memcpy(to + c, &bits, 4);
      }
    }
    return scratch;
  }
};

// Values of one row to the place `row` of a contiguous tensor.
inline void store_values(int32_t dtype, void* tensor, int64_t row, const float* values,
                         int64_t width) {
  if (dtype == GR_FLOAT32) {
    std::memcpy((float*)tensor + row * width, values, width * 4);
    return;
  }
  uint16_t* out = (uint16_t*)tensor + row * width;
  for (int64_t c = 0; c < width; ++c) {
    uint32_t bits;
    std::memcpy(&bits, values + c, 4);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    // To the nearest, ties to even; a NaN stays one.
    out[c] = is_nan ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

}  // namespace gr
