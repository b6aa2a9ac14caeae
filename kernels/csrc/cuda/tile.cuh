// The state of one head in the registers of N threads, for the kernels with fp32 maths: N / 8 keys of 8 values a
// thread, for N = 32, 64 and 128.
//
// Thread i of the block: kg = i % 8 chooses its keys, rg = i / 8 its values. A thread's tile is x[p][q][j]: part p has
// keys of 64 neighbours (of 32, for N = 32), value row 8 rg + q, key key_of(kg, j) of the part. Sums over keys run over
// the 8 lanes of equal rg; sums over values over the 4 groups of a warp, and then over the warps through shared memory.
#pragma once

#include "device.cuh"

namespace rwkv {

constexpr int EDGE = 8;  // value rows of a tile, and threads that share them
constexpr int STEPS_BETWEEN_STATES = 16;
constexpr int RUN = 8;  // steps whose inputs are in shared memory at a time
constexpr unsigned ALL_LANES = 0xffffffffu;

template <int N>
struct Shape {
    static_assert(N == 32 || N == 64 || N == 128, "sizes whose tiles fit");
    static constexpr int WARPS = N / 32;
    static constexpr int KEYS = N < 64 ? 4 : 8;  // of a part and thread
    static constexpr int PARTS = N / EDGE / KEYS;
    static constexpr int PART = EDGE * KEYS;  // keys of a part
    // Of the backward pass: with 128 its shared memory has the state, and 8 steps would not fit beside it.
    static constexpr int RUN_BACK = N > 64 ? 2 : RUN;
};

template <int KEYS>
using Part = float[EDGE][KEYS];
template <int N>
using Tile = Part<Shape<N>::KEYS>[Shape<N>::PARTS];

// A thread's keys are runs of four, so that the 8 lanes of one 128-bit read touch 32 different banks.
__device__ __forceinline__ int key_of(int kg, int j) {
    return j < 4 ? kg * 4 + j : 32 + kg * 4 + j - 4;
}

__device__ __forceinline__ void load_four(float *to, const float *from) {
    const float4 x = *reinterpret_cast<const float4 *>(from);
    to[0] = x.x;
    to[1] = x.y;
    to[2] = x.z;
    to[3] = x.w;
}

// row: of the part's keys.
template <int KEYS>
__device__ __forceinline__ void load_keys(float (&to)[KEYS], const float *row, int kg) {
    load_four(to, row + kg * 4);
    if constexpr (KEYS > 4) load_four(to + 4, row + 32 + kg * 4);
}

__device__ __forceinline__ void load_values(float (&to)[EDGE], const float *row, int rg) {
    load_four(to, row + rg * EDGE);
    load_four(to + 4, row + rg * EDGE + 4);
}

// One stage of a sum that ends scattered: of 2 `half` values, lanes with `bit` set keep the upper ones.
template <int half>
__device__ __forceinline__ void fold(float *x, int lane, int bit) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < half; ++i) {
        const float kept = upper ? x[half + i] : x[i], given = upper ? x[i] : x[half + i];
        x[i] = kept + __shfl_xor_sync(ALL_LANES, given, bit);
    }
}

// x[q] summed over the keys: returns the row's sum of lane kg's own row, q = kg. x is used up.
__device__ __forceinline__ float sum_over_keys(float (&x)[EDGE], int lane) {
    fold<4>(x, lane, 4);
    fold<2>(x, lane, 2);
    fold<1>(x, lane, 1);
    return x[0];
}

// x summed over the 8 lanes of a row group, in each of them.
__device__ __forceinline__ float sum_over_group(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 4);
    x += __shfl_xor_sync(ALL_LANES, x, 2);
    return x + __shfl_xor_sync(ALL_LANES, x, 1);
}

// What sum_over_keys left in the lanes, as every lane's 8 rows.
__device__ __forceinline__ void share_rows(float (&to)[EDGE], float own, int lane) {
#pragma unroll
    for (int q = 0; q < EDGE; ++q) to[q] = __shfl_sync(ALL_LANES, own, (lane & 24) | q);
}

// x[j] summed over the values of this warp, written to `to`, the warp's row of the part's keys. x is used up.
template <int KEYS>
__device__ __forceinline__ void sum_over_values(float (&x)[KEYS], float *to, int lane, int kg) {
    constexpr int LEFT = KEYS / 4;
    fold<2 * LEFT>(x, lane, 16);
    fold<LEFT>(x, lane, 8);
    const int first = (lane & 16 ? 2 * LEFT : 0) + (lane & 8 ? LEFT : 0);
#pragma unroll
    for (int j = 0; j < LEFT; ++j) to[key_of(kg, first + j)] = x[j];
}

// x, equal in the lanes of a row group, summed over the values of this warp.
__device__ __forceinline__ float sum_over_row_groups(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 16);
    return x + __shfl_xor_sync(ALL_LANES, x, 8);
}

// Where a part begins in memory in the block's private order: its floats a thread, as float4 [..][N].
template <int N>
__host__ __device__ constexpr int private_part(int part) {
    return part * EDGE * Shape<N>::KEYS * N;
}

template <int N, int KEYS>
__device__ __forceinline__ void load_private(float (&to)[EDGE][KEYS], const float *from) {
#pragma unroll
    for (int i = 0; i < EDGE * KEYS; i += 4) load_four(&to[i / KEYS][i % KEYS], from + i * N + threadIdx.x * 4);
}

template <int N, int KEYS>
__device__ __forceinline__ void store_private(float *to, const float (&from)[EDGE][KEYS]) {
#pragma unroll
    for (int i = 0; i < EDGE * KEYS; i += 4) {
        const float *x = &from[i / KEYS][i % KEYS];
        *reinterpret_cast<float4 *>(to + i * N + threadIdx.x * 4) = {x[0], x[1], x[2], x[3]};
    }
}

// body(element, offset) for each of a tile's elements and its place in a caller's state; the strides tell [value,key]
// from [key,value].
template <int PARTS, int KEYS, typename Element, typename Body>
__device__ __forceinline__ void over_state(Element (&x)[PARTS][EDGE][KEYS], int value_stride, int key_stride,
                                           const Body &body) {
    const int kg = threadIdx.x % EDGE, rg = threadIdx.x / EDGE;
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
#pragma unroll
        for (int q = 0; q < EDGE; ++q) {
#pragma unroll
            for (int j = 0; j < KEYS; ++j) {
                body(x[p][q][j], (rg * EDGE + q) * value_stride + (p * EDGE * KEYS + key_of(kg, j)) * key_stride);
            }
        }
    }
}

// Between a tile and a caller's state. A null pointer reads as zeros, and is not written.
template <int PARTS, int KEYS>
__device__ __forceinline__ void load_state(float (&to)[PARTS][EDGE][KEYS], const float *from, int value_stride,
                                           int key_stride) {
    over_state(to, value_stride, key_stride, [](float &x, int) { x = 0.0f; });
    if (!from) return;
    over_state(to, value_stride, key_stride, [from](float &x, int offset) { x = from[offset]; });
}

template <int PARTS, int KEYS>
__device__ __forceinline__ void store_state(float *to, const float (&from)[PARTS][EDGE][KEYS], int value_stride,
                                            int key_stride) {
    if (!to) return;
    over_state(from, value_stride, key_stride, [to](float x, int offset) { to[offset] = x; });
}

template <typename T>
__host__ __device__ __forceinline__ T *at(T *pointer, int64_t offset) {
    return pointer ? pointer + offset : nullptr;
}

// Where a block's head is: its first element in [B,T,H,N] tensors, and the elements between its steps.
template <int N>
struct Head {
    int64_t first, stride;

    __device__ Head(int64_t time, int heads) {
        const int64_t batch = blockIdx.x / heads, head = blockIdx.x % heads;
        stride = static_cast<int64_t>(heads) * N;
        first = batch * time * stride + head * N;
    }

    __device__ __forceinline__ int64_t at(int64_t step) const {
        return first + step * stride + threadIdx.x;
    }
};

__device__ __forceinline__ int64_t states_of(int64_t time) {
    return (time + STEPS_BETWEEN_STATES - 1) / STEPS_BETWEEN_STATES;
}

// x row for each row of the tile: a thread's part of the sums over keys.
template <int PARTS, int KEYS>
__device__ __forceinline__ void times_row(float (&to)[EDGE], const float (&x)[PARTS][EDGE][KEYS], const float *row,
                                          int kg) {
#pragma unroll
    for (int q = 0; q < EDGE; ++q) to[q] = 0.0f;
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        float keys[KEYS];
        load_keys(keys, row + p * EDGE * KEYS, kg);
#pragma unroll
        for (int q = 0; q < EDGE; ++q) {
#pragma unroll
            for (int j = 0; j < KEYS; ++j) to[q] += x[p][q][j] * keys[j];
        }
    }
}

// values^T x for each key of the part: a thread's part of the sums over values.
template <int KEYS>
__device__ __forceinline__ void times_values(float (&to)[KEYS], const float (&x)[EDGE][KEYS],
                                             const float (&values)[EDGE]) {
#pragma unroll
    for (int j = 0; j < KEYS; ++j) {
        to[j] = 0.0f;
#pragma unroll
        for (int q = 0; q < EDGE; ++q) to[j] += x[q][j] * values[q];
    }
}

// Sums over the part's values of x * other, elementwise, for each key.
template <int KEYS>
__device__ __forceinline__ void times_part(float (&to)[KEYS], const float (&x)[EDGE][KEYS],
                                           const float (&other)[EDGE][KEYS]) {
#pragma unroll
    for (int j = 0; j < KEYS; ++j) {
        to[j] = 0.0f;
#pragma unroll
        for (int q = 0; q < EDGE; ++q) to[j] += x[q][j] * other[q][j];
    }
}

template <int KEYS>
__device__ __forceinline__ void add_outer(float (&x)[EDGE][KEYS], const float (&values)[EDGE],
                                          const float (&keys)[KEYS]) {
#pragma unroll
    for (int q = 0; q < EDGE; ++q) {
#pragma unroll
        for (int j = 0; j < KEYS; ++j) x[q][j] += values[q] * keys[j];
    }
}

// A row's element i, or a step's number, summed over the warps.
template <int WARPS, int N>
__device__ __forceinline__ float over_warps(const float (&x)[WARPS][N], int i) {
    float sum = x[0][i];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) sum += x[warp][i];
    return sum;
}

template <int WARPS>
__device__ __forceinline__ float over_warps(const float (&x)[WARPS]) {
    float sum = x[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) sum += x[warp];
    return sum;
}

// Thread i's element of a row, of all warps.
template <int WARPS, int N>
__device__ __forceinline__ void clear_warps(float (&x)[WARPS][N], int i) {
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) x[warp][i] = 0.0f;
}

}  // namespace rwkv
