// The functions of fused.h on one block of rows, as one instruction set has them; see wkv.hpp for why no threads here.
#pragma once

#include "../fused.h"

// What both directions of norm_mix have. weight, bias: [C]; mixes: [count,C].
struct NormMix {
    int32_t count, rows_in_block;
    const float *weight, *bias, *mixes;
};

constexpr int64_t RWKV_MOST_LANES = 16;  // floats of a vector register

// Parameters are as io has them, see round_parameter; those of mix and shift_blend lie side by side.
struct FusedOperators {
    void (*mix_forward)(const rwkv_rows &, int64_t block, int32_t count, const void *x, const float *mixes,
                        void *const *outputs);
    void (*mix_backward)(const rwkv_rows &, int64_t block, int32_t count, const void *x, const float *mixes,
                         const void *const *doutputs, void *dx, float *dmixes);
    void (*squared_relu_forward)(const rwkv_rows &, int64_t block, const void *x, void *y);
    void (*squared_relu_backward)(const rwkv_rows &, int64_t block, const void *x, const void *dy, void *dx);
    void (*prepare_forward)(const rwkv_rows &, int64_t block, const rwkv_prepare_inputs &, const rwkv_prepare_outputs &);
    void (*prepare_backward)(const rwkv_rows &, int64_t block, const rwkv_prepare_inputs &,
                             const rwkv_prepare_doutputs &, const rwkv_prepare_dinputs &);
    void (*read_forward)(const rwkv_rows &, int64_t block, const void *y, const void *v, const float *bonus,
                         const void *gate, const float *weight, const float *bias, void *out);
    void (*read_backward)(const rwkv_rows &, int64_t block, const void *y, const void *v, const float *bonus,
                          const void *gate, const float *weight, const float *bias, const void *dout, void *dy,
                          void *dv, float *dbonus, void *dgate, float *dparameters);
    // scratch: 2 C floats
    void (*norm_mix_forward)(const rwkv_rows &, const NormMix &, int64_t block, const void *x, const void *branch,
                             void *sum, float *statistics, void *const *outputs, float *scratch);
    // scratch: rows_in_block C + 2 rows_in_block RWKV_MOST_LANES floats
    void (*norm_mix_backward)(const rwkv_rows &, const NormMix &, int64_t block, const void *sum,
                              const float *statistics, const void *dsum, const void *const *doutputs, void *dx,
                              float *dparameters, float *scratch);
    // to [C] = from as io has it, or zeros where that is null
    void (*round_parameter)(const rwkv_rows &, const float *from, float *to);
};

// Those that RWKV-5 and 6 have alone.
struct Rwkv6Passes {
    void (*shift_blend_forward)(const rwkv_rows &, int64_t block, const void *x, const void *const *mixes,
                                const float *constants, void *const *outputs);
    void (*shift_blend_backward)(const rwkv_rows &, int64_t block, const void *x, const void *const *mixes,
                                 const float *constants, const void *const *doutputs, void *dx, void *const *dmixes,
                                 float *dconstants);
    void (*sigmoid_gate_forward)(const rwkv_rows &, int64_t block, const void *gate, const void *value, void *y);
    void (*sigmoid_gate_backward)(const rwkv_rows &, int64_t block, const void *gate, const void *value,
                                  const void *dy, void *dgate, void *dvalue);
    void (*gated_norm_forward)(const rwkv_rows &, int64_t block, const void *y, const void *gate, const float *weight,
                               const float *bias, void *out);
    void (*gated_norm_backward)(const rwkv_rows &, int64_t block, const void *y, const void *gate,
                                const float *weight, const float *bias, const void *dout, void *dy, void *dgate,
                                float *dparameters);
};

#if RWKV_HAS_X86_TARGETS
namespace avx512 {
extern const FusedOperators fused_operators;
extern const Rwkv6Passes rwkv6_passes;
}
namespace avx2 {
extern const FusedOperators fused_operators;
extern const Rwkv6Passes rwkv6_passes;
}
#endif
namespace portable {
extern const FusedOperators fused_operators;
extern const Rwkv6Passes rwkv6_passes;
}
