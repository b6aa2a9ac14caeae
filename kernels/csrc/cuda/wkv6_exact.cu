// RWKV-6 with fp32 maths, and RWKV-5, whose decay is the same at all times: one block of N threads a head, the state
// in registers (tile.cuh), held as [value,key].
//
//   d = exp(-exp(w));  y_t = S r_t + (r_t . (u k_t)) v_t;  S = S diag(d_t) + v_t k_t^T
//
// Forward saves the state of every 16th step in the threads' own order. Backward recomputes the state before each step
// from the one at the start of its run of 8 or 2 steps, without any sum over threads and without dividing by a decay, which
// may be 0. Formulas of the gradients: csrc/cpu/wkv6.hpp.
//
// Where a document begins, d counts as 0 and S r as unread: then neither the step nor any gradient knows the state
// before it.
#include "documents.cuh"
#include "launchers.hpp"
#include "tile.cuh"

namespace rwkv {
namespace {

// A thread's decay input: of its channel at a step, or for all times.
template <int N, typename io>
struct Decay {
    const io *w;
    const float *constant;

    // exp(w) = -log d
    __device__ __forceinline__ float rate(int64_t from, int heads) const {
        return expf(constant ? constant[blockIdx.x % heads * N + threadIdx.x] : to_float(w[from]));
    }
};

// S = S diag(d) + v k^T on a part, whose keys' rows are given.
template <int KEYS>
__device__ __forceinline__ void advance(float (&s)[EDGE][KEYS], const float *v_row, const float *d_row,
                                        const float *k_row, int kg, int rg) {
    float v[EDGE], d[KEYS], k[KEYS];
    load_values(v, v_row, rg);
    load_keys(d, d_row, kg);
    load_keys(k, k_row, kg);
#pragma unroll
    for (int q = 0; q < EDGE; ++q) {
#pragma unroll
        for (int j = 0; j < KEYS; ++j) s[q][j] = s[q][j] * d[j] + v[q] * k[j];
    }
}

// r . (u k), in every thread.
template <int N>
__device__ __forceinline__ float bonus(const float *r_row, const float *u_row, const float *k_row, int kg) {
    constexpr int KEYS = Shape<N>::KEYS;
    float sum = 0.0f;
#pragma unroll
    for (int first = 0; first < N; first += Shape<N>::PART) {
        float r[KEYS], u[KEYS], k[KEYS];
        load_keys(r, r_row + first, kg);
        load_keys(u, u_row + first, kg);
        load_keys(k, k_row + first, kg);
#pragma unroll
        for (int j = 0; j < KEYS; ++j) sum += r[j] * u[j] * k[j];
    }
    return sum_over_group(sum);
}

template <int N>
struct ForwardMemory {
    float u[N], r[RUN][N], d[RUN][N], k[RUN][N], v[RUN][N];
};

template <int N, typename io>
__global__ void __launch_bounds__(N)
    forward(int64_t time, int heads, const uint8_t *starts, const io *r, const io *k, const io *v, Decay<N, io> w,
            const float *u, const float *state, io *y, float *final_state, float *saved) {
    using Is = Shape<N>;
    ForwardMemory<N> &x = *dynamic_memory<ForwardMemory<N>>();
    const Head<N> head(time, heads);
    starts = row_of_starts(starts, time, heads);
    const int i = threadIdx.x, kg = i % EDGE, rg = i / EDGE, lane = i % 32;
    const int64_t this_state = static_cast<int64_t>(blockIdx.x) * N * N;
    Tile<N> s;
    load_state(s, at(state, this_state), 1, N);
    float *states = at(saved, this_state * states_of(time));
    x.u[i] = u[blockIdx.x % heads * N + i];
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
            x.d[t][i] = expf(-w.rate(from, heads));
            x.k[t][i] = to_float(k[from]);
            x.v[t][i] = to_float(v[from]);
        }
        documents.for_starts([&](int t) { x.d[t][i] = 0.0f; });
        __syncthreads();
#pragma unroll 1
        for (int t = 0; t < steps; ++t) {
            float sums[EDGE];
            times_row(sums, s, x.r[t], kg);
            float read = sum_over_keys(sums, lane);  // of row i = 8 rg + kg
            if (documents.is_start(t)) read = 0.0f;
            y[head.at(start + t)] = from_float<io>(read + bonus<N>(x.r[t], x.u, x.k[t], kg) * x.v[t][i]);
#pragma unroll
            for (int p = 0; p < Is::PARTS; ++p) {
                advance(s[p], x.v[t], x.d[t] + p * Is::PART, x.k[t] + p * Is::PART, kg, rg);
            }
        }
    }
    store_state(at(final_state, this_state), s, 1, N);
}

template <int N>
struct BackwardMemory {
    static constexpr int STEPS = Shape<N>::RUN_BACK;
    using Vectors = float[STEPS][N];
    using ByWarp = float[STEPS][Shape<N>::WARPS][N];
    using ScalarsByWarp = float[STEPS][Shape<N>::WARPS];

    float start[N * N];  // the state at the run's start, in private order
    float zero[N], u[N];
    Vectors r, d, k, v, dy, rate;
    ByWarp s_dy, dd, dk;
    ScalarsByWarp v_dy;
};

// What moves the state over a run: d, k and v.
template <int N, typename io>
__device__ __forceinline__ void load_moves(BackwardMemory<N> &x, const Head<N> &head, const Documents &documents,
                                           int64_t start, int steps, int heads, const io *k, const io *v,
                                           const Decay<N, io> &w) {
    const int i = threadIdx.x;
    for (int t = 0; t < steps; ++t) {
        const int64_t from = head.at(start + t);
        const float rate = w.rate(from, heads);
        x.rate[t][i] = rate;
        x.d[t][i] = expf(-rate);
        x.k[t][i] = to_float(k[from]);
        x.v[t][i] = to_float(v[from]);
    }
    documents.for_starts([&](int t) { x.d[t][i] = 0.0f; });
}

// Gradients of step t from g, the gradient of the state after it, which becomes that of the state before it.
template <int N, typename io>
__device__ __forceinline__ void step_back(Tile<N> &g, BackwardMemory<N> &x, const Documents &documents, int t,
                                          io *dv) {
    using Is = Shape<N>;
    const int i = threadIdx.x, kg = i % EDGE, rg = i / EDGE, lane = i % 32, warp = i / 32;
    // values are loaded where they are used: with N = 128 there are no registers to keep them
    float values[EDGE], rows[EDGE], sums[Is::KEYS];
    times_row(rows, g, x.k[t], kg);
    const float from_state = sum_over_keys(rows, lane);
    *dv = from_float<io>(from_state + bonus<N>(x.r[t], x.u, x.k[t], kg) * x.dy[t][i]);
#pragma unroll
    for (int p = 0; p < Is::PARTS; ++p) {
        const int first = p * Is::PART;
        load_values(values, x.v[t], rg);
        times_values(sums, g[p], values);
        sum_over_values(sums, x.dk[t][warp] + first, lane, kg);

        Part<Is::KEYS> before;
        load_private<N>(before, x.start + private_part<N>(p));
#pragma unroll 1
        for (int earlier = 0; earlier < t; ++earlier) {
            advance(before, x.v[earlier], x.d[earlier] + first, x.k[earlier] + first, kg, rg);
        }
        load_values(values, x.dy[t], rg);
        times_values(sums, before, values);
        sum_over_values(sums, x.s_dy[t][warp] + first, lane, kg);
        times_part(sums, g[p], before);
        sum_over_values(sums, x.dd[t][warp] + first, lane, kg);
    }

    float v_dy = 0.0f, v[EDGE], dy[EDGE];
    load_values(v, x.v[t], rg);
    load_values(dy, x.dy[t], rg);
#pragma unroll
    for (int q = 0; q < EDGE; ++q) v_dy += v[q] * dy[q];
    v_dy = sum_over_row_groups(v_dy);
    if (lane == 0) x.v_dy[t][warp] = v_dy;
    const float *read = documents.is_start(t) ? x.zero : x.r[t];
#pragma unroll
    for (int p = 0; p < Is::PARTS; ++p) {
        float d[Is::KEYS], r[Is::KEYS];
        load_keys(d, x.d[t] + p * Is::PART, kg);
        load_keys(r, read + p * Is::PART, kg);
#pragma unroll
        for (int q = 0; q < EDGE; ++q) {
#pragma unroll
            for (int j = 0; j < Is::KEYS; ++j) g[p][q][j] = g[p][q][j] * d[j] + dy[q] * r[j];
        }
    }
}

// dw: [B,T,H,N] elements; or null, and dconstant fp32 [B,H,N].
template <int N, typename io>
__global__ void __launch_bounds__(N)
    backward(int64_t time, int heads, const uint8_t *starts, const io *r, const io *k, const io *v, Decay<N, io> w,
             const float *u, const float *saved, const io *dy, const float *dfinal_state, io *dr, io *dk, io *dv,
             io *dw, float *dconstant, float *du, float *dstate) {
    using Is = Shape<N>;
    constexpr int STEPS = Is::RUN_BACK;
    BackwardMemory<N> &x = *dynamic_memory<BackwardMemory<N>>();
    const Head<N> head(time, heads);
    starts = row_of_starts(starts, time, heads);
    const int i = threadIdx.x, kg = i % EDGE, rg = i / EDGE;
    const int64_t this_state = static_cast<int64_t>(blockIdx.x) * N * N;
    const float *states = saved + this_state * states_of(time);
    const float its_u = u[blockIdx.x % heads * N + i];
    float its_du = 0.0f, its_dconstant = 0.0f;
    Tile<N> g;
    load_state(g, at(dfinal_state, this_state), 1, N);
    x.u[i] = its_u;
    x.zero[i] = 0.0f;
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
                load_moves(x, head, documents, earlier, STEPS, heads, k, v, w);
                __syncthreads();
            }
#pragma unroll
            for (int p = 0; p < Is::PARTS; ++p) {
                const int first = p * Is::PART;
                Part<Is::KEYS> s;
                load_private<N>(s, from + private_part<N>(p));
#pragma unroll 1
                for (int t = 0; t < moves; ++t) advance(s, x.v[t], x.d[t] + first, x.k[t] + first, kg, rg);
                store_private<N>(x.start + private_part<N>(p), s);
            }
            if (moves) __syncthreads();
            from = x.start;
            earlier += STEPS;
        } while (earlier < start);
        const Documents documents = share_starts(load_start(starts, time, start, STEPS));
        load_moves(x, head, documents, start, steps, heads, k, v, w);
        for (int t = 0; t < steps; ++t) {
            const int64_t from = head.at(start + t);
            x.r[t][i] = to_float(r[from]);
            x.dy[t][i] = dy ? to_float(dy[from]) : 0.0f;
        }
        __syncthreads();
#pragma unroll 1
        for (int t = steps - 1; t >= 0; --t) step_back(g, x, documents, t, dv + head.at(start + t));
        __syncthreads();
        documents.for_starts([&](int t) { clear_warps(x.s_dy[t], i); });
        for (int t = steps - 1; t >= 0; --t) {
            const int64_t to = head.at(start + t);
            const float v_dy = over_warps(x.v_dy[t]);
            dr[to] = from_float<io>(over_warps(x.s_dy[t], i) + its_u * x.k[t][i] * v_dy);
            dk[to] = from_float<io>(over_warps(x.dk[t], i) + its_u * x.r[t][i] * v_dy);
            its_du += x.r[t][i] * x.k[t][i] * v_dy;
            // -exp(w) may be infinite, but there d is 0 and so is the gradient
            const float d = x.d[t][i], dlog = over_warps(x.dd[t], i) * d;
            const float its_dw = d == 0.0f ? 0.0f : -dlog * x.rate[t][i];
            its_dconstant += its_dw;
            if (dw) dw[to] = from_float<io>(its_dw);
        }
    }
    const int64_t row = static_cast<int64_t>(blockIdx.x) * N + i;
    du[row] = its_du;
    if (dconstant) dconstant[row] = its_dconstant;
    store_state(at(dstate, this_state), g, 1, N);
}

template <int N, typename io>
Decay<N, io> decay(const rwkv_problem &p, const void *w) {
    if (p.constant_decay) return {nullptr, static_cast<const float *>(w)};
    return {static_cast<const io *>(w), nullptr};
}

template <int N, typename io>
int32_t run(const rwkv_problem &p, const Wkv6Forward &x) {
    const auto in = [](const void *pointer) { return static_cast<const io *>(pointer); };
    return launch(forward<N, io>, dim3(p.batch * p.heads), dim3(N), sizeof(ForwardMemory<N>), p.stream, p.time,
                  static_cast<int>(p.heads), p.starts, in(x.r), in(x.k), in(x.v), decay<N, io>(p, x.w), x.u, x.state,
                  static_cast<io *>(x.y), x.final_state, static_cast<float *>(x.saved));
}

template <int N, typename io>
int32_t run(const rwkv_problem &p, const Wkv6Backward &x) {
    static_assert(sizeof(BackwardMemory<N>) <= MOST_SHARED_BYTES, "fits");
    const auto in = [](const void *pointer) { return static_cast<const io *>(pointer); };
    const auto out = [](void *pointer) { return static_cast<io *>(pointer); };
    io *dw = p.constant_decay ? nullptr : out(x.dw);
    float *dconstant = p.constant_decay ? static_cast<float *>(x.dw) : nullptr;
    return launch(backward<N, io>, dim3(p.batch * p.heads), dim3(N), sizeof(BackwardMemory<N>), p.stream, p.time,
                  static_cast<int>(p.heads), p.starts, in(x.r), in(x.k), in(x.v), decay<N, io>(p, x.w), x.u,
                  static_cast<const float *>(x.saved), in(x.dy), x.dfinal_state, out(x.dr), out(x.dk), out(x.dv), dw,
                  dconstant, x.du, x.dstate);
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

int32_t wkv6_exact(const rwkv_problem &p, const Wkv6Forward &pointers) {
    return run_size(p, pointers);
}

int32_t wkv6_exact(const rwkv_problem &p, const Wkv6Backward &pointers) {
    return run_size(p, pointers);
}

}  // namespace rwkv
