// Token shift, key preparation and the reading of WKV's output, of one instruction set, on blocks of rows.
#include "fused.hpp"

#include "../wkv.h"
#include "vector.hpp"

namespace RWKV_TARGET {
namespace {

constexpr float NORM_EPS = 64e-5f;   // of the head norm: RWKV-LM's 1e-5 on y / 8
constexpr float KAPPA_EPS = 1e-12f;  // least length of kappa's divisor

struct Range {
    int64_t begin, end;
};

Range rows_of(const rwkv_rows &p, int64_t block) {
    const int64_t end = (block + 1) * RWKV_ROWS_IN_BLOCK;
    return {block * RWKV_ROWS_IN_BLOCK, end < p.rows ? end : p.rows};
}

// body(element of io).
template <typename Body>
void with_io(int32_t io, const Body &body) {
    if (io == RWKV_FP32) body(float());
    if (io == RWKV_BF16) body(bf16());
    if (io == RWKV_FP16) body(half());
}

template <typename io>
const io *in(const void *x, int64_t offset) {
    return static_cast<const io *>(x) + offset;
}

template <typename io>
io *out(void *x, int64_t offset) {
    return static_cast<io *>(x) + offset;
}

// Whether nothing comes before the row: it is the first of its sequence or document.
RWKV_INLINE bool is_first(const rwkv_rows &p, int64_t row) {
    return row % p.time == 0 || (p.starts && p.starts[row]);
}

RWKV_INLINE void accumulate(float *to, vec x) {
    store(to, load(to) + x);
}

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

// 1 / max(length of k k_k over a head, KAPPA_EPS)
template <typename io>
RWKV_INLINE float inverse_length(const io *k, const float *k_k, int64_t size) {
    vec squares = {};
    for (int64_t c = 0; c < size; c += LANES) {
        const vec q = load_io(k + c) * load(k_k + c);
        squares += q * q;
    }
    const float length = __builtin_sqrtf(sum(squares));
    return 1.0f / (length > KAPPA_EPS ? length : KAPPA_EPS);
}

void keys_forward(const rwkv_rows &p, int64_t block, const void *k, const void *a, const float *k_k, const float *k_a,
                  void *written, void *removed, void *replaced) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        const Range rows = rows_of(p, block);
        for (int64_t head = rows.begin * p.width; head < rows.end * p.width; head += p.size) {
            const int64_t channel = head % p.width;
            const vec inverse = splat(inverse_length(in<io>(k, head), k_k + channel, p.size));
            for (int64_t c = 0; c < p.size; c += LANES) {
                const vec key = load_io(in<io>(k, head + c)), rate = load_io(in<io>(a, head + c));
                const vec kappa = key * load(k_k + channel + c) * inverse;
                store_io(out<io>(written, head + c), key * (1.0f + (rate - 1.0f) * load(k_a + channel + c)));
                store_io(out<io>(removed, head + c), -kappa);
                store_io(out<io>(replaced, head + c), kappa * rate);
            }
        }
    });
}

void keys_backward(const rwkv_rows &p, int64_t block, const void *k, const void *a, const float *k_k,
                   const float *k_a, const void *dwritten, const void *dremoved, const void *dreplaced, void *dk,
                   void *da, float *dk_k, float *dk_a) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        const Range rows = rows_of(p, block);
        float *k_sums = dk_k + block * p.width, *a_sums = dk_a + block * p.width;
        memset(k_sums, 0, sizeof(float) * p.width);
        memset(a_sums, 0, sizeof(float) * p.width);
        for (int64_t head = rows.begin * p.width; head < rows.end * p.width; head += p.size) {
            const int64_t channel = head % p.width;
            const float inverse = inverse_length(in<io>(k, head), k_k + channel, p.size);
            const auto dkappa = [&](int64_t c, vec rate) {
                return load_io(in<io>(dreplaced, head + c)) * rate - load_io(in<io>(dremoved, head + c));
            };
            vec along = {};  // kappa . dkappa
            for (int64_t c = 0; c < p.size; c += LANES) {
                const vec kappa = load_io(in<io>(k, head + c)) * load(k_k + channel + c) * inverse;
                along += kappa * dkappa(c, load_io(in<io>(a, head + c)));
            }
            // a length below the floor counts as constant
            const vec projected = splat(inverse < 1.0f / KAPPA_EPS ? sum(along) : 0.0f);
            for (int64_t c = 0; c < p.size; c += LANES) {
                const vec key = load_io(in<io>(k, head + c)), rate = load_io(in<io>(a, head + c));
                const vec scale = load(k_k + channel + c), blend = load(k_a + channel + c);
                const vec g = load_io(in<io>(dwritten, head + c)), kappa = key * scale * inverse;
                const vec dq = (dkappa(c, rate) - kappa * projected) * inverse;
                store_io(out<io>(dk, head + c), g * (1.0f + (rate - 1.0f) * blend) + scale * dq);
                store_io(out<io>(da, head + c), g * key * blend + load_io(in<io>(dreplaced, head + c)) * kappa);
                accumulate(k_sums + channel + c, dq * key);
                accumulate(a_sums + channel + c, g * key * (rate - 1.0f));
            }
        }
    });
}

struct HeadFigures {
    float mean, rstd, bonus;
};

// Mean and 1 / deviation of y over a head, and the sum of r k r_k.
template <typename io>
RWKV_INLINE HeadFigures figures(const io *y, const io *r, const io *k, const float *r_k, int64_t size) {
    vec total = {}, bonus = {}, squares = {};
    for (int64_t c = 0; c < size; c += LANES) {
        total += load_io(y + c);
        bonus += load_io(r + c) * load_io(k + c) * load(r_k + c);
    }
    const float mean = sum(total) / size;
    for (int64_t c = 0; c < size; c += LANES) {
        const vec centred = load_io(y + c) - mean;
        squares += centred * centred;
    }
    return {mean, 1.0f / __builtin_sqrtf(sum(squares) / size + NORM_EPS), sum(bonus)};
}

void read_forward(const rwkv_rows &p, int64_t block, const void *y, const void *r, const void *k, const void *v,
                  const void *gate, const float *r_k, const float *weight, const float *bias, void *to) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        const Range rows = rows_of(p, block);
        for (int64_t head = rows.begin * p.width; head < rows.end * p.width; head += p.size) {
            const int64_t channel = head % p.width;
            const HeadFigures f = figures(in<io>(y, head), in<io>(r, head), in<io>(k, head), r_k + channel, p.size);
            for (int64_t c = 0; c < p.size; c += LANES) {
                const vec normed = (load_io(in<io>(y, head + c)) - f.mean) * f.rstd;
                const vec z = normed * load(weight + channel + c) + load(bias + channel + c) +
                              f.bonus * load_io(in<io>(v, head + c));
                store_io(out<io>(to, head + c), z * load_io(in<io>(gate, head + c)));
            }
        }
    });
}

void read_backward(const rwkv_rows &p, int64_t block, const void *y, const void *r, const void *k, const void *v,
                   const void *gate, const float *r_k, const float *weight, const float *bias, const void *dout,
                   void *dy, void *dr, void *dk, void *dv, void *dgate, float *dparameters) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        const Range rows = rows_of(p, block);
        float *r_k_sums = dparameters + block * 3 * p.width, *weight_sums = r_k_sums + p.width;
        float *bias_sums = weight_sums + p.width;
        memset(r_k_sums, 0, sizeof(float) * 3 * p.width);
        for (int64_t head = rows.begin * p.width; head < rows.end * p.width; head += p.size) {
            const int64_t channel = head % p.width;
            const HeadFigures f = figures(in<io>(y, head), in<io>(r, head), in<io>(k, head), r_k + channel, p.size);
            vec dbonus_sum = {}, dnormed_sum = {}, along_sum = {};
            for (int64_t c = 0; c < p.size; c += LANES) {
                const vec normed = (load_io(in<io>(y, head + c)) - f.mean) * f.rstd;
                const vec dz = load_io(in<io>(dout, head + c)) * load_io(in<io>(gate, head + c));
                const vec dnormed = dz * load(weight + channel + c);
                dbonus_sum += dz * load_io(in<io>(v, head + c));
                dnormed_sum += dnormed;
                along_sum += dnormed * normed;
            }
            const float dbonus = sum(dbonus_sum), mean = sum(dnormed_sum) / p.size, along = sum(along_sum) / p.size;
            for (int64_t c = 0; c < p.size; c += LANES) {
                const vec g = load_io(in<io>(dout, head + c)), its_gate = load_io(in<io>(gate, head + c));
                const vec normed = (load_io(in<io>(y, head + c)) - f.mean) * f.rstd;
                const vec value = load_io(in<io>(v, head + c)), scale = load(weight + channel + c);
                const vec read = load_io(in<io>(r, head + c)), key = load_io(in<io>(k, head + c));
                const vec its_r_k = load(r_k + channel + c), dz = g * its_gate;
                store_io(out<io>(dgate, head + c), g * (normed * scale + load(bias + channel + c) + f.bonus * value));
                store_io(out<io>(dv, head + c), dz * f.bonus);
                store_io(out<io>(dr, head + c), dbonus * key * its_r_k);
                store_io(out<io>(dk, head + c), dbonus * read * its_r_k);
                store_io(out<io>(dy, head + c), f.rstd * (dz * scale - mean - normed * along));
                accumulate(r_k_sums + channel + c, dbonus * read * key);
                accumulate(weight_sums + channel + c, dz * normed);
                accumulate(bias_sums + channel + c, dz);
            }
        }
    });
}

}  // namespace

extern const FusedOperators fused_operators = {
    mix_forward,  mix_backward,  squared_relu_forward, squared_relu_backward,
    keys_forward, keys_backward, read_forward,         read_backward,
};

}  // namespace RWKV_TARGET
