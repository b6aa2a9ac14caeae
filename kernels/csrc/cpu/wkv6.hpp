// RWKV-6 on one head, and RWKV-5, whose decay is the same at all times: forward, and backward from saved states.
//
//   d = exp(-exp(w));  y_t = S^T r_t + (r_t . (u k_t)) v_t;  S = diag(d_t) S + k_t v_t^T
//
// In here S is [value,key], the transpose of what callers see, so that a row runs along memory. Backward, G the
// gradient of the state, from the last step to the first, c = v . dy:
//   dr = S dy + u k c;  dk = G v + u r c;  dv = G^T k + (r . (u k)) dy;  du += r k c
//   dd = sums over values of G * S_{t-1};  G = diag(d) G + r dy^T
#pragma once

#include "chunk.hpp"

namespace RWKV_TARGET {

template <int N>
struct alignas(64) Inputs6 {
    Row<N> r[PADDED], d[PADDED], k[PADDED], v[PADDED], rate[PADDED];  // rate: exp(w) = -log d
    float bonus[L];                          // r . (u k)
    uint8_t begins[L];                       // a document
};

// w: [B,T,H,N] elements; or, where it is null, `constant`, the head's fp32 [N].
struct Pointers6 {
    const void *r, *k, *v, *w;
    const float *constant, *u;
};

template <int N>
RWKV_INLINE void set_decay(Inputs6<N> &x, int t) {
    for (int c = 0; c < N; c += LANES) {
        const vec rate = exp(load(&x.rate[t][c]));
        store(&x.rate[t][c], rate);
        store(&x.d[t][c], exp(-rate));
    }
}

// Of all chunks, with a constant decay, which load_inputs then leaves alone.
template <int N>
void set_constant_decay(Inputs6<N> &x, const Pointers6 &in, int size) {
    if (in.w) return;
    for (int t = 0; t < L; ++t) {
        load_rows<N>(&x.rate[t], in.constant, 0, 1, size);
        set_decay(x, t);
    }
}

template <int N>
void load_inputs(Inputs6<N> &x, const Pointers6 &from, const float *u, const Head &head, int64_t start, int steps) {
    load_rows<N>(x.r, from.r, head.io, head.at(start), head.stride, steps, head.size);
    load_rows<N>(x.k, from.k, head.io, head.at(start), head.stride, steps, head.size);
    load_rows<N>(x.v, from.v, head.io, head.at(start), head.stride, steps, head.size);
    if (from.w) load_rows<N>(x.rate, from.w, head.io, head.at(start), head.stride, steps, head.size);
    head.load_starts(x.begins, start, steps);
    for (int t = 0; t < steps; ++t) {
        if (from.w) set_decay(x, t);
        vec bonus = {};
        for (int c = 0; c < N; c += LANES) bonus += load(&x.r[t][c]) * load(u + c) * load(&x.k[t][c]);
        x.bonus[t] = sum(bonus);
    }
}

// from [rows][columns] transposed, for `size` of both; zeros elsewhere, and for a null pointer.
template <int N>
RWKV_INLINE void load_transposed(Row<N> *to, const float *from, int size) {
    memset(to, 0, sizeof(Row<N>) * N);
    if (!from) return;
    for (int i = 0; i < size; ++i) {
        for (int j = 0; j < size; ++j) to[j][i] = from[i * size + j];
    }
}

template <int N>
RWKV_INLINE void store_transposed(float *to, const Row<N> *from, int size) {
    if (!to) return;
    for (int i = 0; i < size; ++i) {
        for (int j = 0; j < size; ++j) to[j * size + i] = from[i][j];
    }
}

template <int N>
void wkv6_forward_head(const Head &head, const Pointers6 &in, const float *state, void *y, float *final_state,
                       float *saved) {
    const int size = head.size;
    struct alignas(64) {
        Inputs6<N> x;
        Row<N> u, y[PADDED], s[N];
    } local;
    Inputs6<N> &x = local.x;
    load_rows<N>(&local.u, in.u, 0, 1, size);
    set_constant_decay(x, in, size);
    load_transposed<N>(local.s, state, size);
    for (int64_t start = 0; start < head.time; start += L) {
        const int steps = head.time - start < L ? head.time - start : L;
        load_inputs(x, in, local.u, head, start, steps);
        if (saved) store_state<N>(saved + start / L * size * size, local.s, size);
        for (int i = 0; i < size; i += R) {
            vec s[R][N / LANES];
            for (int q = 0; q < R; ++q) {
                for (int c = 0; c < N / LANES; ++c) s[q][c] = load(&local.s[i + q][c * LANES]);
            }
            for (int t = 0; t < steps; ++t) {
                const float *v = &x.v[t][i];
                if (x.begins[t]) clear<N>(s);
                vec by_r[R] = {};
                for (int q = 0; q < R; ++q) {
                    for (int c = 0; c < N / LANES; ++c) {
                        const int j = c * LANES;
                        by_r[q] += s[q][c] * load(&x.r[t][j]);
                        s[q][c] = s[q][c] * load(&x.d[t][j]) + splat(v[q]) * load(&x.k[t][j]);
                    }
                }
                float read[R];
                sums(by_r, read);
                for (int q = 0; q < R; ++q) local.y[t][i + q] = read[q] + x.bonus[t] * v[q];
            }
            for (int q = 0; q < R; ++q) {
                for (int c = 0; c < N / LANES; ++c) store(&local.s[i + q][c * LANES], s[q][c]);
            }
        }
        store_rows<N>(y, head.io, head.at(start), local.y, head.stride, steps, size);
    }
    store_transposed<N>(final_state, local.s, size);
}

template <int N>
struct alignas(64) Backward6 {
    Inputs6<N> x;
    Row<N> dy[PADDED];
    Row<N> dr[PADDED], dd[PADDED], dk[PADDED], dv[PADDED];
    Row<N> states[L][R];
    Row<N> g[N];
    Row<N> u, du, dw;  // the last two: sums over time, dw for a constant decay
    float v_dy[L];
};

// The states of rows i.. before every step of the chunk, from `start`, the chunk's first.
template <int N>
RWKV_INLINE void recompute(Backward6<N> &local, const float *start, int i, int steps, int size) {
    const Inputs6<N> &x = local.x;
    Row<N> first[R];
    const int rows = size - i < R ? size - i : R;
    load_rows<N>(first, start + i * size, size, rows, size);
    memset(first[rows], 0, sizeof(Row<N>) * (R - rows));
    vec s[R][N / LANES];
    for (int q = 0; q < R; ++q) {
        for (int c = 0; c < N / LANES; ++c) s[q][c] = load(&first[q][c * LANES]);
    }
    for (int t = 0; t < steps;) {  // by documents: a branch in every step would cost a tenth of the backward pass
        if (x.begins[t]) clear<N>(s);
        for (const int end = document_end(x.begins, t, steps); t < end; ++t) {
            for (int q = 0; q < R; ++q) {
                const vec v = splat(x.v[t][i + q]);
                for (int c = 0; c < N / LANES; ++c) {
                    const int j = c * LANES;
                    store(&local.states[t][q][j], s[q][c]);
                    s[q][c] = s[q][c] * load(&x.d[t][j]) + v * load(&x.k[t][j]);
                }
            }
        }
    }
}

// One step back for rows i..: adds the rows' part to the gradients of step t and moves g, their part of G, before it.
template <int N>
RWKV_INLINE void step_back(Backward6<N> &local, vec (&g)[R][N / LANES], int i, int t) {
    const Inputs6<N> &x = local.x;
    const float *dy = &local.dy[t][i], *v = &x.v[t][i];
    vec by_k[R] = {};
    for (int q = 0; q < R; ++q) {
        for (int c = 0; c < N / LANES; ++c) by_k[q] += g[q][c] * load(&x.k[t][c * LANES]);
    }
    float dv[R];
    sums(by_k, dv);
    for (int q = 0; q < R; ++q) local.dv[t][i + q] = dv[q] + x.bonus[t] * dy[q];
    for (int c = 0; c < N / LANES; ++c) {
        const int j = c * LANES;
        vec dr = load(&local.dr[t][j]), dd = load(&local.dd[t][j]), dk = load(&local.dk[t][j]);
        const vec d = load(&x.d[t][j]), r = load(&x.r[t][j]);
        for (int q = 0; q < R; ++q) {
            const vec before = load(&local.states[t][q][j]);
            dr += before * splat(dy[q]);
            dd += g[q][c] * before;
            dk += g[q][c] * splat(v[q]);
            g[q][c] = g[q][c] * d + splat(dy[q]) * r;
        }
        store(&local.dr[t][j], dr);
        store(&local.dd[t][j], dd);
        store(&local.dk[t][j], dk);
    }
    if (x.begins[t]) clear<N>(g);
}

// The terms of the bonus, and dd, now complete, as the gradient of w.
template <int N>
RWKV_INLINE void finish_step(Backward6<N> &local, int t) {
    const Inputs6<N> &x = local.x;
    const vec v_dy = splat(local.v_dy[t]);
    for (int c = 0; c < N; c += LANES) {
        const vec r = load(&x.r[t][c]), k = load(&x.k[t][c]), u = load(&local.u[c]);
        const vec d = load(&x.d[t][c]), rate = load(&x.rate[t][c]);
        store(&local.dr[t][c], load(&local.dr[t][c]) + u * k * v_dy);
        store(&local.dk[t][c], load(&local.dk[t][c]) + u * r * v_dy);
        store(&local.du[c], load(&local.du[c]) + r * k * v_dy);
        // d log d / dw = -exp(w): infinite where w is large, but d falls faster than it grows
        const vec dw = select(d == 0.0f, vec{}, -load(&local.dd[t][c]) * d * rate);
        store(&local.dd[t][c], dw);
        store(&local.dw[c], load(&local.dw[c]) + dw);
    }
}

// dw: null with a constant decay, whose gradient goes to dconstant.
struct Gradients6 {
    void *dr, *dk, *dv, *dw;
    float *dconstant, *du;
};

template <int N>
void wkv6_backward_head(const Head &head, const Pointers6 &in, const float *saved, const void *dy,
                        const float *dfinal_state, const Gradients6 &out, float *dstate) {
    const int size = head.size;
    Backward6<N> local;
    Inputs6<N> &x = local.x;
    load_rows<N>(&local.u, in.u, 0, 1, size);
    set_constant_decay(x, in, size);
    load_transposed<N>(local.g, dfinal_state, size);
    memset(local.du, 0, sizeof(local.du) + sizeof(local.dw));
    for (int64_t start = (head.time - 1) / L * L; start >= 0; start -= L) {
        const int64_t at = head.at(start);
        const int steps = head.time - start < L ? head.time - start : L;
        load_inputs(x, in, local.u, head, start, steps);
        if (dy) load_rows<N>(local.dy, dy, head.io, at, head.stride, steps, size);
        else memset(local.dy, 0, sizeof(local.dy));
        for (int t = 0; t < steps; ++t) {
            vec v_dy = {};
            for (int c = 0; c < N; c += LANES) v_dy += load(&x.v[t][c]) * load(&local.dy[t][c]);
            local.v_dy[t] = sum(v_dy);
        }
        memset(local.dr, 0, sizeof(local.dr) * 3);
        for (int i = 0; i < size; i += R) {
            recompute<N>(local, saved + start / L * size * size, i, steps, size);
            vec g[R][N / LANES];
            for (int q = 0; q < R; ++q) {
                for (int c = 0; c < N / LANES; ++c) g[q][c] = load(&local.g[i + q][c * LANES]);
            }
            for (int t = steps - 1; t >= 0; --t) step_back<N>(local, g, i, t);
            for (int q = 0; q < R; ++q) {
                for (int c = 0; c < N / LANES; ++c) store(&local.g[i + q][c * LANES], g[q][c]);
            }
        }
        for (int t = steps - 1; t >= 0; --t) finish_step(local, t);
        store_rows<N>(out.dr, head.io, at, local.dr, head.stride, steps, size);
        store_rows<N>(out.dk, head.io, at, local.dk, head.stride, steps, size);
        store_rows<N>(out.dv, head.io, at, local.dv, head.stride, steps, size);
        if (out.dw) store_rows<N>(out.dw, head.io, at, local.dd, head.stride, steps, size);
    }
    store_rows<N>(out.du, &local.du, 0, 1, size);
    if (out.dconstant) store_rows<N>(out.dconstant, &local.dw, 0, 1, size);
    store_transposed<N>(dstate, local.g, size);
}

}  // namespace RWKV_TARGET
