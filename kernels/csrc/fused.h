// The C interface of what a block computes beside its matrix products and WKV. Both libraries, the CPU's and CUDA's,
// export these functions; blend and gated_norm are CUDA's alone.
//
// Tensors are contiguous; [R,C] tensors have R = B T rows and hold elements of `io`; parameters are fp32. Gradients of
// parameters are partial sums, fp32 [ceil(R / RWKV_ROWS_IN_BLOCK), ..], to be summed over their first dimension: what a
// block of rows adds up does not depend on the number of threads. C is a multiple of 16, and so is the head size N. CUDA:
// addresses of tensors are multiples of 16, and in the passes over heads (keys, read, gated_norm) N is a power of two
// up to 256.
#pragma once
#include <stdint.h>

#define RWKV_ROWS_IN_BLOCK 64
#define RWKV_MOST_MIXES 6

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int64_t rows, time, width, size;  // R = B T, T, C, N
    int32_t io;
    int32_t threads;  // CPU: at most this many, counting the caller's. CUDA: ignored
    void *stream;  // CUDA: cudaStream_t on the current device. CPU: ignored
    const uint8_t *starts;  // mix: [R], 1 where a document begins. Null: only sequences begin
} rwkv_rows;

// outputs[m] = x + (previous x - x) mixes[m] for m < count; the row before the first of a sequence or document is zero.
// mixes [count,C].
int32_t rwkv_mix_forward(const rwkv_rows *shape, int32_t count, const void *x, const float *mixes,
                         void *const *outputs);
// doutputs: count tensors. dx [R,C]; dmixes: partial [count,C].
int32_t rwkv_mix_backward(const rwkv_rows *shape, int32_t count, const void *x, const float *mixes,
                          const void *const *doutputs, void *dx, float *dmixes);

// outputs[m] = x + delta mixes[m] for m < count; all [R,C].
int32_t rwkv_blend_forward(const rwkv_rows *shape, int32_t count, const void *x, const void *delta,
                           const void *const *mixes, void *const *outputs);
// mixes, doutputs, dmixes: count tensors.
int32_t rwkv_blend_backward(const rwkv_rows *shape, int32_t count, const void *delta, const void *const *mixes,
                            const void *const *doutputs, void *dx, void *ddelta, void *const *dmixes);

// y = relu(x)^2, and dx = 2 relu(x) dy.
int32_t rwkv_squared_relu_forward(const rwkv_rows *shape, const void *x, void *y);
int32_t rwkv_squared_relu_backward(const rwkv_rows *shape, const void *x, const void *dy, void *dx);

// kappa = per-head unit vector along k k_k; written = k (1 + (a - 1) k_a), removed = -kappa, replaced = kappa a.
int32_t rwkv_keys_forward(const rwkv_rows *shape, const void *k, const void *a, const float *k_k, const float *k_a,
                          void *written, void *removed, void *replaced);
int32_t rwkv_keys_backward(const rwkv_rows *shape, const void *k, const void *a, const float *k_k, const float *k_a,
                           const void *dwritten, const void *dremoved, const void *dreplaced, void *dk, void *da,
                           float *dk_k, float *dk_a);

// out = (norm(y) weight + bias + (sum over a head of r k r_k) v) gate; norm over a head, eps 64e-5. Parameters [C].
int32_t rwkv_read_forward(const rwkv_rows *shape, const void *y, const void *r, const void *k, const void *v,
                          const void *gate, const float *r_k, const float *weight, const float *bias, void *out);
// dparameters: partial [3,C] of r_k, weight, bias.
int32_t rwkv_read_backward(const rwkv_rows *shape, const void *y, const void *r, const void *k, const void *v,
                           const void *gate, const float *r_k, const float *weight, const float *bias,
                           const void *dout, void *dy, void *dr, void *dk, void *dv, void *dgate, float *dparameters);

// out = (norm(y) weight + bias) silu(gate); norm as in read. Parameters [C]; dparameters: partial [2,C] of both.
int32_t rwkv_gated_norm_forward(const rwkv_rows *shape, const void *y, const void *gate, const float *weight,
                                const float *bias, void *out);
int32_t rwkv_gated_norm_backward(const rwkv_rows *shape, const void *y, const void *gate, const float *weight,
                                 const float *bias, const void *dout, void *dy, void *dgate, float *dparameters);

#ifdef __cplusplus
}
#endif
