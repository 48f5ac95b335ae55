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

// work(first) with the first of numbers of a dtype, by `layout.DTYPES`, as a pointer to their type
template <typename Work>
inline void with_type(const void *first, int dtype, Work work) {
    if (dtype == BFLOAT16) work(static_cast<const Bfloat *>(first));
    else if (dtype == FLOAT16) work(static_cast<const Half *>(first));
    else work(static_cast<const float *>(first));
}

}  // namespace twotower
