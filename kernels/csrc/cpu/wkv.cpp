// The operators of one instruction set, RWKV_TARGET, on one head of a problem.
#include "wkv.hpp"

#include <type_traits>

#include "wkv6.hpp"
#include "wkv7.hpp"

namespace RWKV_TARGET {
namespace {

// Where a head's part of the smaller tensors begins, in elements.
struct Places {
    int64_t state, saved, row, channel;  // [B,H,N,N], [B,H,C(T),N,N], [B,H,N], [H,N]
};

template <typename T>
T *at(T *pointer, int64_t offset) {
    return pointer ? pointer + offset : nullptr;
}

// The projections follow the states of all heads in `saved`.
Saved7 saved7(const rwkv_problem &p, int64_t item, const void *saved) {
    if (!saved) return {nullptr, nullptr};
    const int64_t states = (p.time + L - 1) / L * p.size * p.size;
    float *first = static_cast<float *>(const_cast<void *>(saved));
    return {first + item * states, first + p.batch * p.heads * states + item * p.time * p.size};
}

// body(size that has a kernel, head, places).
template <typename Body>
void on_head(const rwkv_problem &p, int64_t item, const Body &body) {
    const int64_t batch = item / p.heads, channel = item % p.heads * p.size, stride = p.heads * p.size;
    const int64_t states = (p.time + L - 1) / L, area = p.size * p.size;
    const uint8_t *starts = p.starts ? p.starts + batch * p.time : nullptr;
    const Head head{p.time, batch * p.time * stride + channel, stride, static_cast<int>(p.size), p.io, starts};
    const Places places{item * area, item * states * area, item * p.size, channel};
    if (p.size <= 64) body(std::integral_constant<int, 64>(), head, places);
    else body(std::integral_constant<int, LARGEST_SIZE>(), head, places);
}

void wkv7_forward(const rwkv_problem &problem, int64_t item, const void *r, const void *w, const void *k,
                  const void *v, const void *a, const void *b, const float *state, void *y, float *final_state,
                  void *saved) {
    on_head(problem, item, [&](auto padded, const Head &head, const Places &places) {
        wkv7_forward_head<padded.value>(head, {r, w, k, v, a, b}, at(state, places.state), y,
                                        at(final_state, places.state), saved7(problem, item, saved));
    });
}

void wkv7_backward(const rwkv_problem &problem, int64_t item, const void *r, const void *w, const void *k,
                   const void *v, const void *a, const void *b, const void *saved, const void *dy,
                   const float *dfinal_state, void *dr, void *dw, void *dk, void *dv, void *da, void *db,
                   float *dstate) {
    on_head(problem, item, [&](auto padded, const Head &head, const Places &places) {
        wkv7_backward_head<padded.value>(head, {r, w, k, v, a, b}, saved7(problem, item, saved), dy,
                                         at(dfinal_state, places.state), {dr, dw, dk, dv, da, db},
                                         at(dstate, places.state));
    });
}

Pointers6 inputs6(const rwkv_problem &p, const Places &places, const void *r, const void *k, const void *v,
                  const void *w, const float *u) {
    const float *constant = p.constant_decay ? static_cast<const float *>(w) + places.channel : nullptr;
    return {r, k, v, p.constant_decay ? nullptr : w, constant, u + places.channel};
}

void wkv6_forward(const rwkv_problem &problem, int64_t item, const void *r, const void *k, const void *v,
                  const void *w, const float *u, const float *state, void *y, float *final_state, void *saved) {
    on_head(problem, item, [&](auto padded, const Head &head, const Places &places) {
        wkv6_forward_head<padded.value>(head, inputs6(problem, places, r, k, v, w, u), at(state, places.state), y,
                                        at(final_state, places.state), at(static_cast<float *>(saved), places.saved));
    });
}

void wkv6_backward(const rwkv_problem &problem, int64_t item, const void *r, const void *k, const void *v,
                   const void *w, const float *u, const void *saved, const void *dy, const float *dfinal_state,
                   void *dr, void *dk, void *dv, void *dw, float *du, float *dstate) {
    on_head(problem, item, [&](auto padded, const Head &head, const Places &places) {
        const bool constant = problem.constant_decay;
        const Gradients6 gradients{dr, dk, dv, constant ? nullptr : dw,
                                   constant ? static_cast<float *>(dw) + places.row : nullptr, du + places.row};
        wkv6_backward_head<padded.value>(head, inputs6(problem, places, r, k, v, w, u),
                                         static_cast<const float *>(saved) + places.saved, dy,
                                         at(dfinal_state, places.state), gradients, at(dstate, places.state));
    });
}

#define RWKV_TEXT(x) #x
#define RWKV_NAME(x) RWKV_TEXT(x)

}  // namespace

extern const Operators operators = {RWKV_NAME(RWKV_TARGET), wkv7_forward, wkv7_backward, wkv6_forward, wkv6_backward};

}  // namespace RWKV_TARGET
