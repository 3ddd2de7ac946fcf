/* Exact search: the items of a table with the largest dot products, see
gr_kernels/retrieval/exact.py. B users, I rows of the table, D width. */

#ifndef GR_TOPK_H
#define GR_TOPK_H

#include <stdint.h>

#define GR_TOPK_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum gr_topk_status { GR_TOPK_OK = 0, GR_TOPK_INVALID = 1, GR_TOPK_NO_MEMORY = 2 };

typedef struct gr_topk_index gr_topk_index;

/* Copies a float32 table (I, D), whose row 0 is padding, into the order that the kernels read.
 * The instruction set is "auto", "avx512" or "avx2". Null where an argument is wrong, the
 * processor lacks the instruction set, or memory. */
GR_TOPK_API gr_topk_index* gr_topk_create(const float* table, int64_t rows, int32_t width,
                                          const char* instruction_set, int32_t threads);
GR_TOPK_API void gr_topk_destroy(gr_topk_index* index);

/* For each of the users (B, D), the k rows of largest score, best first and of equal scores the
 * lower row first, into scores (B, k) and places (B, k). A score that is NaN counts as -inf. k is
 * at most I - 1. Calls from several threads wait for each other. */
GR_TOPK_API int32_t gr_topk_search(gr_topk_index* index, const float* users, int64_t count,
                                   int64_t k, float* scores, int64_t* places);

#ifdef __cplusplus
}
#endif

#endif
