// Products of a matrix and a few tokens, in float32 and in int8.
//
// Activations lie feature by feature, W tokens (lanes) side by side. An int8 matrix has one scale
// per row (output), its tokens one scale each; a product of both is a sum of integers, exact in any
// order, times the two scales.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "layout.h"
#include "threads.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && !defined(TWOTOWER_PLAIN)
#define TWOTOWER_VNNI
#include <immintrin.h>
#endif

namespace twotower {

constexpr int ROWS = 16;  // of a packed block
constexpr int AHEAD = 8192;  // bytes that an int8 product asks for in advance

// y[R][W] = w[R][K] x[K][W] (+ bias): w's rows and columns are `row`, `column` floats apart.
template <int W, int R>
inline void product_rows(const float *w, long row, long column, int K, const float *x,
                         const float *bias, float *y) {
    typedef float Lanes __attribute__((vector_size(W * 4), aligned(4), may_alias));
    Lanes sum[R];
    for (int r = 0; r < R; r++) sum[r] = Lanes{} + (bias ? bias[r] : 0.0f);
    for (int i = 0; i < K; i++) {
        // The next rows, while these are used: 16 tokens keep a weight so busy that the processor
        // does not look ahead by itself.
        if (R > 1 && column == 1) __builtin_prefetch(w + R * row + long(i) * R);
        Lanes value = *reinterpret_cast<const Lanes *>(x + long(i) * W);
        for (int r = 0; r < R; r++) sum[r] += w[r * row + i * column] * value;
    }
    for (int r = 0; r < R; r++) *reinterpret_cast<Lanes *>(y + r * W) = sum[r];
}

// One token: rows are contiguous, each is a dot product; four rows share the loads of x.
template <int R>
inline void dot_rows(const float *w, long row, int K, const float *x, const float *bias, float *y) {
    typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
    Lanes sum[R] = {};
    for (int i = 0; i + 16 <= K; i += 16) {
        Lanes value = *reinterpret_cast<const Lanes *>(x + i);
        for (int r = 0; r < R; r++)
            sum[r] += *reinterpret_cast<const Lanes *>(w + r * row + i) * value;
    }
    for (int r = 0; r < R; r++) {
        float total = bias ? bias[r] : 0.0f;
        for (int lane = 0; lane < 16; lane++) total += sum[r][lane];
        for (int rest = K / 16 * 16; rest < K; rest++) total += w[r * row + rest] * x[rest];
        y[r] = total;
    }
}

template <int W>
void product(const float *w, long row, long column, int rows, int K, const float *x,
             const float *bias, float *y) {
    constexpr int R = W == 1 ? 4 : 8;
    auto some = [&](int r, auto count) {
        constexpr int N = decltype(count)::value;
        const float *b = bias ? bias + r : nullptr;
        if (W == 1 && column == 1)
            dot_rows<N>(w + r * row, row, K, x, b, y + r);
        else
            product_rows<W, N>(w + r * row, row, column, K, x, b, y + long(r) * W);
    };
    int r = 0;
    for (; r + R <= rows; r += R) some(r, std::integral_constant<int, R>());
    for (; r < rows; r++) some(r, std::integral_constant<int, 1>());
}

// What tokens are to an int8 matrix: unsigned bytes (value + 128) and a scale for each.
template <int W>
struct Input {
    const float *x;  // (K, W)
    int K;
    const uint8_t *bytes = nullptr;  // [K/4][W][4]; null where the matrix is float32
    float scale[W];
};

// work(begin, end) over features; those of one token are too few to share.
template <int W, typename Work>
void over_features(Team &team, int count, Work work) {
    if (W == 1) work(0, count);
    else team.split(count, work);
}

// The largest magnitude of each token, as bits: NaN is more than infinity and so is not lost.
template <int W>
void largest_bits(Team &team, const float *x, int K, uint32_t *most) {
    constexpr int PARTS = 16;
    uint32_t part[PARTS][W] = {};
    over_features<W>(team, PARTS, [&part, x, K](int begin, int end) {
        for (int p = begin; p < end; p++) {
            uint32_t found[W] = {};
            for (long f = long(K) * p / PARTS; f < long(K) * (p + 1) / PARTS; f++)
                for (int l = 0; l < W; l++) {
                    uint32_t bits;
                    std::memcpy(&bits, x + f * W + l, 4);
                    found[l] = std::max(found[l], bits & 0x7fffffffu);
                }
            std::copy(found, found + W, part[p]);
        }
    });
    for (int l = 0; l < W; l++) most[l] = 0;
    for (int p = 0; p < PARTS; p++)
        for (int l = 0; l < W; l++) most[l] = std::max(most[l], part[p][l]);
}

inline uint32_t as_byte(float x) {
    float value = std::min(std::max(std::nearbyint(x), -127.0f), 127.0f);
    return uint32_t(int32_t(value == value ? value : 0.0f) + 128);
}

// Quads begin to end of x[K][W] as bytes; beyond K the weights are 0 and any byte will do.
template <int W>
void to_bytes(const float *x, const float *inverse, int K, int begin, int end, uint8_t *buffer) {
    typedef uint32_t Four __attribute__((aligned(4), may_alias));
    float own[W];
    std::copy(inverse, inverse + W, own);
    for (int q = begin; q < end; q++) {
        const float *in = x + long(q) * 4 * W;
        Four *out = reinterpret_cast<Four *>(buffer) + long(q) * W;
        for (int l = 0; l < W; l++) out[l] = as_byte(in[l] * own[l]);
        for (int j = 1; j < std::min(4, K - q * 4); j++)
            for (int l = 0; l < W; l++) out[l] |= as_byte(in[j * W + l] * own[l]) << (8 * j);
    }
}

// buffer: at least ceil(K / 4) * 4 * W bytes.
template <int W>
Input<W> as_input(Team &team, const Weight &w, const float *x, int K, uint8_t *buffer) {
    Input<W> input{x, K, nullptr, {}};
    if (w.packed == nullptr) return input;
    uint32_t most[W];
    largest_bits<W>(team, x, K, most);
    float inverse[W];
    for (int l = 0; l < W; l++) {
        float largest;
        std::memcpy(&largest, &most[l], 4);
        input.scale[l] = largest / 127.0f;
        inverse[l] = largest > 0.0f && largest < INFINITY ? 127.0f / largest : 0.0f;
        if (!(inverse[l] < INFINITY)) inverse[l] = 0.0f, input.scale[l] = 0.0f;  // as good as zero
    }
    if (W == 1)
        for (int f = 0; f < K; f++) buffer[f] = uint8_t(as_byte(x[f] * inverse[0]));
    else
        team.split((K + 3) / 4, [&](int begin, int end) {
            to_bytes<W>(x, inverse, K, begin, end, buffer);
        });
    input.bytes = buffer;
    return input;
}

// sum[16][W]: the integer products of a block's rows with the tokens.
template <int W>
inline void integer_block(const int8_t *w, int quads, const uint8_t *x, int32_t *sum) {
#ifdef TWOTOWER_VNNI
    if constexpr (W == 1) {
        const int32_t *token = reinterpret_cast<const int32_t *>(x);
        __m512i part[4] = {};  // four, so that no product waits for the one before it
        auto add = [&](int to, int q) {
            part[to] = _mm512_dpbusd_epi32(part[to], _mm512_set1_epi32(token[q]),
                                           _mm512_loadu_si512(w + long(q) * 64));
        };
        int q = 0;
        for (; q + 4 <= quads; q += 4) add(0, q), add(1, q + 1), add(2, q + 2), add(3, q + 3);
        for (; q < quads; q++) add(0, q);
        part[0] = _mm512_add_epi32(part[0], part[1]), part[2] = _mm512_add_epi32(part[2], part[3]);
        _mm512_storeu_si512(sum, _mm512_add_epi32(part[0], part[2]));
    } else {
        const int32_t *four = reinterpret_cast<const int32_t *>(w);
        typedef std::conditional_t<W == 8, __m256i, __m512i> Lanes;
        Lanes part[ROWS] = {};
        for (int q = 0; q < quads; q++, four += 16, x += 4 * W) {
            __builtin_prefetch(reinterpret_cast<const int8_t *>(four) + AHEAD, 0, 2);
            Lanes value;
            std::memcpy(&value, x, sizeof value);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++)
                if constexpr (W == 8)
                    part[r] = _mm256_dpbusd_epi32(part[r], value, _mm256_set1_epi32(four[r]));
                else
                    part[r] = _mm512_dpbusd_epi32(part[r], value, _mm512_set1_epi32(four[r]));
        }
        std::memcpy(sum, part, sizeof part);
    }
#else
    std::fill(sum, sum + ROWS * W, 0);
    for (int q = 0; q < quads; q++, w += 64, x += 4 * W)
        for (int r = 0; r < ROWS; r++)
            for (int l = 0; l < W; l++)
                for (int j = 0; j < 4; j++) sum[r * W + l] += int(w[r * 4 + j]) * x[l * 4 + j];
#endif
}

// y[rows][W] of blocks `begin` to `end` of an int8 matrix.
template <int W>
void integer_product(const int8_t *packed, int rows, const Input<W> &in, const float *bias,
                     float *y, int begin, int end) {
    int quads = (in.K + 3) / 4, blocks = (rows + ROWS - 1) / ROWS;
    const int8_t *after = packed + long(blocks) * quads * 64;
    const float *scales = reinterpret_cast<const float *>(after);
    const int32_t *offsets = reinterpret_cast<const int32_t *>(after) + blocks * ROWS;
    for (int b = begin; b < end; b++) {
        int32_t sum[ROWS * W];
        integer_block<W>(packed + long(b) * quads * 64, quads, in.bytes, sum);
        int first = b * ROWS, here = std::min(ROWS, rows - first);
        for (int r = 0; r < here; r++)
            for (int l = 0; l < W; l++)
                y[long(first + r) * W + l] =
                    float(sum[r * W + l] - offsets[first + r]) * (scales[first + r] * in.scale[l]) +
                    (bias ? bias[first + r] : 0.0f);
    }
}

// y[rows][W] = w x (+ bias), by the team, blocks of 16 rows each; then after(first, last) of the
// rows that one of them has made.
template <int W, typename After>
void matrix(Team &team, const Weight &w, int rows, const Input<W> &in, const float *bias, float *y,
            After after) {
    team.split((rows + ROWS - 1) / ROWS, [&](int begin, int end) {
        int first = begin * ROWS, last = std::min(rows, end * ROWS);
        if (w.packed != nullptr)
            integer_product<W>(w.packed, rows, in, bias, y, begin, end);
        else
            product<W>(w.full + long(first) * in.K, in.K, 1, last - first, in.K, in.x,
                       bias ? bias + first : nullptr, y + long(first) * W);
        after(first, last);
    });
}

template <int W>
void matrix(Team &team, const Weight &w, int rows, const Input<W> &in, const float *bias, float *y) {
    matrix<W>(team, w, rows, in, bias, y, [](int, int) {});
}

}  // namespace twotower
