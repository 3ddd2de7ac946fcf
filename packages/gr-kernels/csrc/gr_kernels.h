/* The C interface of the native kernels. Nothing here throws; every function that can fail returns
 * an error code or null, and gr_last_error() says in words what was wrong. */
#ifndef GR_KERNELS_H
#define GR_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GR_API __attribute__((visibility("default")))

#define GR_ABI_VERSION 2
#define GR_BLOCK_TOKENS 32

enum gr_status { GR_OK = 0, GR_INVALID = 1, GR_NO_MEMORY = 2, GR_BUSY = 3 };
enum gr_dtype { GR_FLOAT32 = 0, GR_BFLOAT16 = 1 };
enum gr_silu { GR_SILU_NONE = 0, GR_SILU_U = 1, GR_SILU_ALL = 2 };
enum gr_gate {
  GR_GATE_U_NORM = 0,              /* u * norm(a) */
  GR_GATE_U_NORM_PRODUCT = 1,      /* u, norm(a), u * norm(a) */
  GR_GATE_U_ATTENTION_PRODUCT = 2, /* u, a, u * norm(a) */
  GR_GATE_NORM_OF_PRODUCT = 3      /* norm(a * u) */
};
enum gr_rows { GR_ROWS_CANDIDATES = 0, GR_ROWS_AND_LAST = 1, GR_ROWS_ALL = 2 };

typedef struct {
  int32_t d_model, num_heads, d_qk, d_v, num_layers;
  int32_t dtype, silu, gate, head_norm, groups;
  float alpha, divisor, norm_eps;
  int32_t positions;                /* P of the position bias, 0 for none */
  int32_t time_buckets;             /* rows of the time bias, 0 for none */
  const int64_t* time_thresholds;   /* (time_buckets - 1): least |dt| of buckets 1.. */
} gr_stack_config;

typedef struct {
  const float *input_norm_weight, *input_norm_bias;         /* (groups, d_model) or null */
  const float *uvqk_weight, *uvqk_bias;                     /* (2HV + 2HK, d_model) */
  const float *attention_norm_weight, *attention_norm_bias; /* (groups, HV) or null */
  const float *output_weight, *output_bias;                 /* (d_model, m·HV) */
  const float *position_bias, *time_bias;                   /* (2P - 1), (time_buckets) or null */
} gr_layer_weights;

typedef struct {
  const uint64_t* blocks;  /* addresses of ceil((cached + new_tokens) / 32) blocks */
  const int32_t *low, *high;       /* (new_tokens + candidates) */
  const uint8_t* groups;           /* (new_tokens + candidates) or null */
  const int64_t *times;            /* (cached + new_tokens + candidates) or null */
  const int64_t *next_times;       /* (new_tokens + candidates) or null */
  int32_t cached, new_tokens, candidates, rows;
} gr_segment;

typedef struct gr_stack gr_stack;

GR_API int32_t gr_abi_version(void);
/* Message of this thread's last failure. */
GR_API const char* gr_last_error(void);
/* Names of the instruction sets that this processor has kernels for, best first, for a dtype;
 * separated by spaces, empty if there is none. */
GR_API const char* gr_instruction_sets(int32_t dtype);
/* Why "amxbf16" is not among them, in words; empty if it is. */
GR_API const char* gr_amx_absence(void);

/* The op hstu_attention on plain tensors, see gr_kernels/ops/hstu_attention/interface.py: T queries,
 * S keys, B sequences, H heads, K columns of Q and K per head, V columns of V per head. All are
 * contiguous, and their places checked by the caller. */
typedef struct {
  int32_t dtype;                /* of q, k, v and out */
  int32_t threads, heads, d_qk, d_v;
  int64_t sequences;
  float alpha, divisor;
  const void *q, *k, *v;        /* (T, H, K), (S, H, K), (S, H, V) */
  const int64_t *query_offsets, *key_offsets;  /* (B + 1) */
  const int32_t *low, *high, *own;             /* (T), places within the query's sequence */
  const float* bias;            /* all pairs of all sequences, or null */
  const int64_t* bias_offsets;  /* (B) where each sequence's begin */
  void* out;                    /* (T, H, V); rows of no sequence are left alone */
} gr_attention_call;

/* bfloat16 may also be computed on an instruction set that has float32 alone. */
GR_API int32_t gr_hstu_attention(const gr_attention_call* call, const char* instruction_set);

/* The op hstu_paged_attention, see gr_kernels/ops/hstu_paged_attention/interface.py: T tokens, B
 * sequences, P pages, M pages of a row of the block table. */
typedef struct {
  int32_t dtype;                /* of q, k, v and out */
  int32_t heads, d_qk, d_v;
  float alpha, divisor;
} gr_paged_config;

typedef struct {
  int64_t tokens, sequences, page_count, max_pages;  /* T, B, P, M */
  int64_t page_stride;          /* bytes between pages, at least gr_paged_page_bytes() */
  int64_t table_stride;         /* numbers between rows of block_table */
  int64_t pairs;                /* numbers of bias */
  const void *q, *k, *v;        /* (T, H, K), (T, H, K), (T, H, V), columns contiguous */
  int64_t q_strides[2], k_strides[2], v_strides[2];  /* of tokens and heads, in elements */
  void* pages;                  /* (P, page_stride) */
  const int32_t* block_table;   /* (B, M) */
  const int64_t* slots;         /* (T) */
  const int64_t* query_offsets; /* (B + 1) */
  const int32_t* key_counts;    /* (B) */
  const int32_t *low, *high;    /* (T) */
  const float* bias;            /* all pairs of all sequences, or null */
  void* out;                    /* (T, H, V) */
} gr_paged_call;

typedef struct gr_paged gr_paged;

/* Null on failure. Those with as many threads share them, and run one call at a time. bfloat16 may
 * also be computed on an instruction set that has float32 alone. */
GR_API gr_paged* gr_paged_create(const gr_paged_config* config, const char* instruction_set,
                                 int32_t threads);
GR_API void gr_paged_destroy(gr_paged* paged);
GR_API int64_t gr_paged_page_bytes(const gr_paged* paged);
/* Checks all numbers of the call, but not whether memory is where it is said to be. */
GR_API int32_t gr_paged_run(gr_paged* paged, const gr_paged_call* call);

/* Converts the weights; the caller's memory is not needed afterwards. Null on failure. */
GR_API gr_stack* gr_stack_create(const gr_stack_config* config, const gr_layer_weights* layers,
                          const char* instruction_set, int32_t threads);
GR_API void gr_stack_destroy(gr_stack* stack);
GR_API const char* gr_stack_instruction_set(const gr_stack* stack);
GR_API int64_t gr_stack_block_bytes(const gr_stack* stack);
/* Bytes of the workspace at its largest so far. */
GR_API int64_t gr_stack_workspace_bytes(const gr_stack* stack);
/* Runs all layers on x, (tokens, d_model), in place. One call at a time; another is GR_BUSY. */
GR_API int32_t gr_stack_run(gr_stack* stack, float* x, int64_t tokens, const gr_segment* segments,
                     int32_t count);

#ifdef __cplusplus
}
#endif
#endif
