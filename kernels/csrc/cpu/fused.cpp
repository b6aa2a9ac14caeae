// Token shift, and RWKV-7's passes before and after WKV, of one instruction set, on blocks of rows.
#include "fused.hpp"

#include "norm_mix.hpp"
#include "rows.hpp"

namespace RWKV_TARGET {
namespace {

constexpr float KAPPA_EPS = 1e-12f;  // least length of kappa's divisor

void mix_forward(const rwkv_rows &p, int64_t block, int32_t count, const void *x, const float *mixes,
                 void *const *outputs) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        const Range rows = rows_of(p, block);
        for (int64_t row = rows.begin; row < rows.end; ++row) {
            const bool first = is_first(p, row);
            for (int64_t c = 0; c < p.width; c += LANES) {
                const int64_t place = row * p.width + c;
                const vec now = load_io(in<io>(x, place));
                const vec before = first ? vec{} : load_io(in<io>(x, place - p.width));
                for (int32_t m = 0; m < count; ++m) {
                    store_io(out<io>(outputs[m], place), now + (before - now) * load(mixes + m * p.width + c));
                }
            }
        }
    });
}

// dx_t = sum of g_t (1 - mix) + g_{t+1} mix
void mix_backward(const rwkv_rows &p, int64_t block, int32_t count, const void *x, const float *mixes,
                  const void *const *doutputs, void *dx, float *dmixes) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        const Range rows = rows_of(p, block);
        float *sums = dmixes + block * count * p.width;
        memset(sums, 0, sizeof(float) * count * p.width);
        for (int64_t c = 0; c < p.width; c += LANES) {
            vec mix[RWKV_MOST_MIXES], total[RWKV_MOST_MIXES];
            for (int32_t m = 0; m < count; ++m) {
                mix[m] = load(mixes + m * p.width + c);
                total[m] = vec{};
            }
            vec later = {};  // sum of g mix of the row after this one, where it is of the same document
            if (rows.end < p.rows && !is_first(p, rows.end)) {
                for (int32_t m = 0; m < count; ++m) {
                    later += load_io(in<io>(doutputs[m], rows.end * p.width + c)) * mix[m];
                }
            }
            for (int64_t row = rows.end - 1; row >= rows.begin; --row) {
                const int64_t place = row * p.width + c;
                const vec now = load_io(in<io>(x, place));
                const bool first = is_first(p, row);
                const vec before = first ? vec{} : load_io(in<io>(x, place - p.width));
                vec whole = {}, mixed = {};
                for (int32_t m = 0; m < count; ++m) {
                    const vec g = load_io(in<io>(doutputs[m], place));
                    whole += g;
                    mixed += g * mix[m];
                    total[m] += g * (before - now);
                }
                store_io(out<io>(dx, place), whole - mixed + later);
                later = first ? vec{} : mixed;
            }
            for (int32_t m = 0; m < count; ++m) store(sums + m * p.width + c, total[m]);
        }
    });
}

void round_parameter(const rwkv_rows &p, const float *from, float *to) {
    with_io(p.io, [&](auto element) {
        for (int64_t c = 0; c < p.width; c += LANES) store(to + c, from ? rounded(load(from + c), element) : vec{});
    });
}

RWKV_INLINE vec relu(vec x) {
    return select(x < vec{}, vec{}, x);  // NaN stays NaN
}

void squared_relu_forward(const rwkv_rows &p, int64_t block, const void *x, void *y) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        const Range rows = rows_of(p, block);
        for (int64_t place = rows.begin * p.width; place < rows.end * p.width; place += LANES) {
            const vec positive = relu(load_io(in<io>(x, place)));
            store_io(out<io>(y, place), positive * positive);
        }
    });
}

void squared_relu_backward(const rwkv_rows &p, int64_t block, const void *x, const void *dy, void *dx) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        const Range rows = rows_of(p, block);
        for (int64_t place = rows.begin * p.width; place < rows.end * p.width; place += LANES) {
            const vec positive = relu(load_io(in<io>(x, place)));
            store_io(out<io>(dx, place), 2.0f * positive * load_io(in<io>(dy, place)));
        }
    });
}

// 1 / max(length, KAPPA_EPS) of a vector with this sum of squares.
RWKV_INLINE float inverse_length(float squares) {
    const float length = __builtin_sqrtf(squares);
    return 1.0f / (length < KAPPA_EPS ? KAPPA_EPS : length);  // NaN stays NaN
}

void prepare_forward(const rwkv_rows &p, int64_t block, const rwkv_prepare_inputs &x, const rwkv_prepare_outputs &to) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        const Range rows = rows_of(p, block);
        for (int64_t head = rows.begin * p.width; head < rows.end * p.width; head += p.size) {
            const int64_t channel = head % p.width;
            vec squares = {}, bonus = {};
            for (int64_t c = 0; c < p.size; c += LANES) {
                const vec q = load_io(in<io>(x.k, head + c)) * load(x.k_k + channel + c);
                squares += q * q;
            }
            const float inverse = inverse_length(sum(squares));
            for (int64_t c = 0; c < p.size; c += LANES) {
                const vec key = load_io(in<io>(x.k, head + c));
                const vec rate = sigmoid(load_io(in<io>(x.a, head + c)) + load(x.a0 + channel + c));
                const vec kappa = key * load(x.k_k + channel + c) * inverse;
                const vec written = key * (1.0f + (rate - 1.0f) * load(x.k_a + channel + c));
                store_io(out<io>(to.written, head + c), written);
                store_io(out<io>(to.removed, head + c), -kappa);
                store_io(out<io>(to.replaced, head + c), kappa * rate);
                bonus += load_io(in<io>(x.r, head + c)) * rounded(written, element) * load(x.r_k + channel + c);
            }
            to.bonus[head / p.size] = sum(bonus);
            if (!x.v_first) continue;
            for (int64_t c = 0; c < p.size; c += LANES) {
                const vec value = load_io(in<io>(x.v, head + c));
                const vec share = sigmoid(load_io(in<io>(x.v_mix, head + c)) + load(x.v0 + channel + c));
                store_io(out<io>(to.mixed, head + c), value + (load_io(in<io>(x.v_first, head + c)) - value) * share);
            }
        }
    });
}

// Of v, v_first, v_mix and v0.
template <typename io>
RWKV_INLINE void values_backward(const rwkv_rows &p, int64_t place, const rwkv_prepare_inputs &x,
                                 const rwkv_prepare_doutputs &g, const rwkv_prepare_dinputs &to, float *v0_sums) {
    vec dvalue = load_io(in<io>(g.mixed, place)) + load_io(in<io>(g.mixed_again, place));
    const vec later = g.v_first ? load_io(in<io>(g.v_first, place)) : vec{};
    if (!x.v_first) return store_io(out<io>(to.v, place), dvalue + later);
    const vec share = sigmoid(load_io(in<io>(x.v_mix, place)) + load(x.v0 + place % p.width)), rest = 1.0f - share;
    const vec of_first = dvalue * share;
    const vec dmix = of_first * rest * (load_io(in<io>(x.v_first, place)) - load_io(in<io>(x.v, place)));
    store_io(out<io>(to.v, place), dvalue * rest);
    store_io(out<io>(to.v_first, place), of_first + later);
    store_io(out<io>(to.v_mix, place), dmix);
    accumulate(v0_sums, dmix);
}

void prepare_backward(const rwkv_rows &p, int64_t block, const rwkv_prepare_inputs &x, const rwkv_prepare_doutputs &g,
                      const rwkv_prepare_dinputs &to) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        const Range rows = rows_of(p, block);
        const int64_t count = x.v_first ? 5 : 4;
        float *sums = to.parameters + block * count * p.width;
        memset(sums, 0, sizeof(float) * count * p.width);
        for (int64_t head = rows.begin * p.width; head < rows.end * p.width; head += p.size) {
            const int64_t channel = head % p.width;
            const float *k_k = x.k_k + channel, *k_a = x.k_a + channel, *r_k = x.r_k + channel, *a0 = x.a0 + channel;
            float *k_k_sums = sums + channel, *k_a_sums = k_k_sums + p.width, *r_k_sums = k_a_sums + p.width;
            float *a0_sums = r_k_sums + p.width, *v0_sums = a0_sums + p.width;
            const auto rate_at = [&](int64_t c) { return sigmoid(load_io(in<io>(x.a, head + c)) + load(a0 + c)); };
            const auto dkappa = [&](int64_t c, vec rate) {
                return load_io(in<io>(g.replaced, head + c)) * rate - load_io(in<io>(g.removed, head + c));
            };
            vec squares = {}, along = {};  // of q = k k_k: q . q and q . dkappa
            for (int64_t c = 0; c < p.size; c += LANES) {
                const vec q = load_io(in<io>(x.k, head + c)) * load(k_k + c);
                squares += q * q;
                along += q * dkappa(c, rate_at(c));
            }
            const float inverse = inverse_length(sum(squares)), dbonus = g.bonus[head / p.size];
            // a length below the floor counts as constant
            const vec projected = splat(inverse < 1.0f / KAPPA_EPS ? sum(along) * inverse : 0.0f);
            for (int64_t c = 0; c < p.size; c += LANES) {
                const int64_t place = head + c;
                const vec key = load_io(in<io>(x.k, place)), read = load_io(in<io>(x.r, place));
                const vec rate = rate_at(c), rest = rate - 1.0f, blend = 1.0f + rest * load(k_a + c);
                const vec written = rounded(key * blend, element), scale = load(k_k + c);
                const vec kappa = key * scale * inverse, of_bonus = dbonus * load(r_k + c);
                const vec dwritten = load_io(in<io>(g.written, place)) + of_bonus * read;
                const vec dq = (dkappa(c, rate) - kappa * projected) * inverse;
                const vec drate = dwritten * key * load(k_a + c) + load_io(in<io>(g.replaced, place)) * kappa;
                const vec da = drate * rate * -rest;
                store_io(out<io>(to.r, place), load_io(in<io>(g.r, place)) + of_bonus * written);
                store_io(out<io>(to.k, place), dwritten * blend + scale * dq);
                store_io(out<io>(to.a, place), da);
                accumulate(k_k_sums + c, dq * key);
                accumulate(k_a_sums + c, dwritten * key * rest);
                accumulate(r_k_sums + c, dbonus * read * written);
                accumulate(a0_sums + c, da);
                values_backward<io>(p, place, x, g, to, v0_sums + c);
            }
        }
    });
}

void read_forward(const rwkv_rows &p, int64_t block, const void *y, const void *v, const float *bonus, const void *gate,
                  const float *weight, const float *bias, void *to) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        const Range rows = rows_of(p, block);
        for (int64_t head = rows.begin * p.width; head < rows.end * p.width; head += p.size) {
            const int64_t channel = head % p.width;
            const Moments m = moments(in<io>(y, head), p.size);
            const float its_bonus = bonus[head / p.size];
            for (int64_t c = 0; c < p.size; c += LANES) {
                const vec normed = (load_io(in<io>(y, head + c)) - m.mean) * m.rstd;
                const vec z = normed * load(weight + channel + c) + load(bias + channel + c) +
                              its_bonus * load_io(in<io>(v, head + c));
                store_io(out<io>(to, head + c), z * load_io(in<io>(gate, head + c)));
            }
        }
    });
}

void read_backward(const rwkv_rows &p, int64_t block, const void *y, const void *v, const float *bonus,
                   const void *gate, const float *weight, const float *bias, const void *dout, void *dy, void *dv,
                   float *dbonus, void *dgate, float *dparameters) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        const Range rows = rows_of(p, block);
        float *weight_sums = dparameters + block * 2 * p.width, *bias_sums = weight_sums + p.width;
        memset(weight_sums, 0, sizeof(float) * 2 * p.width);
        for (int64_t head = rows.begin * p.width; head < rows.end * p.width; head += p.size) {
            const int64_t channel = head % p.width;
            const Moments m = moments(in<io>(y, head), p.size);
            const float its_bonus = bonus[head / p.size];
            vec dbonus_sum = {}, dnormed_sum = {}, along_sum = {};
            for (int64_t c = 0; c < p.size; c += LANES) {
                const vec normed = (load_io(in<io>(y, head + c)) - m.mean) * m.rstd;
                const vec dz = load_io(in<io>(dout, head + c)) * load_io(in<io>(gate, head + c));
                const vec dnormed = dz * load(weight + channel + c);
                dbonus_sum += dz * load_io(in<io>(v, head + c));
                dnormed_sum += dnormed;
                along_sum += dnormed * normed;
            }
            dbonus[head / p.size] = sum(dbonus_sum);
            const float mean = sum(dnormed_sum) / p.size, along = sum(along_sum) / p.size;
            for (int64_t c = 0; c < p.size; c += LANES) {
                const vec g = load_io(in<io>(dout, head + c)), dz = g * load_io(in<io>(gate, head + c));
                const vec normed = (load_io(in<io>(y, head + c)) - m.mean) * m.rstd;
                const vec value = load_io(in<io>(v, head + c)), scale = load(weight + channel + c);
                store_io(out<io>(dgate, head + c), g * (normed * scale + load(bias + channel + c) + its_bonus * value));
                store_io(out<io>(dv, head + c), dz * its_bonus);
                store_io(out<io>(dy, head + c), m.rstd * (dz * scale - mean - normed * along));
                accumulate(weight_sums + channel + c, dz * normed);
                accumulate(bias_sums + channel + c, dz);
            }
        }
    });
}

}  // namespace

extern const FusedOperators fused_operators = {
    mix_forward,     mix_backward,     squared_relu_forward, squared_relu_backward,
    prepare_forward, prepare_backward, read_forward,         read_backward,
    norm_mix_forward, norm_mix_backward, round_parameter,
};

}  // namespace RWKV_TARGET
