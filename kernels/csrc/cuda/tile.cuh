// The state of one head in the registers of 64 threads, for the kernels with fp32 maths: N = 64, 8 x 8 floats a thread.
//
// Thread i of the block: kg = i % 8 chooses its keys, rg = i / 8 its values. A thread's tile is x[q][j]: value row
// 8 rg + q, key key_of(kg, j). Sums over keys run over the 8 lanes of equal rg; sums over values over the 4 groups of
// a warp, and then over the two warps through shared memory.
#pragma once

#include "device.cuh"

namespace rwkv {

constexpr int N = 64;
constexpr int THREADS = 64;
constexpr int WARPS = 2;
constexpr int EDGE = 8;  // of a tile
constexpr int STEPS_BETWEEN_STATES = 16;
constexpr int RUN = 8;  // steps whose inputs are in shared memory at a time
constexpr unsigned ALL_LANES = 0xffffffffu;

using Tile = float[EDGE][EDGE];
using Row = float[N];

// A thread's keys are two runs of four, so that the 8 lanes of one 128-bit read touch 32 different banks.
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

__device__ __forceinline__ void load_keys(float (&to)[EDGE], const Row &row, int kg) {
    load_four(to, row + kg * 4);
    load_four(to + 4, row + 32 + kg * 4);
}

__device__ __forceinline__ void load_values(float (&to)[EDGE], const Row &row, int rg) {
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

// x[j] summed over the values of this warp, written to `to`, the warp's row of keys. x is used up.
__device__ __forceinline__ void sum_over_values(float (&x)[EDGE], Row &to, int lane, int kg) {
    fold<4>(x, lane, 16);
    fold<2>(x, lane, 8);
    const int j = (lane & 16 ? 4 : 0) + (lane & 8 ? 2 : 0);
    to[key_of(kg, j)] = x[0];
    to[key_of(kg, j + 1)] = x[1];
}

// x, equal in the lanes of a row group, summed over the values of this warp.
__device__ __forceinline__ float sum_over_row_groups(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 16);
    return x + __shfl_xor_sync(ALL_LANES, x, 8);
}

__device__ __forceinline__ void clear(Tile &x) {
#pragma unroll
    for (int q = 0; q < EDGE; ++q) {
#pragma unroll
        for (int j = 0; j < EDGE; ++j) x[q][j] = 0.0f;
    }
}

// Between a tile and memory in the block's private order: 64 floats a thread, as float4 [16][64].
__device__ __forceinline__ void load_private(Tile &to, const float *from) {
#pragma unroll
    for (int part = 0; part < 2 * EDGE; ++part) {
        load_four(&to[part / 2][part % 2 * 4], from + (part * THREADS + threadIdx.x) * 4);
    }
}

__device__ __forceinline__ void store_private(float *to, const Tile &from) {
#pragma unroll
    for (int part = 0; part < 2 * EDGE; ++part) {
        const float *x = &from[part / 2][part % 2 * 4];
        *reinterpret_cast<float4 *>(to + (part * THREADS + threadIdx.x) * 4) = {x[0], x[1], x[2], x[3]};
    }
}

// Between a tile and a caller's state; the strides tell [value,key] from [key,value]. A null pointer reads as zeros.
__device__ __forceinline__ void load_state(Tile &to, const float *from, int value_stride, int key_stride) {
    clear(to);
    if (!from) return;
    const int kg = threadIdx.x % EDGE, rg = threadIdx.x / EDGE;
#pragma unroll
    for (int q = 0; q < EDGE; ++q) {
#pragma unroll
        for (int j = 0; j < EDGE; ++j) to[q][j] = from[(rg * EDGE + q) * value_stride + key_of(kg, j) * key_stride];
    }
}

__device__ __forceinline__ void store_state(float *to, const Tile &from, int value_stride, int key_stride) {
    if (!to) return;
    const int kg = threadIdx.x % EDGE, rg = threadIdx.x / EDGE;
#pragma unroll
    for (int q = 0; q < EDGE; ++q) {
#pragma unroll
        for (int j = 0; j < EDGE; ++j) to[(rg * EDGE + q) * value_stride + key_of(kg, j) * key_stride] = from[q][j];
    }
}

template <typename T>
__host__ __device__ __forceinline__ T *at(T *pointer, int64_t offset) {
    return pointer ? pointer + offset : nullptr;
}

// Where a block's head is: its first element in [B,T,H,N] tensors, and the elements between its steps.
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
__device__ __forceinline__ void times_row(float (&to)[EDGE], const Tile &x, const Row &row, int kg) {
    float keys[EDGE];
    load_keys(keys, row, kg);
#pragma unroll
    for (int q = 0; q < EDGE; ++q) {
        to[q] = 0.0f;
#pragma unroll
        for (int j = 0; j < EDGE; ++j) to[q] += x[q][j] * keys[j];
    }
}

// values^T x for each key of the tile: a thread's part of the sums over values.
__device__ __forceinline__ void times_values(float (&to)[EDGE], const Tile &x, const float (&values)[EDGE]) {
#pragma unroll
    for (int j = 0; j < EDGE; ++j) {
        to[j] = 0.0f;
#pragma unroll
        for (int q = 0; q < EDGE; ++q) to[j] += x[q][j] * values[q];
    }
}

// Sums over the tile's values of x * other, elementwise, for each key.
__device__ __forceinline__ void times_tile(float (&to)[EDGE], const Tile &x, const Tile &other) {
#pragma unroll
    for (int j = 0; j < EDGE; ++j) {
        to[j] = 0.0f;
#pragma unroll
        for (int q = 0; q < EDGE; ++q) to[j] += x[q][j] * other[q][j];
    }
}

__device__ __forceinline__ void add_outer(Tile &x, const float (&values)[EDGE], const float (&keys)[EDGE]) {
#pragma unroll
    for (int q = 0; q < EDGE; ++q) {
#pragma unroll
        for (int j = 0; j < EDGE; ++j) x[q][j] += values[q] * keys[j];
    }
}

__device__ __forceinline__ float over_warps(const Row (&x)[WARPS], int i) {
    return x[0][i] + x[1][i];
}

}  // namespace rwkv
