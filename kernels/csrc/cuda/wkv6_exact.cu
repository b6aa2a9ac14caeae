// RWKV-6 with fp32 maths, and RWKV-5, whose decay is the same at all times: one block of 64 threads a head, the state
// in registers (tile.cuh), held as [value,key].
//
//   d = exp(-exp(w));  y_t = S r_t + (r_t . (u k_t)) v_t;  S = S diag(d_t) + v_t k_t^T
//
// Forward saves the state of every 16th step in the threads' own order. Backward recomputes the state before each step
// from the one at the start of its run of 8 steps, without any sum over threads and without dividing by a decay, which
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
template <typename io>
struct Decay {
    const io *w;
    const float *constant;

    // exp(w) = -log d
    __device__ __forceinline__ float rate(int64_t from, int heads) const {
        return expf(constant ? constant[blockIdx.x % heads * N + threadIdx.x] : to_float(w[from]));
    }
};

// S = S diag(d) + v k^T on a tile.
__device__ __forceinline__ void advance(Tile &s, const Row &v_row, const Row &d_row, const Row &k_row, int kg, int rg) {
    float v[EDGE], d[EDGE], k[EDGE];
    load_values(v, v_row, rg);
    load_keys(d, d_row, kg);
    load_keys(k, k_row, kg);
#pragma unroll
    for (int q = 0; q < EDGE; ++q) {
#pragma unroll
        for (int j = 0; j < EDGE; ++j) s[q][j] = s[q][j] * d[j] + v[q] * k[j];
    }
}

// r . (u k), in every thread.
__device__ __forceinline__ float bonus(const Row &r_row, const Row &u_row, const Row &k_row, int kg) {
    float r[EDGE], u[EDGE], k[EDGE];
    load_keys(r, r_row, kg);
    load_keys(u, u_row, kg);
    load_keys(k, k_row, kg);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < EDGE; ++j) sum += r[j] * u[j] * k[j];
    return sum_over_group(sum);
}

struct ForwardMemory {
    Row u, r[RUN], d[RUN], k[RUN], v[RUN];
};

template <typename io>
__global__ void __launch_bounds__(THREADS)
    forward(int64_t time, int heads, const uint8_t *starts, const io *r, const io *k, const io *v, Decay<io> w,
            const float *u, const float *state, io *y, float *final_state, float *saved) {
    ForwardMemory &x = *dynamic_memory<ForwardMemory>();
    const Head head(time, heads);
    starts = row_of_starts(starts, time, heads);
    const int i = threadIdx.x, kg = i % EDGE, rg = i / EDGE, lane = i % 32;
    const int64_t this_state = static_cast<int64_t>(blockIdx.x) * N * N;
    Tile s;
    load_state(s, at(state, this_state), 1, N);
    float *states = at(saved, this_state * states_of(time));
    x.u[i] = u[blockIdx.x % heads * N + i];
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
            y[head.at(start + t)] = from_float<io>(read + bonus(x.r[t], x.u, x.k[t], kg) * x.v[t][i]);
            advance(s, x.v[t], x.d[t], x.k[t], kg, rg);
        }
    }
    store_state(at(final_state, this_state), s, 1, N);
}

struct BackwardMemory {
    float start[N * N];  // the state at the run's start, in private order
    Row zero, u, r[RUN], d[RUN], k[RUN], v[RUN], dy[RUN], rate[RUN];
    Row s_dy[RUN][WARPS], dd[RUN][WARPS], dk[RUN][WARPS];  // by warp
    float v_dy[RUN][WARPS];
};

// What moves the state over a run: d, k and v.
template <typename io>
__device__ __forceinline__ void load_moves(BackwardMemory &x, const Head &head, const Documents &documents,
                                           int64_t start, int steps, int heads, const io *k, const io *v, const Decay<io> &w) {
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
template <typename io>
__device__ __forceinline__ void step_back(Tile &g, BackwardMemory &x, const Documents &documents, int t, io *dv) {
    const int i = threadIdx.x, kg = i % EDGE, rg = i / EDGE, lane = i % 32, warp = i / 32;
    float dy[EDGE], v[EDGE], sums[EDGE];
    load_values(dy, x.dy[t], rg);
    load_values(v, x.v[t], rg);
    times_row(sums, g, x.k[t], kg);
    const float from_state = sum_over_keys(sums, lane);
    *dv = from_float<io>(from_state + bonus(x.r[t], x.u, x.k[t], kg) * x.dy[t][i]);
    times_values(sums, g, v);
    sum_over_values(sums, x.dk[t][warp], lane, kg);

    Tile before;
    load_private(before, x.start);
#pragma unroll 1
    for (int earlier = 0; earlier < t; ++earlier) advance(before, x.v[earlier], x.d[earlier], x.k[earlier], kg, rg);
    times_values(sums, before, dy);
    sum_over_values(sums, x.s_dy[t][warp], lane, kg);
    times_tile(sums, g, before);
    sum_over_values(sums, x.dd[t][warp], lane, kg);

    float v_dy = 0.0f;
#pragma unroll
    for (int q = 0; q < EDGE; ++q) v_dy += v[q] * dy[q];
    v_dy = sum_over_row_groups(v_dy);
    if (lane == 0) x.v_dy[t][warp] = v_dy;
    float d[EDGE], r[EDGE];
    load_keys(d, x.d[t], kg);
    load_keys(r, documents.is_start(t) ? x.zero : x.r[t], kg);
#pragma unroll
    for (int q = 0; q < EDGE; ++q) {
#pragma unroll
        for (int j = 0; j < EDGE; ++j) g[q][j] = g[q][j] * d[j] + dy[q] * r[j];
    }
}

// dw: [B,T,H,N] elements; or null, and dconstant fp32 [B,H,N].
template <typename io>
__global__ void __launch_bounds__(THREADS)
    backward(int64_t time, int heads, const uint8_t *starts, const io *r, const io *k, const io *v, Decay<io> w,
             const float *u, const float *saved, const io *dy, const float *dfinal_state, io *dr, io *dk, io *dv,
             io *dw, float *dconstant, float *du, float *dstate) {
    BackwardMemory &x = *dynamic_memory<BackwardMemory>();
    const Head head(time, heads);
    starts = row_of_starts(starts, time, heads);
    const int i = threadIdx.x, kg = i % EDGE, rg = i / EDGE;
    const int64_t this_state = static_cast<int64_t>(blockIdx.x) * N * N;
    const float *states = saved + this_state * states_of(time);
    const float its_u = u[blockIdx.x % heads * N + i];
    float its_du = 0.0f, its_dconstant = 0.0f;
    Tile g;
    load_state(g, at(dfinal_state, this_state), 1, N);
    x.u[i] = its_u;
    x.zero[i] = 0.0f;
    for (int64_t start = (time - 1) / RUN * RUN; start >= 0; start -= RUN) {
        const int steps = static_cast<int>(time - start < RUN ? time - start : RUN);
        Tile s;
        load_private(s, states + start / STEPS_BETWEEN_STATES * N * N);
        // no barrier: since the last one each thread has read its own column alone, and it writes no other now
        if (start % STEPS_BETWEEN_STATES) {
            const Documents earlier = share_starts(load_start(starts, time, start - RUN, RUN));
            load_moves(x, head, earlier, start - RUN, RUN, heads, k, v, w);
            __syncthreads();
#pragma unroll 1
            for (int t = 0; t < RUN; ++t) advance(s, x.v[t], x.d[t], x.k[t], kg, rg);
            __syncthreads();
        }
        store_private(x.start, s);  // each thread reads its own part alone
        const Documents documents = share_starts(load_start(starts, time, start, RUN));
        load_moves(x, head, documents, start, steps, heads, k, v, w);
        for (int t = 0; t < steps; ++t) {
            const int64_t from = head.at(start + t);
            x.r[t][i] = to_float(r[from]);
            x.dy[t][i] = dy ? to_float(dy[from]) : 0.0f;
        }
        __syncthreads();
#pragma unroll 1
        for (int t = steps - 1; t >= 0; --t) step_back<io>(g, x, documents, t, dv + head.at(start + t));
        __syncthreads();
        documents.for_starts([&](int t) { x.s_dy[t][0][i] = x.s_dy[t][1][i] = 0.0f; });
        for (int t = steps - 1; t >= 0; --t) {
            const int64_t to = head.at(start + t);
            const float v_dy = x.v_dy[t][0] + x.v_dy[t][1];
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

template <typename io>
Decay<io> decay(const rwkv_problem &p, const void *w) {
    if (p.constant_decay) return {nullptr, static_cast<const float *>(w)};
    return {static_cast<const io *>(w), nullptr};
}

template <typename io>
int32_t run(const rwkv_problem &p, const Wkv6Forward &x) {
    const auto in = [](const void *pointer) { return static_cast<const io *>(pointer); };
    return launch(forward<io>, dim3(p.batch * p.heads), dim3(THREADS), sizeof(ForwardMemory), p.stream, p.time,
                  static_cast<int>(p.heads), p.starts, in(x.r), in(x.k), in(x.v), decay<io>(p, x.w), x.u, x.state,
                  static_cast<io *>(x.y), x.final_state, static_cast<float *>(x.saved));
}

template <typename io>
int32_t run(const rwkv_problem &p, const Wkv6Backward &x) {
    const auto in = [](const void *pointer) { return static_cast<const io *>(pointer); };
    const auto out = [](void *pointer) { return static_cast<io *>(pointer); };
    io *dw = p.constant_decay ? nullptr : out(x.dw);
    float *dconstant = p.constant_decay ? static_cast<float *>(x.dw) : nullptr;
    return launch(backward<io>, dim3(p.batch * p.heads), dim3(THREADS), sizeof(BackwardMemory), p.stream, p.time,
                  static_cast<int>(p.heads), p.starts, in(x.r), in(x.k), in(x.v), decay<io>(p, x.w), x.u,
                  static_cast<const float *>(x.saved), in(x.dy), x.dfinal_state, out(x.dr), out(x.dk), out(x.dv), dw,
                  dconstant, x.du, x.dstate);
}

template <typename Pointers>
int32_t run_io(const rwkv_problem &p, const Pointers &pointers) {
    if (p.io == RWKV_FP32) return run<float>(p, pointers);
    return p.io == RWKV_BF16 ? run<bf16>(p, pointers) : run<half>(p, pointers);
}

}  // namespace

int32_t wkv6_exact(const rwkv_problem &p, const Wkv6Forward &pointers) {
    return run_io(p, pointers);
}

int32_t wkv6_exact(const rwkv_problem &p, const Wkv6Backward &pointers) {
    return run_io(p, pointers);
}

}  // namespace rwkv
