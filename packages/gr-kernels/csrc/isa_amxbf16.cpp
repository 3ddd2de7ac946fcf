#define GR_ISA amxbf16
#include "simd_avx512.h"
#include "kernels_amx.h"
#include "isa.h"

namespace gr {

namespace {

constexpr Kernels amx() {
  Kernels kernels = GR_ISA::kernels<GR_ISA::Bf16>("amxbf16");
  kernels.linear = GR_ISA::linear_amx;
  kernels.attend = GR_ISA::attend_amx;
  kernels.scratch_bytes = GR_ISA::Scratch::bytes;
  kernels.begin = GR_ISA::begin;
  kernels.end = GR_ISA::end;
  return kernels;
}

}  // namespace

const Kernels kAmxBf16 = amx();

bool amx_self_test() {
  using GR_ISA::E;
  alignas(64) E a[16 * 32], b[16 * 32];
  alignas(64) float c[16 * 16];
  // Small whole numbers, whose sums are exact; bfloat16 has the upper half of a float's bits.
  const auto number = [](int i) { return (float)(i % 7 - 3); };
  const auto element = [&](int i) {
    const float value = number(i);
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return (E)(bits >> 16);
  };
  for (int i = 0; i < 16 * 32; ++i) {
    a[i] = element(5 * i + i / 32);
    b[i] = element(3 * i + i / 32);
  }
  for (int rows = 16; rows > 0; rows -= 11) {
    for (float& value : c) value = -1.0f;
    GR_ISA::begin(rows);
    GR_ISA::tile_zero<0>();
    GR_ISA::tile_load<4>(a, 64);
    GR_ISA::tile_load<6>(b, 64);
    GR_ISA::tile_dot<0, 4, 6>();
    GR_ISA::tile_dot<0, 4, 6>();
    GR_ISA::tile_store<0>(c, 64);
    GR_ISA::end();
    for (int r = 0; r < 16; ++r) {
      for (int n = 0; n < 16; ++n) {
        float sum = 0.0f;
        for (int k = 0; k < 32; ++k) {
          const int i = 32 * r + k, j = 32 * (k / 2) + 2 * n + k % 2;
          sum += 2.0f * number(5 * i + i / 32) * number(3 * j + j / 32);
        }
        if (c[16 * r + n] != (r < rows ? sum : -1.0f)) return false;
      }
    }
  }
  return true;
}

}  // namespace gr
