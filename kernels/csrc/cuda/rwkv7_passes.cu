// RWKV-7's passes before and after WKV: fp32 arithmetic, each tensor read and written once.
#pragma GCC visibility push(default)
#include "../fused.h"
#pragma GCC visibility pop

#include <type_traits>

#include "rows.cuh"

namespace rwkv {
namespace {

constexpr float KAPPA_EPS = 1e-12f;  // least length of kappa's divisor

// Where a thread's head is in a tensor [R,C/N].
struct HeadPlace {
    int64_t heads, head;
    bool writes;  // one thread of the head's does

    __device__ __forceinline__ HeadPlace(const rwkv_rows &p, const Work &work) {
        heads = p.width / p.size;
        head = work.channel / p.size;
        writes = work.is_inside && work.channel == head * p.size;
    }

    __device__ __forceinline__ int64_t at(int64_t row) const {
        return row * heads + head;
    }
};

// 1 / max(length, KAPPA_EPS) of a vector with this sum of squares.
__device__ __forceinline__ float inverse_length(float squares) {
    const float length = sqrtf(squares);
    return 1.0f / (length < KAPPA_EPS ? KAPPA_EPS : length);  // NaN stays NaN
}

// A thread's channels of COUNT parameters, as io has them, in shared memory for want of registers.
template <typename io, int COUNT>
struct SharedParameters {
    float4 *lanes = reinterpret_cast<float4 *>(dynamic_memory<char>() + bytes_of_sums(COUNT)) + threadIdx.x;  // [COUNT,2,lane]

    __device__ __forceinline__ SharedParameters(const float *const (&from)[COUNT], const Work &work) {
        if (threadIdx.y == 0) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                const Channels x = parameter<io>(from[i], work);
                lanes[2 * i * 32] = float4{x.at[0], x.at[1], x.at[2], x.at[3]};
                lanes[(2 * i + 1) * 32] = float4{x.at[4], x.at[5], x.at[6], x.at[7]};
            }
        }
        __syncthreads();
    }

    __device__ __forceinline__ Channels operator[](int i) const {
        const float4 low = lanes[2 * i * 32], high = lanes[(2 * i + 1) * 32];
        return {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    }
};

constexpr size_t bytes_of_backward(int parameters) {
    return bytes_of_sums(parameters) + parameters * WARP_CHANNELS * sizeof(float);
}

// MIXES: all blocks but the first, which has no v_first.
template <typename io, bool MIXES>
__global__ void __launch_bounds__(ROW_THREADS)
    prepare_forward(rwkv_rows p, rwkv_prepare_inputs x, rwkv_prepare_outputs to) {
    const Work work(p);
    const HeadPlace bonus(p, work);
    const int lanes = static_cast<int>(p.size / LANE_CHANNELS);
    const Channels k_k = parameter<io>(x.k_k, work), k_a = parameter<io>(x.k_a, work);
    const Channels r_k = parameter<io>(x.r_k, work), a0 = parameter<io>(x.a0, work);
    const Channels v0 = MIXES ? parameter<io>(x.v0, work) : splat(0.0f);
    for (int64_t row = work.begin; row < work.end; ++row) {
        const int64_t place = row * p.width + work.channel;
        const Channels key = load(in<io>(x.k) + place), rate = sigmoid(load(in<io>(x.a) + place) + a0);
        const Channels written = key * (splat(1.0f) + (rate - splat(1.0f)) * k_a), q = key * k_k;
        float sums[2] = {sum(q * q), sum(load(in<io>(x.r) + place) * rounded<io>(written) * r_k)};
        sum_over_head(sums, lanes);
        const Channels kappa = q * inverse_length(sums[0]);
        work.put(out<io>(to.written), place, written);
        work.put(out<io>(to.removed), place, kappa * -1.0f);
        work.put(out<io>(to.replaced), place, kappa * rate);
        if (bonus.writes) to.bonus[bonus.at(row)] = sums[1];
        if constexpr (MIXES) {
            const Channels value = load(in<io>(x.v) + place);
            const Channels share = sigmoid(load(in<io>(x.v_mix) + place) + v0);
            work.put(out<io>(to.mixed), place, value + (load(in<io>(x.v_first) + place) - value) * share);
        }
    }
}

template <typename io, bool MIXES>
__global__ void __launch_bounds__(ROW_THREADS, 3)
    prepare_backward(rwkv_rows p, rwkv_prepare_inputs x, rwkv_prepare_doutputs g, rwkv_prepare_dinputs dx) {
    constexpr int COUNT = MIXES ? 5 : 4;
    const Work work(p);
    const HeadPlace bonus(p, work);
    const int lanes = static_cast<int>(p.size / LANE_CHANNELS);
    Channels totals[COUNT];
    float *to[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        totals[i] = splat(0.0f);
        to[i] = dx.parameters + (static_cast<int64_t>(blockIdx.x) * COUNT + i) * p.width;
    }
    const float *from[COUNT] = {x.k_k, x.k_a, x.r_k, x.a0};
    if constexpr (MIXES) from[COUNT - 1] = x.v0;
    const SharedParameters<io, COUNT> shared(from, work);
    for (int64_t row = work.begin; row < work.end; ++row) {
        const int64_t place = row * p.width + work.channel;
        asm volatile("" ::: "memory");  // or parameters would be read once, into registers
        const Channels k_k = shared[0], k_a = shared[1], r_k = shared[2];
        const Channels key = load(in<io>(x.k) + place), read = load(in<io>(x.r) + place), q = key * k_k;
        const Channels rate = sigmoid(load(in<io>(x.a) + place) + shared[3]), rest = rate - splat(1.0f);
        const Channels dreplaced = load(in<io>(g.replaced) + place);
        const Channels dkappa = dreplaced * rate - load(in<io>(g.removed) + place);
        float sums[2] = {sum(q * q), sum(q * dkappa)};
        sum_over_head(sums, lanes);
        const float inverse = inverse_length(sums[0]), dbonus = g.bonus[bonus.at(row)];
        // a length below the floor counts as constant
        const float projected = inverse < 1.0f / KAPPA_EPS ? sums[1] * inverse : 0.0f;
        const Channels kappa = q * inverse, dq = (dkappa - kappa * projected) * inverse;
        const Channels blend = splat(1.0f) + rest * k_a, written = rounded<io>(key * blend), of_bonus = r_k * dbonus;
        const Channels dwritten = load(in<io>(g.written) + place) + of_bonus * read;
        const Channels da = (dwritten * key * k_a + dreplaced * kappa) * rate * (rest * -1.0f);
        work.put(out<io>(dx.r), place, load(in<io>(g.r) + place) + of_bonus * written);
        work.put(out<io>(dx.k), place, dwritten * blend + k_k * dq);
        work.put(out<io>(dx.a), place, da);
        totals[0] = totals[0] + dq * key;
        totals[1] = totals[1] + dwritten * key * rest;
        totals[2] = totals[2] + read * written * dbonus;
        totals[3] = totals[3] + da;

        const Channels dvalue = load(in<io>(g.mixed) + place) + load(in<io>(g.mixed_again) + place);
        const Channels later = g.v_first ? load(in<io>(g.v_first) + place) : splat(0.0f);
        if constexpr (MIXES) {
            const Channels share = sigmoid(load(in<io>(x.v_mix) + place) + shared[COUNT - 1]);
            const Channels of_first = dvalue * share;
            const Channels kept = splat(1.0f) - share;
            const Channels dmix =
                of_first * kept * (load(in<io>(x.v_first) + place) - load(in<io>(x.v) + place));
            work.put(out<io>(dx.v), place, dvalue * kept);
            work.put(out<io>(dx.v_first), place, of_first + later);
            work.put(out<io>(dx.v_mix), place, dmix);
            totals[COUNT - 1] = totals[COUNT - 1] + dmix;
        } else {
            work.put(out<io>(dx.v), place, dvalue + later);
        }
    }
    add_over_warps(to, totals, p.width);
}

template <typename io>
__global__ void __launch_bounds__(ROW_THREADS, 4)
    read_forward(rwkv_rows p, const io *y, const io *v, const float *bonus, const io *gate, const float *weight,
                 const float *bias, io *to) {
    const Work work(p);
    const HeadPlace its_bonus(p, work);
    const int lanes = static_cast<int>(p.size / LANE_CHANNELS);
    const Channels scale = parameter<io>(weight, work), shift = parameter<io>(bias, work);
    for (int64_t row = work.begin; row < work.end; ++row) {
        const int64_t place = row * p.width + work.channel;
        const Normed normed = norm(load(y + place), lanes);
        const Channels z = normed.at * scale + shift + load(v + place) * bonus[its_bonus.at(row)];
        work.put(to, place, z * load(gate + place));
    }
}

template <typename io>
__global__ void __launch_bounds__(ROW_THREADS)
    read_backward(rwkv_rows p, const io *y, const io *v, const float *bonus, const io *gate, const float *weight,
                  const float *bias, const io *dout, io *dy, io *dv, float *dbonus, io *dgate, float *dparameters) {
    const Work work(p);
    const HeadPlace its_bonus(p, work);
    const int lanes = static_cast<int>(p.size / LANE_CHANNELS);
    const Channels scale = parameter<io>(weight, work), shift = parameter<io>(bias, work);
    Channels totals[2] = {splat(0.0f), splat(0.0f)};  // of weight, bias
    for (int64_t row = work.begin; row < work.end; ++row) {
        const int64_t place = row * p.width + work.channel;
        const Channels value = load(v + place), g = load(dout + place), its_gate = load(gate + place);
        const float factor = bonus[its_bonus.at(row)];
        const Normed normed = norm(load(y + place), lanes);
        const Channels dz = g * its_gate, dnormed = dz * scale;
        float sums[3] = {sum(dz * value), sum(dnormed), sum(dnormed * normed.at)};
        sum_over_head(sums, lanes);
        if (its_bonus.writes) dbonus[its_bonus.at(row)] = sums[0];
        work.put(dgate, place, g * (normed.at * scale + shift + value * factor));
        work.put(dv, place, dz * factor);
        work.put(dy, place, norm_backward(normed, dnormed, sums[1], sums[2], lanes));
        totals[0] = totals[0] + dz * normed.at;
        totals[1] = totals[1] + dz;
    }
    float *first = dparameters + static_cast<int64_t>(blockIdx.x) * 2 * p.width;
    float *to[2] = {first, first + p.width};
    add_over_warps(to, totals, p.width);
}

// body(element of io, whether values are mixed), where there are kernels for the shape.
template <typename Body>
int32_t with_values(const rwkv_rows &p, const rwkv_prepare_inputs &x, const Body &body) {
    return with_heads(p, [&](auto element) {
        return x.v_first ? body(element, std::true_type()) : body(element, std::false_type());
    });
}

}  // namespace
}  // namespace rwkv

using namespace rwkv;

int32_t rwkv_prepare_forward(const rwkv_rows *shape, const rwkv_prepare_inputs *inputs,
                             const rwkv_prepare_outputs *outputs) {
    return with_values(*shape, *inputs, [&](auto element, auto mixes) {
        return launch_rows(prepare_forward<decltype(element), mixes>, 0, *shape, *inputs, *outputs);
    });
}

int32_t rwkv_prepare_backward(const rwkv_rows *shape, const rwkv_prepare_inputs *inputs,
                              const rwkv_prepare_doutputs *doutputs, const rwkv_prepare_dinputs *dinputs) {
    return with_values(*shape, *inputs, [&](auto element, auto mixes) {
        return launch_rows(prepare_backward<decltype(element), mixes>, bytes_of_backward(mixes ? 5 : 4), *shape,
                           *inputs, *doutputs, *dinputs);
    });
}

int32_t rwkv_read_forward(const rwkv_rows *shape, const void *y, const void *v, const float *bonus, const void *gate,
                          const float *weight, const float *bias, void *to) {
    return with_heads(*shape, [&](auto element) {
        using io = decltype(element);
        return launch_rows(read_forward<io>, 0, *shape, in<io>(y), in<io>(v), bonus, in<io>(gate), weight, bias,
                           out<io>(to));
    });
}

int32_t rwkv_read_backward(const rwkv_rows *shape, const void *y, const void *v, const float *bonus, const void *gate,
                           const float *weight, const float *bias, const void *dout, void *dy, void *dv, float *dbonus,
                           void *dgate, float *dparameters) {
    return with_heads(*shape, [&](auto element) {
        using io = decltype(element);
        return launch_rows(read_backward<io>, bytes_of_sums(2), *shape, in<io>(y), in<io>(v), bonus, in<io>(gate), weight,
                           bias, in<io>(dout), out<io>(dy), out<io>(dv), dbonus, out<io>(dgate), dparameters);
    });
}
