// What RWKV-7's kernels share that take two chunks of L = 16 steps between barriers; the notation is wkv7_chunk.cu's.
#pragma once

#include "wkv7.cuh"

namespace rwkv {

constexpr int CHUNKS = 2, STEPS = 2;  // chunks between barriers, and steps of a thread
constexpr int WARPS_OF_CHUNK = WARPS / CHUNKS;

using Rows = bf16[CHUNKS * L][STRIDE];

// What a thread loads of a tensor: 8 channels from 8 (i % 8) on of the steps from 2 (i / 8) on.
using Pieces = uint4[STEPS];

// Zeros behind the end, which no step may lie behind unless `may_end`.
template <bool may_end = true>
__device__ __forceinline__ void load(Pieces &to, const bf16 *x, const Head &head, int64_t start) {
    const int64_t first = start + threadIdx.x / 8 * STEPS;
    x += head.at(first) + threadIdx.x % 8 * 8;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        to[i] = {0, 0, 0, 0};
        if (may_end && first + i >= head.time) continue;
        to[i] = *reinterpret_cast<const uint4 *>(x + i * head.stride);
    }
}

__device__ __forceinline__ void store(Rows &to, const Pieces &pieces) {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        *reinterpret_cast<uint4 *>(&to[threadIdx.x / 8 * STEPS + i][threadIdx.x % 8 * 8]) = pieces[i];
    }
}

// The documents of one chunk of both.
__device__ __forceinline__ Documents of_chunk(const Documents &documents, int chunk) {
    return {documents.starts >> chunk * L & ((1u << L) - 1)};
}

// x times the other lanes' of the warp's earlier steps; 1 for the first ones.
__device__ __forceinline__ float scan_products(float x) {
    const int lane = threadIdx.x % 32;
    const float before = __shfl_sync(0xffffffffu, x, lane - 8);
    float product = lane >= 8 ? before : 1.0f;
#pragma unroll
    for (int distance = 8; distance < 24; distance *= 2) {
        const float earlier = __shfl_sync(0xffffffffu, product, lane - distance);
        if (lane >= distance) product *= earlier;
    }
    return product;
}

// A float for each channel, such that no bank is asked twice where eight threads take four of their channels each, or
// where four rows are read in pairs as fragments lie.
using Channels = float[N + 8];
constexpr int OTHER_FOUR = N / 2 + 4;

__device__ __forceinline__ int place_of(int channel) {
    return channel % 8 / 4 * OTHER_FOUR + channel / 8 * 4 + channel % 4;
}

// This thread's eight channels.
__device__ __forceinline__ void load_eight(float (&to)[8], const Channels &from) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        const float4 x = *reinterpret_cast<const float4 *>(&from[threadIdx.x % 8 * 4 + i / 4 * OTHER_FOUR]);
        to[i] = x.x, to[i + 1] = x.y, to[i + 2] = x.z, to[i + 3] = x.w;
    }
}

__device__ __forceinline__ void store_eight(Channels &to, const float (&from)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        float4 &place = *reinterpret_cast<float4 *>(&to[threadIdx.x % 8 * 4 + i / 4 * OTHER_FOUR]);
        place = {from[i], from[i + 1], from[i + 2], from[i + 3]};
    }
}

using WarpProducts = Channels[WARPS];  // of the decays of the eight steps that a warp loads

// last: the product up to this thread's last step. exclusive: that over the warp's earlier steps. The caller adds a barrier.
__device__ __forceinline__ void scan_in_warp(float (&exclusive)[8], WarpProducts &whole, const float (&last)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) exclusive[i] = scan_products(last[i]);
    if (threadIdx.x % 32 < 24) return;
    float product[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) product[i] = exclusive[i] * last[i];
    store_eight(whole[threadIdx.x / 32], product);
}

// exclusive: now over the chunk's earlier steps. first: the product of its first warp's.
__device__ __forceinline__ void scan_over_warps(float (&exclusive)[8], float (&first)[8], const WarpProducts &whole) {
    const int warp = threadIdx.x / 32;
    load_eight(first, whole[warp / WARPS_OF_CHUNK * WARPS_OF_CHUNK]);
    if (warp % WARPS_OF_CHUNK == 0) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) exclusive[i] *= first[i];
}

// acc^T as the sum of two bf16, as fragments of B. acc is used up.
__device__ __forceinline__ void transpose_split(uint32_t (&rounded)[4], uint32_t (&rest)[4], float (&acc)[2][4]) {
    uint32_t columns[1][4];
    transpose(columns, acc);
#pragma unroll
    for (int i = 0; i < 4; ++i) rounded[i] = columns[0][i];
    leave_rest(acc);
    transpose(columns, acc);
#pragma unroll
    for (int i = 0; i < 4; ++i) rest[i] = columns[0][i];
}

// s += A^T B for 16 steps; A as fragments of B.
__device__ __forceinline__ void write(State &s, const uint32_t (&a)[4], const Operand &b) {
    const uint32_t left[4] = {a[0], a[2], a[1], a[3]};
    multiply_wide(s, left, b);
}

}  // namespace rwkv
