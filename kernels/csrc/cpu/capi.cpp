// The CPU library's C interface: the fastest instruction set that the machine has, chosen when the library is loaded.
#include <string.h>

#include <atomic>
#include <memory>
#include <new>

#pragma GCC visibility push(default)
#include "../fused.h"
#include "../wkv.h"
extern "C" int32_t rwkv_select_target(const char *target);
#pragma GCC visibility pop

#include "fused.hpp"
#include "threads.hpp"
#include "wkv.hpp"

namespace {

constexpr int64_t STEPS_BETWEEN_STATES = 16;

struct Target {
    const Operators *wkv;
    const FusedOperators *fused;
    const Rwkv6Passes *rwkv6;
};

#if RWKV_HAS_X86_TARGETS
constexpr Target AVX512 = {&avx512::operators, &avx512::fused_operators, &avx512::rwkv6_passes};
constexpr Target AVX2 = {&avx2::operators, &avx2::fused_operators, &avx2::rwkv6_passes};
#endif
constexpr Target PORTABLE = {&portable::operators, &portable::fused_operators, &portable::rwkv6_passes};

const Target *find(const char *target) {
    const auto is_wanted = [&](const char *name) { return !target || !strcmp(name, target); };
#if RWKV_HAS_X86_TARGETS
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && is_wanted("avx512")) return &AVX512;
    if (has_avx2 && is_wanted("avx2")) return &AVX2;
#endif
    return is_wanted("portable") ? &PORTABLE : nullptr;
}

std::atomic<const Target *> chosen{nullptr};

const Target &target() {
    if (!chosen.load()) chosen.store(find(nullptr));
    return *chosen.load();
}

const Operators &operators() {
    return *target().wkv;
}

// body(item) for every head of the problem.
template <typename Body>
int32_t for_heads(const rwkv_problem &p, const Body &body) {
    if (p.io != RWKV_FP32 && p.io != RWKV_BF16 && p.io != RWKV_FP16) return RWKV_NO_SUCH_IO;
    if (p.size > LARGEST_SIZE) return RWKV_NO_SUCH_SIZE;
    parallel_for(p.batch * p.heads, p.threads, [&](int64_t item, int32_t) { body(item); });
    return RWKV_OK;
}

// body(operators, block) for every block of rows.
template <typename Body>
int32_t for_blocks(const rwkv_rows &p, const Body &body) {
    if (p.io != RWKV_FP32 && p.io != RWKV_BF16 && p.io != RWKV_FP16) return RWKV_NO_SUCH_IO;
    if (p.width % 16 || p.size % 16 || p.width % p.size) return RWKV_NO_SUCH_SIZE;
    const FusedOperators &fused = *target().fused;
    const int64_t blocks = (p.rows + RWKV_ROWS_IN_BLOCK - 1) / RWKV_ROWS_IN_BLOCK;
    parallel_for(blocks, p.threads, [&](int64_t block, int32_t) { body(fused, block); });
    return RWKV_OK;
}

// Parameters [width] one after another, as io has them; zeros for null. Null itself where there is no memory.
class Rounded {
  public:
    Rounded(const rwkv_rows &p, const float *const *given, int32_t count)
        : width(p.width), values(new (std::nothrow) float[count * p.width]) {
        for (int32_t i = 0; values && i < count; ++i) {
            target().fused->round_parameter(p, given[i], values.get() + i * width);
        }
    }

    explicit operator bool() const {
        return values != nullptr;
    }

    const float *operator[](int32_t i) const {
        return values.get() + i * width;
    }

  private:
    int64_t width;
    std::unique_ptr<float[]> values;
};

// body(operators, block, rounded) for every block of rows of a pass with parameters.
template <typename Body>
int32_t for_blocks(const rwkv_rows &p, const float *const *given, int32_t count, const Body &body) {
    if (p.width % 16) return RWKV_NO_SUCH_SIZE;
    const Rounded rounded(p, given, count);
    if (!rounded) return RWKV_NO_MEMORY;
    return for_blocks(p, [&](const FusedOperators &fused, int64_t block) { body(fused, block, rounded); });
}

// body(operators, block, inputs with rounded parameters) for every block of rows.
template <typename Body>
int32_t for_prepare(const rwkv_rows &p, const rwkv_prepare_inputs &inputs, const Body &body) {
    const float *const given[] = {inputs.k_k, inputs.k_a, inputs.r_k, inputs.a0, inputs.v0};
    return for_blocks(p, given, 5, [&](const FusedOperators &fused, int64_t block, const Rounded &rounded) {
        rwkv_prepare_inputs used = inputs;
        used.k_k = rounded[0], used.k_a = rounded[1], used.r_k = rounded[2], used.a0 = rounded[3], used.v0 = rounded[4];
        body(fused, block, used);
    });
}

struct NormMixArguments {
    int32_t count, rows_in_block;
    const float *weight, *bias;
    const float *const *mixes;
};

// body(operators, pass, block, scratch) for every block of rows of norm_mix; scratch: `floats` of its own for each thread.
template <typename Body>
int32_t for_norms(const rwkv_rows &p, const NormMixArguments &given, int64_t floats, const Body &body) {
    if (p.io != RWKV_FP32 && p.io != RWKV_BF16 && p.io != RWKV_FP16) return RWKV_NO_SUCH_IO;
    const bool has_count = given.count == 1 || given.count == 2 || given.count == 4 || given.count == 6;
    if (p.width % 16 || !has_count || given.rows_in_block < 1) return RWKV_NO_SUCH_SIZE;
    const FusedOperators &fused = *target().fused;
    const float *const norm[] = {given.weight, given.bias};
    const Rounded mixes(p, given.mixes, given.count), affine(p, norm, 2);
    const int64_t blocks = (p.rows + given.rows_in_block - 1) / given.rows_in_block;
    const int64_t workers = blocks < p.threads ? blocks : p.threads;
    const std::unique_ptr<float[]> scratch(new (std::nothrow) float[workers * floats]);
    if (!mixes || !affine || !scratch) return RWKV_NO_MEMORY;
    const NormMix pass = {given.count, given.rows_in_block, affine[0], affine[1], mixes[0]};
    parallel_for(blocks, workers, [&](int64_t block, int32_t worker) {
        body(fused, pass, block, scratch.get() + worker * floats);
    });
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
    const Target *found = find(target);
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

int32_t rwkv_mix_forward(const rwkv_rows *shape, int32_t count, const void *x, const float *const *mixes,
                         void *const *outputs) {
    if (count < 1 || count > RWKV_MOST_MIXES) return RWKV_NO_SUCH_SIZE;
    return for_blocks(*shape, mixes, count, [&](const FusedOperators &fused, int64_t block, const Rounded &rounded) {
        fused.mix_forward(*shape, block, count, x, rounded[0], outputs);
    });
}

int32_t rwkv_mix_backward(const rwkv_rows *shape, int32_t count, const void *x, const float *const *mixes,
                          const void *const *doutputs, void *dx, float *dmixes) {
    if (count < 1 || count > RWKV_MOST_MIXES) return RWKV_NO_SUCH_SIZE;
    return for_blocks(*shape, mixes, count, [&](const FusedOperators &fused, int64_t block, const Rounded &rounded) {
        fused.mix_backward(*shape, block, count, x, rounded[0], doutputs, dx, dmixes);
    });
}

int32_t rwkv_squared_relu_forward(const rwkv_rows *shape, const void *x, void *y) {
    return for_blocks(*shape, [&](const FusedOperators &fused, int64_t block) {
        fused.squared_relu_forward(*shape, block, x, y);
    });
}

int32_t rwkv_squared_relu_backward(const rwkv_rows *shape, const void *x, const void *dy, void *dx) {
    return for_blocks(*shape, [&](const FusedOperators &fused, int64_t block) {
        fused.squared_relu_backward(*shape, block, x, dy, dx);
    });
}

int32_t rwkv_prepare_forward(const rwkv_rows *shape, const rwkv_prepare_inputs *inputs,
                             const rwkv_prepare_outputs *outputs) {
    return for_prepare(*shape, *inputs, [&](const FusedOperators &fused, int64_t block, const auto &rounded) {
        fused.prepare_forward(*shape, block, rounded, *outputs);
    });
}

int32_t rwkv_prepare_backward(const rwkv_rows *shape, const rwkv_prepare_inputs *inputs,
                              const rwkv_prepare_doutputs *doutputs, const rwkv_prepare_dinputs *dinputs) {
    return for_prepare(*shape, *inputs, [&](const FusedOperators &fused, int64_t block, const auto &rounded) {
        fused.prepare_backward(*shape, block, rounded, *doutputs, *dinputs);
    });
}

int32_t rwkv_read_forward(const rwkv_rows *shape, const void *y, const void *v, const float *bonus, const void *gate,
                          const float *weight, const float *bias, void *out) {
    const float *const given[] = {weight, bias};
    return for_blocks(*shape, given, 2, [&](const FusedOperators &fused, int64_t block, const Rounded &rounded) {
        fused.read_forward(*shape, block, y, v, bonus, gate, rounded[0], rounded[1], out);
    });
}

int32_t rwkv_read_backward(const rwkv_rows *shape, const void *y, const void *v, const float *bonus, const void *gate,
                           const float *weight, const float *bias, const void *dout, void *dy, void *dv, float *dbonus,
                           void *dgate, float *dparameters) {
    const float *const given[] = {weight, bias};
    return for_blocks(*shape, given, 2, [&](const FusedOperators &fused, int64_t block, const Rounded &rounded) {
        fused.read_backward(*shape, block, y, v, bonus, gate, rounded[0], rounded[1], dout, dy, dv, dbonus, dgate,
                            dparameters);
    });
}

int32_t rwkv_shift_blend_forward(const rwkv_rows *shape, const void *x, const void *const *mixes,
                                 const float *const *constants, void *const *outputs) {
    const auto operate = target().rwkv6->shift_blend_forward;
    return for_blocks(*shape, constants, RWKV_MIXES_OF_DATA,
                      [&](const FusedOperators &, int64_t block, const Rounded &rounded) {
        operate(*shape, block, x, mixes, rounded[0], outputs);
    });
}

int32_t rwkv_shift_blend_backward(const rwkv_rows *shape, const void *x, const void *const *mixes,
                                  const float *const *constants, const void *const *doutputs, void *dx,
                                  void *const *dmixes, float *dconstants) {
    const auto operate = target().rwkv6->shift_blend_backward;
    return for_blocks(*shape, constants, RWKV_MIXES_OF_DATA,
                      [&](const FusedOperators &, int64_t block, const Rounded &rounded) {
        operate(*shape, block, x, mixes, rounded[0], doutputs, dx, dmixes, dconstants);
    });
}

int32_t rwkv_sigmoid_gate_forward(const rwkv_rows *shape, const void *gate, const void *value, void *y) {
    const auto operate = target().rwkv6->sigmoid_gate_forward;
    return for_blocks(*shape, [&](const FusedOperators &, int64_t block) { operate(*shape, block, gate, value, y); });
}

int32_t rwkv_sigmoid_gate_backward(const rwkv_rows *shape, const void *gate, const void *value, const void *dy,
                                   void *dgate, void *dvalue) {
    const auto operate = target().rwkv6->sigmoid_gate_backward;
    return for_blocks(*shape, [&](const FusedOperators &, int64_t block) {
        operate(*shape, block, gate, value, dy, dgate, dvalue);
    });
}

int32_t rwkv_gated_norm_forward(const rwkv_rows *shape, const void *y, const void *gate, const float *weight,
                                const float *bias, void *to) {
    const auto operate = target().rwkv6->gated_norm_forward;
    const float *const given[] = {weight, bias};
    return for_blocks(*shape, given, 2, [&](const FusedOperators &, int64_t block, const Rounded &rounded) {
        operate(*shape, block, y, gate, rounded[0], rounded[1], to);
    });
}

int32_t rwkv_gated_norm_backward(const rwkv_rows *shape, const void *y, const void *gate, const float *weight,
                                 const float *bias, const void *dout, void *dy, void *dgate, float *dparameters) {
    const auto operate = target().rwkv6->gated_norm_backward;
    const float *const given[] = {weight, bias};
    return for_blocks(*shape, given, 2, [&](const FusedOperators &, int64_t block, const Rounded &rounded) {
        operate(*shape, block, y, gate, rounded[0], rounded[1], dout, dy, dgate, dparameters);
    });
}

int32_t rwkv_norm_mix_forward(const rwkv_rows *shape, int32_t count, int32_t rows_in_block, const void *x,
                              const void *branch, const float *weight, const float *bias, const float *const *mixes,
                              void *sum, float *statistics, void *const *outputs) {
    const NormMixArguments given = {count, rows_in_block, weight, bias, mixes};
    const auto body = [&](const FusedOperators &fused, const NormMix &pass, int64_t block, float *scratch) {
        fused.norm_mix_forward(*shape, pass, block, x, branch, sum, statistics, outputs, scratch);
    };
    return for_norms(*shape, given, 2 * shape->width, body);
}

int32_t rwkv_norm_mix_backward(const rwkv_rows *shape, int32_t count, int32_t rows_in_block, const void *sum,
                               const float *statistics, const float *weight, const float *bias,
                               const float *const *mixes, const void *dsum, const void *const *doutputs, void *dx,
                               float *dparameters) {
    const NormMixArguments given = {count, rows_in_block, weight, bias, mixes};
    const auto body = [&](const FusedOperators &fused, const NormMix &pass, int64_t block, float *scratch) {
        fused.norm_mix_backward(*shape, pass, block, sum, statistics, dsum, doutputs, dx, dparameters, scratch);
    };
    return for_norms(*shape, given, rows_in_block * (shape->width + 2 * RWKV_MOST_LANES), body);
}
