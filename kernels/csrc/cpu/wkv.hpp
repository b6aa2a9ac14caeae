// The operators of wkv.h on one head, as one instruction set has them: a table that capi.cpp chooses from at run time.
//
// `item` counts heads, 0 .. B H - 1; the other arguments are those of wkv.h, for sizes up to LARGEST_SIZE. Threads are
// capi.cpp's: the standard library's templates must not be compiled with instructions that the machine may lack,
// because the linker keeps one copy of each for all.
#pragma once

#include "../wkv.h"

constexpr int64_t LARGEST_SIZE = 128;

struct Operators {
    const char *target;
    void (*wkv7_forward)(const rwkv_problem &, int64_t item, const void *r, const void *w, const void *k, const void *v,
                         const void *a, const void *b, const float *state, void *y, float *final_state, void *saved);
    void (*wkv7_backward)(const rwkv_problem &, int64_t item, const void *r, const void *w, const void *k,
                          const void *v, const void *a, const void *b, const void *saved, const void *dy,
                          const float *dfinal_state, void *dr, void *dw, void *dk, void *dv, void *da, void *db,
                          float *dstate);
    void (*wkv6_forward)(const rwkv_problem &, int64_t item, const void *r, const void *k, const void *v,
                         const void *w, const float *u, const float *state, void *y, float *final_state, void *saved);
    void (*wkv6_backward)(const rwkv_problem &, int64_t item, const void *r, const void *k, const void *v,
                          const void *w, const float *u, const void *saved, const void *dy,
                          const float *dfinal_state, void *dr, void *dk, void *dv, void *dw, float *du, float *dstate);
};

#if RWKV_HAS_X86_TARGETS
namespace avx512 {
extern const Operators operators;
}
namespace avx2 {
extern const Operators operators;
}
#endif
namespace portable {
extern const Operators operators;
}
