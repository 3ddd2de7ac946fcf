/* The op hstu_attention on plain tensors, see gr_kernels/ops/hstu_attention/interface.py.

T queries, S keys, B sequences, H heads, K columns of Q and K per head, V columns of V per head. */

#ifndef GR_ATTENTION_OP_H
#define GR_ATTENTION_OP_H

#include <stdint.h>

#if defined(_WIN32)
#define GR_ATTENTION_API __declspec(dllexport)
#else
#define GR_ATTENTION_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { GR_ATTENTION_NONE = 0, GR_ATTENTION_AVX2 = 1, GR_ATTENTION_AVX512 = 2 };

typedef struct {
  int32_t isa;         /* which instructions to use, at most gr_hstu_attention_isa() */
  int32_t is_bfloat16; /* what q, k, v and out hold; float32 otherwise */
  int32_t threads;
  int32_t heads;
  int32_t d_qk;
  int32_t d_v;
  int64_t sequences;
  float alpha;
  float divisor;
  const void* q; /* (T, H, K), contiguous like all others */
  const void* k; /* (S, H, K) */
  const void* v; /* (S, H, V) */
  const int64_t* query_offsets; /* (B + 1,) */
  const int64_t* key_offsets;   /* (B + 1,) */
  const int32_t* low;           /* (T,), places in the query's own sequence, checked by the caller */
  const int32_t* high;          /* (T,) */
  const int32_t* own;           /* (T,), or -1 */
  const float* bias;            /* all pairs of all sequences, or NULL */
  const int64_t* bias_offsets;  /* (B,) where each sequence's begin */
  void* out;                    /* (T, H, V); rows of no sequence are left alone */
} gr_attention_call;

/* The best instruction set of this processor that there is code for. */
GR_ATTENTION_API int gr_hstu_attention_isa(void);

/* 0; 1 for an instruction set that is not there; 2 without memory. Thread-safe. */
GR_ATTENTION_API int gr_hstu_attention(const gr_attention_call* call);

#ifdef __cplusplus
}
#endif

#endif
