// What the kernels on tensor cores share: N = 64, chunks of L = 16 steps, one block of four warps a head.
//
// Warp w owns the 16 value rows from 16 w on, of the state (fp32 registers) and of what is indexed by values, and for
// the gradients of what is indexed by keys the 16 keys from 16 w on. Thread i loads and prepares the 8 channels from
// 8 (i % 8) on of step i / 8: one 16-byte piece of each input.
#pragma once

#include "documents.cuh"
#include "fragments.cuh"

namespace rwkv {

constexpr int N = 64, L = 16, WARPS = 4, THREADS = 128;
constexpr int STRIDE = N + 8, SMALL_STRIDE = L + 8;  // of rows in shared memory, so that eight lie in different banks

using Steps = bf16[L][STRIDE];
using Square = bf16[N][STRIDE];
using Small = bf16[L][SMALL_STRIDE];

// Where a block's head is in [B,T,H,N] tensors.
struct Head {
    int64_t first, stride, time;

    __device__ Head(int64_t time, int heads) : time(time) {
        const int64_t batch = blockIdx.x / heads, head = blockIdx.x % heads;
        stride = static_cast<int64_t>(heads) * N;
        first = batch * time * stride + head * N;
    }

    __device__ __forceinline__ int64_t at(int64_t step) const {
        return first + step * stride;
    }
};

template <typename T>
__device__ __forceinline__ T *at(T *pointer, int64_t offset) {
    return pointer ? pointer + offset : nullptr;
}

// This thread's piece of a tensor in the chunk from `start` on; zeros behind the end and before the beginning.
__device__ __forceinline__ uint4 load_piece(const bf16 *x, const Head &head, int64_t start) {
    const int64_t step = start + threadIdx.x / 8;
    if (!x || start < 0 || step >= head.time) return {0, 0, 0, 0};
    return *reinterpret_cast<const uint4 *>(x + head.at(step) + threadIdx.x % 8 * 8);
}

__device__ __forceinline__ void store_piece(Steps &to, const uint4 &piece) {
    *reinterpret_cast<uint4 *>(&to[threadIdx.x / 8][threadIdx.x % 8 * 8]) = piece;
}

// Zero in the rows that `holds` does not.
template <typename Holds>
__device__ __forceinline__ void keep_rows(float (&acc)[2][4], const Holds &holds) {
    for_pairs(acc, [&](int row, int, float &x, float &y) {
        if (!holds(row)) x = y = 0.0f;
    });
}

using State = float[N / 8][4];  // 16 value rows from the warp's first on, all keys

__device__ __forceinline__ void load_state(State &s, const float *from, int first, int value_stride,
                                           int key_stride) {
    for_pairs(s, [&](int row, int column, float &x, float &y) {
        const int place = (first + row) * value_stride + column * key_stride;
        x = from ? from[place] : 0.0f;
        y = from ? from[place + key_stride] : 0.0f;
    });
}

__device__ __forceinline__ void store_state(float *to, State &s, int first, int value_stride, int key_stride) {
    if (!to) return;
    for_pairs(s, [&](int row, int column, float x, float y) {
        const int place = (first + row) * value_stride + column * key_stride;
        to[place] = x;
        to[place + key_stride] = y;
    });
}

// Every row times the chunk's whole decay.
__device__ __forceinline__ void decay(State &s, const float (&total)[N]) {
    for_pairs(s, [&](int, int column, float &first, float &second) {
        first *= total[column];
        second *= total[column + 1];
    });
}

// Rows of this chunk that are steps, as 4-byte pairs to a [B,T,H,N] tensor, from column `first` of the head on.
template <int tiles>
__device__ __forceinline__ void store_steps(bf16 *to, const Head &head, int64_t start, int first, float (&acc)[tiles][4]) {
    for_pairs(acc, [&](int row, int column, float x, float y) {
        if (start + row >= head.time) return;
        *reinterpret_cast<uint32_t *>(to + head.at(start + row) + first + column) = pack2(x, y);
    });
}

// A column of a [16,16] matrix of fragments has rows g = lane / 4 and g + 8. Over the eight rows g of a half: the sum of x
// from each row on, over at most rows[half], for several columns of one half or both, whose shuffles are waited for together.
template <int halves, int columns>
__device__ __forceinline__ void suffix_sums(float (&x)[halves][columns], const int (&rows)[halves]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) {
        float later[halves][columns];
#pragma unroll
        for (int half = 0; half < halves; ++half) {
#pragma unroll
            for (int c = 0; c < columns; ++c) later[half][c] = __shfl_sync(0xffffffffu, x[half][c], lane + distance);
        }
#pragma unroll
        for (int half = 0; half < halves; ++half) {
            const bool counts = lane + distance < 32 && distance / 4 < rows[half];
#pragma unroll
            for (int c = 0; c < columns; ++c) x[half][c] += counts ? later[half][c] : 0.0f;
        }
    }
}

// The value that row 0 of the half holds.
__device__ __forceinline__ float first_row(float x) {
    return __shfl_sync(0xffffffffu, x, threadIdx.x % 4);
}

// The value that the row after, or before, holds; 0 for the last, or first.
__device__ __forceinline__ float row_after(float x) {
    const int lane = threadIdx.x % 32;
    const float found = __shfl_sync(0xffffffffu, x, lane + 4);
    return lane < 28 ? found : 0.0f;
}

__device__ __forceinline__ float row_before(float x) {
    const int lane = threadIdx.x % 32;
    const float found = __shfl_sync(0xffffffffu, x, lane - 4);
    return lane >= 4 ? found : 0.0f;
}

// The sum of x up to each row, as above.
template <int halves, int columns>
__device__ __forceinline__ void prefix_sums(float (&x)[halves][columns]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) {
        float earlier[halves][columns];
#pragma unroll
        for (int half = 0; half < halves; ++half) {
#pragma unroll
            for (int c = 0; c < columns; ++c) earlier[half][c] = __shfl_sync(0xffffffffu, x[half][c], lane - distance);
        }
#pragma unroll
        for (int half = 0; half < halves; ++half) {
#pragma unroll
            for (int c = 0; c < columns; ++c) x[half][c] += lane >= distance ? earlier[half][c] : 0.0f;
        }
    }
}

// The diagonal of a [16,16] matrix of fragments. Lanes whose row g has g / 2 == t hold an element of each tile.
struct Diagonal {
    float held[2];

    __device__ explicit Diagonal(const float (&x)[2][4]) {
        const bool is_odd = threadIdx.x / 4 % 2;
        held[0] = is_odd ? x[0][1] : x[0][0];
        held[1] = is_odd ? x[1][3] : x[1][2];
    }

    // Element 8 n + i.
    __device__ __forceinline__ float at(int n, int i) const {
        return __shfl_sync(0xffffffffu, held[n], 4 * i + i / 2);
    }
};

struct SavedState {
    uint4 piece[4];
};

// This thread's pieces of a saved state [N,N]: rows i / 8 + 16 n, 8 columns from 8 (i % 8) on.
__device__ __forceinline__ SavedState load_saved(const bf16 *states, int64_t chunk) {
    SavedState found = {};
    if (chunk < 0) return found;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        const int row = threadIdx.x / 8 + 16 * n;
        found.piece[n] = *reinterpret_cast<const uint4 *>(states + (chunk * N + row) * N + threadIdx.x % 8 * 8);
    }
    return found;
}

__device__ __forceinline__ void store_saved(Square &to, const SavedState &state) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        *reinterpret_cast<uint4 *>(&to[threadIdx.x / 8 + 16 * n][threadIdx.x % 8 * 8]) = state.piece[n];
    }
}

inline const bf16 *in(const void *x) {
    return static_cast<const bf16 *>(x);
}

inline bf16 *out(void *x) {
    return static_cast<bf16 *>(x);
}

}  // namespace rwkv
