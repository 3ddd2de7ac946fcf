// Sixteen floats in two AVX2 registers. Everything that the kernels need of the instruction set.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace GR_ISA {

struct F {
  __m256 a, b;
};

static inline F f_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline F f_set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void f_store(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
static inline __m256i bits(uint32_t mask) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)mask), each), each);
}
static inline F f_load_n(const float* p, int n) {
  const uint32_t mask = (1u << n) - 1;
  return {_mm256_maskload_ps(p, bits(mask)), _mm256_maskload_ps(p + 8, bits(mask >> 8))};
}
static inline void f_store_n(float* p, F x, int n) {
  const uint32_t mask = (1u << n) - 1;
  _mm256_maskstore_ps(p, bits(mask), x.a);
  _mm256_maskstore_ps(p + 8, bits(mask >> 8), x.b);
}
static inline F f_add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline F f_sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline F f_mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline F f_fma(F x, F y, F z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static inline float f_sum(F x) {
  const __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  t = _mm_add_ss(t, _mm_movehdup_ps(t));
  return _mm_cvtss_f32(t);
}
// Zero where the mask has no bit.
static inline F f_keep(uint32_t mask, F x) {
  return {_mm256_and_ps(x.a, _mm256_castsi256_ps(bits(mask))),
          _mm256_and_ps(x.b, _mm256_castsi256_ps(bits(mask >> 8)))};
}

// e^-x as p(f)·2^n with t = -x·log2(e), n = floor(t), f = t - n; n is kept where 2^n is a float.
static inline __m256 silu8(__m256 x) {
  __m256 t = _mm256_mul_ps(x, _mm256_set1_ps(-1.44269504088896341f));
  // The operand that comes second is the one that a NaN passes.
  t = _mm256_min_ps(_mm256_set1_ps(126.0f), t);
  t = _mm256_max_ps(_mm256_set1_ps(-126.0f), t);
  const __m256 n = _mm256_floor_ps(t);
  const __m256 f = _mm256_sub_ps(t, n);
  __m256 p = _mm256_set1_ps(1.87757649e-3f);
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(8.98934054e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.58263177e-2f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.40153617e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.93153073e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.99999925e-1f));
  const __m256i power = _mm256_slli_epi32(
      _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  const __m256 e = _mm256_mul_ps(p, _mm256_castsi256_ps(power));
  return _mm256_div_ps(x, _mm256_add_ps(e, _mm256_set1_ps(1.0f)));
}

template <bool kPrecise>
static inline F silu(F x) {
  return {silu8(x.a), silu8(x.b)};
}

struct F32 {
  typedef float E;
  static constexpr int kStep = 1;
  static constexpr bool kPrecise = true;
  typedef F B;
  static inline B load_b(const E* p) { return f_load(p); }
  static inline B load_b_first(const E* p) { return f_load(p); }
  static inline F madd(F acc, const E* a, B b) {
    const __m256 x = _mm256_broadcast_ss(a);
    return {_mm256_fmadd_ps(x, b.a, acc.a), _mm256_fmadd_ps(x, b.b, acc.b)};
  }
  static inline void store(E* p, F x) { f_store(p, x); }
  static inline void store_spread(E* p, int, F x) { f_store(p, x); }
  static inline F load(const E* p) { return f_load(p); }
};

}  // namespace GR_ISA
