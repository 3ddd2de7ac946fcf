#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "attention_op.h"
#include "gr_kernels.h"
#include "isa.h"
#include "paged_attention.h"
#include "stack.h"

struct gr_stack {
  gr::Stack stack;
};

struct gr_paged {
  gr::PagedAttention attention;
};

namespace {

thread_local std::string last_error;

int32_t fail(int32_t status, const std::string& message) {
  last_error = message;
  return status;
}

const gr::Kernels* find_kernels(int dtype, const char* instruction_set) {
  for (const gr::Kernels* const* k = gr::kernels_for(dtype); *k; ++k) {
    if (std::strcmp((*k)->name, instruction_set) == 0) return *k;
  }
  return nullptr;
}

// bfloat16 may also be computed in float32.
const gr::Kernels* find_either(int dtype, const char* instruction_set) {
  const gr::Kernels* kernels = find_kernels(dtype, instruction_set);
  return kernels ? kernels : find_kernels(GR_FLOAT32, instruction_set);
}

std::string wrong_in(const gr_stack_config& c) {
  if (c.d_model < 1 || c.num_heads < 1 || c.d_qk < 1 || c.d_v < 1 || c.num_layers < 1) {
    return "a dimension is below 1";
  }
  if (c.dtype != GR_FLOAT32 && c.dtype != GR_BFLOAT16) return "no such dtype";
  if (c.silu < GR_SILU_NONE || c.silu > GR_SILU_ALL) return "no such silu";
  if (c.gate < GR_GATE_U_NORM || c.gate > GR_GATE_NORM_OF_PRODUCT) return "no such gate";
  if (c.groups < 1 || c.groups > 255) return "groups are not 1 to 255";
  if (!(c.divisor != 0)) return "the divisor is 0";
  if (c.positions < 0 || c.time_buckets < 0 || c.time_buckets > 256) return "biases are too large";
  if (c.time_buckets && !c.time_thresholds) return "no time thresholds";
  return "";
}

}  // namespace

extern "C" {

int32_t gr_abi_version(void) { return GR_ABI_VERSION; }

const char* gr_last_error(void) { return last_error.c_str(); }

const char* gr_instruction_sets(int32_t dtype) {
  thread_local std::string names;
  names.clear();
  for (const gr::Kernels* const* k = gr::kernels_for(dtype); *k; ++k) {
    if (!names.empty()) names += ' ';
    names += (*k)->name;
  }
  return names.c_str();
}

const char* gr_amx_absence(void) { return gr::amx_absence(); }

int32_t gr_hstu_attention(const gr_attention_call* call, const char* instruction_set) {
  if (!call || !instruction_set) return fail(GR_INVALID, "no call or no instruction set");
  const gr::Kernels* kernels = find_either(call->dtype, instruction_set);
  if (!kernels) {
    return fail(GR_INVALID, std::string("no kernels for ") + instruction_set + " on this processor");
  }
  try {
    gr::hstu_attention(*call, *kernels);
    return GR_OK;
  } catch (const std::bad_alloc&) {
    return fail(GR_NO_MEMORY, "not enough memory for the keys");
  } catch (const std::exception& error) {
    return fail(GR_INVALID, error.what());
  }
}

gr_paged* gr_paged_create(const gr_paged_config* config, const char* instruction_set,
                          int32_t threads) {
  if (!config || !instruction_set || threads < 1 || threads > 1024) {
    fail(GR_INVALID, "config or instruction set are missing, or threads are not 1 to 1024");
    return nullptr;
  }
  if (config->heads < 1 || config->d_qk < 1 || config->d_v < 1 || !(config->divisor != 0) ||
      (config->dtype != GR_FLOAT32 && config->dtype != GR_BFLOAT16)) {
    fail(GR_INVALID, "a dimension is below 1, the divisor is 0, or there is no such dtype");
    return nullptr;
  }
  const gr::Kernels* kernels = find_either(config->dtype, instruction_set);
  if (!kernels) {
    fail(GR_INVALID, std::string("no kernels for ") + instruction_set + " on this processor");
    return nullptr;
  }
  try {
    return new gr_paged{{*config, *kernels, threads}};
  } catch (const std::bad_alloc&) {
    fail(GR_NO_MEMORY, "not enough memory for a page");
  } catch (const std::exception& error) {
    fail(GR_INVALID, error.what());
  }
  return nullptr;
}

void gr_paged_destroy(gr_paged* paged) { delete paged; }

int64_t gr_paged_page_bytes(const gr_paged* paged) { return paged->attention.page_bytes(); }

int32_t gr_paged_run(gr_paged* paged, const gr_paged_call* call) {
  if (!paged || !call) return fail(GR_INVALID, "no attention or no call");
  try {
    if (std::string wrong = paged->attention.check(*call); !wrong.empty()) {
      return fail(GR_INVALID, wrong);
    }
    paged->attention.run(*call);
    return GR_OK;
  } catch (const std::bad_alloc&) {
    return fail(GR_NO_MEMORY, "not enough memory for the workspace");
  } catch (const std::exception& error) {
    return fail(GR_INVALID, error.what());
  }
}

gr_stack* gr_stack_create(const gr_stack_config* config, const gr_layer_weights* layers,
                          const char* instruction_set, int32_t threads) {
  if (!config || !layers || !instruction_set || threads < 1 || threads > 1024) {
    fail(GR_INVALID, "config, layers or instruction set are missing, or threads are not 1 to 1024");
    return nullptr;
  }
  if (std::string wrong = wrong_in(*config); !wrong.empty()) {
    fail(GR_INVALID, wrong);
    return nullptr;
  }
  for (int i = 0; i < config->num_layers; ++i) {
    if (!layers[i].uvqk_weight || !layers[i].output_weight) {
      fail(GR_INVALID, "layer " + std::to_string(i) + " has no weights");
      return nullptr;
    }
  }
  const gr::Kernels* kernels = find_kernels(config->dtype, instruction_set);
  if (!kernels) {
    fail(GR_INVALID, std::string("no kernels for ") + instruction_set + " on this processor");
    return nullptr;
  }
  try {
    return new gr_stack{{*config, layers, *kernels, threads}};
  } catch (const std::bad_alloc&) {
    fail(GR_NO_MEMORY, "not enough memory for the weights");
  } catch (const std::exception& error) {
    fail(GR_INVALID, error.what());
  }
  return nullptr;
}

void gr_stack_destroy(gr_stack* stack) { delete stack; }

const char* gr_stack_instruction_set(const gr_stack* stack) {
  return stack->stack.kernels().name;
}

int64_t gr_stack_block_bytes(const gr_stack* stack) { return stack->stack.block_bytes(); }

int64_t gr_stack_workspace_bytes(const gr_stack* stack) { return stack->stack.workspace_bytes(); }

int32_t gr_stack_run(gr_stack* stack, float* x, int64_t tokens, const gr_segment* segments,
                     int32_t count) {
  if (!stack) return fail(GR_INVALID, "no stack");
  if (stack->stack.busy.test_and_set()) return fail(GR_BUSY, "the stack is running already");
  struct Guard {
    std::atomic_flag& flag;
    ~Guard() { flag.clear(); }
  } guard{stack->stack.busy};
  try {
    if (std::string wrong = stack->stack.check(x, tokens, segments, count); !wrong.empty()) {
      return fail(GR_INVALID, wrong);
    }
    stack->stack.run(x, tokens, segments, count);
    return GR_OK;
  } catch (const std::bad_alloc&) {
    return fail(GR_NO_MEMORY, "not enough memory for the workspace");
  } catch (const std::exception& error) {
    return fail(GR_INVALID, error.what());
  }
}

}  // extern "C"
