// RWKV-6's mixes from the data, and the gate of its and RWKV-5's channel mix: each tensor is read and written once.
#pragma GCC visibility push(default)
#include "../fused.h"
#pragma GCC visibility pop

#include "rows.cuh"

namespace rwkv {
namespace {

constexpr int MIXES = RWKV_MIXES_OF_DATA;

// The same channels of each of the tensors. All are read before anything is written: after a store, which may be to the
// same address for all that the compiler knows, a load would wait.
template <typename io>
struct Row {
    Packed<io> of[MIXES];

    __device__ __forceinline__ Row(const Tensors<const io> &tensors, int64_t place) {
#pragma unroll
        for (int m = 0; m < MIXES; ++m) of[m] = load_packed(tensors.at[m] + place);
    }

    __device__ __forceinline__ Channels operator[](int m) const {
        return unpack(of[m]);
    }
};

template <typename io>
__global__ void __launch_bounds__(ROW_THREADS)
    shift_blend_forward(rwkv_rows p, const io *x, Tensors<const io> mixes, Tensors<const float> constants,
                        Tensors<io> outputs) {
    const Work work(p);
    if (!work.has_rows()) return;
    Channels constant[MIXES];
#pragma unroll
    for (int m = 0; m < MIXES; ++m) constant[m] = parameter<io>(constants.at[m], work);
    int64_t step = work.begin % p.time;
    Channels before = work.begin ? load(x + (work.begin - 1) * p.width + work.channel) : splat(0.0f);
    for (int64_t row = work.begin; row < work.end; ++row) {
        const int64_t place = row * p.width + work.channel;
        const Channels now = load(x + place);
        const Row<io> mix(mixes, place);
        if (is_first(p, row, step)) before = splat(0.0f);
        const Channels difference = before - now;
#pragma unroll
        for (int m = 0; m < MIXES; ++m) work.put(outputs.at[m], place, now + difference * (mix[m] + constant[m]));
        before = now;
        step = step + 1 == p.time ? 0 : step + 1;
    }
}

// dx_t = sum of g_t (1 - mix_t) + g_{t+1} mix_{t+1}
template <typename io>
__global__ void __launch_bounds__(ROW_THREADS, 2)
    shift_blend_backward(rwkv_rows p, const io *x, Tensors<const io> mixes, Tensors<const float> constants,
                         Tensors<const io> doutputs, io *dx, Tensors<io> dmixes, float *dconstants) {
    const Work work(p);
    Channels constant[MIXES], total[MIXES];
    float *to[MIXES];
#pragma unroll
    for (int m = 0; m < MIXES; ++m) {
        constant[m] = parameter<io>(constants.at[m], work);
        total[m] = splat(0.0f);
        to[m] = dconstants + (static_cast<int64_t>(blockIdx.x) * MIXES + m) * p.width;
    }
    if (work.has_rows()) {
        int64_t step = work.end % p.time;
        Channels later = splat(0.0f);  // sum of g mix of the row after this one, where it is of the same document
        if (work.end < p.rows && !is_first(p, work.end, step)) {
            const int64_t place = work.end * p.width + work.channel;
            const Row<io> mix(mixes, place), g(doutputs, place);
#pragma unroll
            for (int m = 0; m < MIXES; ++m) later = later + g[m] * (mix[m] + constant[m]);
        }
        Channels now = load(x + (work.end - 1) * p.width + work.channel);
        for (int64_t row = work.end - 1; row >= work.begin; --row) {
            const int64_t place = row * p.width + work.channel;
            step = step ? step - 1 : p.time - 1;
            const Channels earlier = row ? load(x + place - p.width) : splat(0.0f);
            const Row<io> mix(mixes, place), g(doutputs, place);
            const bool first = is_first(p, row, step);
            const Channels difference = first ? splat(0.0f) - now : earlier - now;
            Channels whole = splat(0.0f), mixed = splat(0.0f);
#pragma unroll
            for (int m = 0; m < MIXES; ++m) {
                const Channels dmix = g[m] * difference;
                whole = whole + g[m];
                mixed = mixed + g[m] * (mix[m] + constant[m]);
                total[m] = total[m] + dmix;
                work.put(dmixes.at[m], place, dmix);
            }
            work.put(dx, place, whole - mixed + later);
            later = first ? splat(0.0f) : mixed;
            now = earlier;
        }
    }
    add_over_warps(to, total, p.width);
}

template <typename io>
__global__ void __launch_bounds__(FLAT_THREADS)
    sigmoid_gate_forward(int64_t elements, const io *gate, const io *value, io *y) {
    const int64_t place = flat_place();
    if (place >= elements) return;
    store(y + place, sigmoid(load(gate + place)) * load(value + place));
}

template <typename io>
__global__ void __launch_bounds__(FLAT_THREADS)
    sigmoid_gate_backward(int64_t elements, const io *gate, const io *value, const io *dy, io *dgate, io *dvalue) {
    const int64_t place = flat_place();
    if (place >= elements) return;
    const Channels open = sigmoid(load(gate + place)), through = load(dy + place) * open;
    const Channels slope = through * (splat(1.0f) - open) * load(value + place);
    store(dgate + place, slope);
    store(dvalue + place, through);
}

}  // namespace
}  // namespace rwkv

using namespace rwkv;

int32_t rwkv_shift_blend_forward(const rwkv_rows *shape, const void *x, const void *const *mixes,
                                 const float *const *constants, void *const *outputs) {
    return with_io(*shape, [&](auto element) {
        using io = decltype(element);
        return launch_rows(shift_blend_forward<io>, 0, *shape, in<io>(x), all_in<io>(mixes, MIXES),
                           all_parameters(constants, MIXES), all_out<io>(outputs, MIXES));
    });
}

int32_t rwkv_shift_blend_backward(const rwkv_rows *shape, const void *x, const void *const *mixes,
                                  const float *const *constants, const void *const *doutputs, void *dx,
                                  void *const *dmixes, float *dconstants) {
    return with_io(*shape, [&](auto element) {
        using io = decltype(element);
        return launch_rows(shift_blend_backward<io>, bytes_of_sums(MIXES), *shape, in<io>(x),
                           all_in<io>(mixes, MIXES), all_parameters(constants, MIXES), all_in<io>(doutputs, MIXES),
                           out<io>(dx), all_out<io>(dmixes, MIXES), dconstants);
    });
}

int32_t rwkv_sigmoid_gate_forward(const rwkv_rows *shape, const void *gate, const void *value, void *y) {
    return with_io(*shape, [&](auto element) {
        using io = decltype(element);
        return launch_flat(sigmoid_gate_forward<io>, *shape, in<io>(gate), in<io>(value), out<io>(y));
    });
}

int32_t rwkv_sigmoid_gate_backward(const rwkv_rows *shape, const void *gate, const void *value, const void *dy,
                                   void *dgate, void *dvalue) {
    return with_io(*shape, [&](auto element) {
        using io = decltype(element);
        return launch_flat(sigmoid_gate_backward<io>, *shape, in<io>(gate), in<io>(value), in<io>(dy), out<io>(dgate),
                           out<io>(dvalue));
    });
}
