// One fp32 vector register of the target, and what the operators need beyond + - * / < and ?: on it.
//
//   vec, LANES               the register and its number of floats: 16 (avx512), 8 (avx2), 4 (portable)
//   splat(x)                 all lanes x; load(p), store(p, x) need no alignment
//   load_io(p), store_io(p, x)  the same from and to float, bf16 or half in memory; stores round to nearest even,
//                            keep NaN a NaN and overflow to infinity. load_some / store_some do it for `count` lanes
//   rounded(x, io())         x after a store to and a load from memory of io
//   exp(x)                   to 1 ulp or so over the whole range: 0, subnormals and infinity included
//   sigmoid(x), vabs(x), select(mask, x, y)
//   sum(x)                   of the lanes; sums(x, out): out[q] = sum(x[q]) for several vectors at once
//
// Everything is GCC's vector extensions (clang has them too), with intrinsics only where those have no word for it.
// a * b + c becomes one instruction by -ffp-contract=fast.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define RWKV_INLINE inline __attribute__((always_inline))

namespace RWKV_TARGET {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef uint16_t hvec __attribute__((vector_size(LANES * 2)));

struct bf16 {
    uint16_t bits;
};
struct half {
    uint16_t bits;
};

template <typename To, typename From>
RWKV_INLINE To bit_cast(From x) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To result;
    memcpy(&result, &x, sizeof(To));
    return result;
}

RWKV_INLINE vec splat(float x) {
    return x - vec{};
}

RWKV_INLINE vec load(const float *p) {
    vec x;
    memcpy(&x, p, sizeof(x));
    return x;
}

RWKV_INLINE void store(float *p, vec x) {
    memcpy(p, &x, sizeof(x));
}

RWKV_INLINE vec select(ivec mask, vec x, vec y) {
    return mask ? x : y;
}

RWKV_INLINE vec vabs(vec x) {
    return bit_cast<vec>(bit_cast<uvec>(x) & 0x7fffffffu);
}

RWKV_INLINE vec from_bits(hvec bits, bf16) {
    return bit_cast<vec>(__builtin_convertvector(bits, uvec) << 16);
}

RWKV_INLINE hvec to_bits(vec x, bf16) {
    const uvec bits = bit_cast<uvec>(x);
    const uvec rounded = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
    const uvec quiet = (bits >> 16) | 0x40u;
    return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, hvec);
}

#if defined(__AVX512F__)

RWKV_INLINE vec from_bits(hvec bits, half) {
    return (vec)_mm512_cvtph_ps((__m256i)bits);
}

RWKV_INLINE hvec to_bits(vec x, half) {
    return (hvec)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif defined(__AVX2__)

RWKV_INLINE vec from_bits(hvec bits, half) {
    return (vec)_mm256_cvtph_ps((__m128i)bits);
}

RWKV_INLINE hvec to_bits(vec x, half) {
    return (hvec)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#else

// Shifted into a float's place the exponent lacks 112, which a multiplication adds, to subnormals too.
RWKV_INLINE vec from_bits(hvec bits, half) {
    const uvec wide = __builtin_convertvector(bits, uvec);
    const uvec magnitude = (wide & 0x7fffu) << 13;
    const uvec scaled = bit_cast<uvec>(bit_cast<vec>(magnitude) * 0x1p112f);
    const uvec special = magnitude | 0x7f800000u;
    return bit_cast<vec>(((wide & 0x8000u) << 16) | (magnitude >= 0x7c00u << 13 ? special : scaled));
}

// Adding a power of two whose last bit is the half's last bit lets the float unit round to nearest even.
RWKV_INLINE hvec to_bits(vec x, half) {
    const uvec bits = bit_cast<uvec>(x), magnitude = bits & 0x7fffffffu;
    const vec saturated = bit_cast<vec>(magnitude) * 0x1p112f * 0x1p-110f;  // infinity from 65536 on
    uvec exponent = magnitude & 0x7f800000u;
    exponent = exponent < 0x38800000u ? uvec{} + 0x38800000u : exponent;
    const uvec rounded = bit_cast<uvec>(saturated + bit_cast<vec>(exponent + 0x07800000u));
    const uvec found = ((rounded >> 13) & 0x7c00u) + (rounded & 0x0fffu);
    const uvec sign = (bits >> 16) & 0x8000u;
    return __builtin_convertvector(sign | (magnitude > 0x7f800000u ? uvec{} + 0x7e00u : found), hvec);
}

#endif

RWKV_INLINE vec load_io(const float *p) {
    return load(p);
}

RWKV_INLINE void store_io(float *p, vec x) {
    store(p, x);
}

template <typename io>
RWKV_INLINE vec load_io(const io *p) {
    hvec bits;
    memcpy(&bits, p, sizeof(bits));
    return from_bits(bits, io{});
}

template <typename io>
RWKV_INLINE void store_io(io *p, vec x) {
    const hvec bits = to_bits(x, io{});
    memcpy(p, &bits, sizeof(bits));
}

// x as memory of io keeps it.
RWKV_INLINE vec rounded(vec x, float) {
    return x;
}

template <typename io>
RWKV_INLINE vec rounded(vec x, io) {
    return from_bits(to_bits(x, io{}), io{});
}

// The first `count` lanes, 0 < count <= LANES, from memory that ends there; the others become 0.
template <typename io>
RWKV_INLINE vec load_some(const io *p, int64_t count) {
    if (count == LANES) return load_io(p);
    io padded[LANES] = {};
    memcpy(padded, p, count * sizeof(io));
    return load_io(padded);
}

template <typename io>
RWKV_INLINE void store_some(io *p, vec x, int64_t count) {
    if (count == LANES) return store_io(p, x);
    io padded[LANES];
    store_io(padded, x);
    memcpy(p, padded, count * sizeof(io));
}

// exp(x) = 2^n exp(rest), n the integer nearest to x / ln 2, exp(rest) by Cephes' polynomial.
RWKV_INLINE vec exp(vec x) {
    const vec highest = splat(89.0f), lowest = splat(-104.0f);  // beyond: infinity, 0. NaN stays NaN
    x = select(x > highest, highest, x);
    x = select(x < lowest, lowest, x);
    const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    const vec shifted = x * 1.44269504088896341f + magic;
    const vec n = shifted - magic;
    const vec rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * (rest * rest) + rest + 1.0f;
#if defined(__AVX512F__)
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    // 2^n in two factors, since it may be out of range where the result is not.
    const ivec integer = bit_cast<ivec>(shifted) - bit_cast<ivec>(magic), low = integer >> 1;
    return p * bit_cast<vec>((low + 127) << 23) * bit_cast<vec>((integer - low + 127) << 23);
#endif
}

RWKV_INLINE vec sigmoid(vec x) {
    return 1.0f / (1.0f + exp(-x));
}

#if defined(__AVX512F__)

RWKV_INLINE __m128 sums4(vec a, vec b, vec c, vec d) {
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44),
                                    _mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xee));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4((__m512)c, (__m512)d, 0x44),
                                    _mm512_shuffle_f32x4((__m512)c, (__m512)d, 0xee));
    const __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    const __m512 pairs = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4e));
    const __m512 all = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xb1));
    return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, all));
}

#elif defined(__AVX2__)

RWKV_INLINE __m128 sums4(vec a, vec b, vec c, vec d) {
    const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
    const __m256 all = _mm256_hadd_ps(ab, cd);
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

#else

RWKV_INLINE vec sums4(vec a, vec b, vec c, vec d) {
    return vec{(a[0] + a[1]) + (a[2] + a[3]), (b[0] + b[1]) + (b[2] + b[3]), (c[0] + c[1]) + (c[2] + c[3]),
               (d[0] + d[1]) + (d[2] + d[3])};
}

#endif

RWKV_INLINE float sum(vec x) {
    return sums4(x, vec{}, vec{}, vec{})[0];
}

template <int count>
RWKV_INLINE void sums(const vec (&x)[count], float *out) {
    int q = 0;
    for (; q + 4 <= count; q += 4) {
        const auto four = sums4(x[q], x[q + 1], x[q + 2], x[q + 3]);
        memcpy(out + q, &four, sizeof(four));
    }
    for (; q < count; ++q) out[q] = sum(x[q]);
}

}  // namespace RWKV_TARGET
