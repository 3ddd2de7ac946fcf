// The kernels of the exact search, for the instruction set of the simd header before this one.
#pragma once

#include "topk_kernels.h"

namespace GR_ISA {

template <int kUsers>
static __attribute__((noinline)) void score_users(const float* users, int64_t depth,
                                                  const float* items, float* scores) {
  constexpr int kGroups = gr::kTopkItems / 16;
  F sum[kUsers][kGroups];
  for (int u = 0; u < kUsers; ++u) {
    for (int g = 0; g < kGroups; ++g) sum[u][g] = f_zero();
  }
  for (int64_t d = 0; d < depth; ++d) {
    F item[kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) item[g] = f_load(items + (g * depth + d) * 16);
#pragma GCC unroll 6
    for (int u = 0; u < kUsers; ++u) {
      const F one = f_set1(users[u * depth + d]);
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) sum[u][g] = f_fma(one, item[g], sum[u][g]);
    }
  }
  for (int u = 0; u < kUsers; ++u) {
    for (int g = 0; g < kGroups; ++g) f_store(scores + u * gr::kTopkItems + g * 16, sum[u][g]);
  }
}

static void score(const float* users, int count, int64_t depth, const float* items,
                  float* scores) {
  static_assert(gr::kTopkUsers == 6, "a case for each number of users");
  switch (count) {
    case 1: score_users<1>(users, depth, items, scores); break;
    case 2: score_users<2>(users, depth, items, scores); break;
    case 3: score_users<3>(users, depth, items, scores); break;
    case 4: score_users<4>(users, depth, items, scores); break;
    case 5: score_users<5>(users, depth, items, scores); break;
    default: score_users<6>(users, depth, items, scores); break;
  }
}

static inline uint32_t above16(const float* scores, float threshold) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(scores), _mm512_set1_ps(threshold), _CMP_GT_OQ);
#else
  const __m256 t = _mm256_set1_ps(threshold);
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(scores), t, _CMP_GT_OQ));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(scores + 8), t, _CMP_GT_OQ));
  return (uint32_t)(low | high << 8);
#endif
}

static uint64_t above(const float* scores, float threshold) {
  uint64_t bits = 0;
  for (int g = 0; g < gr::kTopkItems / 16; ++g) {
    bits |= (uint64_t)above16(scores + g * 16, threshold) << (g * 16);
  }
  return bits;
}

}  // namespace GR_ISA
