// Grouped-query attention of any number of tokens to a past and to themselves.
//
// All keys and values of a pass come first, then its queries, tile by tile. Keys are taken in blocks
// whose scores stay in the nearest cache; blocks begin at multiples of KEYS from the text's start,
// so that a text gives the same bits however it is cut into passes.
#pragma once

#include "scores.h"

namespace twotower {

constexpr int TOGETHER = 2 * LANES;  // queries that are compared with keys at the same time, at most

// Room for all queries, and for keys and values that nobody else keeps
inline void make_room_for_keys(const Step &s) {
    size_t kv_width = s.layer.kv_heads * s.layer.head_dim, total = 0;
    at_least(scratch.q, size_t(s.call.num_lanes) * s.layer.q_heads * s.layer.head_dim);
    for (int r = 0; r < s.call.num_rows; r++) total += s.rows[r].length;
    float *k = at_least(scratch.keys, total * kv_width), *v = at_least(scratch.values, total * kv_width);
    for (int r = 0; r < s.call.num_rows; r++) {  // in half precision half of each part stays unused
        RowState &row = s.rows[r];
        if (row.out.k == nullptr) row.out.k = k;
        if (row.out.v == nullptr) row.out.v = v;
        k += row.length * kv_width, v += row.length * kv_width;
    }
}

// Cosines and sines [A][W] of a tile's angles: halves make the pairs, as in the PyTorch layers
template <int W>
void make_angles(const Call &call, int head_dim, const Tile &tile) {
    int half = head_dim / 2;
    float *cosines = scratch.angles.data() + long(tile.first_lane) * head_dim, *sines = cosines + half * W;
    float positions[W] = {};
    each_segment(call, tile, [&](const Segment &s) {
        const Row &row = call.rows[s.row];
        for (int t = s.at; t < s.at + s.count; t++)
            positions[s.lane + t - s.at] = float(row.num_past + (row.depths ? row.depths[t] : t));
    });
    for (int l = 0; l < W; l++)
        for (int i = 0; i < half; i++) {
            float angle = positions[std::min(l, tile.count - 1)] * call.tower.frequencies[i];
            cosines[i * W + l] = std::cos(angle) * call.tower.turn_factor;
            sines[i * W + l] = std::sin(angle) * call.tower.turn_factor;
        }
}

// x[A][W] turned
template <int W>
void rotate(float *x, const float *angles, int A) {
    int half = A / 2 * W;
    for (int i = 0; i < half; i++) {
        float one = x[i], two = x[i + half], cosine = angles[i], sine = angles[i + half];
        x[i] = add_product(-(two * sine), one, cosine);
        x[i + half] = add_product(one * sine, two, cosine);
    }
}

// What comes between a product and attention: x[heads][A][W] normed per head and turned, where the
// layer has that
template <int W>
void finish_heads(const Step &s, const Weight &weight, int heads, const float *angles, float *x) {
    int A = s.layer.head_dim;
    if (!weight.full && !angles) return;
    over_features<W>(s.call.team, heads, heads * A, [&s, &weight, angles, x, A](int begin, int end) {
        float part[PARTS * W], scale[W];
        for (float *head = x + begin * A * W; head < x + end * A * W; head += A * W) {
            if (weight.full) {
                square_parts<W>(head, A, 0, PARTS, part);
                scale_by_parts<W>(part, A, s.call.tower.eps, scale);
                multiply<W>(head, scale, weight.full, 0, A, head);
            }
            if (angles) rotate<W>(head, angles, A);
        }
    });
}

// Lanes x[width][W] of `count` tokens to where they are kept, y (count, width): rounded here, once, so that a token's
// keys are the same numbers for the pass that writes them and for all that read them
template <int W, typename T>
void keep(const float *x, int width, int count, T *y) {
    if constexpr (std::is_same_v<T, float>) to_rows<W>(x, width, count, y, width);
    else {
        float *rows = at_least(scratch.rows, size_t(width) * count);
        to_rows<W>(x, width, count, rows, width);
        round_all(rows, long(width) * count, y);
    }
}

// Queries, keys and values of a tile: scratch.u to its part of scratch.q, and the rows' out.k, out.v
template <int W>
void project(const Step &s, const Tile &tile) {
    const auto &w = weights_of<AttentionWeights>(s.layer);
    int A = s.layer.head_dim, q_width = s.layer.q_heads * A, kv_width = s.layer.kv_heads * A;
    float *k = at_least(scratch.flat, 2 * size_t(kv_width) * W), *v = k + kv_width * W;
    float *q = scratch.q.data() + long(tile.first_lane) * q_width;
    const float *angles = s.layer.rotary ? scratch.angles.data() + long(tile.first_lane) * A : nullptr;
    const Weight &packed = packed_of(w.q_proj, packed_of(w.k_proj, w.v_proj));
    Input<W> in = input_of<W>(s.call.team, packed, scratch.u.data(), s.call.tower.width, tile.count);
    matrices<W>(s.call.team,
                {{w.q_proj, q_width, w.q_proj_bias.full, q},
                 {w.k_proj, kv_width, w.k_proj_bias.full, k},
                 {w.v_proj, kv_width, w.v_proj_bias.full, v}},
                in);
    finish_heads<W>(s, w.q_norm, s.layer.q_heads, angles, q);
    finish_heads<W>(s, w.k_norm, s.layer.kv_heads, angles, k);
    each_segment(s.call, tile, [&](const Segment &part) {
        const Outputs &out = s.rows[part.row].out;
        with_type(out.k, s.call.kv_dtype, [&](auto *first) {
            using T = Pointed<decltype(first)>;
            long at = long(part.at) * kv_width;
            keep<W>(k + part.lane, kv_width, part.count, static_cast<T *>(out.k) + at);
            keep<W>(v + part.lane, kv_width, part.count, static_cast<T *>(out.v) + at);
        });
    });
}

template <typename T>
struct KeyBlock {
    const T *k, *v;
    long stride;
    int count;
};

// Of a head whose features begin at `head`: the first key and value of a row's past, and of its tokens
template <typename T>
struct HeadKeys {
    const T *past_k, *past_v, *own_k, *own_v;
    long stride;
    int A;

    HeadKeys(const Layer &layer, const RowState &s, int head)
        : past_k(static_cast<const T *>(s.past.k) + head), past_v(static_cast<const T *>(s.past.v) + head),
          own_k(static_cast<const T *>(s.out.k) + head), own_v(static_cast<const T *>(s.out.v) + head),
          stride(long(layer.kv_heads) * layer.head_dim), A(layer.head_dim) {}

    // Key and value number `index` of the past, or of the tokens, to number j of `room`
    void copy(bool is_past, long index, int j, T *room) const {
        std::copy_n((is_past ? past_k : own_k) + index * stride, A, room + j * A);
        std::copy_n((is_past ? past_v : own_v) + index * stride, A, room + (MOST + j) * A);
    }
};

// Keys `at` to `at + count` of a head after S of the past: where they lie, or in room for 2 * MOST * A numbers where
// the past ends among them.
template <typename T>
inline KeyBlock<T> find_keys(const HeadKeys<T> &keys, int S, int at, int count, T *room) {
    long own = long(at - S) * keys.stride, past = long(at) * keys.stride;
    if (at >= S) return {keys.own_k + own, keys.own_v + own, keys.stride, count};
    if (at + count <= S) return {keys.past_k + past, keys.past_v + past, keys.stride, count};
    for (int j = 0; j < count; j++) keys.copy(at + j < S, at + j < S ? at + j : at + j - S, j, room);
    return {room, room + MOST * keys.A, keys.A, count};
}

// The same of a draft that branches, where its block holds tokens of the pass: the past, then all tokens
// whose positions lie in the block, whose indices in the pass go to `indices`. Of those a token sees,
// each stands behind the one that it follows, so sums are taken in the order of a text.
template <typename T>
inline KeyBlock<T> find_branches(const HeadKeys<T> &keys, const RowState &s, int at, T *room, int *indices) {
    int S = s.num_past, count = std::max(0, S - at);
    for (int j = 0; j < count; j++) keys.copy(true, at + j, j, room);
    for (int t = 0; t < s.length; t++)
        if (int position = S + s.depths[t]; position >= at && position < at + KEYS) {
            indices[count] = t;
            keys.copy(false, t, count++, room);
        }
    return {room, room + MOST * keys.A, keys.A, count};
}

// score[count][W] of keys that a lane does not see: those of other branches. first: the first lane's
// token; `heads` lanes are of one.
template <int W>
void hide_branches(const RowState &s, const int *indices, int past, int count, int first, int heads, float *score) {
    for (int j = past; j < count; j++)
        for (int l = 0; l < W; l++) {
            int token = std::min(first + l / heads, s.length - 1);
            if (!(s.sees[token] >> indices[j] & 1)) score[j * W + l] = -INFINITY;
        }
}

// firsts[W]: the position of the first key that each lane sees; the least of them is returned
template <int W>
int first_keys(const Layer &layer, const RowState &s, int first, int heads, int *firsts) {
    for (int l = 0; l < W; l++) {
        int token = std::min(first + l / heads, s.length - 1);
        int position = s.num_past + (s.depths ? s.depths[token] : token);
        firsts[l] = layer.window ? std::max(0, position - layer.window + 1) : 0;
    }
    return *std::min_element(firsts, firsts + W);
}

// score[count][W] of keys before those. indices: as of hide_branches, null where all keys follow each other
template <int W>
void hide_distant(const RowState &s, const int *firsts, int at, const int *indices, int count, float *score) {
    for (int j = 0; j < count; j++) {
        bool branches = indices && at + j >= s.num_past;
        int position = branches ? s.num_past + s.depths[indices[j]] : at + j;
        for (int l = 0; l < W; l++)
            if (position < firsts[l]) score[j * W + l] = -INFINITY;
    }
}

// y[W][A] of q[A][W] to the keys of a head; lane l sees those up to `last`, and where the pass is causal
// one more with every `heads` lanes, as far as they lie in its window
template <int W, typename T>
void attend_head(const Layer &layer, const RowState &row, int head, const float *q, int heads, int last,
                 bool is_causal, int visible, float *y) {
    int A = layer.head_dim;
    float *score = at_least(scratch.own, size_t(MOST) * W + 3 * size_t(MOST) * A), *wide = score + MOST * W;
    T *room = reinterpret_cast<T *>(wide + MOST * A);
    HeadKeys<T> all(layer, row, head);
    float root = 1.0f / std::sqrt(float(A)), most[W], total[W] = {};
    int indices[MOST], firsts[W], S = row.num_past, first = first_keys<W>(layer, row, last - S, heads, firsts);
    for (int l = 0; l < W; l++) most[l] = LEAST;  // finite: a window may hide all keys of a block
    std::fill(y, y + A * W, 0.0f);
    for (int at = first / KEYS * KEYS; at < visible; at += KEYS) {
        bool branches = row.depths && at + KEYS > S;
        KeyBlock<T> keys = branches ? find_branches(all, row, at, room, indices)
                                    : find_keys(all, S, at, std::min(KEYS, visible - at), room);
        int here = keys.count;
        compare<W>(keys.k, keys.stride, A, here, q, score, Ahead<T>{keys.v, keys.stride, here}, wide);
        if (branches)
            hide_branches<W>(row, indices, std::max(0, S - at), here, last - S, heads, score);
        else if (is_causal)
            for (int j = std::max(0, last + 1 - at); j < here; j++)
                for (int l = 0; l < std::min((at + j - last) * heads, W); l++) score[j * W + l] = -INFINITY;
        if (layer.window) hide_distant<W>(row, firsts, at, branches ? indices : nullptr, here, score);
        weigh<W>(score, here, root, most, total, y, A);
        int next = at + KEYS;
        Ahead<T> ahead = {all.past_k + next * all.stride, all.stride, std::min(KEYS, S - next)};
        add_weighted<W>(keys.v, keys.stride, A, here, score, y, ahead, wide);
    }
    for (int l = 0; l < W; l++)
        for (int a = 0; a < A; a++) y[l * A + a] /= total[l];
}

// The queries of a segment that are compared with keys at the same time: of `heads` heads, which share
// keys, and of up to `tokens` tokens, so that keys are read for as many as there are lanes; of fewer where
// some of the team would have nothing to do.
struct Together {
    int heads, tokens;  // of a part
    int turns, parts;   // parts of the heads that share keys; of the segment

    Together(const Layer &layer, const Segment &s, const Team &team) {
        cut(layer, s, TOGETHER);
        if (parts < 2 * team.count()) cut(layer, s, LANES);
    }

    void cut(const Layer &layer, const Segment &s, int lanes) {
        int shared = layer.q_heads / layer.kv_heads;
        heads = std::min(shared, std::max(1, lanes / s.count));
        tokens = lanes;
        turns = (shared + heads - 1) / heads;
        parts = layer.kv_heads * turns * ((s.count + tokens - 1) / tokens);
    }
};

// `tokens` of `heads` heads, A * W floats apart, in V lanes: from and to their first numbers
template <int V, int W>
void attend_lanes(const Step &s, const RowState &row, int head, const float *from, float *to,
                  int heads, int tokens, int last, int visible) {
    int A = s.layer.head_dim, lanes = heads * tokens;
    float *q = at_least(scratch.lanes, 2 * size_t(A) * V), *y = q + A * V;
    long offsets[V];
    for (int l = 0; l < V; l++) {
        int own = std::min(l, lanes - 1);
        offsets[l] = long(own % heads) * A * W + own / heads;
    }
    for (int a = 0; a < A; a++)
        for (int l = 0; l < V; l++) q[a * V + l] = from[a * W + offsets[l]];
    with_type(row.out.k, s.call.kv_dtype, [&](auto *first) {
        attend_head<V, Pointed<decltype(first)>>(s.layer, row, head, q, heads, last, s.call.causal, visible, y);
    });
    for (int a = 0; a < A; a++)
        for (int l = 0; l < lanes; l++) to[a * W + offsets[l]] = y[l * A + a];
}

// One part of a segment of a tile of W lanes: q and out [q_heads * A][W]
template <int W>
void attend_part(const Step &s, const Segment &segment, int part, const float *q, float *out) {
    const RowState &row = s.rows[segment.row];
    Together together(s.layer, segment, s.call.team);
    int A = s.layer.head_dim, shared = s.layer.q_heads / s.layer.kv_heads, S = row.num_past;
    int group = part % (s.layer.kv_heads * together.turns), head = group / together.turns;
    int done = group % together.turns * together.heads, heads = std::min(together.heads, shared - done);
    int before = part / (s.layer.kv_heads * together.turns) * together.tokens;
    int tokens = std::min(together.tokens, segment.count - before), first = segment.at + before;
    int visible = S + (s.call.causal ? first + tokens : row.length), lanes = heads * tokens;
    long at = long(head * shared + done) * A * W + segment.lane + before;
    auto attend = lanes <= 4       ? attend_lanes<4, W>
                  : lanes <= 8     ? attend_lanes<8, W>
                  : lanes <= LANES ? attend_lanes<LANES, W>
                                   : attend_lanes<TOGETHER, W>;
    attend(s, row, head * A, q + at, out + at, heads, tokens, S + first, visible);
}

// A tile's part of scratch.q to that of scratch.y
template <int W>
void attend(const Step &s, const Tile &tile) {
    const auto &w = weights_of<AttentionWeights>(s.layer);
    int width = s.call.tower.width, q_width = s.layer.q_heads * s.layer.head_dim, total = 0;
    const float *q = scratch.q.data() + long(tile.first_lane) * q_width;
    float *out = at_least(scratch.b, size_t(q_width) * W);
    each_segment(s.call, tile, [&](const Segment &part) { total += Together(s.layer, part, s.call.team).parts; });
    s.call.team.split(total, [=, &s, &tile](int begin, int end) {
        int before = 0;
        each_segment(s.call, tile, [&](const Segment &segment) {
            int count = Together(s.layer, segment, s.call.team).parts, from = std::max(begin - before, 0);
            for (int part = from; part < std::min(end - before, count); part++)
                attend_part<W>(s, segment, part, q, out);
            before += count;
        });
    });
    for (int f = 0; f < q_width; f++)  // lanes that are nobody's must be numbers
        for (int l = tile.count; l < W; l++) out[f * W + l] = 0.0f;
    Input<W> in = input_of<W>(s.call.team, w.o_proj, out, q_width, tile.count);
    matrix<W>(s.call.team, w.o_proj, width, in, w.o_proj_bias.full, scratch.y.data() + long(tile.first_lane) * width);
}

}  // namespace twotower
