// Residual sum, layer norm, token shift and mixes on a block of rows.
#pragma once

#include <string.h>

#include "fused.hpp"
#include "rows.hpp"

namespace RWKV_TARGET {
namespace {

constexpr float LAYER_NORM_EPS = 1e-5f;

template <int N>
struct Count {
    static constexpr int value = N;
};

// body(Count<count>()), for loops over mixes whose vectors are in registers.
template <typename Body>
void with_count(int32_t count, const Body &body) {
    switch (count) {
        case 1: return body(Count<1>());
        case 2: return body(Count<2>());
        case 4: return body(Count<4>());
        case 6: return body(Count<6>());
    }
}

Range block_rows(const rwkv_rows &p, const NormMix &pass, int64_t block) {
    const int64_t begin = block * pass.rows_in_block, end = begin + pass.rows_in_block;
    return {begin, end < p.rows ? end : p.rows};
}

// Mean of a row of floats, and 1 / its deviation.
RWKV_INLINE void measure(const float *row, int64_t width, float &mean, float &rstd) {
    vec total = {}, squares = {};
    for (int64_t c = 0; c < width; c += LANES) total += load(row + c);
    mean = sum(total) / width;
    for (int64_t c = 0; c < width; c += LANES) {
        const vec centred = load(row + c) - mean;
        squares += centred * centred;
    }
    rstd = 1.0f / __builtin_sqrtf(sum(squares) / width + LAYER_NORM_EPS);
}

void norm_mix_forward(const rwkv_rows &p, const NormMix &pass, int64_t block, const void *x, const void *branch,
                      void *to, float *statistics, void *const *outputs, float *scratch) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        with_count(pass.count, [&](auto count) {
            const Range rows = block_rows(p, pass, block);
            const int64_t width = p.width;
            float *now = scratch, *before = now + width;  // a row and the one before
            for (int64_t row = rows.begin - !is_first(p, rows.begin); row < rows.end; ++row) {
                const bool is_own = row >= rows.begin;
                for (int64_t c = 0; c < width; c += LANES) {
                    const int64_t place = row * width + c;
                    vec whole = load_io(in<io>(x, place));
                    if (branch) {
                        whole = rounded(whole + load_io(in<io>(branch, place)), element);
                        if (is_own) store_io(out<io>(to, place), whole);
                    }
                    store(now + c, whole);
                }
                float mean, rstd;
                measure(now, width, mean, rstd);
                const bool first = is_first(p, row);
                for (int64_t c = 0; c < width; c += LANES) {
                    const vec h = (load(now + c) - mean) * rstd * load(pass.weight + c) + load(pass.bias + c);
                    store(now + c, h);
                    if (!is_own) continue;
                    const vec difference = (first ? vec{} : load(before + c)) - h;
                    for (int m = 0; m < count.value; ++m) {
                        const vec mix = load(pass.mixes + m * width + c);
                        store_io(out<io>(outputs[m], row * width + c), h + difference * mix);
                    }
                }
                if (is_own) {
                    statistics[row] = mean;
                    statistics[p.rows + row] = rstd;
                }
                float *const other = before;
                before = now;
                now = other;
            }
        });
    });
}

// Of h, the norm's result: dh_t = sum of g_t (1 - mix) + g_{t+1} mix. Columns first, since the sums of parameters then are
// in registers; what a norm's gradient needs of a whole row is kept for all rows of the block.
void norm_mix_backward(const rwkv_rows &p, const NormMix &pass, int64_t block, const void *whole,
                       const float *statistics, const void *dsum, const void *const *doutputs, void *dx,
                       float *dparameters, float *scratch) {
    with_io(p.io, [&](auto element) {
        using io = decltype(element);
        with_count(pass.count, [&](auto count) {
            const Range rows = block_rows(p, pass, block);
            const int64_t width = p.width;
            float *dnormed = scratch;                                      // [rows,width], dh weight
            float *totals = dnormed + pass.rows_in_block * width;          // [rows,LANES], its sum
            float *along = totals + pass.rows_in_block * RWKV_MOST_LANES;  // the same of dnormed normed
            memset(totals, 0, sizeof(float) * 2 * pass.rows_in_block * RWKV_MOST_LANES);
            float *sums = dparameters + block * (count.value + 2) * width;
            const auto normed = [&](int64_t row, int64_t c) {
                return (load_io(in<io>(whole, row * width + c)) - statistics[row]) * statistics[p.rows + row];
            };
            for (int64_t c = 0; c < width; c += LANES) {
                vec mix[count.value], total[count.value], dweight = {}, dbias = {}, later = {};
                for (int m = 0; m < count.value; ++m) {
                    mix[m] = load(pass.mixes + m * width + c);
                    total[m] = vec{};
                }
                const vec weight = load(pass.weight + c), bias = load(pass.bias + c);
                if (rows.end < p.rows && !is_first(p, rows.end)) {
                    for (int m = 0; m < count.value; ++m) {
                        later += load_io(in<io>(doutputs[m], rows.end * width + c)) * mix[m];
                    }
                }
                vec now = normed(rows.end - 1, c);
                for (int64_t row = rows.end - 1; row >= rows.begin; --row) {
                    const int64_t place = row * width + c, kept = row - rows.begin;
                    const bool first = is_first(p, row);
                    const vec earlier = row ? normed(row - 1, c) : vec{};
                    const vec difference = first ? -(now * weight + bias) : (earlier - now) * weight;
                    vec dh = later, mixed = {};
                    for (int m = 0; m < count.value; ++m) {
                        const vec g = load_io(in<io>(doutputs[m], place)), shifted = g * mix[m];
                        dh += g - shifted;
                        mixed += shifted;
                        total[m] += g * difference;
                    }
                    later = first ? vec{} : mixed;
                    dweight += dh * now;
                    dbias += dh;
                    dh *= weight;
                    store(dnormed + kept * width + c, dh);
                    accumulate(totals + kept * LANES, dh);
                    accumulate(along + kept * LANES, dh * now);
                    now = earlier;
                }
                for (int m = 0; m < count.value; ++m) store(sums + m * width + c, total[m]);
                store(sums + count.value * width + c, dweight);
                store(sums + (count.value + 1) * width + c, dbias);
            }
            for (int64_t row = rows.begin; row < rows.end; ++row) {
                const int64_t kept = row - rows.begin;
                const float mean = sum(load(totals + kept * LANES)) / width;
                const float slope = sum(load(along + kept * LANES)) / width, rstd = statistics[p.rows + row];
                for (int64_t c = 0; c < width; c += LANES) {
                    const int64_t place = row * width + c;
                    vec result = (load(dnormed + kept * width + c) - mean - normed(row, c) * slope) * rstd;
                    if (dsum) result += load_io(in<io>(dsum, place));
                    store_io(out<io>(dx, place), result);
                }
            }
        });
    });
}

}  // namespace
}  // namespace RWKV_TARGET
