// What RWKV-7's kernels on tensor cores share; the notation is wkv7_chunk.cu's.
#pragma once

#include "chunk.cuh"

namespace rwkv {

constexpr float LOG_DECAY_SCALE = -0.60653065971263342f;  // -e^{-1/2}
constexpr float LOG2_DECAY_SCALE = LOG_DECAY_SCALE * LOG2_E;

enum { AB, AK, QB, QK };  // the [L,L] matrices, in the order of the warps that compute them

struct Pointers {
    const bf16 *r, *w, *k, *v, *a, *b;
};

__device__ __forceinline__ float sigmoid(float x) {
    return reciprocal_approx(1.0f + exp_approx(-x));
}

// acc minus acc as bf16.
__device__ __forceinline__ void leave_rest(float (&acc)[2][4]) {
    for_pairs(acc, [](int, int, float &x, float &y) {
        x -= to_float(to_bf16(x));
        y -= to_float(to_bf16(y));
    });
}

// Zero above the diagonal, on it for the matrices whose rows are aq, and between documents.
__device__ __forceinline__ float masked(int matrix, const Documents &documents, int row, int column, float x) {
    const bool is_read = (column < row && documents.joins(row, column)) || (column == row && matrix >= QB);
    return is_read ? x : 0.0f;
}

// A column of X = (1 - AB)^-1 by forward substitution in fp32. (Repeated squaring would not be stable: keys that resemble
// each other make the powers of AB grow before they vanish.)
__device__ __forceinline__ void solve_column(float (&solution)[L], const float (&ab)[L][L + 1], int column) {
#pragma unroll
    for (int row = 0; row < L; ++row) {
        float sum = row == column ? 1.0f : 0.0f;
#pragma unroll
        for (int before = 0; before < row; ++before) sum += ab[row][before] * solution[before];
        solution[row] = sum;
    }
}

// An element of it, as the sum of two bf16. Only when all is solved: loads of AB would wait behind what is stored.
__device__ __forceinline__ void split(bf16 &to, bf16 &rest, float x) {
    to = to_bf16(x);
    rest = to_bf16(x - to_float(to));
}

}  // namespace rwkv
