// What the fused passes share. A thread has 8 channels, which are 16 bytes of bf16, a warp 256 channels of 16 rows, and
// a block of four warps RWKV_ROWS_IN_BLOCK rows of them: block (x, y) is block of rows x, channels from 256 y on.
//
// Lanes beyond the width repeat the last channels and store nothing: a head's lanes are all within it or all beyond.
// Sums over rows are added in each thread from row to row, then over warps in their order: no schedule changes a bit.
#pragma once

#include <type_traits>

#include "../fused.h"
#include "device.cuh"

namespace rwkv {

constexpr int LANE_CHANNELS = 8;
constexpr int WARP_CHANNELS = 32 * LANE_CHANNELS;
constexpr int ROW_WARPS = 4;
constexpr int WARP_ROWS = RWKV_ROWS_IN_BLOCK / ROW_WARPS;
constexpr int ROW_THREADS = 32 * ROW_WARPS;
constexpr int FLAT_THREADS = 256;  // of a block of a pass in which every element is by itself
constexpr int LARGEST_HEAD = WARP_CHANNELS;
constexpr float NORM_EPS = 64e-5f;  // of the head norm: RWKV-LM's 1e-5 on y / 8

// A thread's channels.
struct Channels {
    float at[LANE_CHANNELS];
};

template <typename Body>
__device__ __forceinline__ Channels each(const Body &body) {
    Channels result;
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; ++i) result.at[i] = body(i);
    return result;
}

__device__ __forceinline__ Channels splat(float x) {
    return each([=](int) { return x; });
}

__device__ __forceinline__ Channels operator+(const Channels &x, const Channels &y) {
    return each([&](int i) { return x.at[i] + y.at[i]; });
}

__device__ __forceinline__ Channels operator-(const Channels &x, const Channels &y) {
    return each([&](int i) { return x.at[i] - y.at[i]; });
}

__device__ __forceinline__ Channels operator*(const Channels &x, const Channels &y) {
    return each([&](int i) { return x.at[i] * y.at[i]; });
}

__device__ __forceinline__ Channels operator*(const Channels &x, float y) {
    return each([&](int i) { return x.at[i] * y; });
}

__device__ __forceinline__ Channels sigmoid(const Channels &x) {
    return each([&](int i) { return 1.0f / (1.0f + expf(-x.at[i])); });
}

__device__ __forceinline__ float sum(const Channels &x) {
    return ((x.at[0] + x.at[1]) + (x.at[2] + x.at[3])) + ((x.at[4] + x.at[5]) + (x.at[6] + x.at[7]));
}

// A tensor for each of the mixes.
template <typename T>
struct Tensors {
    T *at[RWKV_MOST_MIXES];
};

// Whether nothing comes before the row, the one of this step: it is the first of its sequence or document.
__device__ __forceinline__ bool is_first(const rwkv_rows &p, int64_t row, int64_t step) {
    return step == 0 || (p.starts && p.starts[row]);
}

// Moved in steps of 16 bytes.
template <typename io>
struct alignas(16) Packed {
    io at[LANE_CHANNELS];
};

template <typename io>
__device__ __forceinline__ Packed<io> load_packed(const io *from) {
    return *reinterpret_cast<const Packed<io> *>(from);
}

template <typename io>
__device__ __forceinline__ Channels unpack(const Packed<io> &packed) {
    return each([&](int i) { return to_float(packed.at[i]); });
}

template <typename io>
__device__ __forceinline__ Channels load(const io *from) {
    return unpack(load_packed(from));
}

template <typename io>
__device__ __forceinline__ Packed<io> pack(const Channels &x) {
    Packed<io> packed;
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; ++i) packed.at[i] = from_float<io>(x.at[i]);
    return packed;
}

template <typename io>
__device__ __forceinline__ void store(io *to, const Channels &x) {
    *reinterpret_cast<Packed<io> *>(to) = pack<io>(x);
}

// x after a store and a load.
template <typename io>
__device__ __forceinline__ Channels rounded(const Channels &x) {
    return unpack(pack<io>(x));
}

template <typename io>
__host__ __device__ __forceinline__ const io *in(const void *x) {
    return static_cast<const io *>(x);
}

template <typename io>
__host__ __device__ __forceinline__ io *out(void *x) {
    return static_cast<io *>(x);
}

// Where a thread works: `rows` from `begin` to `end`, and channels from `channel` on, which it stores where `is_inside`.
struct Work {
    int64_t begin, end, channel;
    bool is_inside;

    __device__ __forceinline__ explicit Work(const rwkv_rows &p) {
        begin = (static_cast<int64_t>(blockIdx.x) * ROW_WARPS + threadIdx.y) * WARP_ROWS;
        end = begin + WARP_ROWS < p.rows ? begin + WARP_ROWS : p.rows;
        channel = static_cast<int64_t>(blockIdx.y) * WARP_CHANNELS + threadIdx.x * LANE_CHANNELS;
        is_inside = channel < p.width;
        if (!is_inside) channel = p.width - LANE_CHANNELS;
    }

    __device__ __forceinline__ bool has_rows() const {
        return begin < end;
    }

    template <typename io>
    __device__ __forceinline__ void put(io *to, int64_t place, const Channels &x) const {
        if (is_inside) store(to + place, x);
    }
};

// A parameter [width], as io has it.
template <typename io>
__device__ __forceinline__ Channels parameter(const float *from, const Work &work) {
    return rounded<io>(load(from + work.channel));
}

__device__ __forceinline__ int64_t flat_place() {
    return (static_cast<int64_t>(blockIdx.x) * FLAT_THREADS + threadIdx.x) * LANE_CHANNELS;
}

// sums[i] over the lanes of a head, of which a warp has some: `lanes` is a power of two.
template <int COUNT>
__device__ __forceinline__ void sum_over_head(float (&sums)[COUNT], int lanes) {
#pragma unroll 1
    for (int distance = lanes / 2; distance; distance /= 2) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
    }
}

// Of a head: y without its mean and over its deviation, and 1 / that.
struct Normed {
    Channels at;
    float rstd;
};

__device__ __forceinline__ Normed norm(const Channels &y, int lanes) {
    const float part = 1.0f / (lanes * LANE_CHANNELS);
    float total[1] = {sum(y)};
    sum_over_head(total, lanes);
    const Channels centred = y - splat(total[0] * part);
    float squares[1] = {sum(centred * centred)};
    sum_over_head(squares, lanes);
    const float rstd = 1.0f / sqrtf(squares[0] * part + NORM_EPS);
    return {centred * rstd, rstd};
}

// dy of the norm; the sums over the head are of dnormed and of dnormed normed.
__device__ __forceinline__ Channels norm_backward(const Normed &y, const Channels &dnormed, float total, float along,
                                                  int lanes) {
    const float part = 1.0f / (lanes * LANE_CHANNELS);
    return (dnormed - splat(total * part) - y.at * (along * part)) * y.rstd;
}

constexpr size_t bytes_of_sums(int count) {
    return sizeof(float) * ROW_WARPS * count * WARP_CHANNELS;
}

// to[i] [width] = sums[i] over the warps of the block, through bytes_of_sums(COUNT) of dynamic memory.
template <int COUNT>
__device__ __forceinline__ void add_over_warps(float *const (&to)[COUNT], const Channels (&sums)[COUNT], int64_t width) {
    float *shared = dynamic_memory<float>();  // [warp,COUNT,WARP_CHANNELS]
    const int thread = threadIdx.y * 32 + threadIdx.x;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        store(shared + (threadIdx.y * COUNT + i) * WARP_CHANNELS + threadIdx.x * LANE_CHANNELS, sums[i]);
    }
    __syncthreads();
    for (int column = thread; column < WARP_CHANNELS; column += ROW_THREADS) {
        const int64_t channel = static_cast<int64_t>(blockIdx.y) * WARP_CHANNELS + column;
        if (channel >= width) return;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            float total = 0.0f;
#pragma unroll
            for (int warp = 0; warp < ROW_WARPS; ++warp) total += shared[(warp * COUNT + i) * WARP_CHANNELS + column];
            to[i][channel] = total;
        }
    }
}

template <typename... Parameters, typename... Arguments>
int32_t launch_rows(void (*kernel)(rwkv_rows, Parameters...), size_t bytes, const rwkv_rows &p, Arguments... arguments) {
    const dim3 grid((p.rows + RWKV_ROWS_IN_BLOCK - 1) / RWKV_ROWS_IN_BLOCK,
                    (p.width + WARP_CHANNELS - 1) / WARP_CHANNELS);
    return launch(kernel, grid, dim3(32, ROW_WARPS), bytes, p.stream, p, arguments...);
}

template <int COUNT>
using Count = std::integral_constant<int, COUNT>;

template <typename io>
Tensors<const io> all_in(const void *const *tensors, int count) {
    Tensors<const io> result{};
    for (int m = 0; m < count; ++m) result.at[m] = in<io>(tensors[m]);
    return result;
}

template <typename io>
Tensors<io> all_out(void *const *tensors, int count) {
    Tensors<io> result{};
    for (int m = 0; m < count; ++m) result.at[m] = out<io>(tensors[m]);
    return result;
}

inline Tensors<const float> all_parameters(const float *const *parameters, int count) {
    Tensors<const float> result{};
    for (int m = 0; m < count; ++m) result.at[m] = parameters[m];
    return result;
}

template <typename... Parameters, typename... Arguments>
int32_t launch_flat(void (*kernel)(int64_t, Parameters...), const rwkv_rows &p, Arguments... arguments) {
    const int64_t elements = p.rows * p.width, each_block = FLAT_THREADS * LANE_CHANNELS;
    const dim3 grid((elements + each_block - 1) / each_block);
    return launch(kernel, grid, dim3(FLAT_THREADS), 0, p.stream, elements, arguments...);
}

// body(element of io), where there are kernels for the shape.
template <typename Body>
int32_t with_io(const rwkv_rows &p, const Body &body) {
    if (p.width % 16 || p.size % 16 || p.width % p.size) return RWKV_NO_SUCH_SIZE;
    if (p.io != RWKV_FP32 && p.io != RWKV_BF16 && p.io != RWKV_FP16) return RWKV_NO_SUCH_IO;
    if (p.rows == 0) return RWKV_OK;
    if (p.io == RWKV_FP32) return body(float());
    return p.io == RWKV_BF16 ? body(bf16()) : body(half());
}

// The same for a pass over heads, each of which is in one warp.
template <typename Body>
int32_t with_heads(const rwkv_rows &p, const Body &body) {
    if (p.size > LARGEST_HEAD || p.size & (p.size - 1)) return RWKV_NO_SUCH_SIZE;
    return with_io(p, body);
}

}  // namespace rwkv
