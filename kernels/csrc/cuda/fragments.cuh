// Products of small matrices on the tensor cores, one warp each: operands in shared memory as bf16, sums in registers.
//
// acc[n][i] is a [16, 8 tiles] matrix in mma_16816's layout: lane l, g = l / 4, t = l % 4, holds of tile n the elements
// i = 0..3 at row g + 8 (i / 2), column 8 n + 2 t + i % 2.
#pragma once

#include "device.cuh"

namespace rwkv {

// An operand in shared memory. Its first element, and the distance of its rows in elements: a multiple of 8, such that
// eight rows lie in different banks.
struct Operand {
    const bf16 *first;
    int stride;
};

template <int rows, int stride>
__device__ __forceinline__ Operand operand(const bf16 (&x)[rows][stride], int row = 0, int column = 0) {
    return {&x[row][column], stride};
}

// Where lane l points ldmatrix, for four 8 x 8 matrices: `inner` counts the pair that follows along rows.
__device__ __forceinline__ const bf16 *row_of(const Operand &x, int row, int column, int row_bit, int column_bit) {
    const int lane = threadIdx.x % 32, matrix = lane / 8;
    row += lane % 8 + (matrix >> row_bit & 1) * 8;
    column += (matrix >> column_bit & 1) * 8;
    return x.first + row * x.stride + column;
}

// Columns k.. of A [16,K], stored as it is, or as its transpose [K,16].
template <bool transposed>
__device__ __forceinline__ void load_a(uint32_t (&to)[4], const Operand &a, int k) {
    if (transposed) ldmatrix_transposed(to, row_of(a, k, 0, 1, 0));
    else ldmatrix(to, row_of(a, 0, k, 0, 1));
}

// Rows k.., columns n.. to n + 15 of B [K,columns], stored as it is, or as its transpose.
template <bool transposed>
__device__ __forceinline__ void load_b(uint32_t (&to)[4], const Operand &b, int k, int n) {
    if (transposed) ldmatrix(to, row_of(b, n, k, 1, 0));
    else ldmatrix_transposed(to, row_of(b, k, n, 0, 1));
}

__device__ __forceinline__ uint32_t pack2(float low, float high) {
    return pack2(to_bf16(low), to_bf16(high));
}

// acc += A B; the fragments of A [16,16] and B [16,16].
__device__ __forceinline__ void multiply_fragments(float (&acc)[2][4], const uint32_t (&left)[4],
                                                   const uint32_t (&right)[4]) {
    const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
    mma_16816(acc[0], left, first);
    mma_16816(acc[1], left, second);
}

// acc += A^T B; A and B [16,16] as fragments of B.
__device__ __forceinline__ void multiply_transposed(float (&acc)[2][4], const uint32_t (&a)[4],
                                                    const uint32_t (&right)[4]) {
    const uint32_t left[4] = {a[0], a[2], a[1], a[3]};
    multiply_fragments(acc, left, right);
}

// acc += columns k.. of A times 16 rows of B, whose fragment `right` is.
template <bool a_transposed = false>
__device__ __forceinline__ void multiply_loaded(float (&acc)[2][4], const Operand &a, int k,
                                                const uint32_t (&right)[4]) {
    uint32_t left[4];
    load_a<a_transposed>(left, a, k);
    multiply_fragments(acc, left, right);
}

// acc += A B; A [16,K], B [K,16]. A or B may be stored transposed.
template <int K, bool a_transposed = false, bool b_transposed = false>
__device__ __forceinline__ void multiply(float (&acc)[2][4], const Operand &a, const Operand &b) {
    static_assert(K % 16 == 0, "whole fragments");
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        uint32_t right[4];
        load_b<b_transposed>(right, b, k, 0);
        multiply_loaded<a_transposed>(acc, a, k, right);
    }
}

// acc += (A + rest) B, as multiply.
template <int K, bool a_transposed = false, bool b_transposed = false>
__device__ __forceinline__ void multiply_split(float (&acc)[2][4], const Operand &a, const Operand &rest,
                                               const Operand &b) {
    static_assert(K % 16 == 0, "whole fragments");
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        uint32_t right[4];
        load_b<b_transposed>(right, b, k, 0);
        multiply_loaded<a_transposed>(acc, a, k, right);
        multiply_loaded<a_transposed>(acc, rest, k, right);
    }
}

// The transpose of acc, rounded, as fragments of B [8 tiles,16]: an accumulator's lanes hold what its transpose's do.
template <int tiles>
__device__ __forceinline__ void transpose(uint32_t (&to)[tiles / 2][4], const float (&acc)[tiles][4]) {
#pragma unroll
    for (int k = 0; k < tiles / 2; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float(&tile)[4] = acc[2 * k + i % 2];
            to[k][i] = pack2(tile[i / 2 * 2], tile[i / 2 * 2 + 1]);
        }
    }
}

// acc += the 16 columns of A in `left` times B [16, 8 tiles].
template <int tiles>
__device__ __forceinline__ void multiply_wide(float (&acc)[tiles][4], const uint32_t (&left)[4], const Operand &b) {
    static_assert(tiles % 2 == 0, "whole fragments");
#pragma unroll
    for (int n = 0; n < tiles; n += 2) {
        uint32_t right[4];
        load_b<false>(right, b, 0, n * 8);
        const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
        mma_16816(acc[n], left, first);
        mma_16816(acc[n + 1], left, second);
    }
}

// acc += A^T B; A [16,16], B [16, 8 tiles].
template <int tiles>
__device__ __forceinline__ void multiply_transposed(float (&acc)[tiles][4], const Operand &a, const Operand &b) {
    uint32_t left[4];
    load_a<true>(left, a, 0);
    multiply_wide(acc, left, b);
}

// acc += A^T B over the rows that `holds`; A [16,16], B [16, 8 tiles].
template <typename Holds, int tiles>
__device__ __forceinline__ void multiply_rows(float (&acc)[tiles][4], const Operand &a, const Operand &b,
                                              const Holds &holds) {
    uint32_t left[4];
    load_a<true>(left, a, 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = threadIdx.x % 4 * 2 + i / 2 * 8;
        left[i] &= (holds(row) ? 0x0000ffffu : 0u) | (holds(row + 1) ? 0xffff0000u : 0u);
    }
    multiply_wide(acc, left, b);
}

// body(row, column, x, y) for each two elements of acc that lie side by side.
template <int tiles, typename Body>
__device__ __forceinline__ void for_pairs(float (&acc)[tiles][4], const Body &body) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < tiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) body(g + 8 * i, 8 * n + 2 * t, acc[n][2 * i], acc[n][2 * i + 1]);
    }
}

// acc as bf16 to a matrix in shared or global memory; `to` is its element (0, 0), even columns are 4-byte aligned.
template <int tiles>
__device__ __forceinline__ void store(bf16 *to, int64_t stride, float (&acc)[tiles][4]) {
    for_pairs(acc, [&](int row, int column, float x, float y) {
        *reinterpret_cast<uint32_t *>(to + row * stride + column) = pack2(x, y);
    });
}

// What transpose made of acc [16, 16 tiles], as store writes acc.
template <int tiles>
__device__ __forceinline__ void store_transpose(bf16 *to, int64_t stride, const uint32_t (&from)[tiles][4]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < tiles; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = g + i / 2 * 8, column = 16 * k + i % 2 * 8 + 2 * t;
            *reinterpret_cast<uint32_t *>(to + row * stride + column) = from[k][i];
        }
    }
}

// Two bf16 side by side, as floats; the first at an even place.
__device__ __forceinline__ void load_pair(float (&to)[2], const bf16 *from) {
    const uint32_t pair = *reinterpret_cast<const uint32_t *>(from);
    to[0] = bf16_bits_to_float(pair << 16);
    to[1] = bf16_bits_to_float(pair & 0xffff0000u);
}

// Eight bf16 in a register quadruple, as floats and back.
__device__ __forceinline__ void unpack(float (&to)[8], const uint4 &from) {
    const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to[2 * i] = bf16_bits_to_float(words[i] << 16);
        to[2 * i + 1] = bf16_bits_to_float(words[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ uint4 pack(const float (&x)[8]) {
    return {pack2(x[0], x[1]), pack2(x[2], x[3]), pack2(x[4], x[5]), pack2(x[6], x[7])};
}

}  // namespace rwkv
