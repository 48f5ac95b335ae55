// What attention does with a block of keys and values: scores of keys, their weights, sums of values.
#pragma once

#include "layers.h"

namespace twotower {

constexpr int KEYS = 64;         // of a block
constexpr int BRANCHING = 32;    // tokens of a draft that branches, at most: the bits of what one sees
constexpr int MOST = KEYS + BRANCHING;

// Rows of a head's keys or values that will be needed next. They lie apart from each other, so that the processor
// does not look ahead by itself; and are asked for a few at a time: it stands still where too many are awaited.
template <typename T>
struct Ahead {
    const T *rows;
    long stride;
    int count;

    static bool begins_line(int feature) { return feature % int(64 / sizeof(T)) == 0; }

    void prefetch(int row, int feature) const {
        if (row < count) __builtin_prefetch(rows + row * stride + feature, 0, 2);
    }
};

// Rows of `count` keys as float32, and how far they lie apart: where they are, or in `wide`
template <typename T>
inline const float *widened_rows(const T *k, long &stride, int A, int count, float *wide) {
    if constexpr (std::is_same_v<T, float>) return k;
    else {
        for (int j = 0; j < count; j++) widen(k + j * stride, A, wide + j * A);
        stride = A;
        return wide;
    }
}

// score[count][W] of keys k[count][A], `stride` numbers apart, to q[A][W] of fewer lanes than a vector has: keys are
// turned in registers to stand side by side. Returns how many keys it has compared, whole vectors of them.
template <int W, typename T>
int compare_few(const T *k, long stride, int A, int count, const float *q, float *score, const Ahead<T> &ahead) {
    constexpr int V = VECTOR;
    int j = 0;
    for (; A % V == 0 && j + V <= count; j += V) {
        Floats<V> sum[W] = {};
        for (int a = 0; a < A; a += V) {
            Floats<V> keys[V];
            for (int i = 0; i < V; i++) {
                keys[i] = widened<V>(k + (j + i) * stride + a);
                if (ahead.begins_line(a)) ahead.prefetch(j + i, a);
            }
            transpose<V, V>(keys);
            for (int i = 0; i < V; i++)
                for (int l = 0; l < W; l++) sum[l] = add_product<V>(sum[l], keys[i], q[(a + i) * W + l]);
        }
        turn<W, V>(reinterpret_cast<const float *>(sum), V, score + j * W, W);
    }
    return j;
}

// score[R][W] of R keys to N vectors of lanes. ahead: from its row `row` on, so many as there are keys. Apart from
// product_rows because of GCC 12: one function for both took 1.4 to 1.7 times as long.
template <int W, int N, int R, typename T>
inline void compare_rows(const float *k, long stride, int A, const float *q, float *score, const Ahead<T> &ahead,
                         int row) {
    constexpr int V = VECTOR;
    Floats<V> sum[R][N] = {};
    for (int a = 0; a < A; a++) {
        for (int r = 0; r < R && ahead.begins_line(a); r++) ahead.prefetch(row + r, a);
        for (int n = 0; n < N; n++) {
            Floats<V> own = floats<V>(q + a * W + n * V);
            for (int r = 0; r < R; r++) sum[r][n] = add_product<V>(sum[r][n], own, k[r * stride + a]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) floats<V>(score + r * W + n * V) = sum[r][n];
}

// The same as compare_few, of whole vectors of lanes; wide: room for 8 keys
template <int W, typename T>
int compare_many(const T *k, long stride, int A, int count, const float *q, float *score, const Ahead<T> &ahead,
                 float *wide) {
    constexpr int V = VECTOR, N = W > V ? 2 : 1, R = std::min(8, SUMS / N);
    int j = 0;
    for (; j + R <= count; j += R) {
        long step = stride;
        const float *keys = widened_rows(k + j * stride, step, A, R, wide);
        for (int l = 0; l < W; l += N * V)
            compare_rows<W, N, R>(keys, step, A, q + l, score + j * W + l, ahead, l ? count : j);
    }
    return j;
}

// Each score is summed from the first feature to the last, whichever way it is made. wide: room for MOST keys
template <int W, typename T>
void compare(const T *k, long stride, int A, int count, const float *q, float *score, const Ahead<T> &ahead,
             float *wide) {
    int j = 0;
    if constexpr (W >= VECTOR) j = compare_many<W>(k, stride, A, count, q, score, ahead, wide);
    else j = compare_few<W>(k, stride, A, count, q, score, ahead);
    const float *keys = widened_rows(k + j * stride, stride, A, count - j, wide);
    product<W>(keys, stride, 1, count - j, A, q, nullptr, score + j * W);
}

// y[W][width] += the sums of rows of v (count, width), weighted by p[count][W]: N vectors of features and
// L lanes at a time, so that as many sums are under way as there are registers. Each turn asks for its share of the
// rows that come next, since memory brings them more slowly than one turn would ask for all.
template <int W, typename T, typename Next>
void add_weighted(const T *v, long stride, int width, int count, const float *p, float *y, const Ahead<Next> &ahead,
                  float *wide) {
    constexpr int L = std::min(W, SUMS / 2), N = SUMS / L;
    if constexpr (W > L && !std::is_same_v<T, float>) {  // read more than once
        const float *values = widened_rows(v, stride, width, count, wide);
        return add_weighted<W>(values, stride, width, count, p, y, ahead, wide);
    }
    auto some = [=, &ahead](int a, auto vectors) {
        constexpr int N = decltype(vectors)::value;
        for (int first = 0; first < W; first += L) {
            Floats<VECTOR> sum[N][L] = {};
            for (int j = 0; j < count; j++)
                for (int n = 0; n < N; n++) {
                    int feature = a + n * VECTOR;
                    if (ahead.begins_line(feature) && j % (W / L) == first / L) ahead.prefetch(j, feature);
                    Floats<VECTOR> own = widened<VECTOR>(v + j * stride + feature);
                    for (int l = 0; l < L; l++) sum[n][l] = add_product<VECTOR>(sum[n][l], own, p[j * W + first + l]);
                }
            for (int n = 0; n < N; n++)
                for (int l = 0; l < L; l++) floats<VECTOR>(y + (first + l) * width + a + n * VECTOR) += sum[n][l];
        }
    };
    int a = 0;
    for (; a + N * VECTOR <= width; a += N * VECTOR) some(a, std::integral_constant<int, N>());
    for (; a + VECTOR <= width; a += VECTOR) some(a, std::integral_constant<int, 1>());
    for (; a < width; a++) {
        float sum[W], column[MOST];
        for (int j = 0; j < count; j++) column[j] = widened(v[j * stride + a]);
        product_rows<W, 1, 1>(column, 1, 1, count, p, W, nullptr, sum);
        for (int l = 0; l < W; l++) y[l * width + a] += sum[l];
    }
}

// score[count][W] of some keys to weights against the largest score so far, `most`; what was summed
// up against a smaller one, `total` and y[W][A], is brought down to it.
template <int W>
void weigh(float *score, int count, float root, float *most, float *total, float *y, int A) {
    constexpr int V = std::min(W, VECTOR), ALL = std::max(W, VECTOR);  // one key's lanes, or several keys'
    float largest[ALL];
    for (int first = 0; first < W; first += V) {
        Floats<V> own = floats<V>(most + first);
        for (int j = 0; j < count; j++) {
            Floats<V> other = floats<V>(score + j * W + first);
            own = own < other ? other : own;
        }
        Floats<V> kept = exponential<V>((floats<V>(most + first) - own) * root);
        floats<V>(total + first) *= kept, floats<V>(most + first) = own;
        for (int l = first; l < ALL; l += W) floats<V>(largest + l) = own;
        for (int l = 0; l < V; l++)  // few blocks have a larger score than all before
            for (int a = 0; a < A && kept[l] != 1.0f; a++) y[(first + l) * A + a] *= kept[l];
    }
    for (int i = 0; i < count * W; i += VECTOR) {  // what lies behind the last key is nobody's
        Floats<VECTOR> own = (floats<VECTOR>(score + i) - floats<VECTOR>(largest + i % ALL)) * root;
        Floats<VECTOR> hidden = Floats<VECTOR>{} - 87.0f;  // such a key has no weight at all
        floats<VECTOR>(score + i) = own < hidden ? Floats<VECTOR>{} : exponential_within<VECTOR>(own);
    }
    for (int first = 0; first < W; first += V) {
        Floats<V> sum = {};
        for (int j = 0; j < count; j++) sum += floats<V>(score + j * W + first);
        floats<V>(total + first) += sum;
    }
}

}  // namespace twotower
