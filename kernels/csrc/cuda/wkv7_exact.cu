// RWKV-7 with fp32 maths: one block of N threads a head, the state in registers (tile.cuh).
//
//   d = exp(-e^{-1/2} sigmoid(w));  sa = S a;  S = S diag(d) + sa b^T + v k^T;  y = S r
//
// Forward saves the state of every 16th step, in the threads' own order, and sa. With sa known a state follows from an
// earlier one without any sum over threads, so backward recomputes the state before each step from the one at the
// start of its run of 8 or 2 steps, and never divides by a decay. Formulas of the gradients: csrc/cpu/wkv7.hpp.
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

// S = S diag(d) + sa b^T + v k^T on a part, whose keys' rows are given.
template <int KEYS>
__device__ __forceinline__ void advance(float (&s)[EDGE][KEYS], const float (&sa)[EDGE], const float (&v)[EDGE],
                                        const float *d_row, const float *b_row, const float *k_row, int kg) {
    float d[KEYS], b[KEYS], k[KEYS];
    load_keys(d, d_row, kg);
    load_keys(b, b_row, kg);
    load_keys(k, k_row, kg);
#pragma unroll
    for (int q = 0; q < EDGE; ++q) {
#pragma unroll
        for (int j = 0; j < KEYS; ++j) s[q][j] = s[q][j] * d[j] + (sa[q] * b[j] + v[q] * k[j]);
    }
}

template <int N>
struct ForwardMemory {
    float r[RUN][N], d[RUN][N], k[RUN][N], v[RUN][N], a[RUN][N], b[RUN][N];
};

template <int N, typename io>
__global__ void __launch_bounds__(N)
    forward(int64_t time, int heads, const uint8_t *starts, const io *r, const io *w, const io *k, const io *v,
            const io *a, const io *b, const float *state, io *y, float *final_state, float *saved_states,
            float *saved_sa) {
    using Is = Shape<N>;
    ForwardMemory<N> &x = *dynamic_memory<ForwardMemory<N>>();
    const Head<N> head(time, heads);
    starts = row_of_starts(starts, time, heads);
    const int i = threadIdx.x, kg = i % EDGE, rg = i / EDGE, lane = i % 32;
    const int64_t this_state = static_cast<int64_t>(blockIdx.x) * N * N;
    Tile<N> s;
    load_state(s, at(state, this_state), N, 1);
    float *states = at(saved_states, this_state * states_of(time));
    for (int64_t start = 0; start < time; start += RUN) {
        const int steps = static_cast<int>(time - start < RUN ? time - start : RUN);
        if (states && start % STEPS_BETWEEN_STATES == 0) {
            float *to = states + start / STEPS_BETWEEN_STATES * N * N;
#pragma unroll
            for (int p = 0; p < Is::PARTS; ++p) store_private<N>(to + private_part<N>(p), s[p]);
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
#pragma unroll
            for (int p = 0; p < Is::PARTS; ++p) {
                const int keys = p * Is::PART;
                advance(s[p], sa, values, x.d[t] + keys, x.b[t] + keys, x.k[t] + keys, kg);
            }
            times_row(sums, s, x.r[t], kg);
            y[head.at(start + t)] = from_float<io>(sum_over_keys(sums, lane));
        }
    }
    store_state(at(final_state, this_state), s, N, 1);
}

template <int N>
struct BackwardMemory {
    static constexpr int STEPS = Shape<N>::RUN_BACK;
    using Vectors = float[STEPS][N];
    using ByWarp = float[STEPS][Shape<N>::WARPS][N];
    using ScalarsByWarp = float[STEPS][Shape<N>::WARPS];

    float start[N * N];  // the state at the run's start, in private order
    Vectors r, d, k, v, a, b, dy, sa;
    ByWarp s_dy, dd, dk, da, db;
    ScalarsByWarp sa_dy, v_dy;
};

// What moves the state over a run: d, k, v, b and sa.
template <int N, typename io>
__device__ __forceinline__ void load_moves(BackwardMemory<N> &x, const Head<N> &head, const Documents &documents,
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

// Part p of a state over step t.
template <int N, int KEYS>
__device__ __forceinline__ void advance(float (&s)[EDGE][KEYS], const BackwardMemory<N> &x, int p, int t, int kg,
                                        int rg) {
    const int keys = p * Shape<N>::PART;
    float sa[EDGE], v[EDGE];
    load_values(sa, x.sa[t], rg);
    load_values(v, x.v[t], rg);
    advance(s, sa, v, x.d[t] + keys, x.b[t] + keys, x.k[t] + keys, kg);
}

// Gradients of step t from g, the gradient of the state after it, which becomes that of the state before it.
template <int N, typename io>
__device__ __forceinline__ void step_back(Tile<N> &g, BackwardMemory<N> &x, int t, io *dv) {
    using Is = Shape<N>;
    const int kg = threadIdx.x % EDGE, rg = threadIdx.x / EDGE, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // values are loaded where they are used: with N = 128 there are no registers to keep them
    float values[EDGE], rows[EDGE], dsa[EDGE], keys[Is::KEYS], sums[Is::KEYS];
    load_values(values, x.dy[t], rg);
#pragma unroll
    for (int p = 0; p < Is::PARTS; ++p) {
        load_keys(keys, x.r[t] + p * Is::PART, kg);
        add_outer(g[p], values, keys);
    }
    times_row(rows, g, x.k[t], kg);
    *dv = from_float<io>(sum_over_keys(rows, lane));
    times_row(rows, g, x.b[t], kg);
    share_rows(dsa, sum_over_keys(rows, lane), lane);
#pragma unroll
    for (int p = 0; p < Is::PARTS; ++p) {
        const int first = p * Is::PART;
        load_values(values, x.v[t], rg);
        times_values(sums, g[p], values);
        sum_over_values(sums, x.dk[t][warp] + first, lane, kg);
        load_values(values, x.sa[t], rg);
        times_values(sums, g[p], values);
        sum_over_values(sums, x.db[t][warp] + first, lane, kg);

        Part<Is::KEYS> before;
        load_private<N>(before, x.start + private_part<N>(p));
#pragma unroll 1
        for (int earlier = 0; earlier < t; ++earlier) advance(before, x, p, earlier, kg, rg);
        load_values(values, x.dy[t], rg);
        times_values(sums, before, values);
        sum_over_values(sums, x.s_dy[t][warp] + first, lane, kg);
        times_values(sums, before, dsa);
        sum_over_values(sums, x.da[t][warp] + first, lane, kg);
        times_part(sums, g[p], before);
        sum_over_values(sums, x.dd[t][warp] + first, lane, kg);
    }

    float sa_dy = 0.0f, v_dy = 0.0f, sa[EDGE], v[EDGE], dy[EDGE];
    load_values(sa, x.sa[t], rg);
    load_values(v, x.v[t], rg);
    load_values(dy, x.dy[t], rg);
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
#pragma unroll
    for (int p = 0; p < Is::PARTS; ++p) {
        float d[Is::KEYS], a[Is::KEYS];
        load_keys(d, x.d[t] + p * Is::PART, kg);
        load_keys(a, x.a[t] + p * Is::PART, kg);
#pragma unroll
        for (int q = 0; q < EDGE; ++q) {
#pragma unroll
            for (int j = 0; j < Is::KEYS; ++j) g[p][q][j] = g[p][q][j] * d[j] + dsa[q] * a[j];
        }
    }
}

template <int N, typename io>
__global__ void __launch_bounds__(N)
    backward(int64_t time, int heads, const uint8_t *starts, const io *r, const io *w, const io *k, const io *v,
             const io *a, const io *b, const float *saved_states, const float *saved_sa, const io *dy,
             const float *dfinal_state, io *dr, io *dw, io *dk, io *dv, io *da, io *db, float *dstate) {
    using Is = Shape<N>;
    constexpr int STEPS = Is::RUN_BACK;
    BackwardMemory<N> &x = *dynamic_memory<BackwardMemory<N>>();
    const Head<N> head(time, heads);
    starts = row_of_starts(starts, time, heads);
    const int i = threadIdx.x, kg = i % EDGE, rg = i / EDGE;
    const int64_t this_state = static_cast<int64_t>(blockIdx.x) * N * N;
    const float *states = saved_states + this_state * states_of(time);
    Tile<N> g;
    load_state(g, at(dfinal_state, this_state), N, 1);
    for (int64_t start = (time - 1) / STEPS * STEPS; start >= 0; start -= STEPS) {
        const int steps = static_cast<int>(time - start < STEPS ? time - start : STEPS);
        const int64_t of_saved = start / STEPS_BETWEEN_STATES;
        // x.start, of which each thread reads its own part alone, a run at a time from the state that was saved
        const float *from = states + of_saved * N * N;
        int64_t earlier = of_saved * STEPS_BETWEEN_STATES;
        do {
            const int moves = earlier < start ? STEPS : 0;
            // no barrier: since the last one each thread has read its own column alone, and it writes no other now
            if (moves) {
                const Documents documents = share_starts(load_start(starts, time, earlier, STEPS));
                load_moves(x, head, documents, earlier, STEPS, w, k, v, b, saved_sa);
                __syncthreads();
            }
#pragma unroll
            for (int p = 0; p < Is::PARTS; ++p) {
                Part<Is::KEYS> s;
                load_private<N>(s, from + private_part<N>(p));
#pragma unroll 1
                for (int t = 0; t < moves; ++t) advance(s, x, p, t, kg, rg);
                store_private<N>(x.start + private_part<N>(p), s);
            }
            if (moves) __syncthreads();
            from = x.start;
            earlier += STEPS;
        } while (earlier < start);
        const Documents documents = share_starts(load_start(starts, time, start, STEPS));
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
        for (int t = steps - 1; t >= 0; --t) step_back(g, x, t, dv + head.at(start + t));
        __syncthreads();
        documents.for_starts([&](int t) { clear_warps(x.da[t], i); });
        for (int t = 0; t < steps; ++t) {
            const int64_t to = head.at(start + t);
            const float sa_dy = over_warps(x.sa_dy[t]), v_dy = over_warps(x.v_dy[t]);
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
    return at(static_cast<float *>(const_cast<void *>(saved)), p.batch * p.heads * states * p.size * p.size);
}

template <int N, typename io>
int32_t run(const rwkv_problem &p, const Wkv7Forward &x) {
    const auto in = [](const void *pointer) { return static_cast<const io *>(pointer); };
    return launch(forward<N, io>, dim3(p.batch * p.heads), dim3(N), sizeof(ForwardMemory<N>), p.stream, p.time,
                  static_cast<int>(p.heads), p.starts, in(x.r), in(x.w), in(x.k), in(x.v), in(x.a), in(x.b), x.state,
                  static_cast<io *>(x.y), x.final_state, static_cast<float *>(x.saved), projections(p, x.saved));
}

template <int N, typename io>
int32_t run(const rwkv_problem &p, const Wkv7Backward &x) {
    static_assert(sizeof(BackwardMemory<N>) <= MOST_SHARED_BYTES, "fits");
    const auto in = [](const void *pointer) { return static_cast<const io *>(pointer); };
    const auto out = [](void *pointer) { return static_cast<io *>(pointer); };
    return launch(backward<N, io>, dim3(p.batch * p.heads), dim3(N), sizeof(BackwardMemory<N>), p.stream, p.time,
                  static_cast<int>(p.heads), p.starts, in(x.r), in(x.w), in(x.k), in(x.v), in(x.a), in(x.b),
                  static_cast<const float *>(x.saved), static_cast<const float *>(projections(p, x.saved)), in(x.dy),
                  x.dfinal_state, out(x.dr), out(x.dw), out(x.dk), out(x.dv), out(x.da), out(x.db), x.dstate);
}

template <int N, typename Pointers>
int32_t run_io(const rwkv_problem &p, const Pointers &pointers) {
    if (p.io == RWKV_FP32) return run<N, float>(p, pointers);
    return p.io == RWKV_BF16 ? run<N, bf16>(p, pointers) : run<N, half>(p, pointers);
}

template <typename Pointers>
int32_t run_size(const rwkv_problem &p, const Pointers &pointers) {
    if (p.size == 32) return run_io<32>(p, pointers);
    return p.size == 64 ? run_io<64>(p, pointers) : run_io<128>(p, pointers);
}

}  // namespace

int32_t wkv7_exact(const rwkv_problem &p, const Wkv7Forward &pointers) {
    return run_size(p, pointers);
}

int32_t wkv7_exact(const rwkv_problem &p, const Wkv7Backward &pointers) {
    return run_size(p, pointers);
}

}  // namespace rwkv
