// RWKV-6 on tensor cores, and RWKV-5, whose decay is the same at all times: chunks of L = 16 steps as matrix products,
// bf16 operands, fp32 sums. Layout of the work: chunk.cuh. The state S is [value,key] in here.
//
// The value written at s is read at t with the weight
//
//   P_ts = sum over channels of r_t k_s d_{s+1} .. d_{t-1}  (s < t),    P_tt = r_t . (u k_t)
//
// d may be anything in [0, 1], so the product of decays is never a quotient. It is split at a point between s and t:
// rows 8.. meet rows ..7 at row 8 (h below), and inside a leaf of 8 rows both sides are taken relative to its middle
// (rl, kl), where a few exponents are positive; there log d is bounded from below, by LEAF_BOUND, far under what bf16
// can tell from 0. With c the products from the chunk's start up to t (rs) and from s to its end (ke), both exclusive:
//
//   P = leaf(rl kl^T) + cross(h h^T) + diag;  Y = P V + rs S^T;  S' = S c_L + V^T ke
//   dP = tril(dY V^T);  dV = P^T dY + ke dS'^T;  dS = dS' c_L + dY^T rs
//   drs = dY S;  dke = V dS';  drl = leaf(dP) kl;  dkl = leaf(dP)^T rl;  dh = cross(dP) h, and cross(dP)^T h
//
// Where documents begin inside a chunk, P and dP are zero between documents; rs is zero from the first start on, ke is
// zero before the last one, and c_L is then zero.
//
// The gradient of log d_m sums, over every factor that contains d_m, the factor times its gradient. Only a leaf's sums
// cancel (eight rows, the same rounded operands on both sides), and where d_m is below the bound they count as 0.
#include "chunk.cuh"
#include "launchers.hpp"

namespace rwkv {
namespace {

constexpr int LEAF = 8;
constexpr float LEAF_BOUND = -17.7f;  // of log d; four of them stay in bf16's range
constexpr float LEAST_LOG_DECAY = -1e4f;  // its exponential is 0, and sums of it are finite

struct alignas(16) Chunk {
    Steps rs, ke, h, rl, kl, v;
    Small weights;
    float log_decay[WARPS][N];  // sum over the four steps that a warp loads
    float total[N];             // c_L
    float bonus[L];             // r . (u k)
};

using Scales = float[L][N + 4];

struct alignas(16) BackwardChunk : Chunk {
    Steps dy, r, k;
    Square s, ds;
    Small dleaf, dcross;
    float v_dy[L];
    Scales start, end, half, leaf_read, leaf_write, own_log_decay;
};

struct Inputs {
    uint4 r, k, v, w;
};

// w: [B,T,H,N]; or null, and constant fp32 [H,N].
struct Pointers {
    const bf16 *r, *k, *v, *w;
    const float *constant, *u;
};

__device__ __forceinline__ Inputs load_inputs(const Pointers &x, const Head &head, int64_t start) {
    return {load_piece(x.r, head, start), load_piece(x.k, head, start), load_piece(x.v, head, start),
            load_piece(x.w, head, start)};
}

// Sums of x over the warp's four steps: up to this one, and after it. All channels' wait for their shuffles together.
__device__ __forceinline__ void scan_sums(const float (&x)[8], float (&up_to)[8], float (&after)[8]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 8; ++i) up_to[i] = after[i] = x[i];
#pragma unroll
    for (int distance = 8; distance < 32; distance *= 2) {
        float earlier[8], later[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            earlier[i] = __shfl_sync(0xffffffffu, up_to[i], lane - distance);
            later[i] = __shfl_sync(0xffffffffu, after[i], lane + distance);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (lane >= distance) up_to[i] += earlier[i];
            if (lane + distance < 32) after[i] += later[i];
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        after[i] = __shfl_sync(0xffffffffu, after[i], lane + 8);
        if (lane >= 24) after[i] = 0.0f;
    }
}

__device__ __forceinline__ float sum_before(float up_to) {
    const int lane = threadIdx.x % 32;
    const float found = __shfl_sync(0xffffffffu, up_to, lane - 8);
    return lane >= 8 ? found : 0.0f;
}

// x, or `least` where that is more; NaN stays NaN.
__device__ __forceinline__ float at_least(float x, float least) {
    return x < least ? least : x;
}

// exp of the sums of log d that this thread's 8 channels need at its step.
struct Factors {
    float start[8], end[8], half[8], leaf_read[8], leaf_write[8], log_decay[8];
};

// One barrier inside.
template <typename Memory>
__device__ __forceinline__ void decay_factors(Memory &x, Factors &f, const Pointers &in, const uint4 &raw,
                                              const Documents &documents, bool is_step, int heads) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = threadIdx.x % 8 * 8;
    const bool before_middle = warp % 2 == 0;  // a leaf is two warps' steps
    float w[8], own[8], up_to[8], after[8];
    unpack(w, raw);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (in.constant) w[i] = in.constant[blockIdx.x % heads * N + column + i];
        const float log_decay = at_least(-expf(w[i]), LEAST_LOG_DECAY);
        f.log_decay[i] = is_step ? log_decay : 0.0f;
        own[i] = at_least(f.log_decay[i], LEAF_BOUND);
    }
    scan_sums(own, up_to, after);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float before = sum_before(up_to[i]);
        f.leaf_read[i] = exp_approx(before_middle ? -(own[i] + after[i]) : before);
        f.leaf_write[i] = exp_approx(before_middle ? after[i] : -up_to[i]);
    }
    scan_sums(f.log_decay, up_to, after);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (lane >= 24) x.log_decay[warp][column + i] = up_to[i];
        up_to[i] = sum_before(up_to[i]);
    }
    __syncthreads();  // also ends the last chunk: nobody reads its factors any more
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float sums[WARPS];
#pragma unroll
        for (int other = 0; other < WARPS; ++other) sums[other] = x.log_decay[other][column + i];
        float earlier = 0.0f, later = 0.0f;
#pragma unroll
        for (int other = 0; other < WARPS; ++other) {
            if (other < warp) earlier += sums[other];
            if (other > warp) later += sums[other];
        }
        f.start[i] = exp_approx(earlier + up_to[i]);
        f.end[i] = exp_approx(after[i] + later);
        const float to_row_8 = warp == 0 ? after[i] + sums[1] : after[i];
        const float from_row_8 = warp == 3 ? sums[2] + up_to[i] : up_to[i];
        f.half[i] = exp_approx(warp < 2 ? to_row_8 : from_row_8);
        const float total = exp_approx(sums[0] + sums[1] + sums[2] + sums[3]);
        if (threadIdx.x < 8) x.total[column + i] = documents.starts ? 0.0f : total;
    }
    const int row = threadIdx.x / 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (!documents.reads_first_state(row)) f.start[i] = 0.0f;
        if (!documents.reaches_last_state(row)) f.end[i] = 0.0f;
    }
}

__device__ __forceinline__ void keep(Chunk &, const Factors &, const Documents &, const Inputs &) {}

__device__ __forceinline__ void keep(BackwardChunk &x, const Factors &f, const Documents &documents,
                                     const Inputs &in) {
    const int row = threadIdx.x / 8, column = threadIdx.x % 8 * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        x.start[row][column + i] = f.start[i];
        x.end[row][column + i] = f.end[i];
        x.half[row][column + i] = f.half[i];
        x.leaf_read[row][column + i] = f.leaf_read[i];
        x.leaf_write[row][column + i] = f.leaf_write[i];
        x.own_log_decay[row][column + i] = documents.is_start(row) ? 0.0f : f.log_decay[i];
    }
    store_piece(x.r, in.r);
    store_piece(x.k, in.k);
}

// From inputs in registers to the chunk's factors in shared memory. One barrier inside; the caller adds the next.
template <typename Memory>
__device__ __forceinline__ void prepare(Memory &x, const Inputs &in, const Pointers &pointers, const Head &head,
                                        const Documents &documents, int64_t start, int heads) {
    const int row = threadIdx.x / 8, column = threadIdx.x % 8 * 8;
    Factors f;
    decay_factors(x, f, pointers, in.w, documents, start + row < head.time, heads);
    keep(x, f, documents, in);
    float r[8], k[8], product[8], bonus = 0.0f;
    unpack(r, in.r);
    unpack(k, in.k);
    const auto put = [&](Steps &to, const float (&x)[8], const float (&factor)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) product[i] = x[i] * factor[i];
        store_piece(to, pack(product));
    };
    put(x.rs, r, f.start);
    put(x.ke, k, f.end);
    if (row < LEAF) put(x.h, k, f.half);
    else put(x.h, r, f.half);
    put(x.rl, r, f.leaf_read);
    put(x.kl, k, f.leaf_write);
    store_piece(x.v, in.v);
#pragma unroll
    for (int i = 0; i < 8; ++i) bonus += r[i] * pointers.u[blockIdx.x % heads * N + column + i] * k[i];
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) bonus += __shfl_xor_sync(0xffffffffu, bonus, distance);
    if (column == 0) x.bonus[row] = bonus;
}

__device__ __forceinline__ bool is_leaf(int row, int column) {
    return column < row && row / LEAF == column / LEAF;
}

__device__ __forceinline__ bool is_cross(int row, int column) {
    return row >= LEAF && column < LEAF;
}

// P: the leaves, their diagonal and the empty corner by warp 0, the crossing by warp 1. The caller adds a barrier.
__device__ __forceinline__ void weigh(Chunk &x, const Documents &documents) {
    const int warp = threadIdx.x / 32;
    if (warp > 1) return;
    float acc[2][4] = {};
    multiply<N, false, true>(acc, operand(warp == 0 ? x.rl : x.h), operand(warp == 0 ? x.kl : x.h));
    const auto chosen = [&](int row, int column, float value) {
        if (row == column) return x.bonus[row];
        return (warp == 1 || is_leaf(row, column)) && documents.joins(row, column) ? value : 0.0f;
    };
    for_pairs(acc, [&](int row, int column, float first, float second) {
        if (is_cross(row, column) != (warp == 1)) return;
        const uint32_t pair = pack2(chosen(row, column, first), chosen(row, column + 1, second));
        *reinterpret_cast<uint32_t *>(&x.weights[row][column]) = pair;
    });
}

template <bool has_starts>
__global__ void __launch_bounds__(THREADS, 4)
    forward(int64_t time, int heads, const uint8_t *starts, Pointers in, const float *state, bf16 *y, float *final_state, bf16 *saved) {
    Chunk &x = *dynamic_memory<Chunk>();
    const Head head(time, heads);
    const int warp = threadIdx.x / 32, first = warp * L;
    const int64_t block = blockIdx.x, chunks = (time + L - 1) / L;
    State s;
    load_state(s, at(state, block * N * N), first, 1, N);
    starts = row_of_starts(starts, time, heads);
    Inputs next = load_inputs(in, head, 0);
    bool next_start = has_starts && load_start(starts, time, 0, L);
    for (int64_t start = 0; start < time; start += L) {
        const Documents documents = has_starts ? share_starts(next_start) : Documents{0};
        prepare(x, next, in, head, documents, start, heads);
        next = load_inputs(in, head, start + L);
        if (has_starts) next_start = load_start(starts, time, start + L, L);
        __syncthreads();
        weigh(x, documents);
        uint32_t state_columns[N / 16][4];
        transpose(state_columns, s);
        if (saved) store_transpose(saved + ((block * chunks + start / L) * N + first) * N, N, state_columns);
        float out[2][4] = {};
#pragma unroll
        for (int k = 0; k < N / 16; ++k) multiply_loaded(out, operand(x.rs), 16 * k, state_columns[k]);
        decay(s, x.total);
        multiply_transposed(s, operand(x.v, 0, first), operand(x.ke));
        __syncthreads();
        multiply<L>(out, operand(x.weights), operand(x.v, 0, first));
        store_steps(y, head, start, first, out);
    }
    store_state(at(final_state, block * N * N), s, first, 1, N);
}

// dP, split into leaves, crossing and diagonal; one warp. The caller adds a barrier.
__device__ __forceinline__ void weigh_gradients(BackwardChunk &x, const Documents &documents) {
    float acc[2][4] = {};
    multiply<N, false, true>(acc, operand(x.dy), operand(x.v));
    for_pairs(acc, [&](int row, int column, float first, float second) {
        const auto pair = [&](auto holds) {
            const bool has_first = holds(row, column) && documents.joins(row, column);
            const bool has_second = holds(row, column + 1) && documents.joins(row, column + 1);
            return pack2(has_first ? first : 0.0f, has_second ? second : 0.0f);
        };
        *reinterpret_cast<uint32_t *>(&x.dleaf[row][column]) = pair(is_leaf);
        *reinterpret_cast<uint32_t *>(&x.dcross[row][column]) = pair(is_cross);
        if (row == column) x.v_dy[row] = first;
        if (row == column + 1) x.v_dy[row] = second;
    });
}

struct Gradients {
    bf16 *dr, *dk, *dv, *dw;  // dw: null with a constant decay
    float *dconstant, *du;
};

// Sums over time of the gradients of u and of a constant decay: a lane's share of its channels, [tile][side].
struct ChannelSums {
    float du[2][2] = {}, dw[2][2] = {};
};

// The gradients of r, k, w, u for this warp's 16 keys, from `first` on.
__device__ __forceinline__ void key_gradients(BackwardChunk &x, ChannelSums &sums, const Gradients &out,
                                              const float *u, const Head &head, const Documents &documents,
                                              int64_t start, int first) {
    float drs[2][4] = {}, dke[2][4] = {}, drl[2][4] = {}, dkl[2][4] = {}, dh_read[2][4] = {}, dh_written[2][4] = {};
    float product[2][4] = {};  // S^T dS', whose diagonal sums over values
#pragma unroll
    for (int k = 0; k < N; k += 16) {
        uint32_t s[4], ds[4];
        load_b<false>(s, operand(x.s, 0, first), k, 0);
        multiply_loaded(drs, operand(x.dy), k, s);
        load_b<false>(ds, operand(x.ds, 0, first), k, 0);
        multiply_transposed(product, s, ds);
        multiply_loaded(dke, operand(x.v), k, ds);
    }
    const Diagonal state_product(product);
    multiply<L>(drl, operand(x.dleaf), operand(x.kl, 0, first));
    multiply<L, true>(dkl, operand(x.dleaf), operand(x.rl, 0, first));
    uint32_t halves[4];
    load_b<false>(halves, operand(x.h, 0, first), 0, 0);
    multiply_loaded(dh_read, operand(x.dcross), 0, halves);           // rows 8..
    multiply_loaded<true>(dh_written, operand(x.dcross), 0, halves);  // rows ..7

    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    // rows g and g + 8; columns as in a row of tiles
    float reads[2][4], writes[2][4], leaf[2][4], leaf_written[2][4], late_starts[1][4], early_ends[1][4], at_end[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const int n = c / 2, side = c % 2, j = first + 8 * n + 2 * t + side;
        at_end[c] = state_product.at(n, 2 * t + side) * x.total[j];
        float from_start[2], to_end[2], crossing[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = g + 8 * half, i = 2 * half + side;
            const float r = to_float(x.r[row][j]), k = to_float(x.k[row][j]), v_dy = x.v_dy[row];
            const float dh = half ? dh_read[n][i] : dh_written[n][i];
            from_start[half] = drs[n][i] * to_float(x.rs[row][j]);
            to_end[half] = dke[n][i] * to_float(x.ke[row][j]);
            crossing[half] = dh * to_float(x.h[row][j]);
            leaf_written[half][c] = dkl[n][i] * to_float(x.kl[row][j]);
            leaf[half][c] = drl[n][i] * to_float(x.rl[row][j]) - leaf_written[half][c];
            float dr = drs[n][i] * x.start[row][j] + drl[n][i] * x.leaf_read[row][j];
            float dk = dke[n][i] * x.end[row][j] + dkl[n][i] * x.leaf_write[row][j];
            (half ? dr : dk) += dh * x.half[row][j];
            drs[n][i] = dr + u[j] * k * v_dy;
            dke[n][i] = dk + u[j] * r * v_dy;
            sums.du[n][side] += r * k * v_dy;
        }
        reads[0][c] = from_start[0];
        reads[1][c] = from_start[1] + crossing[1];
        late_starts[0][c] = from_start[1];
        writes[0][c] = to_end[0] + crossing[0];
        writes[1][c] = to_end[1];
        early_ends[0][c] = to_end[0];
    }
    store_steps(out.dr, head, start, first, drs);
    store_steps(out.dk, head, start, first, dke);

    // log d_m counts in: rs after m, ke before m, h between m and row 8, the leaf's products across m
    const int rows[2] = {documents.steps_left(g), documents.steps_left(g + 8)};
    suffix_sums(reads, {L, L});
    suffix_sums(late_starts, {L});
    prefix_sums(writes);
    prefix_sums(early_ends);
    suffix_sums(leaf, rows);
    float dw[2][4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const int n = c / 2, side = c % 2, j = first + 8 * n + 2 * t + side;
        const float all_late_starts = first_row(late_starts[0][c]);
        const float all_early_ends = __shfl_sync(0xffffffffu, early_ends[0][c], 28 + t);
        const float dlog[2] = {row_after(reads[0][c]) + all_late_starts + row_before(writes[0][c]),
                               row_after(reads[1][c]) + row_before(writes[1][c]) + all_early_ends};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = g + 8 * half;
            const float log_decay = x.own_log_decay[row][j], later = row_after(leaf[half][c]);
            const float of_leaf = (rows[half] > 1 ? later : 0.0f) - leaf_written[half][c];
            const float all = dlog[half] + at_end[c] + (log_decay > LEAF_BOUND ? of_leaf : 0.0f);
            dw[n][2 * half + side] = all * log_decay;  // d log d / dw = -exp(w) = log d
            if (start + row < head.time) sums.dw[n][side] += all * log_decay;
        }
    }
    if (out.dw) store_steps(out.dw, head, start, first, dw);
}

// Over the rows of all lanes, to this head's fp32 [N] at `to`.
__device__ __forceinline__ void store_channel_sums(float *to, float (&x)[2][2], int first) {
    const int lane = threadIdx.x % 32;
    suffix_sums(x, {L, L});
    if (lane >= 4) return;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            to[blockIdx.x * static_cast<int64_t>(N) + first + 8 * n + 2 * lane + side] = x[n][side];
        }
    }
}

template <bool has_starts>
__global__ void __launch_bounds__(THREADS)
    backward(int64_t time, int heads, const uint8_t *starts, Pointers in, const bf16 *saved, const bf16 *dy,
             const float *dfinal_state, Gradients out, float *dstate) {
    BackwardChunk &x = *dynamic_memory<BackwardChunk>();
    const Head head(time, heads);
    const int warp = threadIdx.x / 32, first = warp * L;
    const int64_t block = blockIdx.x, chunks = (time + L - 1) / L;
    const bf16 *states = saved + block * chunks * N * N;
    State g;  // the gradient of the state at the chunk's end
    load_state(g, at(dfinal_state, block * N * N), first, 1, N);
    ChannelSums sums;
    starts = row_of_starts(starts, time, heads);
    int64_t start = (chunks - 1) * L;
    Inputs next = load_inputs(in, head, start);
    uint4 next_dy = load_piece(dy, head, start);
    SavedState next_state = load_saved(states, chunks - 1);
    bool next_start = has_starts && load_start(starts, time, start, L);
    for (; start >= 0; start -= L) {
        const Documents documents = has_starts ? share_starts(next_start) : Documents{0};
        prepare(x, next, in, head, documents, start, heads);
        store_piece(x.dy, next_dy);
        store_saved(x.s, next_state);
        store(&x.ds[first][0], STRIDE, g);
        next = load_inputs(in, head, start - L);
        next_dy = load_piece(dy, head, start - L);
        next_state = load_saved(states, start / L - 1);
        if (has_starts) next_start = load_start(starts, time, start - L, L);
        __syncthreads();
        float dv[2][4] = {};
        uint32_t gradient_columns[N / 16][4];
        transpose(gradient_columns, g);
#pragma unroll
        for (int k = 0; k < N / 16; ++k) multiply_loaded(dv, operand(x.ke), 16 * k, gradient_columns[k]);
        decay(g, x.total);
        multiply_transposed(g, operand(x.dy, 0, first), operand(x.rs));
        weigh(x, documents);
        if (warp == 2) weigh_gradients(x, documents);
        __syncthreads();
        multiply<L, true>(dv, operand(x.weights), operand(x.dy, 0, first));
        store_steps(out.dv, head, start, first, dv);
        key_gradients(x, sums, out, in.u + block % heads * N, head, documents, start, first);
    }
    store_channel_sums(out.du, sums.du, first);
    if (out.dconstant) store_channel_sums(out.dconstant, sums.dw, first);
    store_state(at(dstate, block * N * N), g, first, 1, N);
}

Pointers pointers(const rwkv_problem &p, const void *r, const void *k, const void *v, const void *w, const float *u) {
    const float *constant = p.constant_decay ? static_cast<const float *>(w) : nullptr;
    return {in(r), in(k), in(v), p.constant_decay ? nullptr : in(w), constant, u};
}

}  // namespace

int32_t wkv6_chunk(const rwkv_problem &p, const Wkv6Forward &x) {
    return launch(p.starts ? forward<true> : forward<false>, dim3(p.batch * p.heads), dim3(THREADS), sizeof(Chunk), p.stream, p.time,
                  static_cast<int>(p.heads), p.starts, pointers(p, x.r, x.k, x.v, x.w, x.u), x.state, out(x.y), x.final_state,
                  out(x.saved));
}

int32_t wkv6_chunk(const rwkv_problem &p, const Wkv6Backward &x) {
    const Gradients gradients{out(x.dr), out(x.dk), out(x.dv), p.constant_decay ? nullptr : out(x.dw),
                              p.constant_decay ? static_cast<float *>(x.dw) : nullptr, x.du};
    return launch(p.starts ? backward<true> : backward<false>, dim3(p.batch * p.heads), dim3(THREADS), sizeof(BackwardChunk), p.stream, p.time,
                  static_cast<int>(p.heads), p.starts, pointers(p, x.r, x.k, x.v, x.w, x.u), in(x.saved), in(x.dy),
                  x.dfinal_state, gradients, x.dstate);
}

}  // namespace rwkv
