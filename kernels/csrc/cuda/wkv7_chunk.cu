// RWKV-7 on tensor cores: chunks of L = 16 steps as matrix products, bf16 operands, fp32 sums. Four warps a head.
//
// With c_t the product of the chunk's decays up to t, E_t = c_t and c_{t-1} per channel, and
//
//   rq = r c_t, aq = a c_{t-1}, ki = k / c_t, bi = b / c_t, ke = k c_L / c_t, be = b c_L / c_t          [L,N]
//   AB = tril-(aq bi^T), AK = tril-(aq ki^T), QB = tril(rq bi^T), QK = tril(rq ki^T), X = (1 - AB)^-1   [L,L]
//
// a chunk is (S [value,key] at its start)
//
//   U = X (aq S^T + AK V);  Y = rq S^T + QK V + QB U;  S' = S c_L + V^T ke + U^T be
//
// and backward, from dY and dS' (Z is the gradient of the bracket):
//
//   Z = X^T (QB^T dY + be dS'^T);  dV = QK^T dY + ke dS'^T + AK^T Z;  dS = dS' c_L + dY^T rq + Z^T aq
//   dAB = tril-(Z U^T), dAK = tril-(Z V^T), dQB = tril(dY U^T), dQK = tril(dY V^T)
//   drq = dY S + dQB bi + dQK ki;  daq = Z S + dAB bi + dAK ki;  dke = V dS';  dbe = U dS'
//   dki = dQK^T rq + dAK^T aq;  dbi = dQB^T rq + dAB^T aq
//
// The gradient of log d is a sum over time of each factor times its gradient; both as rounded, so that what cancels
// cancels exactly. d > 0.545, so 1 / c_t < 1.7e4 and nothing overflows.
//
// Where documents begin inside a chunk, the [L,L] matrices and their gradients are zero between documents; only what
// comes before the first start reads S, and only what follows the last one reaches S', which S itself then does not.
//
// Warp w computes one of the four [L,L] matrices, then owns the 16 value rows from 16 w on (of S, U, V, Y, Z) and, for
// the gradients of what is indexed by keys, the 16 keys from 16 w on. The state itself stays in fp32 registers,
// and so, rounded, do its own rows as an operand: no other warp reads them, but for the gradients by keys.
// Thread i loads the 8 channels from 8 (i % 8) on of step i / 8, one 16-byte piece of each input, a chunk ahead.
#include <type_traits>

#include "launchers.hpp"
#include "wkv7.cuh"

namespace rwkv {
namespace {

// Blocks that a multiprocessor has registers for, forward: four where its shared memory has room for them.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int FORWARD_BLOCKS = 3;
#else
constexpr int FORWARD_BLOCKS = 4;
#endif

struct alignas(16) Chunk {
    Steps rq, aq, ki, bi, ke, be, v, u;
    Steps aq_rest;  // what bf16 left of aq (backward: of be too), where keys that resemble each other amplify it
    Small product[4], product_rest[4], inverse, inverse_rest;
    Steps rest;  // of u: what bf16 left of the fp32 sums
    float ab[L][L + 1];
    float decay[WARPS][N];  // product over the four steps that a warp loads
    float total[N];         // c_L
};

struct alignas(16) BackwardChunk : Chunk {
    Steps dy, z, z_rest;
    Steps be_rest;
    Square s, ds;
    Small dproduct[4];
    float cumulative[L + 1][N + 4];  // row t is c_{t-1}, row t + 1 is c_t
    float slope[L][N + 4];           // d log d / dw
};

struct Inputs {
    uint4 r, w, k, v, a, b;
};

__device__ __forceinline__ Inputs load_inputs(const Pointers &x, const Head &head, int64_t start) {
    return {load_piece(x.r, head, start), load_piece(x.w, head, start), load_piece(x.k, head, start),
            load_piece(x.v, head, start), load_piece(x.a, head, start), load_piece(x.b, head, start)};
}

// Products of d over the steps up to this thread's, within its warp's four steps: d becomes inclusive.
__device__ __forceinline__ void scan_products(float (&d)[8], float (&exclusive)[8]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int distance = 8; distance < 32; distance *= 2) {
            const float earlier = __shfl_sync(0xffffffffu, d[i], lane - distance);
            if (lane >= distance) d[i] *= earlier;
        }
        const float before = __shfl_sync(0xffffffffu, d[i], lane - 8);
        exclusive[i] = lane >= 8 ? before : 1.0f;
    }
}

// From inputs in registers to the chunk's factors in shared memory. One barrier inside; the caller adds the next.
template <typename Memory>
__device__ __forceinline__ void prepare(Memory &x, const Inputs &in, const Head &head, const Documents &documents,
                                        int64_t start) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = threadIdx.x % 8 * 8, row = threadIdx.x / 8;
    float inclusive[8], exclusive[8], w[8];
    unpack(w, in.w);
    const bool is_step = start + row < head.time;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float d = exp2_approx(LOG2_DECAY_SCALE * sigmoid(w[i]));
        inclusive[i] = is_step ? d : 1.0f;
    }
    scan_products(inclusive, exclusive);
    if (lane >= 24) {
#pragma unroll
        for (int i = 0; i < 8; ++i) x.decay[warp][column + i] = inclusive[i];
    }
    __syncthreads();  // also ends the last chunk: nobody reads its factors any more
    float total[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float before = 1.0f, all = 1.0f;
#pragma unroll
        for (int other = 0; other < WARPS; ++other) {
            if (other == warp) before = all;
            all *= x.decay[other][column + i];
        }
        inclusive[i] *= before;
        exclusive[i] *= before;
        total[i] = all;
        if (row == 0) x.total[column + i] = all;
    }
    keep(x, inclusive, exclusive, w, documents.is_start(row), row, column);
    if (!documents.reaches_last_state(row)) {
#pragma unroll
        for (int i = 0; i < 8; ++i) total[i] = 0.0f;
    }
    float from[8], to[8], inverse[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) inverse[i] = reciprocal_approx(inclusive[i]);
    const auto put = [&](Steps &where, const auto &factor) {
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] = from[i] * factor(i);
        store_piece(where, pack(to));
    };
    unpack(from, in.r);
    put(x.rq, [&](int i) { return inclusive[i]; });
    const auto put_rest = [&](Steps &where) {
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] -= to_float(to_bf16(to[i]));
        store_piece(where, pack(to));
    };
    unpack(from, in.a);
    put(x.aq, [&](int i) { return exclusive[i]; });
    put_rest(x.aq_rest);
    unpack(from, in.k);
    put(x.ki, [&](int i) { return inverse[i]; });
    put(x.ke, [&](int i) { return inverse[i] * total[i]; });
    unpack(from, in.b);
    put(x.bi, [&](int i) { return inverse[i]; });
    put(x.be, [&](int i) { return inverse[i] * total[i]; });
    if constexpr (std::is_same_v<Memory, BackwardChunk>) put_rest(x.be_rest);
    store_piece(x.v, in.v);
}

// What backward needs later: forward keeps nothing.
__device__ __forceinline__ void keep(Chunk &, const float (&)[8], const float (&)[8], const float (&)[8], bool, int, int) {}

__device__ __forceinline__ void keep(BackwardChunk &x, const float (&inclusive)[8], const float (&exclusive)[8],
                                     const float (&w)[8], bool is_start, int row, int column) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (row == 0) x.cumulative[0][column + i] = exclusive[i];
        x.cumulative[row + 1][column + i] = inclusive[i];
        x.slope[row][column + i] = is_start ? 0.0f : LOG_DECAY_SCALE * sigmoid(w[i]) * sigmoid(-w[i]);
    }
}

// acc as the sum of two bf16, to this warp's columns of two matrices.
__device__ __forceinline__ void store_split(Steps &columns, Steps &rest, int first, float (&acc)[2][4]) {
    store(&columns[0][first], STRIDE, acc);
    leave_rest(acc);
    store(&rest[0][first], STRIDE, acc);
}

// This warp's one of the four [L,L] matrices. The caller adds a barrier.
__device__ __forceinline__ void multiply_steps(Chunk &x, const Documents &documents) {
    const int matrix = threadIdx.x / 32;
    float acc[2][4] = {};
    const bool reads_b = matrix == AB || matrix == QB;
    uint32_t writes[N / 16][4];
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
        load_b<true>(writes[k], operand(reads_b ? x.bi : x.ki), 16 * k, 0);
        multiply_loaded(acc, operand(matrix < QB ? x.aq : x.rq), 16 * k, writes[k]);
    }
    if (matrix < QB) {
#pragma unroll
        for (int k = 0; k < N / 16; ++k) multiply_loaded(acc, operand(x.aq_rest), 16 * k, writes[k]);
    }
    for_pairs(acc, [&](int row, int column, float &first, float &second) {
        first = masked(matrix, documents, row, column, first);
        second = masked(matrix, documents, row, column + 1, second);
        if (matrix == AB) {
            x.ab[row][column] = first;
            x.ab[row][column + 1] = second;
        }
    });
    store(&x.product[matrix][0][0], SMALL_STRIDE, acc);
    if (matrix != AK && matrix != QB) return;
    leave_rest(acc);
    store(&x.product_rest[matrix][0][0], SMALL_STRIDE, acc);
}

// X = (1 - AB)^-1, lanes j and j + 16 column j, of which each stores half; warp 0. The caller adds a barrier.
__device__ __forceinline__ void invert(Chunk &x) {
    const int column = threadIdx.x % L, later_half = threadIdx.x / L * (L / 2);
    float solution[L];
    solve_column(solution, x.ab, column);
#pragma unroll
    for (int i = 0; i < L / 2; ++i) {
        const int row = later_half + i;
        split(x.inverse[row][column], x.inverse_rest[row][column], later_half ? solution[L / 2 + i] : solution[i]);
    }
}

// acc, this warp's columns of aq S^T, plus AK V, to x.u.
__device__ __forceinline__ void project(Chunk &x, float (&acc)[2][4], int first) {
    multiply_split<L>(acc, operand(x.product[AK]), operand(x.product_rest[AK]), operand(x.v, 0, first));
    store_split(x.u, x.rest, first, acc);
}

// acc = X columns, or X^T columns, on this warp's 16 of them, which may be overwritten afterwards. Both factors are sums
// of two bf16: with keys that resemble each other the product is small beside its terms.
template <bool transposed>
__device__ __forceinline__ void solve(float (&acc)[2][4], const Chunk &x, const Steps &columns, const Steps &rest,
                                      int first) {
    for_pairs(acc, [](int, int, float &first, float &second) { first = second = 0.0f; });
    uint32_t left[4], right[4];
    load_a<transposed>(left, operand(x.inverse), 0);
    load_b<false>(right, operand(columns, 0, first), 0, 0);
    multiply_fragments(acc, left, right);
    multiply_loaded<transposed>(acc, operand(x.inverse_rest), 0, right);
    load_b<false>(right, operand(rest, 0, first), 0, 0);
    multiply_fragments(acc, left, right);
    __syncwarp();
}

// S, or its gradient, to the chunk's other end.
__device__ __forceinline__ void pass(State &s, const Chunk &x, const Documents &documents) {
    decay(s, x.total);
    if (!documents.starts) return;
    for_pairs(s, [](int, int, float &first, float &second) { first = second = 0.0f; });
}

template <bool has_starts>
__global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    forward(int64_t time, int heads, const uint8_t *starts, Pointers in, const float *state, bf16 *y, float *final_state, bf16 *saved) {
    Chunk &x = *dynamic_memory<Chunk>();
    const Head head(time, heads);
    const int warp = threadIdx.x / 32, first = warp * L;
    const int64_t block = blockIdx.x, chunks = (time + L - 1) / L;
    State s;
    load_state(s, at(state, block * N * N), first, N, 1);
    saved = at(saved, (block * chunks * N + first) * N);
    starts = row_of_starts(starts, time, heads);
    Inputs next = load_inputs(in, head, 0);
    bool next_start = has_starts && load_start(starts, time, 0, L);
    for (int64_t start = 0; start < time; start += L) {
        const Documents documents = has_starts ? share_starts(next_start) : Documents{0};
        prepare(x, next, head, documents, start);
        next = load_inputs(in, head, start + L);
        if (has_starts) next_start = load_start(starts, time, start + L, L);
        __syncthreads();
        multiply_steps(x, documents);
        __syncthreads();
        if (warp == 0) invert(x);
        uint32_t state_columns[N / 16][4];
        transpose(state_columns, s);
        if (saved) {
            store_transpose(saved, N, state_columns);
            saved += N * N;
        }
        float read[2][4] = {}, out[2][4] = {};
#pragma unroll
        for (int k = 0; k < N / 16; ++k) {
            multiply_loaded(read, operand(x.aq), 16 * k, state_columns[k]);
            multiply_loaded(read, operand(x.aq_rest), 16 * k, state_columns[k]);
            multiply_loaded(out, operand(x.rq), 16 * k, state_columns[k]);
        }
        const auto reads_first_state = [&](int row) { return documents.reads_first_state(row); };
        keep_rows(read, reads_first_state);
        keep_rows(out, reads_first_state);
        project(x, read, first);
        __syncthreads();
        solve<false>(read, x, x.u, x.rest, first);
        store(&x.u[0][first], STRIDE, read);
        multiply<L>(out, operand(x.product[QK]), operand(x.v, 0, first));
        __syncwarp();
        multiply<L>(out, operand(x.product[QB]), operand(x.u, 0, first));
        store_steps(y, head, start, first, out);
        pass(s, x, documents);
        multiply_transposed(s, operand(x.v, 0, first), operand(x.ke));
        multiply_transposed(s, operand(x.u, 0, first), operand(x.be));
    }
    store_state(at(final_state, block * N * N), s, first, N, 1);
}

struct Gradients {
    bf16 *dr, *dw, *dk, *dv, *da, *db;
};

// The gradients of r, w, k, a, b for this warp's 16 keys, from `first` on.
__device__ __forceinline__ void key_gradients(BackwardChunk &x, const Gradients &out, const Head &head,
                                              const Documents &documents, int64_t start, int first) {
    float drq[2][4] = {}, daq[2][4] = {}, dki[2][4] = {}, dke[2][4] = {}, dbi[2][4] = {}, dbe[2][4] = {};
    float product[2][4] = {};  // S^T dS', whose diagonal sums over values
    const auto reads_first_state = [&](int row) { return documents.reads_first_state(row); };
    const auto reaches_last_state = [&](int row) { return documents.reaches_last_state(row); };
#pragma unroll
    for (int k = 0; k < N; k += 16) {
        uint32_t s[4], ds[4];
        load_b<false>(s, operand(x.s, 0, first), k, 0);
        multiply_loaded(drq, operand(x.dy), k, s);
        multiply_loaded(daq, operand(x.z), k, s);
        multiply_loaded(daq, operand(x.z_rest), k, s);
        load_b<false>(ds, operand(x.ds, 0, first), k, 0);
        multiply_transposed(product, s, ds);
        multiply_loaded(dke, operand(x.v), k, ds);
        multiply_loaded(dbe, operand(x.u), k, ds);
        multiply_loaded(dbe, operand(x.rest), k, ds);
    }
    const Diagonal state_product(product);
    keep_rows(drq, reads_first_state);
    keep_rows(daq, reads_first_state);
    keep_rows(dke, reaches_last_state);
    keep_rows(dbe, reaches_last_state);
    uint32_t right[4];
    load_b<false>(right, operand(x.bi, 0, first), 0, 0);
    multiply_loaded(drq, operand(x.dproduct[QB]), 0, right);
    multiply_loaded(daq, operand(x.dproduct[AB]), 0, right);
    load_b<false>(right, operand(x.ki, 0, first), 0, 0);
    multiply_loaded(drq, operand(x.dproduct[QK]), 0, right);
    multiply_loaded(daq, operand(x.dproduct[AK]), 0, right);
    load_b<false>(right, operand(x.rq, 0, first), 0, 0);
    multiply_loaded<true>(dki, operand(x.dproduct[QK]), 0, right);
    multiply_loaded<true>(dbi, operand(x.dproduct[QB]), 0, right);
    load_b<false>(right, operand(x.aq, 0, first), 0, 0);
    multiply_loaded<true>(dki, operand(x.dproduct[AK]), 0, right);
    multiply_loaded<true>(dbi, operand(x.dproduct[AB]), 0, right);

    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float reads[2][4], read_before[2][4], writes[2][4], at_end[4];  // rows g and g + 8; columns as in a row of tiles
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const int j = first + 8 * n + 2 * t;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            at_end[2 * n + side] = documents.starts ? 0.0f : state_product.at(n, 2 * t + side) * x.total[j + side];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = g + 8 * half;
            float rq[2], aq[2], ki[2], bi[2], ke[2], be[2];
            load_pair(rq, &x.rq[row][j]);
            load_pair(aq, &x.aq[row][j]);
            load_pair(ki, &x.ki[row][j]);
            load_pair(bi, &x.bi[row][j]);
            load_pair(ke, &x.ke[row][j]);
            load_pair(be, &x.be[row][j]);
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const int i = 2 * half + side, c = 2 * n + side;
                const float inclusive = x.cumulative[row + 1][j + side], inverse = reciprocal_approx(inclusive);
                read_before[half][c] = daq[n][i] * aq[side];
                reads[half][c] = drq[n][i] * rq[side] - dki[n][i] * ki[side] - dbi[n][i] * bi[side] +
                                 read_before[half][c];
                writes[half][c] = dke[n][i] * ke[side] + dbe[n][i] * be[side];
                const float to_end = inverse * x.total[j + side];
                drq[n][i] *= inclusive;
                daq[n][i] *= x.cumulative[row][j + side];
                dki[n][i] = dki[n][i] * inverse + dke[n][i] * to_end;
                dbi[n][i] = dbi[n][i] * inverse + dbe[n][i] * to_end;
            }
        }
    }
    store_steps(out.dr, head, start, first, drq);
    store_steps(out.dk, head, start, first, dki);
    store_steps(out.da, head, start, first, daq);
    store_steps(out.db, head, start, first, dbi);

    // log d_t reaches what its document reads from t on (aq: after t), and what it writes before t
    const int rows[2] = {documents.steps_left(g), documents.steps_left(g + 8)}, all_rows[2] = {L, L};
    suffix_sums(reads, rows);
    suffix_sums(writes, all_rows);
    float dw[2][4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const int j = first + c / 2 * 8 + 2 * t + c % 2;
        const float from_row_8 = first_row(reads[1][c]);
        const float early_writes = writes[0][c] + first_row(writes[1][c]), all_writes = first_row(early_writes);
        const float early_reads = reads[0][c] + (documents.joins(8, g) ? from_row_8 : 0.0f);
        const float before_early = reaches_last_state(g) ? all_writes - early_writes : 0.0f;
        const float before_late = reaches_last_state(g + 8) ? all_writes - writes[1][c] : 0.0f;
        float(&dlog)[4] = dw[c / 2];
        dlog[c % 2] = x.slope[g][j] * (early_reads - read_before[0][c] + before_early + at_end[c]);
        dlog[2 + c % 2] = x.slope[g + 8][j] * (reads[1][c] - read_before[1][c] + before_late + at_end[c]);
    }
    store_steps(out.dw, head, start, first, dw);
}

// This warp's one of the gradients of the four [L,L] matrices. The caller adds a barrier.
__device__ __forceinline__ void multiply_gradients(BackwardChunk &x, const Documents &documents) {
    const int matrix = threadIdx.x / 32;
    float acc[2][4] = {};
    const bool reads_u = matrix == AB || matrix == QB;
    multiply<N, false, true>(acc, operand(matrix < QB ? x.z : x.dy), operand(reads_u ? x.u : x.v));
    for_pairs(acc, [&](int row, int column, float &first, float &second) {
        first = masked(matrix, documents, row, column, first);
        second = masked(matrix, documents, row, column + 1, second);
    });
    store(&x.dproduct[matrix][0][0], SMALL_STRIDE, acc);
}

template <bool has_starts>
__global__ void __launch_bounds__(THREADS, 2)
    backward(int64_t time, int heads, const uint8_t *starts, Pointers in, const bf16 *saved, const bf16 *dy,
             const float *dfinal_state, Gradients out, float *dstate) {
    BackwardChunk &x = *dynamic_memory<BackwardChunk>();
    const Head head(time, heads);
    const int warp = threadIdx.x / 32, first = warp * L;
    const int64_t block = blockIdx.x, chunks = (time + L - 1) / L;
    const bf16 *states = saved + block * chunks * N * N;
    State g;  // the gradient of the state at the chunk's end
    load_state(g, at(dfinal_state, block * N * N), first, N, 1);
    starts = row_of_starts(starts, time, heads);
    int64_t start = (chunks - 1) * L;
    Inputs next = load_inputs(in, head, start);
    uint4 next_dy = load_piece(dy, head, start);
    SavedState next_state = load_saved(states, chunks - 1);
    bool next_start = has_starts && load_start(starts, time, start, L);
    for (; start >= 0; start -= L) {
        const Documents documents = has_starts ? share_starts(next_start) : Documents{0};
        prepare(x, next, head, documents, start);
        store_piece(x.dy, next_dy);
        store_saved(x.s, next_state);
        store(&x.ds[first][0], STRIDE, g);
        next = load_inputs(in, head, start - L);
        next_dy = load_piece(dy, head, start - L);
        next_state = load_saved(states, start / L - 1);
        if (has_starts) next_start = load_start(starts, time, start - L, L);
        __syncthreads();
        multiply_steps(x, documents);
        __syncthreads();
        if (warp == 0) invert(x);
        const auto reads_first_state = [&](int row) { return documents.reads_first_state(row); };
        float acc[2][4] = {}, dv[2][4] = {};
        uint32_t gradient_columns[N / 16][4];
        transpose(gradient_columns, g);
#pragma unroll
        for (int k = 0; k < N / 16; ++k) {
            multiply_loaded(acc, operand(x.be), 16 * k, gradient_columns[k]);
            multiply_loaded(acc, operand(x.be_rest), 16 * k, gradient_columns[k]);
            multiply_loaded(dv, operand(x.ke), 16 * k, gradient_columns[k]);
        }
        float read[2][4] = {};
        multiply_split<N, false, true>(read, operand(x.aq), operand(x.aq_rest), operand(x.s, first));
        keep_rows(read, reads_first_state);
        project(x, read, first);
        multiply_split<L, true>(acc, operand(x.product[QB]), operand(x.product_rest[QB]), operand(x.dy, 0, first));
        store_split(x.z, x.z_rest, first, acc);
        __syncthreads();
        solve<false>(read, x, x.u, x.rest, first);
        store_split(x.u, x.rest, first, read);
        solve<true>(acc, x, x.z, x.z_rest, first);
        store_split(x.z, x.z_rest, first, acc);
        multiply<L, true>(dv, operand(x.product[QK]), operand(x.dy, 0, first));
        __syncthreads();  // U and Z of all warps
        multiply<L, true>(dv, operand(x.product[AK]), operand(x.z, 0, first));
        store_steps(out.dv, head, start, first, dv);
        multiply_gradients(x, documents);
        pass(g, x, documents);
        multiply_rows(g, operand(x.dy, 0, first), operand(x.rq), reads_first_state);
        multiply_rows(g, operand(x.z, 0, first), operand(x.aq), reads_first_state);
        __syncthreads();
        key_gradients(x, out, head, documents, start, first);
    }
    store_state(at(dstate, block * N * N), g, first, N, 1);
}

}  // namespace

int32_t wkv7_chunk(const rwkv_problem &p, const Wkv7Forward &x) {
    if (p.kernel == RWKV_TENSOR_CORES && p.time > L) return wkv7_chunk32(p, x);
    const Pointers pointers{in(x.r), in(x.w), in(x.k), in(x.v), in(x.a), in(x.b)};
    return launch(p.starts ? forward<true> : forward<false>, dim3(p.batch * p.heads), dim3(THREADS), sizeof(Chunk), p.stream, p.time,
                  static_cast<int>(p.heads), p.starts, pointers, x.state, out(x.y), x.final_state, out(x.saved));
}

int32_t wkv7_chunk(const rwkv_problem &p, const Wkv7Backward &x) {
    const bool is_long = p.kernel == RWKV_TENSOR_CORES && p.time > L;
    if (is_long && wkv7_chunk32_backward_is_faster()) return wkv7_chunk32(p, x);
    const Pointers pointers{in(x.r), in(x.w), in(x.k), in(x.v), in(x.a), in(x.b)};
    const Gradients gradients{out(x.dr), out(x.dw), out(x.dk), out(x.dv), out(x.da), out(x.db)};
    return launch(p.starts ? backward<true> : backward<false>, dim3(p.batch * p.heads), dim3(THREADS), sizeof(BackwardChunk), p.stream, p.time,
                  static_cast<int>(p.heads), p.starts, pointers, in(x.saved), in(x.dy), x.dfinal_state, gradients, x.dstate);
}

}  // namespace rwkv
