// Products of a matrix and the tokens of a tile: in float32, also of weights in half precision; int8; int4.
//
// Activations lie feature by feature, W tokens (lanes) side by side; a tile of more than 16 is
// computed 16 or 32 lanes at a time, while a few rows of the matrix stay in the nearest cache.
#pragma once

#include <algorithm>

#include "integers.h"

namespace twotower {

// N vectors of V lanes at y[R][stride] = w[R][K] x[K][stride] (+ bias): w's rows and columns are
// `row`, `column` floats apart. ahead: `step` bytes of each column are wanted soon.
template <int V, int N, int R>
inline void product_rows(const float *w, long row, long column, int K, const float *x, long stride,
                         const float *bias, float *y, const char *ahead = nullptr, long step = 0) {
    Floats<V> sum[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) sum[r][n] = Floats<V>{} + (bias ? bias[r] : 0.0f);
    for (int i = 0; i < K; i++) {
        // Many tokens keep a weight so busy that the processor does not look ahead by itself.
        if (R > 1 && step) __builtin_prefetch(ahead + i * step);
        Floats<V> value[N];
        for (int n = 0; n < N; n++) value[n] = floats<V>(x + i * stride + n * V);
        for (int r = 0; r < R; r++)
            for (int n = 0; n < N; n++)
                sum[r][n] = add_product<V>(sum[r][n], value[n], w[r * row + i * column]);
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) floats<V>(y + r * stride + n * V) = sum[r][n];
}

// One token: rows are contiguous, each is a dot product; four rows share the loads of x. Short ones: the
// processor would look ahead too late.
template <int R, typename T>
inline void dot_rows(const T *w, long row, int K, const float *x, const float *bias, float *y) {
    Floats<VECTOR> sum[R][16 / VECTOR] = {};
    for (int i = 0; i + 16 <= K; i += 16) {
        const char *next = reinterpret_cast<const char *>(w + i * R) + AHEAD;
        for (int line = 0; line < int(16 * R * sizeof(T)); line += 64) __builtin_prefetch(next + line);
        for (int r = 0; r < R; r++)
            for (int p = 0; p < 16 / VECTOR; p++) {
                Floats<VECTOR> own = widened<VECTOR>(w + r * row + i + p * VECTOR);
                sum[r][p] = add_product<VECTOR>(sum[r][p], own, floats<VECTOR>(x + i + p * VECTOR));
            }
    }
    for (int r = 0; r < R; r++) {
        float part[16];
        std::memcpy(part, sum[r], sizeof part);
        for (int half = 8; half > 0; half /= 2)
            for (int lane = 0; lane < half; lane++) part[lane] += part[lane + half];
        float total = part[0] + (bias ? bias[r] : 0.0f);
        for (int rest = K / 16 * 16; rest < K; rest++) total = add_product(total, widened(w[r * row + rest]), x[rest]);
        y[r] = total;
    }
}

// Columns of V rows, each as a vector: so many at once. Two bfloat16 are turned as one number, where there are
// registers for that.
template <int V, typename T>
constexpr int COLUMNS = std::is_same_v<T, Bfloat> && V == 16 ? 2 * V : V;

template <int V, typename T>
inline void columns_of(const T *w, long row, Floats<V> *found) {
    if constexpr (COLUMNS<V, T> > V) {
        Floats<V> pairs[V];
        for (int r = 0; r < V; r++) std::memcpy(pairs + r, w + r * row, sizeof pairs[r]);
        transpose<V, V>(pairs);
        for (int c = 0; c < V; c++) {
            Ints<V> both = ints<V>(pairs + c), one = both << 16, two = both & int32_t(0xffff0000);
            std::memcpy(found + 2 * c, &one, sizeof one), std::memcpy(found + 2 * c + 1, &two, sizeof two);
        }
    } else {
        for (int r = 0; r < V; r++) found[r] = widened<V>(w + r * row);
        transpose<V, V>(found);
    }
}

// y[VECTOR][W] = w[VECTOR][K] x[K][W] (+ bias), the rows in lanes: where they fill vectors better than the
// tokens do. Each sum is made in the order of product_rows, and has its bits.
template <int W, typename T>
inline void rows_in_lanes(const T *w, int K, const float *x, const float *bias, float *y) {
    constexpr int V = VECTOR, C = COLUMNS<V, T>;
    Floats<V> sum[W], columns[C];
    for (int n = 0; n < W; n++) sum[n] = bias ? floats<V>(bias) : Floats<V>{};
    auto add = [&](const Floats<V> &column, int i) {
        for (int n = 0; n < W; n++) sum[n] = add_product<V>(sum[n], column, x[long(i) * W + n]);
    };
    int i = 0;
    for (; i + C <= K; i += C) {
        const char *next = reinterpret_cast<const char *>(w + V * (long(K) + i));
        for (int line = 0; line < int(V * C * sizeof(T)); line += 64) __builtin_prefetch(next + line);
        columns_of<V>(w + i, K, columns);
        for (int c = 0; c < C; c++) add(columns[c], i + c);
    }
    for (; i < K; i++) {
        for (int r = 0; r < V; r++) columns[0][r] = widened(w[long(r) * K + i]);
        add(columns[0], i);
    }
    for (int n = 0; n < W; n++)
        for (int r = 0; r < V; r++) y[r * W + n] = sum[n][r];
}

// R contiguous rows in float32: as they are, or widened in memory that stays in the nearest cache
template <int R, typename T>
inline const float *in_floats(const T *w, int K) {
    if constexpr (std::is_same_v<T, float>) return w;
    else {
        static thread_local std::vector<float> room;
        if (room.size() < size_t(R) * K) room.resize(size_t(R) * K);
        widen(w, long(R) * K, room.data());
        return room.data();
    }
}

// y[rows][W] = w x (+ bias); in half precision rows are contiguous.
template <int W, typename T>
void product(const T *w, long row, long column, int rows, int K, const float *x,
             const float *bias, float *y) {
    constexpr int V = std::min(W, VECTOR), N = W > V ? 2 : 1, R = W == 1 ? 4 : std::min(8, SUMS / N);
    auto some = [&](int r, auto count) {
        constexpr int C = decltype(count)::value;
        const float *b = bias ? bias + r : nullptr;
        const T *first = w + r * row;
        if (W == 1 && column == 1) return dot_rows<C>(first, row, K, x, b, y + r);
        const float *own = in_floats<C>(first, K);
        const char *next = reinterpret_cast<const char *>(first + C * row);
        long step = column == 1 ? C * long(sizeof(T)) : 0;
        for (int l = 0; l < W; l += V * N)
            product_rows<V, N, C>(own, row, column, K, x + l, W, b, y + long(r) * W + l, next, step);
    };
    int r = 0;
    if constexpr (W > 1 && 2 * W <= VECTOR)
        for (; column == 1 && row == K && r + VECTOR <= rows; r += VECTOR)
            rows_in_lanes<W>(w + r * row, K, x, bias ? bias + r : nullptr, y + long(r) * W);
    for (; r + R <= rows; r += R) some(r, std::integral_constant<int, R>());
    for (; r < rows; r++) some(r, std::integral_constant<int, 1>());
}

inline int blocks_of(int rows) { return (rows + ROWS - 1) / ROWS; }

// y[rows][W] = w x (+ bias): of blocks of 16 rows, from `begin` to `end`.
template <int W>
void product_blocks(const Weight &w, int rows, const Input<W> &in, const float *bias, float *y,
                    int begin, int end) {
    int first = begin * ROWS, last = std::min(rows, end * ROWS);
    if (w.int4 != nullptr) integer_product<W, true>(w, rows, in, bias, y, begin, end);
    else if (w.int8 != nullptr) integer_product<W, false>(w, rows, in, bias, y, begin, end);
    else if (first < last)
        with_type(w.full ? static_cast<const void *>(w.full) : w.half, w.dtype, [&](const auto *matrix) {
            product<W>(matrix + long(first) * in.K, in.K, 1, last - first, in.K, in.x,
                       bias ? bias + first : nullptr, y + long(first) * W);
        });
}

// y[rows][W] = w x (+ bias), by the team; then after(first, last) of the rows that one of them has
// made.
template <int W, typename After>
void matrix(Team &team, const Weight &w, int rows, const Input<W> &in, const float *bias, float *y,
            After after) {
    team.split(blocks_of(rows), [&](int begin, int end) {
        product_blocks<W>(w, rows, in, bias, y, begin, end);
        after(begin * ROWS, std::min(rows, end * ROWS));
    });
}

template <int W>
void matrix(Team &team, const Weight &w, int rows, const Input<W> &in, const float *bias, float *y) {
    matrix<W>(team, w, rows, in, bias, y, [](int, int) {});
}

// Several products of one input, shared out together.
struct Product {
    const Weight &w;
    int rows;
    const float *bias;
    float *y;
};

template <int W, int N>
void matrices(Team &team, const Product (&products)[N], const Input<W> &in) {
    int all = 0;
    for (const Product &p : products) all += blocks_of(p.rows);
    team.split(all, [&products, &in](int begin, int end) {
        for (const Product &p : products) {
            int count = blocks_of(p.rows), from = std::max(begin, 0), to = std::min(end, count);
            if (from < to) product_blocks<W>(p.w, p.rows, in, p.bias, p.y, from, to);
            begin -= count, end -= count;
        }
    });
}

}  // namespace twotower
