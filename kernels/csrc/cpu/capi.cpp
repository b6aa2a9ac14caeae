// The CPU library's C interface: the fastest instruction set that the machine has, chosen when the library is loaded.
#include <string.h>

#include <atomic>

#pragma GCC visibility push(default)
#include "../wkv.h"
extern "C" int32_t rwkv_select_target(const char *target);
#pragma GCC visibility pop

#include "threads.hpp"
#include "wkv.hpp"

namespace {

constexpr int64_t STEPS_BETWEEN_STATES = 16;

const Operators *find(const char *target) {
    const auto is_wanted = [&](const char *name) { return !target || !strcmp(name, target); };
#if RWKV_HAS_X86_TARGETS
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && is_wanted("avx512")) return &avx512::operators;
    if (has_avx2 && is_wanted("avx2")) return &avx2::operators;
#endif
    return is_wanted("portable") ? &portable::operators : nullptr;
}

std::atomic<const Operators *> chosen{nullptr};

const Operators &operators() {
    if (!chosen.load()) chosen.store(find(nullptr));
    return *chosen.load();
}

// body(item) for every head of the problem.
template <typename Body>
int32_t for_heads(const rwkv_problem &p, const Body &body) {
    if (p.io != RWKV_FP32 && p.io != RWKV_BF16 && p.io != RWKV_FP16) return RWKV_NO_SUCH_IO;
    if (p.size > LARGEST_SIZE) return RWKV_NO_SUCH_SIZE;
    parallel_for(p.batch * p.heads, p.threads, [&](int64_t item, int32_t) { body(item); });
    return RWKV_OK;
}

}  // namespace

int32_t rwkv_kernels_abi(void) {
    return RWKV_KERNELS_ABI;
}

const char *rwkv_kernels_target(void) {
    return operators().target;
}

// "avx512", "avx2" or "portable" from now on, for tests and benchmarks.
int32_t rwkv_select_target(const char *target) {
    const Operators *found = find(target);
    if (!found) return RWKV_NO_SUCH_KERNEL;
    chosen.store(found);
    return RWKV_OK;
}

const char *rwkv_status_text(int32_t status) {
    switch (status) {
        case RWKV_OK: return "no error";
        case RWKV_NO_SUCH_SIZE: return "no kernel for this head size";
        case RWKV_NO_SUCH_IO: return "no kernel for this element type";
        case RWKV_NO_SUCH_KERNEL: return "no such kernel";
        case RWKV_NO_MEMORY: return "out of memory";
        default: return "unknown error";
    }
}

int64_t rwkv_saved_bytes(int32_t version, const rwkv_problem *p) {
    if (version != 6 && version != 7) return -1;
    const int64_t states = (p->time + STEPS_BETWEEN_STATES - 1) / STEPS_BETWEEN_STATES;
    const int64_t elements = states * p->size * p->size + (version == 7 ? p->time * p->size : 0);
    return p->batch * p->heads * elements * static_cast<int64_t>(sizeof(float));
}

int32_t rwkv_wkv7_forward(const rwkv_problem *problem, const void *r, const void *w, const void *k, const void *v,
                          const void *a, const void *b, const float *state, void *y, float *final_state, void *saved) {
    const auto operate = operators().wkv7_forward;
    return for_heads(*problem, [&](int64_t item) {
        operate(*problem, item, r, w, k, v, a, b, state, y, final_state, saved);
    });
}

int32_t rwkv_wkv7_backward(const rwkv_problem *problem, const void *r, const void *w, const void *k, const void *v,
                           const void *a, const void *b, const void *saved, const void *dy, const float *dfinal_state,
                           void *dr, void *dw, void *dk, void *dv, void *da, void *db, float *dstate) {
    const auto operate = operators().wkv7_backward;
    return for_heads(*problem, [&](int64_t item) {
        operate(*problem, item, r, w, k, v, a, b, saved, dy, dfinal_state, dr, dw, dk, dv, da, db, dstate);
    });
}

int32_t rwkv_wkv6_forward(const rwkv_problem *problem, const void *r, const void *k, const void *v, const void *w,
                          const float *u, const float *state, void *y, float *final_state, void *saved) {
    const auto operate = operators().wkv6_forward;
    return for_heads(*problem, [&](int64_t item) {
        operate(*problem, item, r, k, v, w, u, state, y, final_state, saved);
    });
}

int32_t rwkv_wkv6_backward(const rwkv_problem *problem, const void *r, const void *k, const void *v, const void *w,
                           const float *u, const void *saved, const void *dy, const float *dfinal_state, void *dr,
                           void *dk, void *dv, void *dw, float *du, float *dstate) {
    const auto operate = operators().wkv6_backward;
    return for_heads(*problem, [&](int64_t item) {
        operate(*problem, item, r, k, v, w, u, saved, dy, dfinal_state, dr, dk, dv, dw, du, dstate);
    });
}
