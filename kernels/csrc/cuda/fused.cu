// Token shift and mixes, and the reading of RWKV-5 and 6: fp32 arithmetic, each tensor read and written once.
#pragma GCC visibility push(default)
#include "../fused.h"
#pragma GCC visibility pop

#include "rows.cuh"

namespace rwkv {
namespace {

template <typename io, int COUNT>
__global__ void __launch_bounds__(ROW_THREADS, 4)
    mix_forward(rwkv_rows p, const io *x, Tensors<const float> mixes, Tensors<io> outputs) {
    const Work work(p);
    if (!work.has_rows()) return;
    Channels mix[COUNT];
#pragma unroll
    for (int m = 0; m < COUNT; ++m) mix[m] = parameter<io>(mixes.at[m], work);
    int64_t step = work.begin % p.time;
    Channels before = work.begin ? load(x + (work.begin - 1) * p.width + work.channel) : splat(0.0f);
    for (int64_t row = work.begin; row < work.end; ++row) {
        const int64_t place = row * p.width + work.channel;
        const Channels now = load(x + place);
        if (is_first(p, row, step)) before = splat(0.0f);
#pragma unroll
        for (int m = 0; m < COUNT; ++m) work.put(outputs.at[m], place, now + (before - now) * mix[m]);
        before = now;
        step = step + 1 == p.time ? 0 : step + 1;
    }
}

// dx_t = sum of g_t (1 - mix) + g_{t+1} mix
template <typename io, int COUNT>
__global__ void __launch_bounds__(ROW_THREADS)
    mix_backward(rwkv_rows p, const io *x, Tensors<const float> mixes, Tensors<const io> doutputs, io *dx,
                 float *dmixes) {
    const Work work(p);
    Channels mix[COUNT], total[COUNT];
    float *to[COUNT];
#pragma unroll
    for (int m = 0; m < COUNT; ++m) {
        mix[m] = parameter<io>(mixes.at[m], work);
        total[m] = splat(0.0f);
        to[m] = dmixes + (static_cast<int64_t>(blockIdx.x) * COUNT + m) * p.width;
    }
    if (work.has_rows()) {
        int64_t step = work.end % p.time;
        Channels later = splat(0.0f);  // sum of g mix of the row after this one, where it is of the same document
        if (work.end < p.rows && !is_first(p, work.end, step)) {
#pragma unroll
            for (int m = 0; m < COUNT; ++m) {
                later = later + load(doutputs.at[m] + work.end * p.width + work.channel) * mix[m];
            }
        }
        Channels now = load(x + (work.end - 1) * p.width + work.channel);
        for (int64_t row = work.end - 1; row >= work.begin; --row) {
            const int64_t place = row * p.width + work.channel;
            step = step ? step - 1 : p.time - 1;
            const Channels earlier = row ? load(x + place - p.width) : splat(0.0f);
            const bool first = is_first(p, row, step);
            const Channels difference = first ? splat(0.0f) - now : earlier - now;
            Channels whole = splat(0.0f), mixed = splat(0.0f);
#pragma unroll
            for (int m = 0; m < COUNT; ++m) {
                const Channels g = load(doutputs.at[m] + place);
                whole = whole + g;
                mixed = mixed + g * mix[m];
                total[m] = total[m] + g * difference;
            }
            work.put(dx, place, whole - mixed + later);
            later = first ? splat(0.0f) : mixed;
            now = earlier;
        }
    }
    add_over_warps(to, total, p.width);
}

__device__ __forceinline__ Channels relu(const Channels &x) {
    return each([&](int i) { return x.at[i] < 0.0f ? 0.0f : x.at[i]; });  // NaN stays NaN
}

template <typename io>
__global__ void __launch_bounds__(FLAT_THREADS) squared_relu_forward(int64_t elements, const io *x, io *y) {
    const int64_t place = flat_place();
    if (place >= elements) return;
    const Channels positive = relu(load(x + place));
    store(y + place, positive * positive);
}

template <typename io>
__global__ void __launch_bounds__(FLAT_THREADS)
    squared_relu_backward(int64_t elements, const io *x, const io *dy, io *dx) {
    const int64_t place = flat_place();
    if (place >= elements) return;
    store(dx + place, relu(load(x + place)) * 2.0f * load(dy + place));
}

template <typename io>
__global__ void __launch_bounds__(ROW_THREADS)
    gated_norm_forward(rwkv_rows p, const io *y, const io *gate, const float *weight, const float *bias, io *out) {
    const Work work(p);
    const int lanes = static_cast<int>(p.size / LANE_CHANNELS);
    const Channels scale = parameter<io>(weight, work), shift = parameter<io>(bias, work);
    for (int64_t row = work.begin; row < work.end; ++row) {
        const int64_t place = row * p.width + work.channel;
        const Channels its_gate = load(gate + place);
        const Normed normed = norm(load(y + place), lanes);
        work.put(out, place, (normed.at * scale + shift) * (its_gate * sigmoid(its_gate)));
    }
}

template <typename io>
__global__ void __launch_bounds__(ROW_THREADS)
    gated_norm_backward(rwkv_rows p, const io *y, const io *gate, const float *weight, const float *bias,
                        const io *dout, io *dy, io *dgate, float *dparameters) {
    const Work work(p);
    const int lanes = static_cast<int>(p.size / LANE_CHANNELS);
    const Channels scale = parameter<io>(weight, work), shift = parameter<io>(bias, work);
    Channels totals[2] = {splat(0.0f), splat(0.0f)};  // of weight, bias
    for (int64_t row = work.begin; row < work.end; ++row) {
        const int64_t place = row * p.width + work.channel;
        const Channels g = load(dout + place), its_gate = load(gate + place), open = sigmoid(its_gate);
        const Normed normed = norm(load(y + place), lanes);
        const Channels dz = g * (its_gate * open), dnormed = dz * scale;
        float sums[2] = {sum(dnormed), sum(dnormed * normed.at)};
        sum_over_head(sums, lanes);
        const Channels slope = open * (splat(1.0f) + its_gate * (splat(1.0f) - open));  // of silu
        work.put(dgate, place, g * (normed.at * scale + shift) * slope);
        work.put(dy, place, norm_backward(normed, dnormed, sums[0], sums[1], lanes));
        totals[0] = totals[0] + dz * normed.at;
        totals[1] = totals[1] + dz;
    }
    float *first = dparameters + static_cast<int64_t>(blockIdx.x) * 2 * p.width;
    float *to[2] = {first, first + p.width};
    add_over_warps(to, totals, p.width);
}

// body(element of io, number of mixes).
template <typename Body>
int32_t with_mixes(const rwkv_rows &p, int32_t count, const Body &body) {
    return with_io(p, [&](auto element) {
        switch (count) {
            case 1: return body(element, Count<1>());
            case 2: return body(element, Count<2>());
            case 3: return body(element, Count<3>());
            case 4: return body(element, Count<4>());
            case 5: return body(element, Count<5>());
            case 6: return body(element, Count<6>());
            default: return static_cast<int32_t>(RWKV_NO_SUCH_SIZE);
        }
    });
}

}  // namespace
}  // namespace rwkv

using namespace rwkv;

int32_t rwkv_mix_forward(const rwkv_rows *shape, int32_t count, const void *x, const float *const *mixes,
                         void *const *outputs) {
    return with_mixes(*shape, count, [&](auto element, auto mixed) {
        using io = decltype(element);
        return launch_rows(mix_forward<io, mixed>, 0, *shape, in<io>(x), all_parameters(mixes, mixed),
                           all_out<io>(outputs, mixed));
    });
}

int32_t rwkv_mix_backward(const rwkv_rows *shape, int32_t count, const void *x, const float *const *mixes,
                          const void *const *doutputs, void *dx, float *dmixes) {
    return with_mixes(*shape, count, [&](auto element, auto mixed) {
        using io = decltype(element);
        return launch_rows(mix_backward<io, mixed>, bytes_of_sums(mixed), *shape, in<io>(x),
                           all_parameters(mixes, mixed), all_in<io>(doutputs, mixed), out<io>(dx), dmixes);
    });
}

int32_t rwkv_squared_relu_forward(const rwkv_rows *shape, const void *x, void *y) {
    return with_io(*shape, [&](auto element) {
        using io = decltype(element);
        return launch_flat(squared_relu_forward<io>, *shape, in<io>(x), out<io>(y));
    });
}

int32_t rwkv_squared_relu_backward(const rwkv_rows *shape, const void *x, const void *dy, void *dx) {
    return with_io(*shape, [&](auto element) {
        using io = decltype(element);
        return launch_flat(squared_relu_backward<io>, *shape, in<io>(x), in<io>(dy), out<io>(dx));
    });
}

int32_t rwkv_gated_norm_forward(const rwkv_rows *shape, const void *y, const void *gate, const float *weight,
                                const float *bias, void *to) {
    return with_heads(*shape, [&](auto element) {
        using io = decltype(element);
        return launch_rows(gated_norm_forward<io>, 0, *shape, in<io>(y), in<io>(gate), weight, bias, out<io>(to));
    });
}

int32_t rwkv_gated_norm_backward(const rwkv_rows *shape, const void *y, const void *gate, const float *weight,
                                 const float *bias, const void *dout, void *dy, void *dgate, float *dparameters) {
    return with_heads(*shape, [&](auto element) {
        using io = decltype(element);
        return launch_rows(gated_norm_backward<io>, bytes_of_sums(2), *shape, in<io>(y), in<io>(gate), weight, bias,
                           in<io>(dout), out<io>(dy), out<io>(dgate), dparameters);
    });
}
