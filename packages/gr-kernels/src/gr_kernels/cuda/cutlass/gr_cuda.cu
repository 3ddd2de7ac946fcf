// The functions of gr_cuda.h, for the architecture that GR_CUDA_ARCHITECTURE says: 80 or 90.
#include "gr_cuda.h"

#include <cstdarg>
#include <cstdio>

#if GR_CUDA_ARCHITECTURE == 90
#include "hstu_attention_sm90.cuh"
#else
#include "hstu_attention_sm80.cuh"
#endif
#include "launch.cuh"

namespace gr {
namespace {

struct Answer {
  char* message;
  int64_t capacity;

  int operator()(int code, const char* format, ...) const {
    if (message && capacity > 0) {
      va_list values;
      va_start(values, format);
      std::vsnprintf(message, capacity, format, values);
      va_end(values);
    }
    return code;
  }
};

Parameters parameters(const GrHstuAttention& call) {
  Parameters of{};
  of.q = static_cast<const uint16_t*>(call.q);
  of.k = static_cast<const uint16_t*>(call.k);
  of.v = static_cast<const uint16_t*>(call.v);
  of.out = static_cast<uint16_t*>(call.out);
  of.q_token = call.q_token_stride, of.q_head = call.q_head_stride;
  of.k_token = call.k_token_stride, of.k_head = call.k_head_stride;
  of.v_token = call.v_token_stride, of.v_head = call.v_head_stride;
  of.out_token = call.out_token_stride, of.out_head = call.out_head_stride;
  of.query_offsets = call.query_offsets, of.key_offsets = call.key_offsets;
  of.low = call.low, of.high = call.high, of.own = call.own;
  of.addresses = call.addresses, of.counts = call.counts;
  of.addresses_stride = call.addresses_stride, of.layer_offset = call.layer_offset;
  of.tokens = static_cast<int>(call.tokens), of.sequences = call.sequences;
  of.heads = call.heads, of.columns = call.columns;
  of.splits = call.splits, of.workspace = call.workspace;
  of.wide_offsets = call.offset_bytes == 8;
  of.alpha = call.alpha, of.scale = call.scale;
  return of;
}

template <class T, int kD>
int attend(const GrHstuAttention& call, void* stream, const Answer& answer) {
#if GR_CUDA_ARCHITECTURE == 90
  using Of = Sm90<T, kD>;
  Sm90Parameters of;
  of.call = parameters(call);
  if (const char* why = tensor_maps<Of>(of, call.keys)) return answer(GR_CUDA_FAILED, "%s", why);
  const auto kernel = hstu_attention_sm90<Of>;
#else
  using Of = Sm80<T, kD>;
  const Parameters of = parameters(call);
  const auto kernel = hstu_attention_sm80<Of>;
#endif
  const int64_t grid = blocks(call.tokens, call.sequences, Of::kM);
  const char* why = launch(kernel, static_cast<int>(grid), call.heads * call.splits, Of::kThreads,
                           Of::kSharedBytes, stream, of);
  if (!why && call.splits > 1) {
    const int64_t pairs = call.tokens * call.heads * (kD / 2);
    why = launch(hstu_attention_sum<T>, static_cast<int>((pairs + kSumThreads - 1) / kSumThreads),
                 1, kSumThreads, 0, stream, parameters(call));
  }
  return why ? answer(GR_CUDA_FAILED, "%s", why) : GR_CUDA_OK;
}

template <class T>
int attend(const GrHstuAttention& call, void* stream, const Answer& answer) {
  switch (call.columns) {
    case 64: return attend<T, 64>(call, stream, answer);
    case 128: return attend<T, 128>(call, stream, answer);
    case 256: return attend<T, 256>(call, stream, answer);
    default:
      return answer(GR_CUDA_UNSUPPORTED, "%d columns of a head; expected 64, 128 or 256",
                    static_cast<int>(call.columns));
  }
}

}  // namespace
}  // namespace gr

extern "C" {

int gr_cuda_abi_version(void) { return GR_CUDA_ABI_VERSION; }

int64_t gr_cuda_hstu_attention_size(void) { return sizeof(GrHstuAttention); }

const char* gr_cuda_architecture(void) { return GR_CUDA_ARCHITECTURE == 90 ? "sm_90a" : "sm_80"; }

int gr_cuda_hstu_attention(const GrHstuAttention* call, void* stream, char* message,
                           int64_t capacity) {
  const gr::Answer answer{message, capacity};
  const int64_t most = 1ll << 30;
  if (call->tokens < 0 || call->tokens > most || call->keys < 0 || call->keys > most ||
      call->sequences < 0 || call->sequences > most) {
    return answer(GR_CUDA_UNSUPPORTED, "more than 2^30 tokens, keys or sequences");
  }
  if (call->splits < 1 || (call->splits > 1 && !call->workspace)) {
    return answer(GR_CUDA_UNSUPPORTED, "%d splits; expected 1, or a workspace",
                  static_cast<int>(call->splits));
  }
  if (call->heads < 0 || int64_t{call->heads} * call->splits > 65535) {
    return answer(GR_CUDA_UNSUPPORTED, "%d heads in %d splits; expected at most 65535",
                  static_cast<int>(call->heads), static_cast<int>(call->splits));
  }
  if (call->tokens == 0 || call->heads == 0) return GR_CUDA_OK;
  const gr::OnDevice device(call->device);
  if (device.why) return answer(GR_CUDA_FAILED, "%s", device.why);
  switch (call->dtype) {
    case GR_CUDA_BFLOAT16: return gr::attend<gr::Bfloat16>(*call, stream, answer);
    case GR_CUDA_FLOAT16: return gr::attend<gr::Float16>(*call, stream, answer);
    default: return answer(GR_CUDA_UNSUPPORTED, "dtype %d", static_cast<int>(call->dtype));
  }
}

}  // extern "C"
