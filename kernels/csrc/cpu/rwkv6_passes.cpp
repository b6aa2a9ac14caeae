// The passes that RWKV-5 and 6 have alone, of one instruction set: mixes from the data, the channel mix's gate, the reading.
#include "fused.hpp"
#include "rows.hpp"

namespace RWKV_TARGET {
namespace {

constexpr int MIXES = RWKV_MIXES_OF_DATA;

void shift_blend_forward(const rwkv_rows &p, int64_t block, const void *x, const void *const *mixes,
                         const float *constants, void *const *outputs) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        const Range rows = rows_of(p, block);
        for (int64_t row = rows.begin; row < rows.end; ++row) {
            const bool first = is_first(p, row);
            for (int64_t c = 0; c < p.width; c += LANES) {
                const int64_t place = row * p.width + c;
                const vec now = load_io(in<io>(x, place));
                const vec before = first ? vec{} : load_io(in<io>(x, place - p.width));
                for (int m = 0; m < MIXES; ++m) {
                    const vec mix = load_io(in<io>(mixes[m], place)) + load(constants + m * p.width + c);
                    store_io(out<io>(outputs[m], place), now + (before - now) * mix);
                }
            }
        }
    });
}

// dx_t = sum of g_t (1 - mix_t) + g_{t+1} mix_{t+1}
void shift_blend_backward(const rwkv_rows &p, int64_t block, const void *x, const void *const *mixes,
                          const float *constants, const void *const *doutputs, void *dx, void *const *dmixes,
                          float *dconstants) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        const Range rows = rows_of(p, block);
        float *sums = dconstants + block * MIXES * p.width;
        for (int64_t c = 0; c < p.width; c += LANES) {
            vec constant[MIXES], total[MIXES];
            for (int m = 0; m < MIXES; ++m) {
                constant[m] = load(constants + m * p.width + c);
                total[m] = vec{};
            }
            vec later = {};  // sum of g mix of the row after this one, where it is of the same document
            if (rows.end < p.rows && !is_first(p, rows.end)) {
                const int64_t place = rows.end * p.width + c;
                for (int m = 0; m < MIXES; ++m) {
                    later += load_io(in<io>(doutputs[m], place)) * (load_io(in<io>(mixes[m], place)) + constant[m]);
                }
            }
            for (int64_t row = rows.end - 1; row >= rows.begin; --row) {
                const int64_t place = row * p.width + c;
                const vec now = load_io(in<io>(x, place));
                const bool first = is_first(p, row);
                const vec difference = (first ? vec{} : load_io(in<io>(x, place - p.width))) - now;
                vec whole = {}, mixed = {};
                for (int m = 0; m < MIXES; ++m) {
                    const vec g = load_io(in<io>(doutputs[m], place)), dmix = g * difference;
                    whole += g;
                    mixed += g * (load_io(in<io>(mixes[m], place)) + constant[m]);
                    total[m] += dmix;
                    store_io(out<io>(dmixes[m], place), dmix);
                }
                store_io(out<io>(dx, place), whole - mixed + later);
                later = first ? vec{} : mixed;
            }
            for (int m = 0; m < MIXES; ++m) store(sums + m * p.width + c, total[m]);
        }
    });
}

void sigmoid_gate_forward(const rwkv_rows &p, int64_t block, const void *gate, const void *value, void *y) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        const Range rows = rows_of(p, block);
        for (int64_t place = rows.begin * p.width; place < rows.end * p.width; place += LANES) {
            store_io(out<io>(y, place), sigmoid(load_io(in<io>(gate, place))) * load_io(in<io>(value, place)));
        }
    });
}

void sigmoid_gate_backward(const rwkv_rows &p, int64_t block, const void *gate, const void *value, const void *dy,
                           void *dgate, void *dvalue) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        const Range rows = rows_of(p, block);
        for (int64_t place = rows.begin * p.width; place < rows.end * p.width; place += LANES) {
            const vec open = sigmoid(load_io(in<io>(gate, place))), through = load_io(in<io>(dy, place)) * open;
            store_io(out<io>(dgate, place), through * (1.0f - open) * load_io(in<io>(value, place)));
            store_io(out<io>(dvalue, place), through);
        }
    });
}

void gated_norm_forward(const rwkv_rows &p, int64_t block, const void *y, const void *gate, const float *weight,
                        const float *bias, void *to) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        const Range rows = rows_of(p, block);
        for (int64_t head = rows.begin * p.width; head < rows.end * p.width; head += p.size) {
            const int64_t channel = head % p.width;
            const Moments of_head = moments(in<io>(y, head), p.size);
            for (int64_t c = 0; c < p.size; c += LANES) {
                const vec normed = (load_io(in<io>(y, head + c)) - of_head.mean) * of_head.rstd;
                const vec z = normed * load(weight + channel + c) + load(bias + channel + c);
                const vec its_gate = load_io(in<io>(gate, head + c));
                store_io(out<io>(to, head + c), z * (its_gate * sigmoid(its_gate)));
            }
        }
    });
}

void gated_norm_backward(const rwkv_rows &p, int64_t block, const void *y, const void *gate, const float *weight,
                         const float *bias, const void *dout, void *dy, void *dgate, float *dparameters) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        const Range rows = rows_of(p, block);
        float *weight_sums = dparameters + block * 2 * p.width, *bias_sums = weight_sums + p.width;
        memset(weight_sums, 0, sizeof(float) * 2 * p.width);
        for (int64_t head = rows.begin * p.width; head < rows.end * p.width; head += p.size) {
            const int64_t channel = head % p.width;
            const Moments of_head = moments(in<io>(y, head), p.size);
            vec dnormed_sum = {}, along_sum = {};
            for (int64_t c = 0; c < p.size; c += LANES) {
                const vec normed = (load_io(in<io>(y, head + c)) - of_head.mean) * of_head.rstd;
                const vec its_gate = load_io(in<io>(gate, head + c)), open = sigmoid(its_gate);
                const vec g = load_io(in<io>(dout, head + c)), scale = load(weight + channel + c);
                const vec dz = g * (its_gate * open), dnormed = dz * scale;
                const vec slope = open * (1.0f + its_gate * (1.0f - open));  // of silu
                store_io(out<io>(dgate, head + c), g * (normed * scale + load(bias + channel + c)) * slope);
                dnormed_sum += dnormed;
                along_sum += dnormed * normed;
                accumulate(weight_sums + channel + c, dz * normed);
                accumulate(bias_sums + channel + c, dz);
            }
            const float mean = sum(dnormed_sum) / p.size, along = sum(along_sum) / p.size;
            for (int64_t c = 0; c < p.size; c += LANES) {
                const vec normed = (load_io(in<io>(y, head + c)) - of_head.mean) * of_head.rstd;
                const vec its_gate = load_io(in<io>(gate, head + c));
                const vec dz = load_io(in<io>(dout, head + c)) * (its_gate * sigmoid(its_gate));
                const vec dnormed = dz * load(weight + channel + c);
                store_io(out<io>(dy, head + c), of_head.rstd * (dnormed - mean - normed * along));
            }
        }
    });
}

}  // namespace

extern const Rwkv6Passes rwkv6_passes = {
    shift_blend_forward,   shift_blend_backward, sigmoid_gate_forward,
    sigmoid_gate_backward, gated_norm_forward,   gated_norm_backward,
};

}  // namespace RWKV_TARGET
