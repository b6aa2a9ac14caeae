// What both versions share: how a head's inputs come into L1 and its results leave it.
//
// Time is cut into chunks of L = 16 steps. A chunk's inputs are converted to fp32 rows of N floats (N: the head size
// rounded up to a size that has a kernel; the columns above `size` are zero, and stay so in the state). The rows of the
// state, one for each value channel, do not depend on each other: R = 4 of them are carried through the chunk in
// registers before the next R come. Backward keeps the R rows' states of the whole chunk in L1, recomputed from the
// state at its start, so that nothing is ever divided by a decay.
#pragma once

#include "../wkv.h"
#include "vector.hpp"

namespace RWKV_TARGET {

constexpr int L = 16;
constexpr int R = 4;

template <int N>
using Row = float[N];

// The rows of a chunk, and one more: with L rows all the arrays of a chunk would be 4096 bytes apart for N = 64, and
// their rows of a step would compete for the same few lines of L1.
constexpr int PADDED = L + 1;

// `steps` rows of `size` elements, `stride` elements apart, as fp32.
template <int N, typename io>
RWKV_INLINE void load_rows(Row<N> *to, const io *from, int64_t stride, int steps, int size) {
    for (int t = 0; t < steps; ++t, from += stride) {
        if (size == N) {
            for (int c = 0; c < N; c += LANES) store(&to[t][c], load_io(from + c));
        } else {
            for (int c = 0; c < N; c += LANES) {
                const int count = size - c < LANES ? size - c : LANES;
                store(&to[t][c], count > 0 ? load_some(from + c, count) : vec{});
            }
        }
    }
}

template <int N, typename io>
RWKV_INLINE void store_rows(io *to, const Row<N> *from, int64_t stride, int steps, int size) {
    for (int t = 0; t < steps; ++t, to += stride) {
        for (int c = 0; c < size; c += LANES) {
            store_some(to + c, load(&from[t][c]), size - c < LANES ? size - c : LANES);
        }
    }
}

// Ask for one row of `size` elements ahead of its use: a head's rows lie far apart, where no hardware prefetcher follows.
RWKV_INLINE void prefetch_row(const void *from, int32_t io, int64_t at, int size) {
    const int64_t bytes = io == RWKV_FP32 ? 4 : 2;
    const char *row = static_cast<const char *>(from) + at * bytes;
    for (int64_t offset = 0; offset < size * bytes; offset += 64) __builtin_prefetch(row + offset, 0, 2);
}

template <int N>
RWKV_INLINE void clear(vec (&rows)[R][N / LANES]) {
    for (int q = 0; q < R; ++q) {
        for (int c = 0; c < N / LANES; ++c) rows[q][c] = vec{};
    }
}

// As load_rows, with zeros for the rows above `size` and for a null pointer.
template <int N>
RWKV_INLINE void load_state(Row<N> *to, const float *from, int size) {
    const int rows = from ? size : 0;
    load_rows<N>(to, from, size, rows, size);
    memset(to[rows], 0, sizeof(Row<N>) * (N - rows));
}

template <int N>
RWKV_INLINE void store_state(float *to, const Row<N> *from, int size) {
    if (to) store_rows<N>(to, from, size, size, size);
}

// The same for elements of a type known at run time; `at` and `stride` count elements.
template <int N>
__attribute__((noinline)) void load_rows(Row<N> *to, const void *from, int32_t io, int64_t at, int64_t stride,
                                         int steps, int size) {
    if (io == RWKV_FP32) load_rows<N>(to, static_cast<const float *>(from) + at, stride, steps, size);
    if (io == RWKV_BF16) load_rows<N>(to, static_cast<const bf16 *>(from) + at, stride, steps, size);
    if (io == RWKV_FP16) load_rows<N>(to, static_cast<const half *>(from) + at, stride, steps, size);
}

template <int N>
__attribute__((noinline)) void store_rows(void *to, int32_t io, int64_t at, const Row<N> *from, int64_t stride,
                                          int steps, int size) {
    if (io == RWKV_FP32) store_rows<N>(static_cast<float *>(to) + at, from, stride, steps, size);
    if (io == RWKV_BF16) store_rows<N>(static_cast<bf16 *>(to) + at, from, stride, steps, size);
    if (io == RWKV_FP16) store_rows<N>(static_cast<half *>(to) + at, from, stride, steps, size);
}

// The step after `step` where the next document begins, or `steps`.
RWKV_INLINE int document_end(const uint8_t (&begins)[L], int step, int steps) {
    do ++step;
    while (step < steps && !begins[step]);
    return step;
}

// One head of [B,T,H,N] tensors: element `first` of each is its first, `stride` elements lie between its steps.
struct Head {
    int64_t time, first, stride;
    int size;
    int32_t io;
    const uint8_t *starts;  // [T], 1 where a document begins; null: none begins

    int64_t at(int64_t step) const {
        return first + step * stride;
    }

    // Which of a chunk's steps begin a document: the state before them is zero.
    void load_starts(uint8_t (&begins)[L], int64_t step, int steps) const {
        if (starts) memcpy(begins, starts + step, steps);
        else memset(begins, 0, L);
    }
};

}  // namespace RWKV_TARGET
