// What kernels ask of Hopper beyond machine.cuh: barriers in shared memory, tensor-memory copies and
// products of warp groups, the latter through CuTe on the layouts of attention.cuh's tiles.
#pragma once

#include "attention.cuh"

#ifndef GR_CUDA_EMULATED

#include <cuda.h>

#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>

namespace gr {

using TensorMap = CUtensorMap;
using Barrier = uint64_t;

/* So many arrivals, and all bytes that were announced, complete a phase. */
GR_DEVICE void barrier_init(Barrier& barrier, int arrivals) {
  cute::initialize_barrier(barrier, arrivals);
}
GR_DEVICE void barriers_ready() { cutlass::arch::fence_barrier_init(); }
GR_DEVICE void arrive(Barrier& barrier) {
  const uint32_t at = cute::cast_smem_ptr_to_uint(&barrier);
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
GR_DEVICE void arrive_expecting(Barrier& barrier, int bytes) {
  const uint32_t at = cute::cast_smem_ptr_to_uint(&barrier);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
               : "memory");
}
/* Until the phase of that parity is complete. */
GR_DEVICE void wait(Barrier& barrier, int parity) {
  const uint32_t at = cute::cast_smem_ptr_to_uint(&barrier);
  // The loop is in PTX: one in C++ makes the compiler copy sums, and products wait for each other.
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\n"
      "bra again;\n"
      "done:\n"
      "}" ::"r"(at),
      "r"(parity)
      : "memory");
}
GR_DEVICE void group_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
/* Between ordinary writes to shared memory and what products read there. */
GR_DEVICE void fence_for_products() { cutlass::arch::fence_view_async_shared(); }

template <int kRegisters>
GR_DEVICE void release_registers() {
  cutlass::arch::warpgroup_reg_dealloc<kRegisters>();
}
template <int kRegisters>
GR_DEVICE void claim_registers() {
  cutlass::arch::warpgroup_reg_alloc<kRegisters>();
}

/* A box of the map, 64 columns of one head and some rows, to shared memory. */
GR_DEVICE void copy_box(const TensorMap& map, Barrier& barrier, char* to, int column, int head,
                        int row) {
  cute::SM90_TMA_LOAD_3D::copy(&map, &barrier,
                               static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), to,
                               column, head, row);
}

template <class T>
struct ElementOf;
template <>
struct ElementOf<Bfloat16> {
  using Type = cutlass::bfloat16_t;
};
template <>
struct ElementOf<Float16> {
  using Type = cutlass::half_t;
};

/* Tiles of attention.cuh as CuTe sees them: (rows, columns), and transposed. */
template <class E, int kRows, int kD>
using RowsLayout = decltype(cute::tile_to_shape(
    cute::SM90::GMMA::Layout_K_SW128_Atom<E>{}, cute::Shape<cute::Int<kRows>, cute::Int<kD>>{}));
template <class E, int kRows, int kD>
using ColumnsLayout = decltype(cute::tile_to_shape(
    cute::SM90::GMMA::Layout_MN_SW128_Atom<E>{}, cute::Shape<cute::Int<kD>, cute::Int<kRows>>{},
    cute::Step<cute::_2, cute::_1>{}));

template <class E, int kRows, int kD>
constexpr bool is_our_layout() {
  const decltype(cute::as_position_independent_swizzle_layout(RowsLayout<E, kRows, kD>{})) rows{};
  const decltype(cute::as_position_independent_swizzle_layout(
      ColumnsLayout<E, kRows, kD>{})) columns{};
  for (int row = 0; row < kRows; row += 5) {
    for (int column = 0; column < kD; column += 7) {
      const int at = column / 64 * (kRows * 64) + row * 64 +
                     (((column / 8) % 8) ^ (row % 8)) * 8 + column % 8;
      if (int(rows(row, column)) != at || int(columns(column, row)) != at) return false;
    }
  }
  return true;
}

/* Starts score (64, kN) = q (64, kD) k (kN, kD)ᵀ, for the warp group that calls. */
template <class T, int kN, int kD>
GR_DEVICE void start_scores(float (&score)[kN / 8][4], char* q_tile, char* k_tile) {
  using namespace cute;
  using E = typename ElementOf<T>::Type;
  static_assert(is_our_layout<E, 64, kD>() && is_our_layout<E, kN, kD>());
  auto product = make_tiled_mma(
      SM90::GMMA::ss_op_selector<E, E, float, Shape<_64, Int<kN>, Int<kD>>>());
  auto part = product.get_thread_slice(threadIdx.x % 128);
  auto q = make_tensor(make_smem_ptr(reinterpret_cast<E*>(q_tile)), RowsLayout<E, 64, kD>{});
  auto k = make_tensor(make_smem_ptr(reinterpret_cast<E*>(k_tile)), RowsLayout<E, kN, kD>{});
  auto a = part.partition_fragment_A(q);
  auto b = part.partition_fragment_B(k);
  auto c = make_tensor(make_rmem_ptr(&score[0][0]),
                       partition_shape_C(product, Shape<_64, Int<kN>>{}));
  static_assert(decltype(size(c))::value == kN / 2);
  warpgroup_fence_operand(c);
  warpgroup_arrive();
  product.accumulate_ = SM90::GMMA::ScaleOut::Zero;
  CUTE_UNROLL
  for (int step = 0; step < size<2>(a); ++step) {
    gemm(product, a(_, _, step), b(_, _, step), c);
    product.accumulate_ = SM90::GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
  warpgroup_fence_operand(c);
}

/* Starts sum (64, kD) += weight (64, kN) v (kN, kD), for the warp group that calls. */
template <class T, int kN, int kD>
GR_DEVICE void start_sums(float (&sum)[kD / 8][4], uint32_t (&weight)[kN / 16][4], char* v_tile) {
  using namespace cute;
  using E = typename ElementOf<T>::Type;
  auto product = make_tiled_mma(
      SM90::GMMA::rs_op_selector<E, E, float, Shape<_64, Int<kD>, Int<kN>>,
                                 SM90::GMMA::Major::K, SM90::GMMA::Major::MN>());
  auto part = product.get_thread_slice(threadIdx.x % 128);
  auto v = make_tensor(make_smem_ptr(reinterpret_cast<E*>(v_tile)), ColumnsLayout<E, kN, kD>{});
  auto b = part.partition_fragment_B(v);
  auto a = make_tensor(make_rmem_ptr(reinterpret_cast<E*>(&weight[0][0])),
                       Layout<Shape<Shape<_2, _2, _2>, _1, Int<kN / 16>>>{});
  auto c = make_tensor(make_rmem_ptr(&sum[0][0]),
                       partition_shape_C(product, Shape<_64, Int<kD>>{}));
  static_assert(decltype(size(c))::value == kD / 2);
  warpgroup_fence_operand(a);
  warpgroup_fence_operand(c);
  warpgroup_arrive();
  product.accumulate_ = SM90::GMMA::ScaleOut::One;
  CUTE_UNROLL
  for (int step = 0; step < size<2>(b); ++step) gemm(product, a(_, _, step), b(_, _, step), c);
  warpgroup_commit_batch();
  warpgroup_fence_operand(c);
  warpgroup_fence_operand(a);
}

/* Until at most so many of what this warp group has started are under way. */
template <int kLeft>
GR_DEVICE void wait_products() {
  cute::warpgroup_wait<kLeft>();
}
/* Results of products are not read before, nor operands written. */
template <int kCount>
GR_DEVICE void settle(float (&of)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) cute::warpgroup_fence_operand(of[i][j]);
  }
}

/* The driver's function, which is not linked to, so that the library loads without a driver. */
struct Encoder {
  decltype(&cuTensorMapEncodeTiled) call = nullptr;
  const char* why = nullptr;

  Encoder() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult state;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &state);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &state);
#endif
    if (error != cudaSuccess) {
      why = cudaGetErrorString(error);
    } else if (state != cudaDriverEntryPointSuccess || !found) {
      why = "the driver has no cuTensorMapEncodeTiled; it is older than CUDA 12";
    } else {
      call = reinterpret_cast<decltype(call)>(found);
    }
  }
};

/* A map of rows of (heads, columns), to be read in boxes of 64 columns of one head and `box` rows.
 * Null, or why it cannot be. */
inline const char* encode(TensorMap& map, const void* base, int columns, int heads, int64_t rows,
                          int64_t head_stride, int64_t row_stride, int box) {
  static const Encoder encoder;
  if (!encoder.call) return encoder.why;
  const cuuint64_t sizes[3] = {cuuint64_t(columns), cuuint64_t(heads), cuuint64_t(rows)};
  const cuuint64_t strides[2] = {cuuint64_t(head_stride) * 2, cuuint64_t(row_stride) * 2};
  const cuuint32_t boxes[3] = {64, 1, cuuint32_t(box)};
  const cuuint32_t steps[3] = {1, 1, 1};
  // Both dtypes are 16 bits, and what is out of bounds is zero in both.
  const CUresult result = encoder.call(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(base), sizes, strides, boxes,
      steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused the rows of k or v";
}

}  // namespace gr

#else
#include "machine_sm90_emulated.h"
#endif
