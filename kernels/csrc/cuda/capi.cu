// The CUDA library's C interface: checks what a kernel takes, and hands over to its launcher.
#pragma GCC visibility push(default)
#include "../loss.h"
#include "../wkv.h"
#ifdef RWKV_HOST_SHIM
extern "C" void rwkv_host_schedule(uint32_t seed);
#endif
#pragma GCC visibility pop

#include "device.cuh"
#include "launchers.hpp"

namespace {

constexpr int64_t STEPS_BETWEEN_STATES = 16;
constexpr int64_t MOST_BLOCKS = 2147483647;

int32_t check_io(int32_t io) {
    return io == RWKV_FP32 || io == RWKV_BF16 || io == RWKV_FP16 ? RWKV_OK : RWKV_NO_SUCH_IO;
}

bool has_tensor_cores(const rwkv_problem &p) {
    return p.kernel == RWKV_TENSOR_CORES || p.kernel == RWKV_TENSOR_CORES_16;
}

// RWKV_OK where `p.kernel` takes the problem.
int32_t check(const rwkv_problem &p) {
    if (p.batch * p.heads > MOST_BLOCKS) return RWKV_NO_SUCH_SIZE;
    if (p.size != 64 && (has_tensor_cores(p) || (p.size != 32 && p.size != 128))) return RWKV_NO_SUCH_SIZE;
    if (has_tensor_cores(p)) return p.io == RWKV_BF16 ? RWKV_OK : RWKV_NO_SUCH_IO;
    if (p.kernel != RWKV_EXACT) return RWKV_NO_SUCH_KERNEL;
    return check_io(p.io);
}

template <typename Pointers>
int32_t run7(const rwkv_problem &p, const Pointers &pointers) {
    if (const int32_t status = check(p)) return status;
    return p.kernel == RWKV_EXACT ? rwkv::wkv7_exact(p, pointers) : rwkv::wkv7_chunk(p, pointers);
}

template <typename Pointers>
int32_t run6(const rwkv_problem &p, const Pointers &pointers) {
    if (const int32_t status = check(p)) return status;
    return p.kernel == RWKV_EXACT ? rwkv::wkv6_exact(p, pointers) : rwkv::wkv6_chunk(p, pointers);
}

}  // namespace

int32_t rwkv_kernels_abi(void) {
    return RWKV_KERNELS_ABI;
}

const char *rwkv_kernels_target(void) {
#ifdef RWKV_HOST_SHIM
    return "host";
#else
    return "cuda";
#endif
}

const char *rwkv_status_text(int32_t status) {
#ifndef RWKV_HOST_SHIM
    if (status >= RWKV_CUDA_ERROR) return cudaGetErrorString(static_cast<cudaError_t>(status - RWKV_CUDA_ERROR));
#endif
    switch (status) {
        case RWKV_OK: return "no error";
        case RWKV_NO_SUCH_SIZE: return "no kernel for this size";
        case RWKV_NO_SUCH_IO: return "no kernel for this element type";
        case RWKV_NO_SUCH_KERNEL: return "no such kernel";
        case RWKV_NO_MEMORY: return "out of memory";
        default: return "unknown error";
    }
}

#ifdef RWKV_HOST_SHIM
// 0: threads in order; others: a random schedule each.
void rwkv_host_schedule(uint32_t seed) {
    shim::schedule = seed;
}
#endif

int64_t rwkv_saved_bytes(int32_t version, const rwkv_problem *problem) {
    const rwkv_problem &p = *problem;
    if ((version != 6 && version != 7) || check(p)) return -1;
    const int64_t states = (p.time + STEPS_BETWEEN_STATES - 1) / STEPS_BETWEEN_STATES;
    const int64_t elements = p.batch * p.heads * states * p.size * p.size;
    if (has_tensor_cores(p)) return elements * 2;
    const int64_t projections = version == 7 ? p.batch * p.time * p.heads * p.size : 0;
    return (elements + projections) * 4;
}

int32_t rwkv_wkv7_forward(const rwkv_problem *problem, const void *r, const void *w, const void *k, const void *v,
                          const void *a, const void *b, const float *state, void *y, float *final_state, void *saved) {
    return run7(*problem, rwkv::Wkv7Forward{r, w, k, v, a, b, state, y, final_state, saved});
}

int32_t rwkv_wkv7_backward(const rwkv_problem *problem, const void *r, const void *w, const void *k, const void *v,
                           const void *a, const void *b, const void *saved, const void *dy, const float *dfinal_state,
                           void *dr, void *dw, void *dk, void *dv, void *da, void *db, float *dstate) {
    return run7(*problem,
                rwkv::Wkv7Backward{r, w, k, v, a, b, saved, dy, dfinal_state, dr, dw, dk, dv, da, db, dstate});
}

int32_t rwkv_wkv6_forward(const rwkv_problem *problem, const void *r, const void *k, const void *v, const void *w,
                          const float *u, const float *state, void *y, float *final_state, void *saved) {
    return run6(*problem, rwkv::Wkv6Forward{r, k, v, w, u, state, y, final_state, saved});
}

int32_t rwkv_wkv6_backward(const rwkv_problem *problem, const void *r, const void *k, const void *v, const void *w,
                           const float *u, const void *saved, const void *dy, const float *dfinal_state, void *dr,
                           void *dk, void *dv, void *dw, float *du, float *dstate) {
    return run6(*problem, rwkv::Wkv6Backward{r, k, v, w, u, saved, dy, dfinal_state, dr, dk, dv, dw, du, dstate});
}

int32_t rwkv_softmax_loss(const rwkv_logits *shape, void *logits, const int64_t *targets, float *losses) {
    const rwkv_logits &p = *shape;
    if (p.rows > MOST_BLOCKS || p.vocabulary < 1 || p.vocabulary > RWKV_MOST_LOGITS) return RWKV_NO_SUCH_SIZE;
    if (const int32_t status = check_io(p.io)) return status;
    return p.rows ? rwkv::softmax_loss(p, logits, targets, losses) : RWKV_OK;
}
