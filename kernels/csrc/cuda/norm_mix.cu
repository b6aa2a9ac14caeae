// Residual sum, layer norm, token shift and mixes, with fp32 arithmetic.
//
// A block goes over whole rows, a thread over 8 channels of each: what the token shift wants of the neighbouring row is in
// registers, and only the row beyond the block's edge is computed twice. Sums over a row cross the block through two
// buffers in turn, so that one barrier is enough for each; every schedule adds in the same order.
#pragma GCC visibility push(default)
#include "../fused.h"
#pragma GCC visibility pop

#include "rows.cuh"

namespace rwkv {
namespace {

constexpr float LAYER_NORM_EPS = 1e-5f;
constexpr int MOST_THREADS = RWKV_WIDEST_NORM_MIX / LANE_CHANNELS;  // more, and registers would not do
constexpr int MOST_WARPS = MOST_THREADS / 32;
constexpr int ROWS_AT_ONCE = 4;  // of the forward pass: their sums share a barrier

struct Parameters {
    const float *weight, *bias;
    Tensors<const float> mixes;  // null: a mix of zeros
};

// A thread's channels of every row, which it stores and adds where `is_inside`.
struct Columns {
    int channel;
    bool is_inside;

    __device__ __forceinline__ explicit Columns(const rwkv_rows &p) {
        const int width = static_cast<int>(p.width);
        channel = threadIdx.x * LANE_CHANNELS;
        is_inside = channel < width;
        if (!is_inside) channel = width - LANE_CHANNELS;
    }

    template <typename io>
    __device__ __forceinline__ void put(io *to, int64_t place, const Channels &x) const {
        if (is_inside) store(to + place, x);
    }

    __device__ __forceinline__ float total(const Channels &x) const {
        return is_inside ? sum(x) : 0.0f;
    }
};

// The rows of a block.
struct Span {
    int begin, end;

    __device__ __forceinline__ Span(const rwkv_rows &p, int rows_in_block) {
        const int rows = static_cast<int>(p.rows);
        begin = blockIdx.x * rows_in_block;
        end = rows - begin < rows_in_block ? rows : begin + rows_in_block;
    }
};

template <typename io>
__device__ __forceinline__ Packed<io> mix_of(const Parameters &parameters, int m, const Columns &columns) {
    const float *from = parameters.mixes.at[m];
    return pack<io>(from ? load(from + columns.channel) : splat(0.0f));
}

// Sums over the block's threads, COUNT at a time, of calls one after another.
template <int COUNT>
struct BlockSums {
    float *buffer = dynamic_memory<float>();  // [2][warp,COUNT]
    bool is_second = false;

    __device__ __forceinline__ void operator()(float (&sums)[COUNT]) {
        float *partial = buffer + (is_second ? MOST_WARPS * COUNT : 0);
        is_second = !is_second;
#pragma unroll
        for (int distance = 16; distance; distance /= 2) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
        }
        if (threadIdx.x % 32 == 0) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) partial[threadIdx.x / 32 * COUNT + i] = sums[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sums[i] = partial[i];
#pragma unroll(COUNT > 2 ? 4 : 1)
        for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) sums[i] += partial[warp * COUNT + i];
        }
    }

    static constexpr size_t bytes() {
        return sizeof(float) * 2 * MOST_WARPS * COUNT;
    }
};

template <typename io, int COUNT>
__global__ void __launch_bounds__(MOST_THREADS)
    norm_mix_forward(rwkv_rows p, int32_t rows_in_block, const io *x, const io *branch, Parameters parameters, io *sum,
                     float *statistics, Tensors<io> outputs) {
    const Columns columns(p);
    const Channels scale = rounded<io>(load(parameters.weight + columns.channel));
    const Channels shift = rounded<io>(load(parameters.bias + columns.channel));
    Packed<io> mixes[COUNT];
#pragma unroll
    for (int m = 0; m < COUNT; ++m) mixes[m] = mix_of<io>(parameters, m, columns);
    BlockSums<ROWS_AT_ONCE> sum_over_block;
    const float part = 1.0f / p.width;
    const Span rows(p, rows_in_block);
    const int first = is_first(p, rows.begin, rows.begin % p.time) ? rows.begin : rows.begin - 1;
    const int time = static_cast<int>(p.time);
    int step = first % time;
    Channels before = splat(0.0f);
    for (int row = first; row < rows.end; row += ROWS_AT_ONCE) {
        Channels now[ROWS_AT_ONCE];
        float sums[ROWS_AT_ONCE];
#pragma unroll
        for (int i = 0; i < ROWS_AT_ONCE; ++i) {
            const int64_t place = (row + i < rows.end ? row + i : rows.end - 1) * p.width + columns.channel;
            now[i] = load(x + place);
            if (branch) {
                now[i] = rounded<io>(now[i] + load(branch + place));
                if (row + i >= rows.begin && row + i < rows.end) columns.put(sum, place, now[i]);
            }
            sums[i] = columns.total(now[i]);
        }
        sum_over_block(sums);
        float squares[ROWS_AT_ONCE];
#pragma unroll
        for (int i = 0; i < ROWS_AT_ONCE; ++i) {
            sums[i] *= part;
            now[i] = now[i] - splat(sums[i]);
            squares[i] = columns.total(now[i] * now[i]);
        }
        sum_over_block(squares);
#pragma unroll
        for (int i = 0; i < ROWS_AT_ONCE; ++i) {
            if (row + i >= rows.end) break;
            const float rstd = 1.0f / sqrtf(squares[i] * part + LAYER_NORM_EPS);
            const Channels normed = now[i] * rstd * scale + shift;
            if (row + i >= rows.begin) {
                if (threadIdx.x == 0) {
                    statistics[row + i] = sums[i];
                    statistics[p.rows + row + i] = rstd;
                }
                if (is_first(p, row + i, step)) before = splat(0.0f);
                const Channels difference = before - normed;
                const int64_t place = (row + i) * p.width + columns.channel;
#pragma unroll
                for (int m = 0; m < COUNT; ++m) {
                    columns.put(outputs.at[m], place, normed + difference * unpack(mixes[m]));
                }
            }
            before = normed;
            step = step + 1 == time ? 0 : step + 1;
        }
    }
}

// What a thread of the backward pass keeps in shared memory, for want of registers: the mixes of its channels, as io has
// them, and the sums of dweight and dbias.
template <typename io, int COUNT>
struct Kept {
    float4 *sums = reinterpret_cast<float4 *>(dynamic_memory<char>() + BlockSums<2>::bytes());  // [2,2,thread]
    Packed<io> *mixes = reinterpret_cast<Packed<io> *>(sums + 4 * blockDim.x);                  // [COUNT,thread]

    __device__ __forceinline__ Kept(const Parameters &parameters, const Columns &columns) {
#pragma unroll
        for (int m = 0; m < COUNT; ++m) mixes[m * blockDim.x + threadIdx.x] = mix_of<io>(parameters, m, columns);
#pragma unroll
        for (int half = 0; half < 4; ++half) sums[half * blockDim.x + threadIdx.x] = float4{0.0f, 0.0f, 0.0f, 0.0f};
    }

    __device__ __forceinline__ Channels mix(int m) const {
        return unpack(mixes[m * blockDim.x + threadIdx.x]);
    }

    __device__ __forceinline__ Channels sum(int i) const {
        const float4 low = sums[2 * i * blockDim.x + threadIdx.x], high = sums[(2 * i + 1) * blockDim.x + threadIdx.x];
        return {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    }

    __device__ __forceinline__ void add(int i, const Channels &x) const {
        const Channels y = sum(i) + x;
        sums[2 * i * blockDim.x + threadIdx.x] = float4{y.at[0], y.at[1], y.at[2], y.at[3]};
        sums[(2 * i + 1) * blockDim.x + threadIdx.x] = float4{y.at[4], y.at[5], y.at[6], y.at[7]};
    }

    static constexpr size_t bytes(unsigned threads) {
        return BlockSums<2>::bytes() + threads * (4 * sizeof(float4) + COUNT * sizeof(Packed<io>));
    }
};

// A row without its mean and over its deviation, and 1 / that.
struct Normed {
    Channels at;
    float rstd;
};

template <typename io>
__device__ __forceinline__ Normed normed_row(const rwkv_rows &p, const io *sum, const float *statistics, int row,
                                             int channel) {
    const float mean = statistics[row], rstd = statistics[p.rows + row];
    return {(load(sum + row * p.width + channel) - splat(mean)) * rstd, rstd};
}

// Of h, the norm's result: dh_t = sum of g_t (1 - mix) + g_{t+1} mix.
template <typename io, int COUNT>
__global__ void __launch_bounds__(MOST_THREADS)
    norm_mix_backward(rwkv_rows p, int32_t rows_in_block, const io *sum, const float *statistics, Parameters parameters,
                      const io *dsum, Tensors<const io> doutputs, io *dx, float *dparameters) {
    const Columns columns(p);
    const Packed<io> scale = pack<io>(load(parameters.weight + columns.channel));
    const Kept<io, COUNT> kept(parameters, columns);
    BlockSums<2> sum_over_block;
    const float part = 1.0f / p.width;
    const Span rows(p, rows_in_block);
    Channels total[COUNT];
#pragma unroll
    for (int m = 0; m < COUNT; ++m) total[m] = splat(0.0f);
    const int time = static_cast<int>(p.time);
    int step = rows.end % time;
    Channels later = splat(0.0f);  // sum of g mix of the row after this one, where it is of the same document
    if (rows.end < p.rows && !is_first(p, rows.end, step)) {
#pragma unroll
        for (int m = 0; m < COUNT; ++m) {
            later = later + load(doutputs.at[m] + rows.end * p.width + columns.channel) * kept.mix(m);
        }
    }
#pragma unroll 1
    for (int row = rows.end - 1; row >= rows.begin; --row) {
        const int64_t place = row * p.width + columns.channel;
        step = step ? step - 1 : time - 1;
        const bool first = is_first(p, row, step);
        // The row before is read twice rather than carried: registers are short, and it is in the cache by then.
        const Normed now = normed_row(p, sum, statistics, row, columns.channel);
        Channels difference;
        if (first) {
            difference = now.at * unpack(scale) * -1.0f - rounded<io>(load(parameters.bias + columns.channel));
        } else {
            const Normed earlier = normed_row(p, sum, statistics, row - 1, columns.channel);
            difference = (earlier.at - now.at) * unpack(scale);
        }
        Channels dnorm = later, mixed = splat(0.0f);
#pragma unroll
        for (int m = 0; m < COUNT; ++m) {
            const Channels g = load(doutputs.at[m] + place), shifted = g * kept.mix(m);
            dnorm = dnorm + (g - shifted);
            mixed = mixed + shifted;
            total[m] = total[m] + g * difference;
        }
        later = first ? splat(0.0f) : mixed;
        kept.add(0, dnorm * now.at);
        kept.add(1, dnorm);
        dnorm = dnorm * unpack(scale);
        float sums[2] = {columns.total(dnorm), columns.total(dnorm * now.at)};
        sum_over_block(sums);
        Channels result = (dnorm - splat(sums[0] * part) - now.at * (sums[1] * part)) * now.rstd;
        if (dsum) result = result + load(dsum + place);
        columns.put(dx, place, result);
    }
    float *to = dparameters + static_cast<int64_t>(blockIdx.x) * (COUNT + 2) * p.width;
#pragma unroll
    for (int m = 0; m < COUNT; ++m) columns.put(to, m * p.width + columns.channel, total[m]);
    columns.put(to, COUNT * p.width + columns.channel, kept.sum(0));
    columns.put(to, (COUNT + 1) * p.width + columns.channel, kept.sum(1));
}

// body(element of io, number of mixes).
template <typename Body>
int32_t with_norm(const rwkv_rows &p, int32_t count, int32_t rows_in_block, const Body &body) {
    if (rows_in_block < 1 || p.rows > INT32_MAX - ROWS_AT_ONCE || p.width > RWKV_WIDEST_NORM_MIX) return RWKV_NO_SUCH_SIZE;
    return with_io(p, [&](auto element) {
        switch (count) {
            case 1: return body(element, Count<1>());
            case 2: return body(element, Count<2>());
            case 4: return body(element, Count<4>());
            case 6: return body(element, Count<6>());
            default: return static_cast<int32_t>(RWKV_NO_SUCH_SIZE);
        }
    });
}

Parameters gather(const float *weight, const float *bias, const float *const *mixes, int count) {
    return {weight, bias, all_parameters(mixes, count)};
}

unsigned threads_of(const rwkv_rows &p) {
    return (p.width / LANE_CHANNELS + 31) / 32 * 32;
}

template <typename... Types, typename... Arguments>
int32_t launch_norm(void (*kernel)(rwkv_rows, int32_t, Types...), size_t bytes, const rwkv_rows &p,
                    int32_t rows_in_block, Arguments... arguments) {
    const dim3 grid((p.rows + rows_in_block - 1) / rows_in_block);
    return launch(kernel, grid, dim3(threads_of(p)), bytes, p.stream, p, rows_in_block, arguments...);
}

}  // namespace
}  // namespace rwkv

using namespace rwkv;

int32_t rwkv_norm_mix_forward(const rwkv_rows *shape, int32_t count, int32_t rows_in_block, const void *x,
                              const void *branch, const float *weight, const float *bias, const float *const *mixes,
                              void *sum, float *statistics, void *const *outputs) {
    return with_norm(*shape, count, rows_in_block, [&](auto element, auto mixed) {
        using io = decltype(element);
        return launch_norm(norm_mix_forward<io, mixed>, BlockSums<ROWS_AT_ONCE>::bytes(), *shape, rows_in_block,
                           in<io>(x), in<io>(branch), gather(weight, bias, mixes, mixed), out<io>(sum), statistics,
                           all_out<io>(outputs, mixed));
    });
}

int32_t rwkv_norm_mix_backward(const rwkv_rows *shape, int32_t count, int32_t rows_in_block, const void *sum,
                               const float *statistics, const float *weight, const float *bias,
                               const float *const *mixes, const void *dsum, const void *const *doutputs, void *dx,
                               float *dparameters) {
    return with_norm(*shape, count, rows_in_block, [&](auto element, auto mixed) {
        using io = decltype(element);
        return launch_norm(norm_mix_backward<io, mixed>, Kept<io, mixed>::bytes(threads_of(*shape)), *shape,
                           rows_in_block, in<io>(sum), statistics, gather(weight, bias, mixes, mixed), in<io>(dsum),
                           all_in<io>(doutputs, mixed), out<io>(dx), dparameters);
    });
}
