// Numbers as files have them: float32, bfloat16 and float16. Widened to float32 none loses a bit, so a product of
// weights in half precision is that of the same weights in float32.
#pragma once

#include "layout.h"
#include "vectors.h"

namespace twotower {

struct Half { uint16_t bits; };
struct Bfloat { uint16_t bits; };  // the upper half of a float32

inline float widened(float x) { return x; }

inline float widened(Bfloat x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float widened(Half x) {
    uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, bits;
    float value;
    if ((x.bits & 0x7c00) == 0x7c00) {
        bits = magnitude | 0x7f800000u;  // infinite or NaN
        std::memcpy(&value, &bits, 4);
    } else {
        std::memcpy(&value, &magnitude, 4);
        value *= 0x1p112f;  // the exponent's other bias; subnormal halves become normal
    }
    return x.bits & 0x8000 ? -value : value;
}

// V of them
template <int V>
inline Floats<V> widened(const float *x) { return floats<V>(x); }

template <int V>
inline Floats<V> widened(const Bfloat *x) {
#ifdef TWOTOWER_AVX512
    if constexpr (V == 16) {
        __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(x)));
        return Floats<V>(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
    }
#elif defined(TWOTOWER_AVX2)
    if constexpr (V == 8) {
        __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x)));
        return Floats<V>(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
    }
#endif
    typedef uint16_t Bits __attribute__((vector_size(V * 2), aligned(2), may_alias));
    Ints<V> bits = __builtin_convertvector(*reinterpret_cast<const Bits *>(x), Ints<V>) << 16;
    Floats<V> found;
    std::memcpy(&found, &bits, sizeof found);
    return found;
}

template <int V>
inline Floats<V> widened(const Half *x) {
#ifdef TWOTOWER_AVX512
    if constexpr (V == 16) return Floats<V>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(x))));
#elif defined(TWOTOWER_AVX2)
    if constexpr (V == 8) return Floats<V>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x))));
#endif
    Floats<V> found;
    for (int i = 0; i < V; i++) found[i] = widened(x[i]);
    return found;
}

template <typename T>
inline void widen(const T *x, long count, float *y) {
    long i = 0;
    for (; i + VECTOR <= count; i += VECTOR) floats<VECTOR>(y + i) = widened<VECTOR>(x + i);
    for (; i < count; i++) y[i] = widened(x[i]);
}

// Rounded to the nearest, ties to even. What is too large for the type becomes its largest number, so that no key or
// value is infinite; NaN stays NaN.
inline void round_to(float x, Bfloat &y) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t magnitude = std::min((bits & 0x7fffffff) + 0x7fff + (bits >> 16 & 1), 0x7f7fffffu) >> 16;
    y.bits = x == x ? magnitude | (bits >> 16 & 0x8000) : 0x7fc0;
}

inline void round_to(float x, Half &y) {
    float magnitude = std::min(std::abs(x), 65504.0f), shifted = magnitude + 0.5f;
    uint32_t bits, sign;
    std::memcpy(&sign, &x, 4), std::memcpy(&bits, &magnitude, 4);
    if (magnitude < 0x1p-14f) std::memcpy(&bits, &shifted, 4), bits -= 0x3f000000;  // the last bit of 0.5 is theirs
    else bits = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    y.bits = x == x ? bits | (sign >> 16 & 0x8000) : 0x7e00;
}

// `count` of them
template <typename T>
inline void round_all(const float *x, long count, T *y) {
    long i = 0;
#ifdef TWOTOWER_AVX2
    if constexpr (std::is_same_v<T, Half>)
        for (; i + 8 <= count; i += 8) {
            Floats<8> most = Floats<8>{} + 65504.0f, own = floats<8>(x + i);
            own = own > most ? most : own;
            own = own < -most ? -most : own;
            _mm_storeu_si128(reinterpret_cast<__m128i *>(y + i), _mm256_cvtps_ph(__m256(own), 0));
        }
#endif
    for (; i < count; i++) round_to(x[i], y[i]);
}

template <typename Pointer>
using Pointed = std::remove_const_t<std::remove_pointer_t<Pointer>>;

// work(first) with the first of numbers of a dtype, by `layout.DTYPES`, as a pointer to their type
template <typename Work>
inline void with_type(const void *first, int dtype, Work work) {
    if (dtype == BFLOAT16) work(static_cast<const Bfloat *>(first));
    else if (dtype == FLOAT16) work(static_cast<const Half *>(first));
    else work(static_cast<const float *>(first));
}

}  // namespace twotower
