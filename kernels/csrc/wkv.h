// The C interface of the WKV operators. Both libraries, the CPU's and CUDA's, export exactly these functions.
//
// Legend: B batch, T time, H heads, N head size, L = 16 steps between checkpoints, C(T) = ceil(T / L).
// All tensors are contiguous. [B,T,H,N] tensors and their gradients hold elements of `io`; states, u, the constant
// decay of RWKV-5 and all partial sums are fp32. Arithmetic and state are fp32, except where `kernel` says otherwise.
// States of wkv7 are [value,key]; states of wkv6 are [key,value]. A null state counts as zero; a null gradient of an
// output counts as zero; a null output is not written. Every other output is written completely.
//
// Operators (RWKV-LM's definitions; formulas in kernels/reference.py):
//   wkv7  d_t = exp(-e^{-1/2} sigmoid(w_t));  S = S diag(d_t) + (S a_t) b_t^T + v_t k_t^T;  y_t = S r_t
//   wkv6  d_t = exp(-exp(w_t));  y_t = S^T r_t + (r_t . (u k_t)) v_t;  S = diag(d_t) S + k_t v_t^T
//   wkv5  is wkv6 with one w [H,N] for all rows and times: `constant_decay`.
#pragma once
#include <stdint.h>

#define RWKV_KERNELS_ABI 5

#ifdef __cplusplus
extern "C" {
#endif

enum { RWKV_FP32 = 0, RWKV_BF16 = 1, RWKV_FP16 = 2 };
// fp32 maths; bf16 products with fp32 accumulation (CUDA, bf16 io); the same with wkv7 16 steps at a time, where it else
// takes 32 from T = 17 on
enum { RWKV_EXACT = 0, RWKV_TENSOR_CORES = 1, RWKV_TENSOR_CORES_16 = 2 };
enum { RWKV_OK = 0, RWKV_NO_SUCH_SIZE = 1, RWKV_NO_SUCH_IO = 2, RWKV_NO_SUCH_KERNEL = 3, RWKV_NO_MEMORY = 4,
       RWKV_CUDA_ERROR = 1000 };  // RWKV_CUDA_ERROR + cudaError_t

typedef struct {
    int64_t batch, time, heads, size;  // B, T, H, N, all positive. N: CPU up to 128; CUDA 32, 64, 128, tensor cores 64
    int32_t io;
    int32_t kernel;
    int32_t threads;  // CPU: at most this many, counting the caller's. CUDA: ignored
    int32_t constant_decay;  // wkv6: 1 when w is fp32 [H,N]
    void *stream;  // CUDA: cudaStream_t on the current device. CPU: ignored
    const uint8_t *starts;  // [B,T], 1 where a document begins: the state before that step is zero. Null: none begins
} rwkv_problem;

int32_t rwkv_kernels_abi(void);  // RWKV_KERNELS_ABI of the library
const char *rwkv_kernels_target(void);  // what runs: "avx512", "avx2", "portable", "cuda", "host"
const char *rwkv_status_text(int32_t status);

// Bytes of `saved`, what forward keeps for backward, for version 6 or 7; -1 where the problem has no kernel.
int64_t rwkv_saved_bytes(int32_t version, const rwkv_problem *problem);

// y [B,T,H,N], final_state [B,H,N,N]; saved may be null when no backward follows.
int32_t rwkv_wkv7_forward(const rwkv_problem *problem, const void *r, const void *w, const void *k, const void *v,
                          const void *a, const void *b, const float *state, void *y, float *final_state, void *saved);
int32_t rwkv_wkv7_backward(const rwkv_problem *problem, const void *r, const void *w, const void *k, const void *v,
                           const void *a, const void *b, const void *saved, const void *dy, const float *dfinal_state,
                           void *dr, void *dw, void *dk, void *dv, void *da, void *db, float *dstate);

// w is io [B,T,H,N], or fp32 [H,N] with constant_decay; u fp32 [H,N].
int32_t rwkv_wkv6_forward(const rwkv_problem *problem, const void *r, const void *k, const void *v, const void *w,
                          const float *u, const float *state, void *y, float *final_state, void *saved);
// dw is io [B,T,H,N], or with constant_decay fp32 [B,H,N], to be summed over B; so is du, fp32 [B,H,N].
int32_t rwkv_wkv6_backward(const rwkv_problem *problem, const void *r, const void *k, const void *v, const void *w,
                           const float *u, const void *saved, const void *dy, const float *dfinal_state, void *dr,
                           void *dk, void *dv, void *dw, float *du, float *dstate);

#ifdef __cplusplus
}
#endif
