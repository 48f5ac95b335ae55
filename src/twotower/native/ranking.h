// The most probable tokens of one position's logits.
#pragma once

#include <limits>

#include "layers.h"

namespace twotower {

constexpr int COMPARED = 64;  // numbers that are compared with a bound at once

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

}  // namespace twotower
