// RWKV-7 with fp32 maths: one block of 64 threads a head, the state in registers (tile.cuh).
//
//   d = exp(-e^{-1/2} sigmoid(w));  sa = S a;  S = S diag(d) + sa b^T + v k^T;  y = S r
//
// Forward saves the state of every 16th step, in the threads' own order, and sa. With sa known a state follows from an
// earlier one without any sum over threads, so backward recomputes the state before each step from the one at the
// start of its run of 8 steps, and never divides by a decay. Formulas of the gradients: csrc/cpu/wkv7.hpp.
//
// Where a document begins, d and a count as 0: then neither the step nor any gradient knows the state before it.
#include "documents.cuh"
#include "launchers.hpp"
#include "tile.cuh"

namespace rwkv {
namespace {

constexpr float LOG_DECAY_SCALE = -0.60653065971263342f;  // -e^{-1/2}

__device__ __forceinline__ float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

// S = S diag(d) + sa b^T + v k^T on a tile.
__device__ __forceinline__ void advance(Tile &s, const float (&sa)[EDGE], const float (&v)[EDGE], const Row &d_row,
                                        const Row &b_row, const Row &k_row, int kg) {
    float d[EDGE], b[EDGE], k[EDGE];
    load_keys(d, d_row, kg);
    load_keys(b, b_row, kg);
    load_keys(k, k_row, kg);
#pragma unroll
    for (int q = 0; q < EDGE; ++q) {
#pragma unroll
        for (int j = 0; j < EDGE; ++j) s[q][j] = s[q][j] * d[j] + (sa[q] * b[j] + v[q] * k[j]);
    }
}

struct ForwardMemory {
    Row r[RUN], d[RUN], k[RUN], v[RUN], a[RUN], b[RUN];
};

template <typename io>
__global__ void __launch_bounds__(THREADS)
    forward(int64_t time, int heads, const uint8_t *starts, const io *r, const io *w, const io *k, const io *v,
            const io *a, const io *b, const float *state, io *y, float *final_state, float *saved_states,
            float *saved_sa) {
    ForwardMemory &x = *dynamic_memory<ForwardMemory>();
    const Head head(time, heads);
    starts = row_of_starts(starts, time, heads);
    const int i = threadIdx.x, kg = i % EDGE, rg = i / EDGE, lane = i % 32;
    const int64_t this_state = static_cast<int64_t>(blockIdx.x) * N * N;
    Tile s;
    load_state(s, at(state, this_state), N, 1);
    float *states = at(saved_states, this_state * states_of(time));
    for (int64_t start = 0; start < time; start += RUN) {
        const int steps = static_cast<int>(time - start < RUN ? time - start : RUN);
        if (states && start % STEPS_BETWEEN_STATES == 0) {
            store_private(states + start / STEPS_BETWEEN_STATES * N * N, s);
        }
        const Documents documents = share_starts(load_start(starts, time, start, RUN));
        __syncthreads();
        for (int t = 0; t < steps; ++t) {
            const int64_t from = head.at(start + t);
            x.r[t][i] = to_float(r[from]);
            x.d[t][i] = expf(LOG_DECAY_SCALE * sigmoid(to_float(w[from])));
            x.k[t][i] = to_float(k[from]);
            x.v[t][i] = to_float(v[from]);
            x.a[t][i] = to_float(a[from]);
            x.b[t][i] = to_float(b[from]);
        }
        documents.for_starts([&](int t) { x.d[t][i] = x.a[t][i] = 0.0f; });
        __syncthreads();
#pragma unroll 1
        for (int t = 0; t < steps; ++t) {
            float sums[EDGE], sa[EDGE], values[EDGE];
            times_row(sums, s, x.a[t], kg);
            const float own = sum_over_keys(sums, lane);  // of row i = 8 rg + kg
            if (saved_sa) saved_sa[head.at(start + t)] = own;
            share_rows(sa, own, lane);
            load_values(values, x.v[t], rg);
            advance(s, sa, values, x.d[t], x.b[t], x.k[t], kg);
            times_row(sums, s, x.r[t], kg);
            y[head.at(start + t)] = from_float<io>(sum_over_keys(sums, lane));
        }
    }
    store_state(at(final_state, this_state), s, N, 1);
}

struct BackwardMemory {
    float start[N * N];  // the state at the run's start, in private order
    Row r[RUN], d[RUN], k[RUN], v[RUN], a[RUN], b[RUN], dy[RUN], sa[RUN];
    Row s_dy[RUN][WARPS], dd[RUN][WARPS], dk[RUN][WARPS], da[RUN][WARPS], db[RUN][WARPS];  // by warp
    float sa_dy[RUN][WARPS], v_dy[RUN][WARPS];
};

// What moves the state over a run: d, k, v, b and sa.
template <typename io>
__device__ __forceinline__ void load_moves(BackwardMemory &x, const Head &head, const Documents &documents,
                                           int64_t start, int steps, const io *w, const io *k, const io *v, const io *b,
                                           const float *sa) {
    const int i = threadIdx.x;
    for (int t = 0; t < steps; ++t) {
        const int64_t from = head.at(start + t);
        x.d[t][i] = expf(LOG_DECAY_SCALE * sigmoid(to_float(w[from])));
        x.k[t][i] = to_float(k[from]);
        x.v[t][i] = to_float(v[from]);
        x.b[t][i] = to_float(b[from]);
        x.sa[t][i] = sa[from];
    }
    documents.for_starts([&](int t) { x.d[t][i] = 0.0f; });
}

__device__ __forceinline__ void advance(Tile &s, const BackwardMemory &x, int t, int kg, int rg) {
    float sa[EDGE], v[EDGE];
    load_values(sa, x.sa[t], rg);
    load_values(v, x.v[t], rg);
    advance(s, sa, v, x.d[t], x.b[t], x.k[t], kg);
}

// Gradients of step t from g, the gradient of the state after it, which becomes that of the state before it.
template <typename io>
__device__ __forceinline__ void step_back(Tile &g, BackwardMemory &x, int t, io *dv) {
    const int kg = threadIdx.x % EDGE, rg = threadIdx.x / EDGE, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float dy[EDGE], v[EDGE], sa[EDGE], keys[EDGE], sums[EDGE], dsa[EDGE];
    load_values(dy, x.dy[t], rg);
    load_values(v, x.v[t], rg);
    load_values(sa, x.sa[t], rg);
    load_keys(keys, x.r[t], kg);
    add_outer(g, dy, keys);
    times_row(sums, g, x.k[t], kg);
    *dv = from_float<io>(sum_over_keys(sums, lane));
    times_row(sums, g, x.b[t], kg);
    share_rows(dsa, sum_over_keys(sums, lane), lane);
    times_values(sums, g, v);
    sum_over_values(sums, x.dk[t][warp], lane, kg);
    times_values(sums, g, sa);
    sum_over_values(sums, x.db[t][warp], lane, kg);

    Tile before;
    load_private(before, x.start);
#pragma unroll 1
    for (int earlier = 0; earlier < t; ++earlier) advance(before, x, earlier, kg, rg);
    times_values(sums, before, dy);
    sum_over_values(sums, x.s_dy[t][warp], lane, kg);
    times_values(sums, before, dsa);
    sum_over_values(sums, x.da[t][warp], lane, kg);
    times_tile(sums, g, before);
    sum_over_values(sums, x.dd[t][warp], lane, kg);

    float sa_dy = 0.0f, v_dy = 0.0f;
#pragma unroll
    for (int q = 0; q < EDGE; ++q) {
        sa_dy += sa[q] * dy[q];
        v_dy += v[q] * dy[q];
    }
    sa_dy = sum_over_row_groups(sa_dy);
    v_dy = sum_over_row_groups(v_dy);
    if (lane == 0) {
        x.sa_dy[t][warp] = sa_dy;
        x.v_dy[t][warp] = v_dy;
    }
    float d[EDGE], a[EDGE];
    load_keys(d, x.d[t], kg);
    load_keys(a, x.a[t], kg);
#pragma unroll
    for (int q = 0; q < EDGE; ++q) {
#pragma unroll
        for (int j = 0; j < EDGE; ++j) g[q][j] = g[q][j] * d[j] + dsa[q] * a[j];
    }
}

template <typename io>
__global__ void __launch_bounds__(THREADS)
    backward(int64_t time, int heads, const uint8_t *starts, const io *r, const io *w, const io *k, const io *v,
             const io *a, const io *b, const float *saved_states, const float *saved_sa, const io *dy,
             const float *dfinal_state, io *dr, io *dw, io *dk, io *dv, io *da, io *db, float *dstate) {
    BackwardMemory &x = *dynamic_memory<BackwardMemory>();
    const Head head(time, heads);
    starts = row_of_starts(starts, time, heads);
    const int i = threadIdx.x, kg = i % EDGE, rg = i / EDGE;
    const int64_t this_state = static_cast<int64_t>(blockIdx.x) * N * N;
    const float *states = saved_states + this_state * states_of(time);
    Tile g;
    load_state(g, at(dfinal_state, this_state), N, 1);
    for (int64_t start = (time - 1) / RUN * RUN; start >= 0; start -= RUN) {
        const int steps = static_cast<int>(time - start < RUN ? time - start : RUN);
        Tile s;
        load_private(s, states + start / STEPS_BETWEEN_STATES * N * N);
        // no barrier: since the last one each thread has read its own column alone, and it writes no other now
        if (start % STEPS_BETWEEN_STATES) {
            const Documents earlier = share_starts(load_start(starts, time, start - RUN, RUN));
            load_moves(x, head, earlier, start - RUN, RUN, w, k, v, b, saved_sa);
            __syncthreads();
#pragma unroll 1
            for (int t = 0; t < RUN; ++t) advance(s, x, t, kg, rg);
            __syncthreads();
        }
        store_private(x.start, s);  // each thread reads its own part alone
        const Documents documents = share_starts(load_start(starts, time, start, RUN));
        load_moves(x, head, documents, start, steps, w, k, v, b, saved_sa);
        for (int t = 0; t < steps; ++t) {
            const int64_t from = head.at(start + t);
            x.r[t][i] = to_float(r[from]);
            x.a[t][i] = to_float(a[from]);
            x.dy[t][i] = dy ? to_float(dy[from]) : 0.0f;
        }
        documents.for_starts([&](int t) { x.a[t][i] = 0.0f; });
        __syncthreads();
#pragma unroll 1
        for (int t = steps - 1; t >= 0; --t) step_back<io>(g, x, t, dv + head.at(start + t));
        __syncthreads();
        documents.for_starts([&](int t) { x.da[t][0][i] = x.da[t][1][i] = 0.0f; });
        for (int t = 0; t < steps; ++t) {
            const int64_t to = head.at(start + t);
            const float sa_dy = x.sa_dy[t][0] + x.sa_dy[t][1], v_dy = x.v_dy[t][0] + x.v_dy[t][1];
            const float rate = to_float(w[to]);
            // S_t^T dy from the state before the step
            dr[to] = from_float<io>(over_warps(x.s_dy[t], i) * x.d[t][i] + (x.b[t][i] * sa_dy + x.k[t][i] * v_dy));
            dw[to] = from_float<io>(over_warps(x.dd[t], i) * x.d[t][i] *
                                    (LOG_DECAY_SCALE * sigmoid(rate) * sigmoid(-rate)));
            dk[to] = from_float<io>(over_warps(x.dk[t], i));
            da[to] = from_float<io>(over_warps(x.da[t], i));
            db[to] = from_float<io>(over_warps(x.db[t], i));
        }
    }
    store_state(at(dstate, this_state), g, N, 1);
}

// The projections follow the states in `saved`.
float *projections(const rwkv_problem &p, const void *saved) {
    const int64_t states = (p.time + STEPS_BETWEEN_STATES - 1) / STEPS_BETWEEN_STATES;
    return at(static_cast<float *>(const_cast<void *>(saved)), p.batch * p.heads * states * N * N);
}

template <typename io>
int32_t run(const rwkv_problem &p, const Wkv7Forward &x) {
    const auto in = [](const void *pointer) { return static_cast<const io *>(pointer); };
    return launch(forward<io>, dim3(p.batch * p.heads), dim3(THREADS), sizeof(ForwardMemory), p.stream, p.time,
                  static_cast<int>(p.heads), p.starts, in(x.r), in(x.w), in(x.k), in(x.v), in(x.a), in(x.b), x.state,
                  static_cast<io *>(x.y), x.final_state, static_cast<float *>(x.saved), projections(p, x.saved));
}

template <typename io>
int32_t run(const rwkv_problem &p, const Wkv7Backward &x) {
    const auto in = [](const void *pointer) { return static_cast<const io *>(pointer); };
    const auto out = [](void *pointer) { return static_cast<io *>(pointer); };
    return launch(backward<io>, dim3(p.batch * p.heads), dim3(THREADS), sizeof(BackwardMemory), p.stream, p.time,
                  static_cast<int>(p.heads), p.starts, in(x.r), in(x.w), in(x.k), in(x.v), in(x.a), in(x.b),
                  static_cast<const float *>(x.saved), static_cast<const float *>(projections(p, x.saved)), in(x.dy),
                  x.dfinal_state, out(x.dr), out(x.dw), out(x.dk), out(x.dv), out(x.da), out(x.db), x.dstate);
}

template <typename Pointers>
int32_t run_io(const rwkv_problem &p, const Pointers &pointers) {
    if (p.io == RWKV_FP32) return run<float>(p, pointers);
    return p.io == RWKV_BF16 ? run<bf16>(p, pointers) : run<half>(p, pointers);
}

}  // namespace

int32_t wkv7_exact(const rwkv_problem &p, const Wkv7Forward &pointers) {
    return run_io(p, pointers);
}

int32_t wkv7_exact(const rwkv_problem &p, const Wkv7Backward &pointers) {
    return run_io(p, pointers);
}

}  // namespace rwkv
