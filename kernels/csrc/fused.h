// The C interface of what a block computes beside its matrix products and WKV. Both libraries, the CPU's and CUDA's,
// export these functions.
//
// Tensors are contiguous; [R,C] tensors have R = B T rows and hold elements of `io`; parameters are fp32 [C], and are used
// as they are in io. Gradients of parameters are partial sums, fp32 [ceil(R / RWKV_ROWS_IN_BLOCK), ..], to be summed over
// their first dimension: what a block of rows adds up does not depend on the number of threads. C is a multiple of 16, and
// so is the head size N. CUDA: addresses of tensors are multiples of 16, and in the passes over heads (prepare, read,
// gated_norm) N is a power of two up to 256.
#pragma once
#include <stdint.h>

#define RWKV_ROWS_IN_BLOCK 64
#define RWKV_MOST_MIXES 6
#define RWKV_MIXES_OF_DATA 5
#define RWKV_WIDEST_NORM_MIX 2560  // of CUDA

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int64_t rows, time, width, size;  // R = B T, T, C, N
    int32_t io;
    int32_t threads;  // CPU: at most this many, counting the caller's. CUDA: ignored
    void *stream;  // CUDA: cudaStream_t on the current device. CPU: ignored
    const uint8_t *starts;  // mix, norm_mix, shift_blend: [R], 1 where a document begins. Null: only sequences begin
} rwkv_rows;

// outputs[m] = x + (previous x - x) mixes[m] for m < count; the row before the first of a sequence or document is zero.
int32_t rwkv_mix_forward(const rwkv_rows *shape, int32_t count, const void *x, const float *const *mixes,
                         void *const *outputs);
// doutputs: count tensors. dx [R,C]; dmixes: partial [count,C].
int32_t rwkv_mix_backward(const rwkv_rows *shape, int32_t count, const void *x, const float *const *mixes,
                          const void *const *doutputs, void *dx, float *dmixes);

// What stands before each half of a block: sum = x + branch, rounded to io; h = norm(sum) weight + bias, norm over C, eps
// 1e-5; outputs[m] = h + (previous h - h) mixes[m] for m < count, and h itself where mixes[m] is null. Without a branch,
// null, x is the sum, and `sum` is not written. statistics: [2,R], mean and 1 / deviation. Blocks have rows_in_block rows. 1, 2, 4 or 6 mixes. CUDA: C up to
// RWKV_WIDEST_NORM_MIX.
int32_t rwkv_norm_mix_forward(const rwkv_rows *shape, int32_t count, int32_t rows_in_block, const void *x,
                              const void *branch, const float *weight, const float *bias, const float *const *mixes,
                              void *sum, float *statistics, void *const *outputs);
// dsum: what reaches the sum from elsewhere; null for nothing. dx: of x and of the branch alike. dparameters: partial
// [count + 2,C] of mixes, weight and bias, by blocks of rows_in_block rows.
int32_t rwkv_norm_mix_backward(const rwkv_rows *shape, int32_t count, int32_t rows_in_block, const void *sum,
                               const float *statistics, const float *weight, const float *bias,
                               const float *const *mixes, const void *dsum, const void *const *doutputs, void *dx,
                               float *dparameters);

// RWKV-6: outputs[m] = x + (previous x - x) (mixes[m] + constants[m]) for m < RWKV_MIXES_OF_DATA; the previous as in mix.
// mixes: tensors [R,C].
int32_t rwkv_shift_blend_forward(const rwkv_rows *shape, const void *x, const void *const *mixes,
                                 const float *const *constants, void *const *outputs);
// doutputs, dmixes: tensors as mixes. dx [R,C]; dconstants: partial [RWKV_MIXES_OF_DATA,C].
int32_t rwkv_shift_blend_backward(const rwkv_rows *shape, const void *x, const void *const *mixes,
                                  const float *const *constants, const void *const *doutputs, void *dx,
                                  void *const *dmixes, float *dconstants);

// y = sigmoid(gate) value; all [R,C].
int32_t rwkv_sigmoid_gate_forward(const rwkv_rows *shape, const void *gate, const void *value, void *y);
int32_t rwkv_sigmoid_gate_backward(const rwkv_rows *shape, const void *gate, const void *value, const void *dy,
                                   void *dgate, void *dvalue);

// y = relu(x)^2, and dx = 2 relu(x) dy.
int32_t rwkv_squared_relu_forward(const rwkv_rows *shape, const void *x, void *y);
int32_t rwkv_squared_relu_backward(const rwkv_rows *shape, const void *x, const void *dy, void *dx);

// RWKV-7's pass before WKV: [R,C] tensors r, k, v, what passes from block 0 (v_first), and a and v_mix before their sigmoids
// and without their biases; and parameters. In block 0 v_first, v_mix and v0 are null, and v stays what it is.
typedef struct {
    const void *r, *k, *a, *v, *v_first, *v_mix;
    const float *k_k, *k_a, *r_k, *a0, *v0;
} rwkv_prepare_inputs;

// written = k (1 + (rate - 1) k_a), removed = -kappa, replaced = kappa rate, with rate = sigmoid(a + a0) and kappa the
// per-head unit vector along k k_k; mixed = v + (v_first - v) sigmoid(v_mix + v0), null in block 0; bonus, fp32 [R,C/N] =
// sum over a head of r written r_k.
typedef struct {
    void *written, *removed, *replaced, *mixed;
    float *bonus;
} rwkv_prepare_outputs;

// Gradients of the outputs. Besides, r and v_first have later uses, and mixed has two (in block 0 that is v itself, and so
// is v_first): their gradients come too, and are added here. v_first may be null.
typedef struct {
    const void *r, *written, *removed, *replaced, *mixed, *mixed_again, *v_first;
    const float *bonus;
} rwkv_prepare_doutputs;

// Gradients of the inputs. parameters: partial [5,C] of k_k, k_a, r_k, a0, v0. In block 0 v_first and v_mix are null, and
// parameters [4,C] are without v0.
typedef struct {
    void *r, *k, *a, *v, *v_first, *v_mix;
    float *parameters;
} rwkv_prepare_dinputs;

int32_t rwkv_prepare_forward(const rwkv_rows *shape, const rwkv_prepare_inputs *inputs,
                             const rwkv_prepare_outputs *outputs);
int32_t rwkv_prepare_backward(const rwkv_rows *shape, const rwkv_prepare_inputs *inputs,
                              const rwkv_prepare_doutputs *doutputs, const rwkv_prepare_dinputs *dinputs);

// out = (norm(y) weight + bias + bonus v) gate; norm over a head, eps 64e-5. bonus fp32 [R,C/N].
int32_t rwkv_read_forward(const rwkv_rows *shape, const void *y, const void *v, const float *bonus, const void *gate,
                          const float *weight, const float *bias, void *out);
// dparameters: partial [2,C] of weight and bias.
int32_t rwkv_read_backward(const rwkv_rows *shape, const void *y, const void *v, const float *bonus, const void *gate,
                           const float *weight, const float *bias, const void *dout, void *dy, void *dv, float *dbonus,
                           void *dgate, float *dparameters);

// out = (norm(y) weight + bias) silu(gate); norm as in read. dparameters: partial [2,C] of weight and bias.
int32_t rwkv_gated_norm_forward(const rwkv_rows *shape, const void *y, const void *gate, const float *weight,
                                const float *bias, void *out);
int32_t rwkv_gated_norm_backward(const rwkv_rows *shape, const void *y, const void *gate, const float *weight,
                                 const float *bias, const void *dout, void *dy, void *dgate, float *dparameters);

#ifdef __cplusplus
}
#endif
