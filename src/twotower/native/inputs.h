// Tokens as products in int8 and int4 take them: whole numbers, with a scale for each group of columns.
#pragma once

#include <algorithm>
#include <cmath>

#include "numbers.h"
#include "threads.h"

namespace twotower {

constexpr int GROUP = 32;  // columns of an int4 group
constexpr int ZERO = 128 - TAKEN_OFF;  // what products of int8 bytes are to be corrected by, for each one

// What tokens are to a packed matrix: signed bytes, and for each group of `group` columns a scale,
// the scale times the sum of the bytes, and -ZERO times this sum.
template <int W>
struct Input {
    const float *x;  // [K][W]
    int K, count;  // of W lanes, so many are tokens
    int group = 0;
    const uint8_t *bytes = nullptr;  // [K/4][W][4]; null where the matrix is float32
    const float *scales = nullptr, *sums = nullptr;  // [groups][W]
    const int32_t *zeros = nullptr;
};

template <int W>
size_t input_bytes(int K) {
    return size_t(K + 4) * W + 3 * sizeof(float) * W * (K / GROUP + 1);
}

constexpr long SHARED = 1 << 14;  // numbers from which a second thread helps more than it is waited for

// work(begin, end) over `count` parts of the `width` features of W tokens.
template <int W, typename Work>
void over_features(Team &team, int count, int width, Work work) {
    if (long(width) * W < SHARED) work(0, count);
    else team.split(count, work);
}

// Numbers of a group, `scales` of V tokens or one number V times: largest is the largest magnitude, as
// bits, in which NaN is more than infinity and so is not lost. Scale and inverse are 0 for what is as
// good as zero, the inverse also for what is not finite.
template <int V>
inline void scale_of(Ints<V> largest, Floats<V> &scale, Floats<V> &inverse) {
    Floats<V> zero = {}, value;
    std::memcpy(&value, &largest, sizeof value);
    scale = value / 127.0f;
    inverse = ((value > 0.0f) & (value < INFINITY)) ? 127.0f / value : zero;
    auto is_finite = inverse < INFINITY;
    inverse = is_finite ? inverse : zero;
    scale = is_finite ? scale : zero;
}

// Rounded to the nearest whole number from -127 to 127, ties to even; 0 for NaN.
template <int V>
inline Ints<V> as_whole(Floats<V> x) {
    Floats<V> zero = {}, most = zero + 127.0f, shift = zero + 0x1.8p23f;
    x = x == x ? x : zero;
    x = x > most ? most : x;
    x = x < -most ? -most : x;
    return __builtin_convertvector((x + shift) - shift, Ints<V>);
}

template <int V>
inline Ints<V> magnitude(const float *x) { return ints<V>(x) & 0x7fffffff; }

template <int V>
inline Ints<V> larger(Ints<V> one, Ints<V> two) { return one > two ? one : two; }

// A group of x[count][W], of V tokens, as bytes [count/4][W][4], zeros beyond; its scale and the sum of
// its bytes.
template <int W, int V>
inline Ints<V> group_to_bytes(const float *x, int count, uint8_t *bytes, float *scales) {
    Ints<V> most = {}, total = {};
    for (int f = 0; f < count; f++) most = larger<V>(most, magnitude<V>(x + long(f) * W));
    Floats<V> scale, inverse;
    scale_of<V>(most, scale, inverse);
    floats<V>(scales) = scale;
    for (int f = 0; f < count; f += 4) {
        Ints<V> four = {};
        for (int j = 0; j < std::min(4, count - f); j++) {
            Ints<V> whole = as_whole<V>(floats<V>(x + long(f + j) * W) * inverse);
            total += whole, four |= (whole & 255) << (8 * j);
        }
        std::memcpy(bytes + long(f) * W, &four, sizeof four);
    }
    return total;
}

// The same of a single token, whose numbers lie side by side.
inline int32_t token_to_bytes(const float *x, int count, uint8_t *bytes, float *scale) {
    constexpr int V = VECTOR;
    Ints<V> most = {}, total = {};
    float rest[V] = {};
    int whole_vectors = count / V * V;
    std::copy(x + whole_vectors, x + count, rest);
    auto numbers = [&](int at) { return at < whole_vectors ? x + at : rest; };
    for (int at = 0; at < count; at += V) most = larger<V>(most, magnitude<V>(numbers(at)));
    int32_t largest = 0, sum = 0;
    for (int i = 0; i < V; i++) largest = std::max(largest, most[i]);
    Floats<4> one, inverse;
    scale_of<4>(Ints<4>{} + largest, one, inverse);
    *scale = one[0];
    for (int at = 0; at < count; at += V) {
        Ints<V> whole = as_whole<V>(floats<V>(numbers(at)) * inverse[0]);
        auto own = __builtin_convertvector(whole, Bytes<V>);
        std::memcpy(bytes + at, &own, std::min(V, (count - at + 3) / 4 * 4));
        total += whole;
    }
    for (int i = 0; i < V; i++) sum += total[i];
    return sum;
}

// buffer: at least input_bytes<W>(K) bytes.
template <int W>
Input<W> as_input(Team &team, const Weight &w, const float *x, int K, int count, uint8_t *buffer) {
    if (w.int8 == nullptr && w.int4 == nullptr) return {x, K, count};
    int group = w.group, groups = (K + group - 1) / group;
    float *scales = reinterpret_cast<float *>(buffer + (long(K) + 3) / 4 * 4 * W);
    float *sums = scales + groups * W;
    int32_t *zeros = reinterpret_cast<int32_t *>(sums + groups * W);
    over_features<W>(team, groups, K, [=](int begin, int end) {
        constexpr int V = std::min(W, VECTOR);
        for (int g = begin; g < end; g++) {
            int here = std::min(group, K - g * group);
            const float *in = x + long(g) * group * W;
            uint8_t *out = buffer + long(g) * group * W;
            for (int at = g * W, l = 0; l < W; l += V, at += V) {
                Ints<V> total;
                if constexpr (W == 1) total = Ints<V>{} + token_to_bytes(in, here, out, scales + at);
                else total = group_to_bytes<W, V>(in + l, here, out + l * 4, scales + at);
                floats<V>(sums + at) = floats<V>(scales + at) * __builtin_convertvector(total, Floats<V>);
                total *= -ZERO;
                std::memcpy(zeros + at, &total, sizeof total);
            }
        }
    });
    return {x, K, count, group, buffer, scales, sums, zeros};
}

}  // namespace twotower
