// What the fused passes of one instruction set share: their rows, elements of any type, and sums beside the rows.
#pragma once

#include "../fused.h"
#include "../wkv.h"
#include "vector.hpp"

namespace RWKV_TARGET {

constexpr float NORM_EPS = 64e-5f;  // of the head norm: RWKV-LM's 1e-5 on y / 8

struct Range {
    int64_t begin, end;
};

RWKV_INLINE Range rows_of(const rwkv_rows &p, int64_t block) {
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
RWKV_INLINE const io *in(const void *x, int64_t offset) {
    return static_cast<const io *>(x) + offset;
}

template <typename io>
RWKV_INLINE io *out(void *x, int64_t offset) {
    return static_cast<io *>(x) + offset;
}

// Whether nothing comes before the row: it is the first of its sequence or document.
RWKV_INLINE bool is_first(const rwkv_rows &p, int64_t row) {
    return row % p.time == 0 || (p.starts && p.starts[row]);
}

RWKV_INLINE void accumulate(float *to, vec x) {
    store(to, load(to) + x);
}

struct Moments {
    float mean, rstd;
};

// Mean and 1 / deviation of y over a head.
template <typename io>
RWKV_INLINE Moments moments(const io *y, int64_t size) {
    vec total = {}, squares = {};
    for (int64_t c = 0; c < size; c += LANES) total += load_io(y + c);
    const float mean = sum(total) / size;
    for (int64_t c = 0; c < size; c += LANES) {
        const vec centred = load_io(y + c) - mean;
        squares += centred * centred;
    }
    return {mean, 1.0f / __builtin_sqrtf(sum(squares) / size + NORM_EPS)};
}

}  // namespace RWKV_TARGET
