/* Kernels for CUDA as a library in plain C: no torch, no exceptions, nothing waits for the device.
 *
 * One library is built per architecture. All functions may be called from any thread. Pointers of a
 * call are the device's; what they point at must stay until the stream has run the call.
 */
#ifndef GR_CUDA_H
#define GR_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GR_CUDA_ABI_VERSION 1

#if defined(__GNUC__)
#define GR_CUDA_API __attribute__((visibility("default")))
#else
#define GR_CUDA_API
#endif

enum { GR_CUDA_BFLOAT16 = 1, GR_CUDA_FLOAT16 = 2 };

enum {
  GR_CUDA_OK = 0,
  GR_CUDA_UNSUPPORTED = 1, /* a call that the library has no kernel for */
  GR_CUDA_FAILED = 2       /* a CUDA function failed */
};

/* The op hstu_attention. Strides are in elements, the columns of a token and head are contiguous,
 * and q, k and v begin and step by multiples of 16 bytes. */
typedef struct GrHstuAttention {
  int32_t dtype;  /* GR_CUDA_BFLOAT16 or GR_CUDA_FLOAT16 */
  int32_t device; /* ordinal */
  int32_t heads;
  int32_t columns; /* of a head, in q and k as in v: 64, 128 or 256 */
  int32_t sequences;
  int32_t offset_bytes; /* 4 or 8: the size of an offset */
  int64_t tokens;       /* rows of q and out */
  int64_t keys;         /* rows of k and v */
  const void *q, *k, *v;
  void *out; /* every row is written; those of no sequence with zeros */
  int64_t q_token_stride, q_head_stride;
  int64_t k_token_stride, k_head_stride;
  int64_t v_token_stride, v_head_stride;
  int64_t out_token_stride, out_head_stride; /* multiples of 2 */
  const void *query_offsets, *key_offsets;   /* (sequences + 1) */
  const int32_t *low, *high, *own;           /* (tokens) */
  /* Keys in blocks of 32 tokens: null, or where the blocks of each sequence begin. */
  const int64_t *addresses;
  const int32_t *counts;     /* (sequences): how many keys of each lie in blocks */
  int64_t addresses_stride;  /* elements from a sequence's addresses to the next one's */
  int64_t layer_offset;      /* bytes from a block's begin to its K (heads, 32, columns), then V */
  float alpha, scale;        /* of scores; of sums: 1 / divisor */
  int32_t splits;            /* how many blocks share the keys of a row: 1, or more where rows are few */
  int32_t reserved;          /* 0 */
  float *workspace;          /* null for one; else (splits, tokens, heads, columns), arbitrary */
} GrHstuAttention;

GR_CUDA_API int gr_cuda_abi_version(void);

/* sizeof(GrHstuAttention): a caller in another language checks its own against it. */
GR_CUDA_API int64_t gr_cuda_hstu_attention_size(void);

/* The architecture built for: "sm_80" or "sm_90a". */
GR_CUDA_API const char *gr_cuda_architecture(void);

/* Launches on a stream (a cudaStream_t). Returns GR_CUDA_OK, or another code and, in `message`, why:
 * at most `capacity` bytes, ended by a zero. The device that was current stays so. */
GR_CUDA_API int gr_cuda_hstu_attention(const GrHstuAttention *call, void *stream,
                                       char *message, int64_t capacity);

#ifdef __cplusplus
}
#endif

#endif
