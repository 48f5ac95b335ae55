// Grouped-query attention of any number of tokens to a past and to themselves.
//
// All keys and values of a pass come first, then its queries, tile by tile. Keys are taken in blocks
// whose scores stay in the nearest cache; blocks begin at multiples of KEYS from the text's start,
// so that a text gives the same bits however it is cut into passes.
#pragma once

#include "layers.h"

namespace twotower {

constexpr int KEYS = 64;  // of a block

// Room for all queries, and for keys and values that nobody else keeps
inline Step with_room_for_keys(Step s) {
    size_t length = s.call.length, kv_width = s.layer.kv_heads * s.layer.head_dim;
    at_least(scratch.q, (length + LANES) * s.layer.q_heads * s.layer.head_dim);
    if (s.out.k == nullptr) s.out.k = at_least(scratch.keys, length * kv_width);
    if (s.out.v == nullptr) s.out.v = at_least(scratch.values, length * kv_width);
    return s;
}

// Queries, keys and values of a tile: scratch.u to its part of scratch.q, out.k and out.v
template <int W>
void project(const Step &s, int first, int count) {
    const auto &w = weights_of<AttentionWeights>(s.layer);
    int q_width = s.layer.q_heads * s.layer.head_dim, kv_width = s.layer.kv_heads * s.layer.head_dim;
    float *flat = at_least(scratch.flat, size_t(kv_width) * W);
    Input<W> in = input_of<W>(s, w.q_proj, scratch.u.data(), s.call.tower.width);
    matrix<W>(s.call.team, w.k_proj, kv_width, in, w.k_proj_bias.full, flat);
    to_rows<W>(flat, kv_width, count, s.out.k + long(first) * kv_width, kv_width);
    matrix<W>(s.call.team, w.v_proj, kv_width, in, w.v_proj_bias.full, flat);
    to_rows<W>(flat, kv_width, count, s.out.v + long(first) * kv_width, kv_width);
    matrix<W>(s.call.team, w.q_proj, q_width, in, w.q_proj_bias.full, scratch.q.data() + long(first) * q_width);
}

struct KeyBlock {
    const float *k, *v;
    long stride;
};

// Keys `at` to `at + count` of the head whose features begin at `head`: where they lie, or in room
// for 2 * KEYS * A floats where the past ends among them.
inline KeyBlock find_keys(const Step &s, int head, int at, int count, float *room) {
    int A = s.layer.head_dim, S = s.call.num_past;
    long stride = long(s.layer.kv_heads) * A, own = long(at - S) * stride + head;
    if (at >= S) return {s.out.k + own, s.out.v + own, stride};
    const float *k = s.past.k + at * stride + head, *v = s.past.v + at * stride + head;
    if (at + count <= S) return {k, v, stride};
    for (int j = 0; j < count; j++) {
        bool is_past = at + j < S;
        std::copy_n(is_past ? k + j * stride : s.out.k + own + j * stride, A, room + j * A);
        std::copy_n(is_past ? v + j * stride : s.out.v + own + j * stride, A,
                    room + (KEYS + j) * A);
    }
    return {room, room + KEYS * A, A};
}

// y[width][W]: the sum of rows of v (count, width), weighted by p[count][W]
template <int W>
void weighted_sum(const float *v, long stride, int width, int count, const float *p, float *y) {
    if (W > 1) return product<W>(v, 1, stride, width, count, p, nullptr, y);
    std::fill(y, y + width, 0.0f);
    for (int i = 0; i < count; i++)
        for (int f = 0; f < width; f++) y[f] += p[i] * v[i * stride + f];
}

// score[count][W] of some keys to weights against the largest score so far, `most`; what was summed
// up against a smaller one, `total` and y[A][W], is brought down to it.
template <int W>
void weigh(float *score, int count, float root, float *most, float *total, float *y, int A) {
    typedef float Lanes __attribute__((vector_size(W * 4), aligned(4), may_alias));
    Lanes *scores = reinterpret_cast<Lanes *>(score), *sums = reinterpret_cast<Lanes *>(y);
    Lanes &before = *reinterpret_cast<Lanes *>(most), &all = *reinterpret_cast<Lanes *>(total);
    Lanes largest = before, kept, sum = {};
    for (int j = 0; j < count; j++) largest = scores[j] < largest ? largest : scores[j];
    kept = (before - largest) * root;
    for (int j = 0; j < count; j++) scores[j] = (scores[j] - largest) * root;
    float *shares = reinterpret_cast<float *>(&kept);
    for (int l = 0; l < W; l++) shares[l] = exponential(shares[l]);
    for (int i = 0; i < count * W; i++) {
        float p = exponential(score[i]);
        score[i] = score[i] < -87.0f ? 0.0f : p;  // a hidden key has no weight at all
    }
    for (int j = 0; j < count; j++) sum += scores[j];
    all = all * kept + sum;
    for (int a = 0; a < A; a++) sums[a] *= kept;
    before = largest;
}

// One head of a tile: y[A][W] of q[A][W]
template <int W>
void attend_head(const Step &s, int head, const float *q, int first, int count, float *y) {
    int A = s.layer.head_dim, S = s.call.num_past;
    int visible = S + (s.call.causal ? first + count : s.call.length);
    float *score = at_least(scratch.own, size_t(KEYS + A) * W + 2 * size_t(KEYS) * A);
    float *part = score + KEYS * W, *room = part + A * W;
    float root = 1.0f / std::sqrt(float(A)), most[W], total[W] = {};
    for (int l = 0; l < W; l++) most[l] = -INFINITY;
    std::fill(y, y + A * W, 0.0f);
    for (int at = 0; at < visible; at += KEYS) {
        int here = std::min(KEYS, visible - at);
        KeyBlock keys = find_keys(s, head, at, here, room);
        product<W>(keys.k, keys.stride, 1, here, A, q, nullptr, score);
        if (s.call.causal)
            for (int j = std::max(0, S + first + 1 - at); j < here; j++)
                for (int l = 0; l < std::min(at + j - S - first, W); l++) score[j * W + l] = -INFINITY;
        weigh<W>(score, here, root, most, total, y, A);
        weighted_sum<W>(keys.v, keys.stride, A, here, score, part);
        for (int i = 0; i < A * W; i++) y[i] += part[i];
    }
    for (int a = 0; a < A; a++)
        for (int l = 0; l < W; l++) y[a * W + l] /= total[l];
}

// A tile's part of scratch.q to that of scratch.y
template <int W>
void attend(const Step &s, int first, int count) {
    const auto &w = weights_of<AttentionWeights>(s.layer);
    int A = s.layer.head_dim, q_heads = s.layer.q_heads, width = s.call.tower.width;
    int q_width = q_heads * A, shared = q_heads / s.layer.kv_heads;
    const float *q = scratch.q.data() + long(first) * q_width;
    float *out = at_least(scratch.b, size_t(q_width) * W);
    s.call.team.split(q_heads, [&s, A, shared, q, first, count, out](int begin, int end) {
        for (int head = begin; head < end; head++)
            attend_head<W>(s, head / shared * A, q + head * A * W, first, count, out + head * A * W);
    });
    matrix<W>(s.call.team, w.o_proj, width, input_of<W>(s, w.o_proj, out, q_width), w.o_proj_bias.full,
              scratch.y.data() + long(first) * width);
}

}  // namespace twotower
