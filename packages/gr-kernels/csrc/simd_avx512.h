// Sixteen floats in one AVX-512 register. Everything that the kernels need of the instruction set.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace GR_ISA {

typedef __m512 F;

static inline F f_zero() { return _mm512_setzero_ps(); }
static inline F f_set1(float x) { return _mm512_set1_ps(x); }
static inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
static inline void f_store(float* p, F x) { _mm512_storeu_ps(p, x); }
static inline F f_load_n(const float* p, int n) {
  return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
static inline void f_store_n(float* p, F x, int n) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), x);
}
static inline F f_add(F a, F b) { return _mm512_add_ps(a, b); }
static inline F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
static inline F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
static inline F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
static inline float f_sum(F x) { return _mm512_reduce_add_ps(x); }
// Zero where the mask has no bit.
static inline F f_keep(uint32_t mask, F x) { return _mm512_maskz_mov_ps((__mmask16)mask, x); }

// e^-x as p(f)·2^floor(t) with t = -x·log2(e), f = t - floor(t). An overflow gives inf, and then
// x/(1+inf) is the zero that SiLU has there.
template <bool kPrecise>
static inline F silu(F x) {
  const F t = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504088896341f));
  const F f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  F p;
  if (kPrecise) {
    p = _mm512_set1_ps(1.87757649e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.98934054e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.58263177e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40153617e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93153073e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.99999925e-1f));
  } else {
    p = _mm512_set1_ps(0.0780245065f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.226067178f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.695833533f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.999925219f));
  }
  const F d = _mm512_add_ps(_mm512_scalef_ps(p, t), _mm512_set1_ps(1.0f));
  F r = _mm512_rcp14_ps(d);
  if (kPrecise) {
    // One step of Newton's; where d is inf, r is 0 and must not become NaN.
    const F e = _mm512_fnmadd_ps(d, r, _mm512_set1_ps(2.0f));
    const __mmask16 finite = _mm512_cmp_ps_mask(d, _mm512_set1_ps(3e38f), _CMP_LT_OQ);
    r = _mm512_mask_mul_ps(r, finite, r, e);
  }
  return _mm512_mul_ps(x, r);
}

struct F32 {
  typedef float E;
  static constexpr int kStep = 1;       // elements of k that one instruction multiplies
  static constexpr bool kPrecise = true;
  typedef __m512 B;
  static inline B load_b(const E* p) { return _mm512_loadu_ps(p); }
  static inline B load_b_first(const E* p) { return _mm512_loadu_ps(p); }
  static inline F madd(F acc, const E* a, B b) {
    return _mm512_fmadd_ps(_mm512_set1_ps(*a), b, acc);
  }
  static inline void store(E* p, F x) { _mm512_storeu_ps(p, x); }
  // To every kStep-th place, from the place `first` on.
  static inline void store_spread(E* p, int, F x) { _mm512_storeu_ps(p, x); }
  static inline F load(const E* p) { return _mm512_loadu_ps(p); }
  static inline E one(float x) { return x; }
};

#ifdef __AVX512BF16__
struct Bf16 {
  typedef uint16_t E;
  static constexpr int kStep = 2;
  static constexpr bool kPrecise = false;
  typedef __m512bh B;
  static inline B load_b(const E* p) { return (__m512bh)_mm512_loadu_si512(p); }
  // Of every pair the first; the second counts as zero, whatever it holds.
  static inline B load_b_first(const E* p) {
    return (__m512bh)_mm512_maskz_mov_epi16(0x55555555u, _mm512_loadu_si512(p));
  }
  static inline F madd(F acc, const E* a, B b) {
    int pair;
    __builtin_memcpy(&pair, a, 4);
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(pair), b);
  }
  static inline void store(E* p, F x) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
  }
  static inline void store_spread(E* p, int first, F x) {
    const __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
    if (first == 0) {
      _mm512_mask_storeu_epi16(p, 0x55555555u, wide);
    } else {
      _mm512_mask_storeu_epi16(p, 0xAAAAAAAAu, _mm512_slli_epi32(wide, 16));
    }
  }
  static inline F load(const E* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
};
#endif

}  // namespace GR_ISA
