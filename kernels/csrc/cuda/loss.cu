// Softmax cross entropy of rows of logits, with its gradient and L2Wrap in their place (loss.h): one block a row.
//
// A row is read twice and written once. First each thread keeps the largest of its logits, where that first was, and
// the sum of exp(logit - largest), which is rescaled when a larger one comes (Milakov and Gimelshein, 2018); those of
// all threads are joined in a fixed order. Then each thread replaces its own logits by probabilities, and what differs
// from them, the gradient at the target and at the largest logit, is written last.
#include <float.h>
#include <limits.h>

#include "device.cuh"
#include "launchers.hpp"

namespace rwkv {
namespace {

constexpr int WARP = 32;
constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP;
constexpr int BLOCKS = 2;  // on a multiprocessor: more rows at a time would no longer be in L2 when they are read again
constexpr int AT_A_TIME = 4;  // vectors that a thread has under way
constexpr unsigned ALL = 0xffffffffu;

template <typename io>
struct alignas(16) Vector {
    static constexpr int SIZE = 16 / sizeof(io);
    io at[SIZE];
};

// exp(x), to the bits that io has.
template <typename io>
__device__ __forceinline__ float exponential(float x) {
    return exp_approx(x);
}

template <>
__device__ __forceinline__ float exponential<float>(float x) {
    return expf(x);
}

// Of logits that were seen: the largest, the sum of exp(logit - largest), and the first place of the largest.
struct Seen {
    float largest = -FLT_MAX;  // finite, so that logits of minus infinity add nothing
    float sum = 0.0f;
    int where = INT_MAX;

    // Logits whose places follow each other as `place(i)`, after all that were seen.
    template <typename io, int COUNT, typename Place>
    __device__ __forceinline__ void add(const float (&x)[COUNT], const Place &place) {
        float highest = x[0];
#pragma unroll
        for (int i = 1; i < COUNT; ++i) highest = fmaxf(highest, x[i]);
        if (highest > largest) {
            sum *= exponential<io>(largest - highest);
            largest = highest;
#pragma unroll
            for (int i = COUNT - 1; i >= 0; --i) {
                if (x[i] == highest) where = place(i);
            }
        }
        float added = 0.0f;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) added += exponential<io>(x[i] - largest);
        sum += added;
    }

    __device__ __forceinline__ void join(const Seen &other) {
        const bool is_tie = largest == other.largest, is_less = largest < other.largest;
        if (is_less || (is_tie && other.where < where)) where = other.where;
        const float highest = is_less ? other.largest : largest;
        sum = sum * expf(largest - highest) + other.sum * expf(other.largest - highest);
        largest = highest;
    }

    // Of all lanes; the same bits in each.
    __device__ __forceinline__ void join_warp() {
#pragma unroll
        for (int mask = WARP / 2; mask; mask /= 2) {
            Seen other;
            other.largest = __shfl_xor_sync(ALL, largest, mask);
            other.sum = __shfl_xor_sync(ALL, sum, mask);
            other.where = __shfl_xor_sync(ALL, where, mask);
            join(other);
        }
        largest = __shfl_sync(ALL, largest, 0);
        sum = __shfl_sync(ALL, sum, 0);
        where = __shfl_sync(ALL, where, 0);
    }
};

// body(x, place) for COUNT vectors from `at` on, THREADS vectors apart, as floats; with IS_WRITTEN x is stored again.
template <bool IS_WRITTEN, int COUNT, typename io, typename Body>
__device__ __forceinline__ void over_vectors(Vector<io> *at, int first, const Body &body) {
    constexpr int SIZE = Vector<io>::SIZE;
    Vector<io> loaded[COUNT];
#pragma unroll
    for (int n = 0; n < COUNT; ++n) loaded[n] = at[n * THREADS];
    float x[COUNT * SIZE];
#pragma unroll
    for (int i = 0; i < COUNT * SIZE; ++i) x[i] = to_float(loaded[i / SIZE].at[i % SIZE]);
    body(x, [first](int i) { return first + i / SIZE * SIZE * THREADS + i % SIZE; });
    if constexpr (IS_WRITTEN) {
#pragma unroll
        for (int i = 0; i < COUNT * SIZE; ++i) loaded[i / SIZE].at[i % SIZE] = from_float<io>(x[i]);
#pragma unroll
        for (int n = 0; n < COUNT; ++n) at[n * THREADS] = loaded[n];
    }
}

template <bool IS_WRITTEN, typename io, typename Body>
__device__ __forceinline__ void over_one(io *row, int place, const Body &body) {
    float x[1] = {to_float(row[place])};
    body(x, [place](int) { return place; });
    if constexpr (IS_WRITTEN) row[place] = from_float<io>(x[0]);
}

// body(x, place) for all of this thread's elements of a row, in the order of their places: vectors of 16 bytes between
// the first and the last that are aligned, single elements before and after.
template <bool IS_WRITTEN, typename io, typename Body>
__device__ __forceinline__ void over_row(io *row, int length, const Body &body) {
    constexpr int SIZE = Vector<io>::SIZE;
    const int after = static_cast<int>(reinterpret_cast<uintptr_t>(row) % sizeof(Vector<io>) / sizeof(io));
    const int until_aligned = (SIZE - after) % SIZE, head = until_aligned < length ? until_aligned : length;
    const int vectors = (length - head) / SIZE, thread = threadIdx.x;
    if (thread < head) over_one<IS_WRITTEN>(row, thread, body);
    auto *aligned = reinterpret_cast<Vector<io> *>(row + head);
    int v = thread;
    for (; v + (AT_A_TIME - 1) * THREADS < vectors; v += AT_A_TIME * THREADS) {
        over_vectors<IS_WRITTEN, AT_A_TIME>(aligned + v, head + v * SIZE, body);
    }
    for (; v < vectors; v += THREADS) over_vectors<IS_WRITTEN, 1>(aligned + v, head + v * SIZE, body);
    const int tail = head + vectors * SIZE + thread;
    if (tail < length) over_one<IS_WRITTEN>(row, tail, body);
}

struct Memory {
    Seen warps[WARPS];
};

template <typename io>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    softmax_loss(int vocabulary, int64_t stride, bool has_gradient, float l2wrap, io *logits, const int64_t *targets,
                 float *losses) {
    Memory &memory = *dynamic_memory<Memory>();
    io *row = logits + blockIdx.x * stride;
    const int64_t target = targets[blockIdx.x];
    const bool is_inside = target >= 0 && target < vocabulary;
    const float wanted = is_inside ? to_float(row[target]) : __uint_as_float(0x7fc00000u);  // NaN
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

    Seen seen;
    over_row<false>(row, vocabulary, [&](auto &x, const auto &place) { seen.template add<io>(x, place); });
    seen.join_warp();
    if (lane == 0) memory.warps[warp] = seen;
    __syncthreads();
    seen = lane < WARPS ? memory.warps[lane] : Seen();
    seen.join_warp();
    const float largest = seen.largest;
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(seen.sum) + (largest - wanted);
    if (!has_gradient) return;

    const float scale = is_inside ? 1.0f / seen.sum : wanted;
    over_row<true>(row, vocabulary, [&](auto &x, const auto &) {
        for (float &logit : x) logit = exponential<io>(logit - largest) * scale;
    });
    __syncthreads();
    if (threadIdx.x) return;
    const float wrap = l2wrap == 0.0f ? 0.0f : l2wrap * largest;
    if (seen.where < vocabulary) row[seen.where] = from_float<io>(scale + wrap);
    if (is_inside) {
        const float probability = expf(wanted - largest) * scale;
        row[target] = from_float<io>(probability - 1.0f + (target == seen.where ? wrap : 0.0f));
    }
}

template <typename io>
int32_t run(const rwkv_logits &p, void *logits, const int64_t *targets, float *losses) {
    return launch(softmax_loss<io>, dim3(p.rows), dim3(THREADS), sizeof(Memory), p.stream,
                  static_cast<int>(p.vocabulary), p.stride, p.gradient != 0, p.l2wrap, static_cast<io *>(logits),
                  targets, losses);
}

}  // namespace

int32_t softmax_loss(const rwkv_logits &p, void *logits, const int64_t *targets, float *losses) {
    if (p.io == RWKV_FP32) return run<float>(p, logits, targets, losses);
    return p.io == RWKV_BF16 ? run<bf16>(p, logits, targets, losses) : run<half>(p, logits, targets, losses);
}

}  // namespace rwkv
