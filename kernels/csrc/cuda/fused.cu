// Token shift and mixes, key preparation and the reading of WKV's output: fp32 arithmetic, each tensor read and written once.
#pragma GCC visibility push(default)
#include "../fused.h"
#pragma GCC visibility pop

#include <type_traits>

#include "rows.cuh"

namespace rwkv {
namespace {

constexpr float NORM_EPS = 64e-5f;   // of the head norm: RWKV-LM's 1e-5 on y / 8
constexpr float KAPPA_EPS = 1e-12f;  // least length of kappa's divisor
constexpr int LARGEST_HEAD = WARP_CHANNELS;
constexpr int FLAT_THREADS = 256;

// A tensor for each of the mixes.
template <typename T>
struct Tensors {
    T *at[RWKV_MOST_MIXES];
};

// Whether nothing comes before the row, the one of this step: it is the first of its sequence or document.
__device__ __forceinline__ bool is_first(const rwkv_rows &p, int64_t row, int64_t step) {
    return step == 0 || (p.starts && p.starts[row]);
}

template <typename io, int COUNT>
__global__ void __launch_bounds__(ROW_THREADS)
    mix_forward(rwkv_rows p, const io *x, const float *mixes, Tensors<io> outputs) {
    const Work work(p);
    if (!work.has_rows()) return;
    Channels mix[COUNT];
#pragma unroll
    for (int m = 0; m < COUNT; ++m) mix[m] = load(mixes + m * p.width + work.channel);
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
    mix_backward(rwkv_rows p, const io *x, const float *mixes, Tensors<const io> doutputs, io *dx, float *dmixes) {
    const Work work(p);
    Channels mix[COUNT], total[COUNT];
    float *to[COUNT];
#pragma unroll
    for (int m = 0; m < COUNT; ++m) {
        mix[m] = load(mixes + m * p.width + work.channel);
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

__device__ __forceinline__ int64_t flat_place() {
    return (static_cast<int64_t>(blockIdx.x) * FLAT_THREADS + threadIdx.x) * LANE_CHANNELS;
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

template <typename io, int COUNT>
__global__ void __launch_bounds__(FLAT_THREADS)
    blend_forward(int64_t elements, const io *x, const io *delta, Tensors<const io> mixes, Tensors<io> outputs) {
    const int64_t place = flat_place();
    if (place >= elements) return;
    const Channels now = load(x + place), difference = load(delta + place);
#pragma unroll
    for (int m = 0; m < COUNT; ++m) store(outputs.at[m] + place, now + difference * load(mixes.at[m] + place));
}

template <typename io, int COUNT>
__global__ void __launch_bounds__(FLAT_THREADS)
    blend_backward(int64_t elements, const io *delta, Tensors<const io> mixes, Tensors<const io> doutputs, io *dx,
                   io *ddelta, Tensors<io> dmixes) {
    const int64_t place = flat_place();
    if (place >= elements) return;
    const Channels difference = load(delta + place);
    Channels whole = splat(0.0f), mixed = splat(0.0f);
#pragma unroll
    for (int m = 0; m < COUNT; ++m) {
        const Channels g = load(doutputs.at[m] + place);
        whole = whole + g;
        mixed = mixed + g * load(mixes.at[m] + place);
        store(dmixes.at[m] + place, g * difference);
    }
    store(dx + place, whole);
    store(ddelta + place, mixed);
}

// 1 / max(length of q over a head, KAPPA_EPS)
__device__ __forceinline__ float inverse_length(const Channels &q, int lanes) {
    float squares[1] = {sum(q * q)};
    sum_over_head(squares, lanes);
    const float length = sqrtf(squares[0]);
    return 1.0f / (length > KAPPA_EPS ? length : KAPPA_EPS);
}

template <typename io>
__global__ void __launch_bounds__(ROW_THREADS)
    keys_forward(rwkv_rows p, const io *k, const io *a, const float *k_k, const float *k_a, io *written, io *removed,
                 io *replaced) {
    const Work work(p);
    const int lanes = static_cast<int>(p.size / LANE_CHANNELS);
    const Channels scale = load(k_k + work.channel), blend = load(k_a + work.channel);
    for (int64_t row = work.begin; row < work.end; ++row) {
        const int64_t place = row * p.width + work.channel;
        const Channels key = load(k + place), rate = load(a + place);
        const Channels q = key * scale, kappa = q * inverse_length(q, lanes);
        work.put(written, place, key * (splat(1.0f) + (rate - splat(1.0f)) * blend));
        work.put(removed, place, kappa * -1.0f);
        work.put(replaced, place, kappa * rate);
    }
}

template <typename io>
__global__ void __launch_bounds__(ROW_THREADS)
    keys_backward(rwkv_rows p, const io *k, const io *a, const float *k_k, const float *k_a, const io *dwritten,
                  const io *dremoved, const io *dreplaced, io *dk, io *da, float *dk_k, float *dk_a) {
    const Work work(p);
    const int lanes = static_cast<int>(p.size / LANE_CHANNELS);
    const Channels scale = load(k_k + work.channel), blend = load(k_a + work.channel);
    Channels totals[2] = {splat(0.0f), splat(0.0f)};
    for (int64_t row = work.begin; row < work.end; ++row) {
        const int64_t place = row * p.width + work.channel;
        const Channels key = load(k + place), rate = load(a + place), rest = rate - splat(1.0f);
        const Channels g = load(dwritten + place), to_replaced = load(dreplaced + place);
        const Channels q = key * scale;
        const float inverse = inverse_length(q, lanes);
        const Channels kappa = q * inverse, dkappa = to_replaced * rate - load(dremoved + place);
        float along[1] = {sum(kappa * dkappa)};
        sum_over_head(along, lanes);
        // a length below the floor counts as constant
        const float projected = inverse < 1.0f / KAPPA_EPS ? along[0] : 0.0f;
        const Channels dq = (dkappa - kappa * projected) * inverse;
        work.put(dk, place, g * (splat(1.0f) + rest * blend) + scale * dq);
        work.put(da, place, g * key * blend + to_replaced * kappa);
        totals[0] = totals[0] + dq * key;
        totals[1] = totals[1] + g * key * rest;
    }
    const int64_t block = blockIdx.x * p.width;
    float *to[2] = {dk_k + block, dk_a + block};
    add_over_warps(to, totals, p.width);
}

// Of a head: y without its mean and over its deviation, and 1 / that.
struct Normed {
    Channels at;
    float rstd;
};

// total: the sum of y over the head.
__device__ __forceinline__ Normed norm(const Channels &y, float total, int lanes) {
    const float part = 1.0f / (lanes * LANE_CHANNELS);
    const Channels centred = y - splat(total * part);
    float squares[1] = {sum(centred * centred)};
    sum_over_head(squares, lanes);
    const float rstd = 1.0f / sqrtf(squares[0] * part + NORM_EPS);
    return {centred * rstd, rstd};
}

__device__ __forceinline__ Normed norm(const Channels &y, int lanes) {
    float total[1] = {sum(y)};
    sum_over_head(total, lanes);
    return norm(y, total[0], lanes);
}

// dy of the norm; the sums over the head are of dnormed and of dnormed normed.
__device__ __forceinline__ Channels norm_backward(const Normed &y, const Channels &dnormed, float total, float along,
                                                  int lanes) {
    const float part = 1.0f / (lanes * LANE_CHANNELS);
    return (dnormed - splat(total * part) - y.at * (along * part)) * y.rstd;
}

// The norm of y over a head, and the sum of r k r_k.
struct HeadFigures {
    Normed y;
    float bonus;
};

__device__ __forceinline__ HeadFigures figures(const Channels &y, const Channels &weighted, int lanes) {
    float sums[2] = {sum(y), sum(weighted)};
    sum_over_head(sums, lanes);
    return {norm(y, sums[0], lanes), sums[1]};
}

template <typename io>
__global__ void __launch_bounds__(ROW_THREADS, 4)
    read_forward(rwkv_rows p, const io *y, const io *r, const io *k, const io *v, const io *gate, const float *r_k,
                 const float *weight, const float *bias, io *out) {
    const Work work(p);
    const int lanes = static_cast<int>(p.size / LANE_CHANNELS);
    const Channels its_r_k = load(r_k + work.channel), scale = load(weight + work.channel);
    const Channels shift = load(bias + work.channel);
    for (int64_t row = work.begin; row < work.end; ++row) {
        const int64_t place = row * p.width + work.channel;
        const HeadFigures f = figures(load(y + place), load(r + place) * load(k + place) * its_r_k, lanes);
        work.put(out, place, (f.y.at * scale + shift + load(v + place) * f.bonus) * load(gate + place));
    }
}

template <typename io>
__global__ void __launch_bounds__(ROW_THREADS)
    read_backward(rwkv_rows p, const io *y, const io *r, const io *k, const io *v, const io *gate, const float *r_k,
                  const float *weight, const float *bias, const io *dout, io *dy, io *dr, io *dk, io *dv, io *dgate,
                  float *dparameters) {
    const Work work(p);
    const int lanes = static_cast<int>(p.size / LANE_CHANNELS);
    const Channels its_r_k = load(r_k + work.channel), scale = load(weight + work.channel);
    const Channels shift = load(bias + work.channel);
    Channels totals[3] = {splat(0.0f), splat(0.0f), splat(0.0f)};  // of r_k, weight, bias
    for (int64_t row = work.begin; row < work.end; ++row) {
        const int64_t place = row * p.width + work.channel;
        const Channels read = load(r + place), key = load(k + place), value = load(v + place);
        const Channels g = load(dout + place), its_gate = load(gate + place);
        const HeadFigures f = figures(load(y + place), read * key * its_r_k, lanes);
        const Channels dz = g * its_gate, dnormed = dz * scale;
        float sums[3] = {sum(dz * value), sum(dnormed), sum(dnormed * f.y.at)};
        sum_over_head(sums, lanes);
        const float dbonus = sums[0];
        work.put(dgate, place, g * (f.y.at * scale + shift + value * f.bonus));
        work.put(dv, place, dz * f.bonus);
        work.put(dr, place, key * its_r_k * dbonus);
        work.put(dk, place, read * its_r_k * dbonus);
        work.put(dy, place, norm_backward(f.y, dnormed, sums[1], sums[2], lanes));
        totals[0] = totals[0] + read * key * dbonus;
        totals[1] = totals[1] + dz * f.y.at;
        totals[2] = totals[2] + dz;
    }
    float *first = dparameters + static_cast<int64_t>(blockIdx.x) * 3 * p.width;
    float *to[3] = {first, first + p.width, first + 2 * p.width};
    add_over_warps(to, totals, p.width);
}

__device__ __forceinline__ Channels sigmoid(const Channels &x) {
    return each([&](int i) { return 1.0f / (1.0f + expf(-x.at[i])); });
}

template <typename io>
__global__ void __launch_bounds__(ROW_THREADS)
    gated_norm_forward(rwkv_rows p, const io *y, const io *gate, const float *weight, const float *bias, io *out) {
    const Work work(p);
    const int lanes = static_cast<int>(p.size / LANE_CHANNELS);
    const Channels scale = load(weight + work.channel), shift = load(bias + work.channel);
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
    const Channels scale = load(weight + work.channel), shift = load(bias + work.channel);
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

template <int COUNT>
using Count = std::integral_constant<int, COUNT>;

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

template <typename io>
const io *in(const void *x) {
    return static_cast<const io *>(x);
}

template <typename io>
io *out(void *x) {
    return static_cast<io *>(x);
}

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

template <typename... Parameters, typename... Arguments>
int32_t launch_flat(void (*kernel)(int64_t, Parameters...), const rwkv_rows &p, Arguments... arguments) {
    const int64_t elements = p.rows * p.width, each_block = FLAT_THREADS * LANE_CHANNELS;
    const dim3 grid((elements + each_block - 1) / each_block);
    return launch(kernel, grid, dim3(FLAT_THREADS), 0, p.stream, elements, arguments...);
}

}  // namespace
}  // namespace rwkv

using namespace rwkv;

int32_t rwkv_mix_forward(const rwkv_rows *shape, int32_t count, const void *x, const float *mixes,
                         void *const *outputs) {
    return with_mixes(*shape, count, [&](auto element, auto mixed) {
        using io = decltype(element);
        return launch_rows(mix_forward<io, mixed>, 0, *shape, in<io>(x), mixes, all_out<io>(outputs, mixed));
    });
}

int32_t rwkv_mix_backward(const rwkv_rows *shape, int32_t count, const void *x, const float *mixes,
                          const void *const *doutputs, void *dx, float *dmixes) {
    return with_mixes(*shape, count, [&](auto element, auto mixed) {
        using io = decltype(element);
        return launch_rows(mix_backward<io, mixed>, mixed, *shape, in<io>(x), mixes, all_in<io>(doutputs, mixed),
                           out<io>(dx), dmixes);
    });
}

int32_t rwkv_blend_forward(const rwkv_rows *shape, int32_t count, const void *x, const void *delta,
                           const void *const *mixes, void *const *outputs) {
    return with_mixes(*shape, count, [&](auto element, auto mixed) {
        using io = decltype(element);
        return launch_flat(blend_forward<io, mixed>, *shape, in<io>(x), in<io>(delta), all_in<io>(mixes, mixed),
                           all_out<io>(outputs, mixed));
    });
}

int32_t rwkv_blend_backward(const rwkv_rows *shape, int32_t count, const void *delta, const void *const *mixes,
                            const void *const *doutputs, void *dx, void *ddelta, void *const *dmixes) {
    return with_mixes(*shape, count, [&](auto element, auto mixed) {
        using io = decltype(element);
        return launch_flat(blend_backward<io, mixed>, *shape, in<io>(delta), all_in<io>(mixes, mixed),
                           all_in<io>(doutputs, mixed), out<io>(dx), out<io>(ddelta), all_out<io>(dmixes, mixed));
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

int32_t rwkv_keys_forward(const rwkv_rows *shape, const void *k, const void *a, const float *k_k, const float *k_a,
                          void *written, void *removed, void *replaced) {
    return with_heads(*shape, [&](auto element) {
        using io = decltype(element);
        return launch_rows(keys_forward<io>, 0, *shape, in<io>(k), in<io>(a), k_k, k_a, out<io>(written),
                           out<io>(removed), out<io>(replaced));
    });
}

int32_t rwkv_keys_backward(const rwkv_rows *shape, const void *k, const void *a, const float *k_k, const float *k_a,
                           const void *dwritten, const void *dremoved, const void *dreplaced, void *dk, void *da,
                           float *dk_k, float *dk_a) {
    return with_heads(*shape, [&](auto element) {
        using io = decltype(element);
        return launch_rows(keys_backward<io>, 2, *shape, in<io>(k), in<io>(a), k_k, k_a, in<io>(dwritten),
                           in<io>(dremoved), in<io>(dreplaced), out<io>(dk), out<io>(da), dk_k, dk_a);
    });
}

int32_t rwkv_read_forward(const rwkv_rows *shape, const void *y, const void *r, const void *k, const void *v,
                          const void *gate, const float *r_k, const float *weight, const float *bias, void *to) {
    return with_heads(*shape, [&](auto element) {
        using io = decltype(element);
        return launch_rows(read_forward<io>, 0, *shape, in<io>(y), in<io>(r), in<io>(k), in<io>(v), in<io>(gate), r_k,
                           weight, bias, out<io>(to));
    });
}

int32_t rwkv_read_backward(const rwkv_rows *shape, const void *y, const void *r, const void *k, const void *v,
                           const void *gate, const float *r_k, const float *weight, const float *bias,
                           const void *dout, void *dy, void *dr, void *dk, void *dv, void *dgate, float *dparameters) {
    return with_heads(*shape, [&](auto element) {
        using io = decltype(element);
        return launch_rows(read_backward<io>, 3, *shape, in<io>(y), in<io>(r), in<io>(k), in<io>(v), in<io>(gate), r_k,
                           weight, bias, in<io>(dout), out<io>(dy), out<io>(dr), out<io>(dk), out<io>(dv),
                           out<io>(dgate), dparameters);
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
        return launch_rows(gated_norm_backward<io>, 2, *shape, in<io>(y), in<io>(gate), weight, bias, in<io>(dout),
                           out<io>(dy), out<io>(dgate), dparameters);
    });
}
