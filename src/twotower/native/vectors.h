// Vectors of V numbers, and the instructions that products are made of.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(TWOTOWER_PLAIN)
#define TWOTOWER_AVX2
#include <immintrin.h>
#if defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define TWOTOWER_AVX512
#endif
#elif defined(__ARM_FEATURE_DOTPROD) && !defined(TWOTOWER_PLAIN)
#define TWOTOWER_DOTPROD
#include <arm_neon.h>
#endif

namespace twotower {

constexpr float LEAST = std::numeric_limits<float>::lowest();

template <int V>
struct Vectors {
    typedef float Floats __attribute__((vector_size(V * 4), aligned(4), may_alias));
    typedef int32_t Ints __attribute__((vector_size(V * 4), aligned(4), may_alias));
    typedef double Doubles __attribute__((vector_size(V * 8), aligned(8), may_alias));
    typedef uint8_t Bytes __attribute__((vector_size(V), aligned(1), may_alias));
};
template <int V>
using Floats = typename Vectors<V>::Floats;
template <int V>
using Ints = typename Vectors<V>::Ints;
template <int V>
using Doubles = typename Vectors<V>::Doubles;
template <int V>
using Bytes = typename Vectors<V>::Bytes;

template <int V>
inline Floats<V> &floats(float *x) { return *reinterpret_cast<Floats<V> *>(x); }
template <int V>
inline const Floats<V> &floats(const float *x) { return *reinterpret_cast<const Floats<V> *>(x); }
template <int V>
inline Ints<V> ints(const void *x) { return *static_cast<const Ints<V> *>(x); }

// What a register holds, and how many sums are under way where each has a register.
#ifdef TWOTOWER_AVX512
constexpr int VECTOR = 16, SUMS = 16;
#elif defined(TWOTOWER_AVX2)
constexpr int VECTOR = 8, SUMS = 8;
#else
constexpr int VECTOR = 4, SUMS = 16;
#endif

// sum + one * two, rounded once where the processor does that as fast. The compiler may not choose
// (-ffp-contract=off): it would fuse one width of a tile and not another, and a token's numbers in int8 and
// int4 would depend on how many are beside it.
inline float add_product(float sum, float one, float two) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__riscv_flen)
    return std::fma(one, two, sum);
#else
    return sum + one * two;
#endif
}

template <int V>
inline Floats<V> add_product(Floats<V> sum, Floats<V> one, Floats<V> two) {
#ifdef TWOTOWER_AVX2
    if constexpr (V == 4) return Floats<V>(_mm_fmadd_ps(__m128(one), __m128(two), __m128(sum)));
    else if constexpr (V == 8) return Floats<V>(_mm256_fmadd_ps(__m256(one), __m256(two), __m256(sum)));
#ifdef TWOTOWER_AVX512
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
template <int HALF, int V>
inline Floats<V> interleaved(Floats<V> one, Floats<V> two) {
    constexpr int H = V / 2 * HALF;
#ifdef __clang__
#define TWOTOWER_SHUFFLE(...) __builtin_shufflevector(one, two, __VA_ARGS__)
#else
#define TWOTOWER_SHUFFLE(...) __builtin_shuffle(one, two, Ints<V>{__VA_ARGS__})
#endif
    if constexpr (V == 4) return TWOTOWER_SHUFFLE(H, H + 4, H + 1, H + 5);
    else if constexpr (V == 8) return TWOTOWER_SHUFFLE(H, H + 8, H + 1, H + 9, H + 2, H + 10, H + 3, H + 11);
    else
        return TWOTOWER_SHUFFLE(H, H + 16, H + 1, H + 17, H + 2, H + 18, H + 3, H + 19, H + 4, H + 20, H + 5, H + 21,
                                H + 6, H + 22, H + 7, H + 23);
#undef TWOTOWER_SHUFFLE
}

// [N][V] numbers as [V][N], those of N vectors: each round brings the numbers of the second half of the
// vectors between those of the first.
template <int N, int V>
inline void transpose(Floats<V> *x) {
    for (int round = 1; round < N; round *= 2) {
        Floats<V> turned[N];
        for (int i = 0; i < N / 2; i++) {
            turned[2 * i] = interleaved<0, V>(x[i], x[i + N / 2]);
            turned[2 * i + 1] = interleaved<1, V>(x[i], x[i + N / 2]);
        }
        std::memcpy(x, turned, sizeof turned);
    }
}

// x[N][M], `from` floats apart, as y[M][N], `to` floats apart; N: 1, 4, 8, or 16, below VECTOR with `to` = N.
template <int N, int M = 16>
inline void turn(const float *x, long from, float *y, long to) {
    constexpr int V = VECTOR, R = std::min(N, V);  // of a piece, numbers and rows
    for (int i = 0; i < N; i += R)
        for (int j = 0; j < M; j += V) {
            Floats<V> part[R];
            for (int n = 0; n < R; n++) part[n] = floats<V>(x + (i + n) * from + j);
            transpose<R, V>(part);
            if constexpr (R < V) std::memcpy(y + j * N, part, sizeof part);
            else for (int n = 0; n < V; n++) floats<V>(y + (j + n) * to + i) = part[n];
        }
}

// The bytes of an int8 matrix are its numbers plus 128. Processors that multiply unsigned bytes by signed
// ones take them so, and sums are corrected afterwards; for others `add_quads` subtracts this first.
#if defined(TWOTOWER_AVX512) || (defined(TWOTOWER_AVX2) && defined(__AVXVNNI__))
constexpr int TAKEN_OFF = 0;
#else
constexpr int TAKEN_OFF = 128;
#endif

// sum + the products of the four weights of each number with the four signed bytes. Weights: unsigned
// bytes up to MOST; those of 255, of an int8 matrix, less TAKEN_OFF.
template <int V, int MOST = 255>
inline Ints<V> add_quads(Ints<V> sum, Ints<V> weights, Ints<V> signed_bytes) {
#ifdef TWOTOWER_AVX512
    if constexpr (V == 16)
        return Ints<V>(_mm512_dpbusd_epi32(__m512i(sum), __m512i(weights), __m512i(signed_bytes)));
    else if constexpr (V == 8)
        return Ints<V>(_mm256_dpbusd_epi32(__m256i(sum), __m256i(weights), __m256i(signed_bytes)));
    else
#elif defined(TWOTOWER_AVX2) && defined(__AVXVNNI__)
    if constexpr (V == 8)
        return Ints<V>(_mm256_dpbusd_avx_epi32(__m256i(sum), __m256i(weights), __m256i(signed_bytes)));
    else
#elif defined(TWOTOWER_AVX2)
    if constexpr (V == 8) {  // a magnitude up to 127 times a byte with its sign: two of them fit into 16 bits
        __m256i own = __m256i(weights), other = __m256i(signed_bytes), ones = _mm256_set1_epi16(1);
        if constexpr (MOST > 127) {
            own = _mm256_xor_si256(own, _mm256_set1_epi8(-128));
            other = _mm256_sign_epi8(other, own), own = _mm256_abs_epi8(own);
        }
        return sum + Ints<V>(_mm256_madd_epi16(_mm256_maddubs_epi16(own, other), ones));
    } else
#elif defined(TWOTOWER_DOTPROD)
    if constexpr (V == 4) {
        Ints<V> own = MOST > 127 ? weights ^ int32_t(0x80808080) : weights;
        return Ints<V>(vdotq_s32(int32x4_t(sum), vreinterpretq_s8_s32(int32x4_t(own)),
                                 vreinterpretq_s8_s32(int32x4_t(signed_bytes))));
    } else
#endif
    {
        uint8_t one[V * 4];
        int8_t two[V * 4];
        std::memcpy(one, &weights, sizeof one), std::memcpy(two, &signed_bytes, sizeof two);
        for (int l = 0; l < V; l++)
            for (int j = 0; j < 4; j++)
                sum[l] += (int(one[l * 4 + j]) - (MOST > 127 ? TAKEN_OFF : 0)) * two[l * 4 + j];
        return sum;
    }
}

// A sum of quads with int8 weights (MOST 255), or of at most 32 columns with int4 ones (MOST 15).
template <int V, int MOST>
struct Quads {
    Ints<V> sum = {};

    void add(Ints<V> weights, Ints<V> signed_bytes) { sum = add_quads<V, MOST>(sum, weights, signed_bytes); }
    Ints<V> total() const { return sum; }
};

#if defined(TWOTOWER_AVX2) && !defined(TWOTOWER_AVX512) && !defined(__AVXVNNI__)
// Two products are at most 2 * 15 * 127, and eight such pairs fit into 16 bits: they are widened once.
template <>
struct Quads<8, 15> {
    __m256i pairs = _mm256_setzero_si256();

    void add(Ints<8> weights, Ints<8> signed_bytes) {
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(__m256i(weights), __m256i(signed_bytes)));
    }
    Ints<8> total() const { return Ints<8>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))); }
};
#endif

}  // namespace twotower
