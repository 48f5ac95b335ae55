// Vectors of V numbers, and the instructions that products are made of.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__FMA__) && !defined(TWOTOWER_PLAIN)
#define TWOTOWER_FMA
#include <immintrin.h>
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define TWOTOWER_VNNI
#endif
#endif

namespace twotower {

template <int V>
struct Vectors {
    typedef float Floats __attribute__((vector_size(V * 4), aligned(4), may_alias));
    typedef int32_t Ints __attribute__((vector_size(V * 4), aligned(4), may_alias));
    typedef uint8_t Bytes __attribute__((vector_size(V), aligned(1), may_alias));
};
template <int V>
using Floats = typename Vectors<V>::Floats;
template <int V>
using Ints = typename Vectors<V>::Ints;
template <int V>
using Bytes = typename Vectors<V>::Bytes;

template <int V>
inline Floats<V> &floats(float *x) { return *reinterpret_cast<Floats<V> *>(x); }
template <int V>
inline const Floats<V> &floats(const float *x) { return *reinterpret_cast<const Floats<V> *>(x); }
template <int V>
inline Ints<V> ints(const void *x) { return *static_cast<const Ints<V> *>(x); }

// sum + one * two, rounded once where the processor does that as fast. The compiler may not choose
// (-ffp-contract=off): it would fuse one width of a tile and not another, and a token's numbers would
// depend on how many are beside it.
inline float add_product(float sum, float one, float two) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__riscv_flen)
    return std::fma(one, two, sum);
#else
    return sum + one * two;
#endif
}

template <int V>
inline Floats<V> add_product(Floats<V> sum, Floats<V> one, Floats<V> two) {
#ifdef TWOTOWER_FMA
    if constexpr (V == 4) return Floats<V>(_mm_fmadd_ps(__m128(one), __m128(two), __m128(sum)));
    else if constexpr (V == 8) return Floats<V>(_mm256_fmadd_ps(__m256(one), __m256(two), __m256(sum)));
#ifdef __AVX512F__
    else if constexpr (V == 16) return Floats<V>(_mm512_fmadd_ps(__m512(one), __m512(two), __m512(sum)));
#endif
    else
#endif
    {
        for (int l = 0; l < V; l++) sum[l] = add_product(sum[l], one[l], two[l]);
        return sum;
    }
}

template <int V>
inline Floats<V> add_product(Floats<V> sum, Floats<V> one, float two) {
    return add_product<V>(sum, one, Floats<V>{} + two);
}

// The first halves of two vectors, or the second ones, number by number in turns.
template <int Half>
inline Floats<16> interleaved(Floats<16> one, Floats<16> two) {
    constexpr int H = 8 * Half;
#ifdef __clang__
    return __builtin_shufflevector(one, two, H, H + 16, H + 1, H + 17, H + 2, H + 18, H + 3, H + 19, H + 4, H + 20,
                                   H + 5, H + 21, H + 6, H + 22, H + 7, H + 23);
#else
    return __builtin_shuffle(one, two, Ints<16>{H, H + 16, H + 1, H + 17, H + 2, H + 18, H + 3, H + 19, H + 4, H + 20,
                                                H + 5, H + 21, H + 6, H + 22, H + 7, H + 23});
#endif
}

// N vectors of 16 numbers, [N][16], as [16][N]: each round brings the numbers of the second half of the
// vectors between those of the first.
template <int N>
inline void transpose(Floats<16> *x) {
    for (int round = 1; round < N; round *= 2) {
        Floats<16> turned[N];
        for (int i = 0; i < N / 2; i++) {
            turned[2 * i] = interleaved<0>(x[i], x[i + N / 2]);
            turned[2 * i + 1] = interleaved<1>(x[i], x[i + N / 2]);
        }
        std::memcpy(x, turned, sizeof turned);
    }
}

// sum + the products of the four unsigned bytes of each number with the four signed ones.
template <int V>
inline Ints<V> add_quads(Ints<V> sum, Ints<V> unsigned_bytes, Ints<V> signed_bytes) {
#ifdef TWOTOWER_VNNI
    if constexpr (V == 16)
        return Ints<V>(_mm512_dpbusd_epi32(__m512i(sum), __m512i(unsigned_bytes), __m512i(signed_bytes)));
    else if constexpr (V == 8)
        return Ints<V>(_mm256_dpbusd_epi32(__m256i(sum), __m256i(unsigned_bytes), __m256i(signed_bytes)));
    else
#endif
    {
        uint8_t one[V * 4];
        int8_t two[V * 4];
        std::memcpy(one, &unsigned_bytes, sizeof one), std::memcpy(two, &signed_bytes, sizeof two);
        for (int l = 0; l < V; l++)
            for (int j = 0; j < 4; j++) sum[l] += int(one[l * 4 + j]) * two[l * 4 + j];
        return sum;
    }
}

// A half-precision number (GGUF's scales) of any size, exactly.
inline float from_half(uint16_t half) {
    uint32_t magnitude = uint32_t(half & 0x7fff) << 13, bits;
    float value;
    if ((half & 0x7c00) == 0x7c00) {
        bits = magnitude | 0x7f800000u;  // infinite or NaN
        std::memcpy(&value, &bits, 4);
    } else {
        std::memcpy(&value, &magnitude, 4);
        value *= 0x1p112f;  // the exponent's other bias; subnormal halves become normal
    }
    return half & 0x8000 ? -value : value;
}

inline Floats<16> from_halves(const uint8_t *halves) {
#ifdef TWOTOWER_VNNI
    return Floats<16>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(halves))));
#else
    Floats<16> found;
    uint16_t own[16];
    std::memcpy(own, halves, sizeof own);
    for (int i = 0; i < 16; i++) found[i] = from_half(own[i]);
    return found;
#endif
}

// bfloat16 numbers: the upper halves of float32
inline Floats<16> from_bfloats(const uint8_t *upper) {
    typedef uint16_t Halves __attribute__((vector_size(32), aligned(1), may_alias));
    Ints<16> bits = __builtin_convertvector(*reinterpret_cast<const Halves *>(upper), Ints<16>) << 16;
    Floats<16> found;
    std::memcpy(&found, &bits, sizeof found);
    return found;
}

}  // namespace twotower
