// What the kernels ask of a GPU, in one place: CUTLASS's atoms and a few words of PTX. With
// GR_CUDA_EMULATED the same names come from a header that computes them on a CPU, so that kernels
// can be tested there as they are.
#pragma once

#include <stdint.h>

#ifdef GR_CUDA_EMULATED
#include "machine_emulated.h"
#else

#include <cuda_runtime.h>

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>

#define GR_DEVICE __device__ __forceinline__
#define GR_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define GR_PARAMETER const __grid_constant__

namespace gr {

struct alignas(16) Words {
  uint32_t at[4];
};

GR_DEVICE int thread_index() { return threadIdx.x; }
GR_DEVICE int block_x() { return blockIdx.x; }
GR_DEVICE int block_y() { return blockIdx.y; }
GR_DEVICE int grid_x() { return gridDim.x; }
GR_DEVICE void block_barrier() { __syncthreads(); }

/* The block's dynamic shared memory, a multiple of 1024 bytes from its begin. */
GR_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

/* Hides where a value comes from, so that what depends on it is not kept in registers. */
GR_DEVICE void hide(int& value) { asm volatile("" : "+r"(value)); }

GR_DEVICE int shuffle_xor(int value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
GR_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
GR_DEVICE uint32_t ballot(bool value) { return __ballot_sync(~0u, value); }

/* 16 bytes to shared memory, zeros where they are not real: nothing is read then. */
GR_DEVICE void copy_async(char* to, const void* from, bool real) {
  cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
      *static_cast<const cute::uint128_t*>(from), *reinterpret_cast<cute::uint128_t*>(to), real);
}
GR_DEVICE void copy_commit() { cute::cp_async_fence(); }
template <int kLeft>
GR_DEVICE void copy_wait() {
  cute::cp_async_wait<kLeft>();
}

/* Four matrices of 8 by 8, whose rows lanes 0-7, 8-15, 16-23, 24-31 point at. */
GR_DEVICE void load_matrices(const char* row, uint32_t (&to)[4]) {
  cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(row), to[0], to[1], to[2],
                                to[3]);
}
GR_DEVICE void load_matrices_transposed(const char* row, uint32_t (&to)[4]) {
  cute::SM75_U16x8_LDSM_T::copy(*reinterpret_cast<const cute::uint128_t*>(row), to[0], to[1], to[2],
                                to[3]);
}

struct Bfloat16 {
  /* c (16, 8) += a (16, 16) b (16, 8) */
  GR_DEVICE static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0,
                                              b1, c[0], c[1], c[2], c[3]);
  }
  GR_DEVICE static uint32_t pack(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  GR_DEVICE static float low(uint32_t packed) { return __uint_as_float(packed << 16); }
  GR_DEVICE static float high(uint32_t packed) { return __uint_as_float(packed & 0xffff0000u); }
  /* x / (1 + exp(-x)) of twice the argument, in one transcendental: its error of 2^-11 is less than
   * that of rounding to bfloat16. */
  GR_DEVICE static float silu_of_twice(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return __fmaf_rn(x, y, x);
  }
};

struct Float16 {
  GR_DEVICE static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    cute::SM80_16x8x16_F32F16F16F32_TN::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1,
                                            c[0], c[1], c[2], c[3]);
  }
  GR_DEVICE static uint32_t pack(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  GR_DEVICE static float low(uint32_t packed) {
    float value;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(value) : "r"(packed));
    return value;
  }
  GR_DEVICE static float high(uint32_t packed) { return low(packed >> 16); }
  GR_DEVICE static float silu_of_twice(float x) { return __fdividef(2 * x, 1 + __expf(-2 * x)); }
};

}  // namespace gr

#endif
