// RWKV-7's forward pass, two chunks of L = 16 steps between barriers; the notation is wkv7_chunk.cu's. Four warps a head.
//
// What does not depend on the state (the factors, the four [L,L] matrices and X) is made for both chunks at once: half as
// many barriers, both inverses side by side in one warp, and a thread's two steps follow each other, which saves most of
// the scan of the decays. Then each warp goes through both chunks alone, its 16 value rows of the state in registers.
//
// U and what it comes from are transposed, [value,step]: as sums of one product they are, rounded, the next one's operand
// in the registers of the same lanes, and no other warp reads them.
#include "launchers.hpp"
#include "wkv7_chunk32.cuh"

namespace rwkv {
namespace {

struct alignas(16) Memory {
    Rows rq, aq, ki, bi, ke, be, v;
    Rows aq_rest;  // what bf16 left of aq, where keys that resemble each other amplify it
    Small ak[CHUNKS], ak_rest[CHUNKS], qb[CHUNKS], qk[CHUNKS], inverse[CHUNKS], inverse_rest[CHUNKS];
    WarpProducts decay;
    float total[CHUNKS][N];  // c_L
    float ab[CHUNKS][L][L + 1];
};

struct Inputs {
    Pieces r, w, k, v, a, b;
};

// From inputs in registers to the factors of both chunks in shared memory. One barrier inside; the caller adds the next.
__device__ __forceinline__ void prepare(Memory &x, const Inputs &in, const Head &head, const Documents &documents,
                                        int64_t start) {
    const int warp = threadIdx.x / 32, column = threadIdx.x % 8 * 8;
    const int row = threadIdx.x / 8 * STEPS, chunk = warp / WARPS_OF_CHUNK;
    float inclusive[STEPS][8], exclusive[8];  // of the first step
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        float w[8];
        unpack(w, in.w[step]);
        const bool is_step = start + row + step < head.time;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float d = exp2_approx(LOG2_DECAY_SCALE * sigmoid(w[i]));
            inclusive[step][i] = is_step ? d : 1.0f;
            if (step) inclusive[step][i] *= inclusive[step - 1][i];
        }
    }
    scan_in_warp(exclusive, x.decay, inclusive[STEPS - 1]);
    __syncthreads();  // also ends the last chunks: nobody reads their factors any more
    store(x.v, in.v);
    float total[8];
    scan_over_warps(exclusive, total, x.decay);
    float of_second[8];
    load_eight(of_second, x.decay[chunk * WARPS_OF_CHUNK + 1]);
#pragma unroll
    for (int i = 0; i < 8; ++i) total[i] *= of_second[i];
    if (row % L == 0) {
#pragma unroll
        for (int i = 0; i < 8; ++i) x.total[chunk][column + i] = total[i];
    }
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        float from[8], to[8], inverse[8];
        const auto place = [&](Rows &where) { *reinterpret_cast<uint4 *>(&where[row + step][column]) = pack(to); };
        const auto put = [&](Rows &where, const float(&factor)[8]) {
#pragma unroll
            for (int i = 0; i < 8; ++i) to[i] = from[i] * factor[i];
            place(where);
        };
        unpack(from, in.a[step]);
        put(x.aq, step ? inclusive[0] : exclusive);
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] -= to_float(to_bf16(to[i]));
        place(x.aq_rest);
#pragma unroll
        for (int i = 0; i < 8; ++i) inclusive[step][i] *= exclusive[i];
        unpack(from, in.r[step]);
        put(x.rq, inclusive[step]);
#pragma unroll
        for (int i = 0; i < 8; ++i) inverse[i] = reciprocal_approx(inclusive[step][i]);
        const bool is_kept = of_chunk(documents, chunk).reaches_last_state((row + step) % L);
        const auto put_both = [&](Rows &read, Rows &kept, const uint4 &piece) {
            unpack(from, piece);
            put(read, inverse);
#pragma unroll
            for (int i = 0; i < 8; ++i) to[i] = is_kept ? to[i] * total[i] : 0.0f;
            place(kept);
        };
        put_both(x.ki, x.ke, in.k[step]);
        put_both(x.bi, x.be, in.b[step]);
    }
}

// This warp's one of the four [L,L] matrices, of both chunks. The caller adds a barrier.
template <bool reads_a>
__device__ __forceinline__ void multiply_steps(Memory &x, const Documents &documents, int matrix) {
    const bool reads_b = matrix % 2 == 0;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        float acc[2][4] = {};
#pragma unroll
        for (int k = 0; k < N; k += 16) {
            uint32_t writes[4];
            load_b<true>(writes, operand(reads_b ? x.bi : x.ki, chunk * L), k, 0);
            multiply_loaded(acc, operand(reads_a ? x.aq : x.rq, chunk * L), k, writes);
            if (reads_a) multiply_loaded(acc, operand(x.aq_rest, chunk * L), k, writes);
        }
        const Documents own = of_chunk(documents, chunk);
        for_pairs(acc, [&](int row, int column, float &first, float &second) {
            first = masked(reads_a ? AB : QB, own, row, column, first);
            second = masked(reads_a ? AB : QB, own, row, column + 1, second);
            if (reads_a && matrix == AB) {
                x.ab[chunk][row][column] = first;
                x.ab[chunk][row][column + 1] = second;
            }
        });
        if (!reads_a) {
            store(reads_b ? &x.qb[chunk][0][0] : &x.qk[chunk][0][0], SMALL_STRIDE, acc);
        } else if (matrix == AK) {
            store(&x.ak[chunk][0][0], SMALL_STRIDE, acc);
            leave_rest(acc);
            store(&x.ak_rest[chunk][0][0], SMALL_STRIDE, acc);
        }
    }
}

// U^T from X and acc^T. Both factors are sums of two bf16: with keys that resemble each other the product is small
// beside its terms.
__device__ __forceinline__ void solve(uint32_t (&u)[4], const Memory &x, int chunk, float (&acc)[2][4]) {
    uint32_t rounded[4], rest[4], right[4];
    transpose_split(rounded, rest, acc);
    float solution[2][4] = {};
    load_b<true>(right, operand(x.inverse[chunk]), 0, 0);
    multiply_transposed(solution, rounded, right);
    multiply_transposed(solution, rest, right);
    load_b<true>(right, operand(x.inverse_rest[chunk]), 0, 0);
    multiply_transposed(solution, rounded, right);
    uint32_t columns[1][4];
    transpose(columns, solution);
#pragma unroll
    for (int i = 0; i < 4; ++i) u[i] = columns[0][i];
}

// X of both chunks, a lane a column; warp 0. The caller adds a barrier.
__device__ __forceinline__ void invert(Memory &x) {
    const int chunk = threadIdx.x / L, column = threadIdx.x % L;
    float solution[L];
    solve_column(solution, x.ab[chunk], column);
#pragma unroll
    for (int row = 0; row < L; ++row) {
        split(x.inverse[chunk][row][column], x.inverse_rest[chunk][row][column], solution[row]);
    }
}

template <bool has_starts>
__global__ void __launch_bounds__(THREADS, 4)
    forward(int64_t time, int heads, const uint8_t *starts, Pointers in, const float *state, bf16 *y,
            float *final_state, bf16 *saved) {
    Memory &x = *dynamic_memory<Memory>();
    const Head head(time, heads);
    const int warp = threadIdx.x / 32, first = warp * L;
    const int64_t block = blockIdx.x, chunks = (time + L - 1) / L;
    State s;
    load_state(s, at(state, block * N * N), first, N, 1);
    saved = at(saved, (block * chunks * N + first) * N);
    starts = row_of_starts(starts, time, heads);
    Inputs next;
    const auto load_rest = [&](int64_t start) {
        load(next.a, in.a, head, start);
        load(next.r, in.r, head, start);
        load(next.k, in.k, head, start);
        load(next.b, in.b, head, start);
        load(next.v, in.v, head, start);
    };
    load(next.w, in.w, head, 0);
    load_rest(0);
    bool next_start = has_starts && load_start(starts, time, 0, CHUNKS * L);
    for (int64_t start = 0; start < time; start += CHUNKS * L) {
        const Documents documents = has_starts ? share_starts(next_start) : Documents{0};
        prepare(x, next, head, documents, start);
        __syncthreads();
        if (warp < QB) multiply_steps<true>(x, documents, warp);
        else multiply_steps<false>(x, documents, warp);
        __syncthreads();
        if (warp == 0) invert(x);
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const Documents own = of_chunk(documents, chunk);
            uint32_t state_columns[N / 16][4], v[4], u[4], right[4];
            transpose(state_columns, s);
            if (saved && (chunk == 0 || start + L < time)) {
                store_transpose(saved, N, state_columns);
                saved += N * N;
            }
            float read[2][4] = {}, out[2][4] = {};  // read [value,step], out [step,value]
#pragma unroll
            for (int k = 0; k < N / 16; ++k) {
                load_b<true>(right, operand(x.aq, chunk * L), 16 * k, 0);
                multiply_transposed(read, state_columns[k], right);
                load_b<true>(right, operand(x.aq_rest, chunk * L), 16 * k, 0);
                multiply_transposed(read, state_columns[k], right);
                multiply_loaded(out, operand(x.rq, chunk * L), 16 * k, state_columns[k]);
            }
            keep_rows(out, [&](int row) { return own.reads_first_state(row); });
            for_pairs(read, [&](int, int column, float &first, float &second) {
                if (!own.reads_first_state(column)) first = 0.0f;
                if (!own.reads_first_state(column + 1)) second = 0.0f;
            });
            load_b<false>(v, operand(x.v, chunk * L, first), 0, 0);
            load_b<true>(right, operand(x.ak[chunk]), 0, 0);
            multiply_transposed(read, v, right);
            load_b<true>(right, operand(x.ak_rest[chunk]), 0, 0);
            multiply_transposed(read, v, right);
            multiply_loaded(out, operand(x.qk[chunk]), 0, v);
            decay(s, x.total[chunk]);
            if (own.starts) for_pairs(s, [](int, int, float &first, float &second) { first = second = 0.0f; });
            if (chunk == 0) {
                __syncthreads();  // both inverses
                // what is read first; registers for more come free later
                if (has_starts) next_start = load_start(starts, time, start + CHUNKS * L, CHUNKS * L);
                load(next.w, in.w, head, start + CHUNKS * L);
            }
            solve(u, x, chunk, read);
            multiply_loaded(out, operand(x.qb[chunk]), 0, u);
            store_steps(y, head, start + chunk * L, first, out);
            if (chunk == CHUNKS - 1) load_rest(start + CHUNKS * L);
            write(s, v, operand(x.ke, chunk * L));
            write(s, u, operand(x.be, chunk * L));
        }
    }
    store_state(at(final_state, block * N * N), s, first, N, 1);
}

}  // namespace

int32_t wkv7_chunk32(const rwkv_problem &p, const Wkv7Forward &x) {
    const Pointers pointers{in(x.r), in(x.w), in(x.k), in(x.v), in(x.a), in(x.b)};
    return launch(p.starts ? forward<true> : forward<false>, dim3(p.batch * p.heads), dim3(THREADS), sizeof(Memory),
                  p.stream, p.time, static_cast<int>(p.heads), p.starts, pointers, x.state, out(x.y), x.final_state,
                  out(x.saved));
}

}  // namespace rwkv
