// The best of many logits.
#pragma once

#include <mutex>

#include "layers.h"

namespace twotower {

constexpr int COMPARED = 64;  // numbers that are compared with a bound at once
constexpr int KEPT = 32;      // blocks of a head whose logits are looked at while they are near

// take(i) in turn for each x[i] above the bound, which it may raise
template <typename Take>
void each_above(const float *x, int count, const float &bound, Take take) {
    for (int first = 0; first < count; first += COMPARED) {
        int end = std::min(first + COMPARED, count);
        if (end - first == COMPARED) {
            Floats<VECTOR> most = floats<VECTOR>(x + first);
            for (int i = VECTOR; i < COMPARED; i += VECTOR) {
                Floats<VECTOR> own = floats<VECTOR>(x + first + i);
                most = own > most ? own : most;
            }
            float largest = most[0];
            for (int l = 1; l < VECTOR; l++) largest = std::max(largest, most[l]);
            if (!(largest > bound)) continue;
        }
        for (int i = first; i < end; i++)
            if (x[i] > bound) take(i);
    }
}

// Index of the largest number, the first of equals
inline int largest_of(const float *x, int count) {
    float bound = -std::numeric_limits<float>::infinity();
    int found = 0;
    each_above(x, count, bound, [&](int i) { found = i, bound = x[i]; });
    return found;
}

// The sum of e^(x - most)
inline float sum_of_exponentials(const float *x, int count, float most) {
    Floats<VECTOR> sums{};
    int i = 0;
    for (; i + VECTOR <= count; i += VECTOR) sums += exponential<VECTOR>(floats<VECTOR>(x + i) - most);
    float sum = 0;
    for (int l = 0; l < VECTOR; l++) sum += sums[l];
    for (; i < count; i++) sum += exponential(x[i] - most);
    return sum;
}

// The ids of the `count` largest logits above -inf, the lower one of equals first, and their probabilities;
// where there are fewer, 0 for the rest of both. chosen: the first id, whatever its logit, or -1. None of
// `unused` is among the others.
inline void rank(const float *x, int size, int count, int64_t chosen, const int64_t *unused, int num_unused,
                 int64_t *ids, float *probs) {
    float most = x[largest_of(x, size)], sum = sum_of_exponentials(x, size, most);
    float bound = -std::numeric_limits<float>::infinity();
    int taken = 0, first = 0;
    if (chosen >= 0) ids[taken++] = chosen, first = 1;
    if (first < count)
        each_above(x, size, bound, [&](int i) {
            if (i == chosen || std::find(unused, unused + num_unused, i) != unused + num_unused) return;
            int at = taken < count ? taken++ : count - 1;
            for (; at > first && x[ids[at - 1]] < x[i]; at--) ids[at] = ids[at - 1];
            ids[at] = i;
            if (taken == count) bound = x[ids[count - 1]];
        });
    std::fill(ids + taken, ids + count, 0), std::fill(probs + taken, probs + count, 0.0f);
    for (int i = 0; i < taken; i++) probs[i] = exponential(x[ids[i]] - most) / sum;
}

// The largest of numbers [rows][W] in each lane, and 0 if all are finite, else NaN. rows: a multiple of 16.
template <int W>
inline void survey(const float *y, int rows, float *largest, float *oddity) {
    constexpr int V = W == 1 ? VECTOR : std::min(W, VECTOR), N = W == 1 ? 1 : W / V;
    Floats<V> most[N], odd[N] = {};
    for (int n = 0; n < N; n++) most[n] = Floats<V>{} + LEAST;
    for (int i = 0; i < rows * W; i += N * V)
        for (int n = 0; n < N; n++) {
            Floats<V> own = floats<V>(y + i + n * V);
            most[n] = own > most[n] ? own : most[n];
            odd[n] += own - own;
        }
    if constexpr (W == 1) {
        *largest = most[0][0], *oddity = odd[0][0];
        for (int l = 1; l < V; l++) *largest = std::max(*largest, most[0][l]), *oddity += odd[0][l];
    } else std::memcpy(largest, most, sizeof most), std::memcpy(oddity, odd, sizeof odd);
}

// ids of the largest of a head's logits for each token of a tile, the lower one at a tie, none of `unused`; -1
// where one of the others is not finite. The logits are never all there.
template <int W>
void best_rows(Team &team, const Weight &w, int rows, const Input<W> &in, const int64_t *unused, int num_unused,
               int64_t *ids) {
    float most[W];
    bool is_finite[W];
    std::fill_n(most, W, -std::numeric_limits<float>::infinity()), std::fill_n(is_finite, W, true);
    std::mutex lock;
    team.split(blocks_of(rows), [&](int begin, int end) {
        alignas(64) float y[KEPT * ROWS * W];
        for (int block = begin; block < end; block += KEPT) {
            int next = std::min(end, block + KEPT), first = block * ROWS, count = std::min(rows, next * ROWS) - first;
            product_blocks<W>(w, rows, in, nullptr, y - long(first) * W, block, next);
            std::fill(y + count * W, y + (next - block) * ROWS * W, LEAST);
            for (int i = 0; i < num_unused; i++)
                if (unused[i] >= first && unused[i] < first + count) std::fill_n(y + (unused[i] - first) * W, W, LEAST);
            float largest[W], oddity[W];
            survey<W>(y, (next - block) * ROWS, largest, oddity);
            std::lock_guard<std::mutex> guard(lock);  // threads share the lanes' bests
            for (int l = 0; l < in.count; l++) {
                if (oddity[l] != 0) is_finite[l] = false;
                if (!is_finite[l] || largest[l] < most[l]) continue;
                int64_t id = first;
                for (const float *own = y + l; *own != largest[l]; own += W) id++;
                if (largest[l] > most[l] || id < ids[l]) most[l] = largest[l], ids[l] = id;
            }
        }
    });
    for (int l = 0; l < in.count; l++)
        if (!is_finite[l]) ids[l] = -1;
}

}  // namespace twotower
