// RWKV-7 on one head: forward, and backward from the states that forward saved.
//
//   d = exp(-e^{-1/2} sigmoid(w));  S = S diag(d) + (S a) b^T + v k^T;  y = S r;  S is [value,key]
//
// Backward, G the gradient of the state, from the last step to the first:
//   dr = S_t^T dy;  G += dy r^T;  dv = G k;  dsa = G b;  dk = G^T v;  db = G^T sa;  da = S_{t-1}^T dsa
//   dd = columns' sums of G * S_{t-1};  G = G diag(d) + dsa a^T
#pragma once

#include <initializer_list>

#include "chunk.hpp"

namespace RWKV_TARGET {

constexpr float LOG_DECAY_SCALE = -0.60653065971263342f;  // -e^{-1/2}

template <int N>
struct alignas(64) Inputs7 {
    Row<N> r[PADDED], d[PADDED], k[PADDED], v[PADDED], a[PADDED], b[PADDED];
    uint8_t begins[L];  // a document
};

struct Pointers7 {
    const void *r, *w, *k, *v, *a, *b;
};

template <int N>
void load_inputs(Inputs7<N> &x, const Pointers7 &from, const Head &head, int64_t start, int steps) {
    load_rows<N>(x.r, from.r, head.io, head.at(start), head.stride, steps, head.size);
    load_rows<N>(x.d, from.w, head.io, head.at(start), head.stride, steps, head.size);
    load_rows<N>(x.k, from.k, head.io, head.at(start), head.stride, steps, head.size);
    load_rows<N>(x.v, from.v, head.io, head.at(start), head.stride, steps, head.size);
    load_rows<N>(x.a, from.a, head.io, head.at(start), head.stride, steps, head.size);
    load_rows<N>(x.b, from.b, head.io, head.at(start), head.stride, steps, head.size);
    head.load_starts(x.begins, start, steps);
}

// Spread over a chunk's groups of rows: group i asks for the chunk's step i / R of the chunk that comes next.
RWKV_INLINE void prefetch_inputs(const Pointers7 &from, const Head &head, int64_t next, int i) {
    const int64_t step = next + i / R;
    if (next < 0 || i / R >= L || step >= head.time) return;
    for (const void *input : {from.r, from.w, from.k, from.v, from.a, from.b}) {
        prefetch_row(input, head.io, head.at(step), head.size);
    }
}

// What forward keeps for backward: the state of every 16th step [C(T),N,N], and sa [T,N], which spares the recomputation
// its sums. Null where no backward follows.
struct Saved7 {
    float *states, *sa;
};

// sa = S a for R rows of the state.
template <int N>
RWKV_INLINE void project(const vec (&s)[R][N / LANES], const float *a, float (&sa)[R]) {
    vec sum[R];
    for (int q = 0; q < R; ++q) {
        sum[q] = s[q][0] * load(a);
        for (int c = 1; c < N / LANES; ++c) sum[q] += s[q][c] * load(a + c * LANES);
    }
    sums(sum, sa);
}

// R rows one step on; v points to their R values.
template <int N>
RWKV_INLINE void advance(vec (&s)[R][N / LANES], const Inputs7<N> &x, int t, const float *sa,
                         const float *v) {
    for (int q = 0; q < R; ++q) {
        const vec its_sa = splat(sa[q]), its_v = splat(v[q]);
        for (int c = 0; c < N / LANES; ++c) {
            const int j = c * LANES;
            s[q][c] = s[q][c] * load(&x.d[t][j]) + its_sa * load(&x.b[t][j]) + its_v * load(&x.k[t][j]);
        }
    }
}

template <int N>
void wkv7_forward_head(const Head &head, const Pointers7 &in, const float *state, void *y, float *final_state,
                       const Saved7 &saved) {
    const int size = head.size;
    struct alignas(64) {
        Inputs7<N> x;
        Row<N> y[PADDED], sa[PADDED], s[N];
    } local;
    Inputs7<N> &x = local.x;
    load_state<N>(local.s, state, size);
    for (int64_t start = 0; start < head.time; start += L) {
        const int steps = head.time - start < L ? head.time - start : L;
        load_inputs(x, in, head, start, steps);
        for (int t = 0; t < steps; ++t) {
            for (int c = 0; c < N; c += LANES) store(&x.d[t][c], exp(LOG_DECAY_SCALE * sigmoid(load(&x.d[t][c]))));
        }
        if (saved.states) store_state<N>(saved.states + start / L * size * size, local.s, size);
        for (int i = 0; i < size; i += R) {
            prefetch_inputs(in, head, start + L, i);
            vec s[R][N / LANES];
            for (int q = 0; q < R; ++q) {
                for (int c = 0; c < N / LANES; ++c) s[q][c] = load(&local.s[i + q][c * LANES]);
            }
            for (int t = 0; t < steps; ++t) {
                float sa[R], read[R];
                if (x.begins[t]) clear<N>(s);
                project<N>(s, x.a[t], sa);
                memcpy(&local.sa[t][i], sa, sizeof(sa));
                advance<N>(s, x, t, sa, &x.v[t][i]);
                project<N>(s, x.r[t], read);
                memcpy(&local.y[t][i], read, sizeof(read));
            }
            for (int q = 0; q < R; ++q) {
                for (int c = 0; c < N / LANES; ++c) store(&local.s[i + q][c * LANES], s[q][c]);
            }
        }
        store_rows<N>(y, head.io, head.at(start), local.y, head.stride, steps, size);
        if (saved.sa) store_rows<N>(saved.sa + start * size, local.sa, size, steps, size);
    }
    store_state<N>(final_state, local.s, size);
}

template <int N>
struct alignas(64) Backward7 {
    Inputs7<N> x;
    Row<N> dy[PADDED];
    Row<N> dr[PADDED], dd[PADDED], dk[PADDED], da[PADDED], db[PADDED], dv[PADDED];
    Row<N> states[L + 1][R], no_state[R], sa[PADDED];
    Row<N> g[N];
};

// The states of rows i.. before every step of the chunk and after its last, from `start`, the chunk's first. Where a
// document begins it is the one that the step before left, which that step reads.
template <int N>
RWKV_INLINE void recompute(Backward7<N> &local, const float *start, int i, int steps, int size) {
    const Inputs7<N> &x = local.x;
    Row<N> first[R];
    const int rows = size - i < R ? size - i : R;
    load_rows<N>(first, start + i * size, size, rows, size);
    memset(first[rows], 0, sizeof(Row<N>) * (R - rows));
    vec s[R][N / LANES];
    for (int q = 0; q < R; ++q) {
        for (int c = 0; c < N / LANES; ++c) s[q][c] = load(&first[q][c * LANES]);
    }
    for (int t = 0; t <= steps; ++t) {
        for (int q = 0; q < R; ++q) {
            for (int c = 0; c < N / LANES; ++c) store(&local.states[t][q][c * LANES], s[q][c]);
        }
        if (t == steps) break;
        if (x.begins[t]) clear<N>(s);
        advance<N>(s, x, t, &local.sa[t][i], &x.v[t][i]);
    }
}

// One step back for rows i..: adds the rows' part to the gradients of step t and moves g, their part of G, before it.
template <int N>
RWKV_INLINE void step_back(Backward7<N> &local, vec (&g)[R][N / LANES], int i, int t) {
    const Inputs7<N> &x = local.x;
    const float *dy = &local.dy[t][i], *v = &x.v[t][i], *sa = &local.sa[t][i];
    const Row<N> *state = x.begins[t] ? local.no_state : local.states[t];
    vec by_k[R] = {}, by_b[R] = {};
    for (int q = 0; q < R; ++q) {
        for (int c = 0; c < N / LANES; ++c) {
            const int j = c * LANES;
            g[q][c] += splat(dy[q]) * load(&x.r[t][j]);
            by_k[q] += g[q][c] * load(&x.k[t][j]);
            by_b[q] += g[q][c] * load(&x.b[t][j]);
        }
    }
    float dv[R], dsa[R];
    sums(by_k, dv);
    sums(by_b, dsa);
    memcpy(&local.dv[t][i], dv, sizeof(dv));
    for (int c = 0; c < N / LANES; ++c) {
        const int j = c * LANES;
        vec dr = load(&local.dr[t][j]), dd = load(&local.dd[t][j]), dk = load(&local.dk[t][j]);
        vec da = load(&local.da[t][j]), db = load(&local.db[t][j]);
        const vec d = load(&x.d[t][j]), a = load(&x.a[t][j]);
        for (int q = 0; q < R; ++q) {
            const vec before = load(&state[q][j]), after = load(&local.states[t + 1][q][j]);
            dr += after * splat(dy[q]);
            dd += g[q][c] * before;
            dk += g[q][c] * splat(v[q]);
            db += g[q][c] * splat(sa[q]);
            da += before * splat(dsa[q]);
            g[q][c] = g[q][c] * d + splat(dsa[q]) * a;
        }
        store(&local.dr[t][j], dr);
        store(&local.dd[t][j], dd);
        store(&local.dk[t][j], dk);
        store(&local.da[t][j], da);
        store(&local.db[t][j], db);
    }
    if (x.begins[t]) clear<N>(g);
}

struct Gradients7 {
    void *dr, *dw, *dk, *dv, *da, *db;
};

template <int N>
void wkv7_backward_head(const Head &head, const Pointers7 &in, const Saved7 &saved, const void *dy,
                        const float *dfinal_state, const Gradients7 &out, float *dstate) {
    const int size = head.size;
    Backward7<N> local;
    Inputs7<N> &x = local.x;
    load_state<N>(local.g, dfinal_state, size);
    memset(local.no_state, 0, sizeof(local.no_state));
    for (int64_t start = (head.time - 1) / L * L; start >= 0; start -= L) {
        const int64_t at = head.at(start);
        const int steps = head.time - start < L ? head.time - start : L;
        load_inputs(x, in, head, start, steps);
        if (dy) load_rows<N>(local.dy, dy, head.io, at, head.stride, steps, size);
        else memset(local.dy, 0, sizeof(local.dy));
        load_rows<N>(local.sa, static_cast<const float *>(saved.sa) + start * size, size, steps, size);
        Row<N> w_slope[L];  // d log d / dw
        for (int t = 0; t < steps; ++t) {
            for (int c = 0; c < N; c += LANES) {
                const vec w = load(&x.d[t][c]), rate = sigmoid(w);
                store(&w_slope[t][c], LOG_DECAY_SCALE * rate * sigmoid(-w));
                store(&x.d[t][c], exp(LOG_DECAY_SCALE * rate));
            }
        }
        memset(local.dr, 0, sizeof(local.dr) * 5);
        for (int i = 0; i < size; i += R) {
            prefetch_inputs(in, head, start - L, i);
            recompute<N>(local, saved.states + start / L * size * size, i, steps, size);
            vec g[R][N / LANES];
            for (int q = 0; q < R; ++q) {
                for (int c = 0; c < N / LANES; ++c) g[q][c] = load(&local.g[i + q][c * LANES]);
            }
            for (int t = steps - 1; t >= 0; --t) step_back<N>(local, g, i, t);
            for (int q = 0; q < R; ++q) {
                for (int c = 0; c < N / LANES; ++c) store(&local.g[i + q][c * LANES], g[q][c]);
            }
        }
        for (int t = 0; t < steps; ++t) {
            for (int c = 0; c < N; c += LANES) {
                store(&local.dd[t][c], load(&local.dd[t][c]) * load(&x.d[t][c]) * load(&w_slope[t][c]));
            }
        }
        store_rows<N>(out.dr, head.io, at, local.dr, head.stride, steps, size);
        store_rows<N>(out.dw, head.io, at, local.dd, head.stride, steps, size);
        store_rows<N>(out.dk, head.io, at, local.dk, head.stride, steps, size);
        store_rows<N>(out.dv, head.io, at, local.dv, head.stride, steps, size);
        store_rows<N>(out.da, head.io, at, local.da, head.stride, steps, size);
        store_rows<N>(out.db, head.io, at, local.db, head.stride, steps, size);
    }
    store_state<N>(dstate, local.g, size);
}

}  // namespace RWKV_TARGET
