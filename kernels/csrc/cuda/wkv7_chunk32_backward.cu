// RWKV-7's backward pass, two chunks of L = 16 steps between barriers; the notation is wkv7_chunk.cu's. Four warps a
// head, two a chunk.
//
// What does not depend on dS is made for both chunks at once, as forward does. Then each warp goes back through both
// alone, with its 16 value rows of dS in registers; U, Z and what they come from are transposed, [value,step], so that
// one product's sums are, rounded, the next one's operand in the same lanes. Last, the gradients by keys: each warp has
// 32 keys of one chunk, and so reads what is indexed by values half as often as with 16 keys of both.
//
// ke and be are ki and bi times c_L, which is dS's instead: with G = dS' c_L, dV has ki G^T, Z has bi G^T, and
//
//   dki + dke c_L = dQK^T rq + dAK^T aq + V G;  dbi + dbe c_L = dQB^T rq + dAB^T aq + U G
//
// are the gradients of k and b times c_t. With the diagonal of S^T G, what all steps write there is the gradient of
// log c_L, and the gradient of log d_t is that and one sum over the steps from t on.
#include "launchers.hpp"
#include "wkv7_chunk32.cuh"

namespace rwkv {
namespace {

constexpr int KEYS = 32;  // of one chunk, whose gradients a warp computes
constexpr int TILES = KEYS / 8;
constexpr int COLUMN_STRIDE = CHUNKS * L + 8;

using Columns = bf16[N][COLUMN_STRIDE];  // [value,step]

struct Products {
    Small ak[CHUNKS], ak_rest[CHUNKS], qb[CHUNKS], qb_rest[CHUNKS];
};

struct Inverse {
    Small x[CHUNKS], rest[CHUNKS];
};

// A union's members are needed at different times, with a barrier between.
struct alignas(16) Memory {
    Rows rq, aq, ki, bi, v, dy;
    Rows bi_rest;  // what bf16 left of bi and aq, where keys that resemble each other amplify it
    Columns u, z;
    union {
        Rows aq_rest;
        Columns u_rest;
    };
    union {
        float ab[CHUNKS][L][L + 1];
        Columns z_rest;
    };
    union {
        Products product;
        Small gradient[4][CHUNKS];
    };
    Small qk[CHUNKS];
    union {
        WarpProducts decay;
        Inverse inverse;
    };
    Square s[CHUNKS], ds[CHUNKS];        // ds: G
    float total[CHUNKS][N];              // c_L
    Channels cumulative[CHUNKS][L + 1];  // row t is c_{t-1}, row t + 1 is c_t
    Rows slope;                          // d log d / dw
};
static_assert(2 * (sizeof(Memory) + (1 << 10)) <= 228 << 10, "two blocks on a multiprocessor of sm_90");

struct Inputs {
    Pieces w, a, r, k, b;
};

struct Values {
    Pieces v, dy;
    SavedState s[CHUNKS];
};

template <bool may_end>
__device__ __forceinline__ void load(Inputs &to, const Pointers &x, const Head &head, int64_t start) {
    load<may_end>(to.w, x.w, head, start);
    load<may_end>(to.a, x.a, head, start);
    load<may_end>(to.r, x.r, head, start);
    load<may_end>(to.k, x.k, head, start);
    load<may_end>(to.b, x.b, head, start);
}

// From inputs in registers to both chunks' factors in shared memory. One barrier inside; the caller adds the next.
__device__ __forceinline__ void prepare(Memory &x, const Inputs &in, const Head &head, const Documents &documents,
                                        int64_t start) {
    const int warp = threadIdx.x / 32, column = threadIdx.x % 8 * 8;
    const int row = threadIdx.x / 8 * STEPS, chunk = warp / WARPS_OF_CHUNK;
    float inclusive[STEPS][8], exclusive[8];  // of the first step
    Pieces slope;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        float w[8], of_w[8];
        unpack(w, in.w[step]);
        const bool is_step = start + row + step < head.time, is_start = documents.is_start(row + step);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            // both sigmoids, of w and -w; where exp(-w) is beyond all floats, the first is 0. NaN stays NaN
            const float any = exp_approx(-w[i]), power = any > 3e38f ? 3e38f : any, open = reciprocal_approx(1.0f + power);
            const float d = exp2_approx(LOG2_DECAY_SCALE * open);
            of_w[i] = is_start ? 0.0f : LOG_DECAY_SCALE * open * (power * open);
            inclusive[step][i] = is_step ? d : 1.0f;
            if (step) inclusive[step][i] *= inclusive[step - 1][i];
        }
        slope[step] = pack(of_w);
    }
    scan_in_warp(exclusive, x.decay, inclusive[STEPS - 1]);
    __syncthreads();  // also ends the last chunks: nobody reads their factors any more
    store(x.slope, slope);
    float total[8];
    scan_over_warps(exclusive, total, x.decay);
    if (row % L == 0) {
        float of_second[8];
        load_eight(of_second, x.decay[chunk * WARPS_OF_CHUNK + 1]);
#pragma unroll
        for (int i = 0; i < 8; ++i) x.total[chunk][column + i] = total[i] * of_second[i];
        store_eight(x.cumulative[chunk][0], exclusive);
    }
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        float from[8], to[8], inverse[8];
        const auto put = [&](Rows &where, const uint4 &piece, const float(&factor)[8]) {
            unpack(from, piece);
#pragma unroll
            for (int i = 0; i < 8; ++i) to[i] = from[i] * factor[i];
            *reinterpret_cast<uint4 *>(&where[row + step][column]) = pack(to);
        };
        const auto put_rest = [&](Rows &where) {
#pragma unroll
            for (int i = 0; i < 8; ++i) to[i] -= to_float(to_bf16(to[i]));
            *reinterpret_cast<uint4 *>(&where[row + step][column]) = pack(to);
        };
        put(x.aq, in.a[step], step ? inclusive[0] : exclusive);
        put_rest(x.aq_rest);
#pragma unroll
        for (int i = 0; i < 8; ++i) inclusive[step][i] *= exclusive[i];
        store_eight(x.cumulative[chunk][(row + step) % L + 1], inclusive[step]);
        put(x.rq, in.r[step], inclusive[step]);
#pragma unroll
        for (int i = 0; i < 8; ++i) inverse[i] = reciprocal_approx(inclusive[step][i]);
        put(x.ki, in.k[step], inverse);
        put(x.bi, in.b[step], inverse);
        put_rest(x.bi_rest);
    }
}

__device__ __forceinline__ void mask(float (&acc)[2][4], int matrix, const Documents &documents) {
    for_pairs(acc, [&](int row, int column, float &first, float &second) {
        first = masked(matrix, documents, row, column, first);
        second = masked(matrix, documents, row, column + 1, second);
    });
}

// acc += A B^T; A and B [16,16] as fragments of A.
__device__ __forceinline__ void multiply_by_transpose(float (&acc)[2][4], const uint32_t (&left)[4],
                                                      const uint32_t (&b)[4]) {
    const uint32_t right[4] = {b[0], b[2], b[1], b[3]};
    multiply_fragments(acc, left, right);
}

// Sixteen channels of a chunk's aq, which is split in two, and of this warp's rows of S: both products of a warp that
// needs two load aq once.
struct Reads {
    uint32_t s[4], aq[4], aq_rest[4];

    __device__ __forceinline__ Reads(const Memory &x, int chunk, int first, int k) {
        load_a<false>(s, operand(x.s[chunk], first), k);
        load_a<false>(aq, operand(x.aq, chunk * L), k);
        load_a<false>(aq_rest, operand(x.aq_rest, chunk * L), k);
    }

    // acc += this warp's columns of aq S^T, as [value,step].
    __device__ __forceinline__ void read_state(float (&acc)[2][4]) const {
        multiply_by_transpose(acc, s, aq);
        multiply_by_transpose(acc, s, aq_rest);
    }

    // acc += aq B
    __device__ __forceinline__ void multiply(float (&acc)[2][4], const uint32_t (&right)[4]) const {
        multiply_fragments(acc, aq, right);
        multiply_fragments(acc, aq_rest, right);
    }
};

// AB of a chunk and X, lanes j and j + 16 column j, of which each stores half; also read += aq S^T, as [value,step].
// The caller adds a barrier.
__device__ __forceinline__ void invert(Memory &x, float (&read)[2][4], const Documents &documents, int chunk,
                                       int first) {
    float acc[2][4] = {};
#pragma unroll
    for (int k = 0; k < N; k += 16) {
        uint32_t bi[4];
        load_b<true>(bi, operand(x.bi, chunk * L), k, 0);
        const Reads reads(x, chunk, first, k);
        reads.multiply(acc, bi);
        reads.read_state(read);
    }
    mask(acc, AB, documents);
    for_pairs(acc, [&](int row, int column, float even, float odd) {
        x.ab[chunk][row][column] = even;
        x.ab[chunk][row][column + 1] = odd;
    });
    __syncwarp();
    const int column = threadIdx.x % L, later_half = threadIdx.x % 32 / L * (L / 2);
    float solution[L];
    solve_column(solution, x.ab[chunk], column);
#pragma unroll
    for (int i = 0; i < L / 2; ++i) {
        const int row = later_half + i;
        split(x.inverse.x[chunk][row][column], x.inverse.rest[chunk][row][column],
              later_half ? solution[L / 2 + i] : solution[i]);
    }
}

// The three other [L,L] matrices of a chunk; also read += aq S^T, as [value,step]. The caller adds a barrier.
__device__ __forceinline__ void multiply_steps(Memory &x, float (&read)[2][4], const Documents &documents, int chunk,
                                               int first) {
    float ak[2][4] = {}, qb[2][4] = {}, qk[2][4] = {};
#pragma unroll
    for (int k = 0; k < N; k += 16) {
        uint32_t ki[4], bi[4], rq[4];
        load_b<true>(ki, operand(x.ki, chunk * L), k, 0);
        const Reads reads(x, chunk, first, k);
        reads.multiply(ak, ki);
        reads.read_state(read);
        load_b<true>(bi, operand(x.bi, chunk * L), k, 0);
        load_a<false>(rq, operand(x.rq, chunk * L), k);
        multiply_fragments(qb, rq, bi);
        multiply_fragments(qk, rq, ki);
    }
    mask(ak, AK, documents);
    mask(qb, QB, documents);
    mask(qk, QK, documents);
    store(&x.product.ak[chunk][0][0], SMALL_STRIDE, ak);
    leave_rest(ak);
    store(&x.product.ak_rest[chunk][0][0], SMALL_STRIDE, ak);
    store(&x.product.qb[chunk][0][0], SMALL_STRIDE, qb);
    leave_rest(qb);
    store(&x.product.qb_rest[chunk][0][0], SMALL_STRIDE, qb);
    store(&x.qk[chunk][0][0], SMALL_STRIDE, qk);
}

// Zero in the columns that `holds` does not.
template <typename Holds>
__device__ __forceinline__ void keep_columns(float (&acc)[2][4], const Holds &holds) {
    for_pairs(acc, [&](int, int column, float &x, float &y) {
        if (!holds(column)) x = 0.0f;
        if (!holds(column + 1)) y = 0.0f;
    });
}

// acc^T = X acc^T, or X^T acc^T, from and to [value,step]. Both factors are sums of two bf16: with keys that resemble
// each other the product is small beside its terms.
template <bool transposed>
__device__ __forceinline__ void solve(float (&acc)[2][4], const Memory &x, int chunk) {
    uint32_t rounded[4], rest[4], right[4];
    transpose_split(rounded, rest, acc);
    for_pairs(acc, [](int, int, float &first, float &second) { first = second = 0.0f; });
    load_b<!transposed>(right, operand(x.inverse.x[chunk]), 0, 0);
    multiply_transposed(acc, rounded, right);
    multiply_transposed(acc, rest, right);
    load_b<!transposed>(right, operand(x.inverse.rest[chunk]), 0, 0);
    multiply_transposed(acc, rounded, right);
}

// acc as two bf16 to this warp's rows of two matrices; `rounded` is the first as fragments of B [step,value].
__device__ __forceinline__ void store_split(Columns &to, Columns &to_rest, int first, int chunk,
                                            uint32_t (&rounded)[4], float (&acc)[2][4]) {
    uint32_t rest[1][4], columns[1][4];
    transpose_split(rounded, rest[0], acc);
#pragma unroll
    for (int i = 0; i < 4; ++i) columns[0][i] = rounded[i];
    store_transpose(&to[first][chunk * L], COLUMN_STRIDE, columns);
    store_transpose(&to_rest[first][chunk * L], COLUMN_STRIDE, rest);
}

// This warp's columns of aq S^T of its own chunk and the other, [value,step], in the chunks' order.
__device__ __forceinline__ void place(float (&to)[CHUNKS][2][4], int own_chunk, const float (&own)[2][4],
                                      const float (&other)[2][4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        to[0][i / 4][i % 4] = own_chunk ? other[i / 4][i % 4] : own[i / 4][i % 4];
        to[1][i / 4][i % 4] = own_chunk ? own[i / 4][i % 4] : other[i / 4][i % 4];
    }
}

// G from dS', to shared memory, and this warp's columns of bi G^T, as [value,step], and of ki G^T.
__device__ __forceinline__ void read_gradient(float (&z)[2][4], float (&dv)[2][4], State &g, Memory &x,
                                              const Documents &documents, int chunk, int first) {
    uint32_t columns[N / 16][4];
    decay(g, x.total[chunk]);
    transpose(columns, g);
    store_transpose(&x.ds[chunk][first][0], STRIDE, columns);
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
        uint32_t right[4];
        load_b<true>(right, operand(x.bi, chunk * L), 16 * k, 0);
        multiply_transposed(z, columns[k], right);
        load_b<true>(right, operand(x.bi_rest, chunk * L), 16 * k, 0);
        multiply_transposed(z, columns[k], right);
        multiply_loaded(dv, operand(x.ki, chunk * L), 16 * k, columns[k]);
    }
    const auto is_kept = [&](int step) { return documents.reaches_last_state(step); };
    keep_columns(z, is_kept);
    keep_rows(dv, is_kept);
}

// s += A^T B over the steps that `holds`; A as fragments of B.
template <typename Holds>
__device__ __forceinline__ void write(State &s, const uint32_t (&a)[4], const Operand &b, const Holds &holds) {
    uint32_t kept[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int step = threadIdx.x % 4 * 2 + i % 2 * 8;
        kept[i] = a[i] & ((holds(step) ? 0x0000ffffu : 0u) | (holds(step + 1) ? 0xffff0000u : 0u));
    }
    write(s, kept, b);
}

// A chunk's U and V as fragments of A [step,value], which those of B [value,step] are too, in another order.
struct Written {
    uint32_t u[N / 16][4], v[N / 16][4];
};

// Two of the gradients of a chunk's four [L,L] matrices: those that z or dy multiplies. The caller adds a barrier.
template <bool of_z>
__device__ __forceinline__ void multiply_gradients(Memory &x, Written &written, const Documents &documents, int chunk) {
    float by_u[2][4] = {}, by_v[2][4] = {};
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
        uint32_t left[4];
        if (of_z) load_a<true>(left, operand(x.z, 0, chunk * L), 16 * k);
        else load_a<false>(left, operand(x.dy, chunk * L), 16 * k);
        load_a<true>(written.u[k], operand(x.u, 0, chunk * L), 16 * k);
        multiply_by_transpose(by_u, left, written.u[k]);
        load_a<false>(written.v[k], operand(x.v, chunk * L), 16 * k);
        multiply_by_transpose(by_v, left, written.v[k]);
    }
    mask(by_u, of_z ? AB : QB, documents);
    mask(by_v, of_z ? AK : QK, documents);
    store(&x.gradient[of_z ? AB : QB][chunk][0][0], SMALL_STRIDE, by_u);
    store(&x.gradient[of_z ? AK : QK][chunk][0][0], SMALL_STRIDE, by_v);
}

using KeyFragments = uint32_t[KEYS / 16][4];
using KeySums = float[TILES][4];  // [step,key]

// acc += the 16 columns of A in `left` times 16 rows of B.
__device__ __forceinline__ void multiply_keys(KeySums &acc, const uint32_t (&left)[4], const KeyFragments &right) {
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) {
        const uint32_t first[2] = {right[j][0], right[j][1]}, second[2] = {right[j][2], right[j][3]};
        mma_16816(acc[2 * j], left, first);
        mma_16816(acc[2 * j + 1], left, second);
    }
}

// One of the two elements at row g + 8 half, column 8 tile + 2 t, of what load_a<false> loads.
__device__ __forceinline__ float element(const KeyFragments &x, int tile, int half, int side) {
    const uint32_t pair = x[tile / 2][half + tile % 2 * 2];
    return bf16_bits_to_float(side ? pair & 0xffff0000u : pair << 16);
}

// Over the eight rows g = lane / 4 the sum of x, of eight columns.
__device__ __forceinline__ void sum_columns(float (&x)[2 * TILES]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = TILES; half > 0; half /= 2) {
        const bool upper = lane & 4 * half;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float kept = upper ? x[half + i] : x[i], given = upper ? x[i] : x[half + i];
            x[i] = kept + __shfl_sync(0xffffffffu, given, lane ^ 4 * half);
        }
    }
    const float sum = x[0];
#pragma unroll
    for (int c = 0; c < 2 * TILES; ++c) x[c] = __shfl_sync(0xffffffffu, sum, 4 * c + lane % 4);
}

struct Gradients {
    bf16 *dr, *dw, *dk, *dv, *da, *db;
};

// The gradients of r, w, k, a, b of a chunk from step `start` on, for KEYS keys from `first` on.
__device__ __forceinline__ void key_gradients(Memory &x, const Written &written, const Gradients &out, const Head &head,
                                              const Documents &documents, int64_t start, int chunk, int first) {
    const int row_of_chunk = chunk * L, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    KeySums drq = {}, daq = {}, dki = {}, dbi = {};
    float product[KEYS / 16][2][4] = {};  // S^T G, whose diagonal sums over values
    uint32_t left[4];
#pragma unroll
    for (int k = 0; k < N; k += 16) {
        KeyFragments s, ds;
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) {
            load_b<false>(s[j], operand(x.s[chunk], 0, first), k, 16 * j);
            load_b<false>(ds[j], operand(x.ds[chunk], 0, first), k, 16 * j);
            multiply_transposed(product[j], s[j], ds[j]);
        }
        load_a<false>(left, operand(x.dy, row_of_chunk), k);
        multiply_keys(drq, left, s);
        load_a<true>(left, operand(x.z, 0, row_of_chunk), k);
        multiply_keys(daq, left, s);
        load_a<true>(left, operand(x.z_rest, 0, row_of_chunk), k);
        multiply_keys(daq, left, s);
        multiply_keys(dki, written.v[k / 16], ds);
        multiply_keys(dbi, written.u[k / 16], ds);
        load_a<true>(left, operand(x.u_rest, 0, row_of_chunk), k);
        multiply_keys(dbi, left, ds);
    }
    const auto keep = [&](KeySums &acc, bool early, bool late) {
        for_pairs(acc, [&](int row, int, float &a, float &b) {
            if (!(row < 8 ? early : late)) a = b = 0.0f;
        });
    };
    const bool reads[2] = {documents.reads_first_state(g), documents.reads_first_state(g + 8)};
    const bool reaches[2] = {documents.reaches_last_state(g), documents.reaches_last_state(g + 8)};
    keep(drq, reads[0], reads[1]);
    keep(daq, reads[0], reads[1]);
    keep(dki, reaches[0], reaches[1]);
    keep(dbi, reaches[0], reaches[1]);

    KeyFragments read, write;
    const auto load_factor = [&](KeyFragments &to, const Rows &from) {
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) load_a<false>(to[j], operand(from, row_of_chunk, first), 16 * j);
    };
    float of_end[2 * TILES];  // the gradient of log c_L: what reaches the last state, by column
    load_factor(write, x.ki);
    load_factor(read, x.bi);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            float &sum = of_end[2 * tile + side];
            const bool is_diagonal = g == 2 * t + side && !documents.starts;
            sum = is_diagonal ? product[tile / 2][tile % 2][tile % 2 * 2 + side] : 0.0f;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                sum += dki[tile][2 * half + side] * element(write, tile, half, side);
                sum += dbi[tile][2 * half + side] * element(read, tile, half, side);
            }
        }
    }
    sum_columns(of_end);

    KeyFragments right;
    const auto load_right = [&](const Rows &from) {
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) load_b<false>(right[j], operand(from, row_of_chunk, first), 0, 16 * j);
    };
    const auto add = [&](KeySums &acc, int matrix) {
        load_a<false>(left, operand(x.gradient[matrix][chunk]), 0);
        multiply_keys(acc, left, right);
    };
    const auto add_transposed = [&](KeySums &acc, int matrix) {
        load_a<true>(left, operand(x.gradient[matrix][chunk]), 0);
        multiply_keys(acc, left, right);
    };
    load_right(x.rq);
    add_transposed(dki, QK);
    add_transposed(dbi, QB);
    load_right(x.aq);
    add_transposed(dki, AK);
    add_transposed(dbi, AB);
    load_right(x.bi);
    add(drq, QB);
    add(daq, AB);
    load_right(x.ki);
    add(drq, QK);
    add(daq, AK);

    float sums[2][2 * TILES], read_before[2][2 * TILES];  // rows g and g + 8; columns as in a row of tiles
    const auto for_all = [&](const auto &body) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
                for (int side = 0; side < 2; ++side) body(half, tile, side, 2 * tile + side, 2 * half + side);
            }
        }
    };
    for_all([&](int half, int tile, int side, int c, int i) {
        sums[half][c] = -dki[tile][i] * element(write, tile, half, side);
        sums[half][c] -= dbi[tile][i] * element(read, tile, half, side);
    });
    load_factor(read, x.aq);
    load_factor(write, x.rq);
    for_all([&](int half, int tile, int side, int c, int i) {
        read_before[half][c] = daq[tile][i] * element(read, tile, half, side);
        sums[half][c] += drq[tile][i] * element(write, tile, half, side) + read_before[half][c];
        const int j = place_of(first + 8 * tile + 2 * t) + side;
        const float inclusive = x.cumulative[chunk][g + 8 * half + 1][j], inverse = reciprocal_approx(inclusive);
        drq[tile][i] *= inclusive;
        daq[tile][i] *= x.cumulative[chunk][g + 8 * half][j];
        dki[tile][i] *= inverse;
        dbi[tile][i] *= inverse;
    });
    store_steps(out.dr, head, start, first, drq);
    store_steps(out.dk, head, start, first, dki);
    store_steps(out.da, head, start, first, daq);
    store_steps(out.db, head, start, first, dbi);

    // log d_t reaches what its document reads from t on (aq: after t), and what it writes before t
    const int rows[2] = {documents.steps_left(g), documents.steps_left(g + 8)};
    suffix_sums(sums, rows);
    KeyFragments slope;
    load_factor(slope, x.slope);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const int c = 2 * tile + side;
            const float from_row_8 = first_row(sums[1][c]);
            sums[0][c] += documents.joins(8, g) ? from_row_8 : 0.0f;
        }
    }
    KeySums dw;
    for_all([&](int half, int tile, int side, int c, int i) {
        const float sum = sums[half][c] - read_before[half][c] + (reaches[half] ? of_end[c] : 0.0f);
        dw[tile][i] = element(slope, tile, half, side) * sum;
    });
    store_steps(out.dw, head, start, first, dw);
}

template <bool has_starts>
__global__ void __launch_bounds__(THREADS, 2)
    backward(int64_t time, int heads, const uint8_t *starts, Pointers in, const bf16 *saved, const bf16 *dy,
             const float *dfinal_state, Gradients out, float *dstate) {
    Memory &x = *dynamic_memory<Memory>();
    const Head head(time, heads);
    const int warp = threadIdx.x / 32, own_chunk = warp / WARPS_OF_CHUNK, role = warp % WARPS_OF_CHUNK;
    const int first = warp * L;
    const int64_t block = blockIdx.x, chunks = (time + L - 1) / L;
    const bf16 *states = saved + block * chunks * N * N;
    State g;  // the gradient of the state at a chunk's end
    load_state(g, at(dfinal_state, block * N * N), first, N, 1);
    starts = row_of_starts(starts, time, heads);
    int64_t start = (time - 1) / (CHUNKS * L) * (CHUNKS * L);
    Inputs next;
    load<true>(next, in, head, start);
    bool next_start = has_starts && load_start(starts, time, start, CHUNKS * L);
    for (; start >= 0; start -= CHUNKS * L) {
        const Documents documents = has_starts ? share_starts(next_start) : Documents{0};
        const Documents own_documents = of_chunk(documents, own_chunk);
        Values values = {};
        load(values.v, in.v, head, start);
        if (dy) load(values.dy, dy, head, start);
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const int64_t number = start / L + chunk;
            values.s[chunk] = load_saved(states, number < chunks ? number : -1);
        }
        prepare(x, next, head, documents, start);
        store(x.v, values.v);
        store(x.dy, values.dy);
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) store_saved(x.s[chunk], values.s[chunk]);
        __syncthreads();
        float of_own[2][4] = {}, of_other[2][4] = {}, read[CHUNKS][2][4], z[2][4] = {}, dv[2][4] = {};
        if (role) multiply_steps(x, of_own, own_documents, own_chunk, first);
        else invert(x, of_own, own_documents, own_chunk, first);
#pragma unroll
        for (int k = 0; k < N; k += 16) Reads(x, CHUNKS - 1 - own_chunk, first, k).read_state(of_other);
        place(read, own_chunk, of_own, of_other);
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const Documents own = of_chunk(documents, chunk);
            keep_columns(read[chunk], [&](int step) { return own.reads_first_state(step); });
        }
        read_gradient(z, dv, g, x, of_chunk(documents, CHUNKS - 1), CHUNKS - 1, first);
        __syncthreads();
#pragma unroll
        for (int chunk = CHUNKS - 1; chunk >= 0; --chunk) {
            const Documents own = of_chunk(documents, chunk);
            uint32_t of_v[4], of_dy[4], of_u[4], of_z[4], right[4];
            load_b<false>(of_v, operand(x.v, chunk * L, first), 0, 0);
            load_b<true>(right, operand(x.product.ak[chunk]), 0, 0);
            multiply_transposed(read[chunk], of_v, right);
            load_b<true>(right, operand(x.product.ak_rest[chunk]), 0, 0);
            multiply_transposed(read[chunk], of_v, right);
            solve<false>(read[chunk], x, chunk);
            store_split(x.u, x.u_rest, first, chunk, of_u, read[chunk]);
            load_b<false>(of_dy, operand(x.dy, chunk * L, first), 0, 0);
            load_b<false>(right, operand(x.product.qb[chunk]), 0, 0);
            multiply_transposed(z, of_dy, right);
            load_b<false>(right, operand(x.product.qb_rest[chunk]), 0, 0);
            multiply_transposed(z, of_dy, right);
            solve<true>(z, x, chunk);
            store_split(x.z, x.z_rest, first, chunk, of_z, z);
            multiply_loaded<true>(dv, operand(x.qk[chunk]), 0, of_dy);
            multiply_loaded<true>(dv, operand(x.product.ak[chunk]), 0, of_z);
            store_steps(out.dv, head, start + chunk * L, first, dv);
            if (own.starts) for_pairs(g, [](int, int, float &a, float &b) { a = b = 0.0f; });
            const auto reads_first_state = [&](int step) { return own.reads_first_state(step); };
            write(g, of_dy, operand(x.rq, chunk * L), reads_first_state);
            write(g, of_z, operand(x.aq, chunk * L), reads_first_state);
            if (chunk == 0) break;
            for_pairs(z, [](int, int, float &a, float &b) { a = b = 0.0f; });
            for_pairs(dv, [](int, int, float &a, float &b) { a = b = 0.0f; });
            read_gradient(z, dv, g, x, of_chunk(documents, chunk - 1), chunk - 1, first);
        }
        __syncthreads();
        Written written;
        if (role) multiply_gradients<false>(x, written, own_documents, own_chunk);
        else multiply_gradients<true>(x, written, own_documents, own_chunk);
        if (start >= CHUNKS * L) {
            load<false>(next, in, head, start - CHUNKS * L);
            if (has_starts) next_start = load_start(starts, time, start - CHUNKS * L, CHUNKS * L);
        }
        __syncthreads();
        key_gradients(x, written, out, head, own_documents, start + own_chunk * L, own_chunk, role * KEYS);
    }
    store_state(at(dstate, block * N * N), g, first, N, 1);
}

}  // namespace

// Where a multiprocessor holds two blocks: one alone is slower than two of wkv7_chunk.cu's, which need less memory.
bool wkv7_chunk32_backward_is_faster() {
    return holds_blocks(sizeof(Memory), 2);
}

int32_t wkv7_chunk32(const rwkv_problem &p, const Wkv7Backward &x) {
    const Pointers pointers{in(x.r), in(x.w), in(x.k), in(x.v), in(x.a), in(x.b)};
    const Gradients gradients{out(x.dr), out(x.dw), out(x.dk), out(x.dv), out(x.da), out(x.db)};
    return launch<MOST_SHARED_BYTES_90>(p.starts ? backward<true> : backward<false>, dim3(p.batch * p.heads),
                                        dim3(THREADS), sizeof(Memory), p.stream, p.time, static_cast<int>(p.heads),
                                        p.starts, pointers, in(x.saved), in(x.dy), x.dfinal_state, gradients,
                                        x.dstate);
}

}  // namespace rwkv
