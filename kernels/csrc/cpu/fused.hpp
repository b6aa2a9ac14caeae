// The functions of fused.h on one block of rows, as one instruction set has them; see wkv.hpp for why no threads here.
#pragma once

#include "../fused.h"

struct FusedOperators {
    void (*mix_forward)(const rwkv_rows &, int64_t block, int32_t count, const void *x, const float *mixes,
                        void *const *outputs);
    void (*mix_backward)(const rwkv_rows &, int64_t block, int32_t count, const void *x, const float *mixes,
                         const void *const *doutputs, void *dx, float *dmixes);
    void (*squared_relu_forward)(const rwkv_rows &, int64_t block, const void *x, void *y);
    void (*squared_relu_backward)(const rwkv_rows &, int64_t block, const void *x, const void *dy, void *dx);
    void (*keys_forward)(const rwkv_rows &, int64_t block, const void *k, const void *a, const float *k_k,
                         const float *k_a, void *written, void *removed, void *replaced);
    void (*keys_backward)(const rwkv_rows &, int64_t block, const void *k, const void *a, const float *k_k,
                          const float *k_a, const void *dwritten, const void *dremoved, const void *dreplaced,
                          void *dk, void *da, float *dk_k, float *dk_a);
    void (*read_forward)(const rwkv_rows &, int64_t block, const void *y, const void *r, const void *k, const void *v,
                         const void *gate, const float *r_k, const float *weight, const float *bias, void *out);
    void (*read_backward)(const rwkv_rows &, int64_t block, const void *y, const void *r, const void *k,
                          const void *v, const void *gate, const float *r_k, const float *weight, const float *bias,
                          const void *dout, void *dy, void *dr, void *dk, void *dv, void *dgate, float *dparameters);
};

#if RWKV_HAS_X86_TARGETS
namespace avx512 {
extern const FusedOperators fused_operators;
}
namespace avx2 {
extern const FusedOperators fused_operators;
}
#endif
namespace portable {
extern const FusedOperators fused_operators;
}
