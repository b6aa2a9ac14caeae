// What capi.cu dispatches to: one launcher per kernel and direction. Pointers and results are those of
// wkv.h and loss.h.
#pragma once

#include "../loss.h"
#include "../wkv.h"

namespace rwkv {

struct Wkv7Forward {
    const void *r, *w, *k, *v, *a, *b;
    const float *state;
    void *y;
    float *final_state;
    void *saved;
};

struct Wkv7Backward {
    const void *r, *w, *k, *v, *a, *b, *saved, *dy;
    const float *dfinal_state;
    void *dr, *dw, *dk, *dv, *da, *db;
    float *dstate;
};

struct Wkv6Forward {
    const void *r, *k, *v, *w;
    const float *u, *state;
    void *y;
    float *final_state;
    void *saved;
};

struct Wkv6Backward {
    const void *r, *k, *v, *w;
    const float *u;
    const void *saved, *dy;
    const float *dfinal_state;
    void *dr, *dk, *dv, *dw;
    float *du, *dstate;
};

int32_t wkv7_exact(const rwkv_problem &problem, const Wkv7Forward &pointers);
int32_t wkv7_exact(const rwkv_problem &problem, const Wkv7Backward &pointers);
int32_t wkv6_exact(const rwkv_problem &problem, const Wkv6Forward &pointers);
int32_t wkv6_exact(const rwkv_problem &problem, const Wkv6Backward &pointers);
int32_t wkv7_chunk(const rwkv_problem &problem, const Wkv7Forward &pointers);
int32_t wkv7_chunk32(const rwkv_problem &problem, const Wkv7Forward &pointers);
int32_t wkv7_chunk(const rwkv_problem &problem, const Wkv7Backward &pointers);
int32_t wkv7_chunk32(const rwkv_problem &problem, const Wkv7Backward &pointers);
bool wkv7_chunk32_backward_is_faster();  // on the current device
int32_t wkv6_chunk(const rwkv_problem &problem, const Wkv6Forward &pointers);
int32_t wkv6_chunk(const rwkv_problem &problem, const Wkv6Backward &pointers);
int32_t softmax_loss(const rwkv_logits &shape, void *logits, const int64_t *targets, float *losses);

}  // namespace rwkv
