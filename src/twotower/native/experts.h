// Mixture of experts: a router sends each token to a few MLPs of many; a shared one takes them all.
//
// Tiles are routed one after the other; then each chosen expert takes its tokens of the whole pass at
// once, so that its weights are read once however long a prompt is.
#pragma once

#include "layers.h"

namespace twotower {

// A lane of the pass, and what its expert's output is multiplied by
struct Sent {
    int lane;
    float weight;
};

inline thread_local std::vector<std::vector<Sent>> sent;  // to each expert
inline thread_local std::vector<double> scores;

constexpr int DOUBLES = 8;  // partial sums of a score: features p, p + 8, p + 16 and so on

// y[W] = w x[K][W] in float64, as the released model: borderline choices differ in float32. In the same
// order for one token and for many.
template <int W>
void score(const float *w, const float *x, int K, double *y) {
    constexpr int V = std::min(W, DOUBLES);
    for (int l = 0; l < W; l += V) {
        Doubles<V> part[DOUBLES] = {};
        int f = 0;
        if constexpr (W == 1) {
            Doubles<DOUBLES> sum = {};
            for (; f + DOUBLES <= K; f += DOUBLES)
                sum += __builtin_convertvector(floats<DOUBLES>(w + f), Doubles<DOUBLES>) *
                       __builtin_convertvector(floats<DOUBLES>(x + f), Doubles<DOUBLES>);
            std::memcpy(part, &sum, sizeof sum);
        } else
            for (; f + DOUBLES <= K; f += DOUBLES)
                for (int p = 0; p < DOUBLES; p++)
                    part[p] += double(w[f + p]) *
                               __builtin_convertvector(floats<V>(x + long(f + p) * W + l), Doubles<V>);
        for (int p = 0; f + p < K; p++)
            part[p] += double(w[f + p]) * __builtin_convertvector(floats<V>(x + long(f + p) * W + l), Doubles<V>);
        for (int half = DOUBLES / 2; half > 0; half /= 2)
            for (int p = 0; p < half; p++) part[p] += part[p + half];
        std::memcpy(y + l, part, V * sizeof(double));
    }
}

// work(i) for the `count` indices of the largest of values[size], one after the other; NaN is the largest,
// so that it reaches the output, as in PyTorch.
template <typename Work>
void each_largest(const double *values, int size, int count, Work work) {
    std::vector<bool> is_taken(size);
    for (int n = 0; n < count; n++) {
        int best = -1;
        for (int i = 0; i < size; i++)
            if (!is_taken[i] && (best < 0 || (values[best] == values[best] && !(values[i] <= values[best])))) best = i;
        is_taken[best] = true;
        work(best);
    }
}

// Of the chances of E experts only those in the best groups keep theirs, the others get 0. A group is as good
// as its two best.
inline void keep_best_groups(const Layer &layer, double *chances) {
    int size = layer.experts / layer.groups;
    std::vector<double> good(layer.groups);
    std::vector<bool> is_kept(layer.groups);
    for (int g = 0; g < layer.groups; g++) {
        const double *own = chances + g * size;
        each_largest(own, size, std::min(2, size), [&](int i) { good[g] += own[i]; });
    }
    each_largest(good.data(), layer.groups, layer.kept_groups, [&](int g) { is_kept[g] = true; });
    for (int g = 0; g < layer.groups; g++)
        if (!is_kept[g]) std::fill_n(chances + g * size, size, 0.0);
}

// The scores of E experts, in place: a softmax over all, or the sigmoid of each
inline void to_scores(const Layer &layer, double *x) {
    if (!layer.softmax) {
        for (int e = 0; e < layer.experts; e++) x[e] = 1.0 / (1.0 + std::exp(-x[e]));
        return;
    }
    double most = *std::max_element(x, x + layer.experts), sum = 0.0;
    for (int e = 0; e < layer.experts; e++) sum += x[e] = std::exp(x[e] - most);
    for (int e = 0; e < layer.experts; e++) x[e] /= sum;
}

// A token of a lane to its experts, by its scores before `to_scores`
inline void choose(const Layer &layer, const float *bias, double *own, int lane) {
    to_scores(layer, own);
    std::vector<double> chances(own, own + layer.experts);
    for (int e = 0; bias && e < layer.experts; e++) chances[e] += bias[e];
    if (layer.groups > 1) keep_best_groups(layer, chances.data());
    std::vector<int> chosen;
    double sum = 0.0;
    each_largest(chances.data(), layer.experts, layer.per_token, [&](int e) {
        chosen.push_back(e);
        sum += own[e];
    });
    for (int e : chosen) {
        double weight = layer.normalises ? own[e] / (sum + 1e-20) : own[e];
        sent[e].push_back({lane, float(weight * layer.factor)});
    }
}

// Features of what routed experts get and make
inline int routed_width(const Step &s) { return s.layer.latent ? s.layer.latent : s.call.tower.width; }

// A tile: what routed experts get of scratch.u to scratch.routed_in, who gets it to `sent`, and what the
// shared expert makes of it to scratch.y
template <int W>
void route(const Step &s, const Tile &tile) {
    const auto &w = weights_of<ExpertsWeights>(s.layer);
    Team &team = s.call.team;
    int D = s.call.tower.width, E = s.layer.experts, K = routed_width(s);
    const float *u = scratch.u.data();
    double *all = at_least(scores, size_t(E) * (W + 1)), *own = all + size_t(E) * W;
    over_features<W>(team, E, E * D, [&w, u, D, all](int begin, int end) {
        for (int e = begin; e < end; e++) score<W>(w.gate.full + long(e) * D, u, D, all + e * W);
    });
    for (int l = 0; l < tile.count; l++) {
        for (int e = 0; e < E; e++) own[e] = all[e * W + l];
        choose(s.layer, w.gate_e_score_correction_bias.full, own, tile.first_lane + l);
    }
    float *rows = scratch.routed_in.data() + long(tile.first_lane) * K;
    if (s.layer.latent) {
        float *latent = at_least(scratch.b, size_t(K) * W);
        matrix<W>(team, w.fc1_latent_proj, K, input_of<W>(team, w.fc1_latent_proj, u, D, tile.count), nullptr, latent);
        to_rows<W>(latent, K, tile.count, rows, K);
    } else
        to_rows<W>(u, K, tile.count, rows, K);
    float *y = scratch.y.data() + long(tile.first_lane) * D;
    Dense shared{w.shared_experts_up_proj, w.shared_experts_gate_proj, w.shared_experts_down_proj,
                 nullptr, nullptr, nullptr, s.layer.inner};
    if (exists(shared.up)) dense<W>(team, shared, u, D, tile.count, y);
    else std::fill_n(y, long(D) * W, 0.0f);
}

// Number `index` of matrices (rows, K) one behind the other
inline Weight matrix_of(Weight w, int index, long rows, long K) {
    long blocks = blocks_of(int(rows)), quads = (K + 3) / 4;
    if (w.full) w.full += index * rows * K;
    if (w.half) w.half += index * rows * K;
    if (w.int8) w.int8 += index * blocks * ROWS * (quads * 4 + long(sizeof(float)));
    if (w.int4) w.int4 += index * blocks * (K / GROUP) * GROUP_BYTES;
    return w;
}

// What an expert makes of `count` tokens, added to scratch.routed
template <int W>
void run_expert(const Step &s, const Dense &w, const Sent *tokens, int count) {
    int K = routed_width(s);
    float *x = at_least(scratch.u, size_t(K) * W), *y = at_least(scratch.b, size_t(K) * W);
    const float *rows = scratch.routed_in.data();
    to_lanes<W>([=](int l) { return rows + long(tokens[l].lane) * K; }, K, count, x);
    dense<W>(s.call.team, w, x, K, count, y);
    to_rows<W>(y, K, count, x, K);
    for (int l = 0; l < count; l++) {
        float *sum = scratch.routed.data() + long(tokens[l].lane) * K, weight = tokens[l].weight;
        for (int f = 0; f < K; f++) sum[f] += weight * x[long(l) * K + f];
    }
}

// Every expert that has tokens; a token's come in the order of their numbers
inline void run_experts(const Step &s) {
    const auto &w = weights_of<ExpertsWeights>(s.layer);
    int F = s.layer.expert_inner, K = routed_width(s);
    std::fill_n(scratch.routed.data(), long(s.call.num_lanes) * K, 0.0f);
    for (int e = 0; e < s.layer.experts; e++) {
        const std::vector<Sent> &own = sent[e];
        if (own.empty()) continue;
        Dense expert{matrix_of(w.experts_up_proj, e, F, K), matrix_of(w.experts_gate_proj, e, F, K),
                     matrix_of(w.experts_down_proj, e, K, F), nullptr, nullptr, nullptr, F};
        for (int first = 0, count; first < int(own.size()); first += count) {
            count = tile_of(int(own.size()) - first);
            with_width(width_of(count), [&](auto width) {
                run_expert<decltype(width)::value>(s, expert, own.data() + first, count);
            });
        }
    }
}

// A tile: scratch.y grows by what its experts made
template <int W>
void add_routed(const Step &s, const Tile &tile) {
    const auto &w = weights_of<ExpertsWeights>(s.layer);
    int D = s.call.tower.width, K = routed_width(s);
    const float *rows = scratch.routed.data() + long(tile.first_lane) * K;
    float *x = at_least(scratch.u, size_t(K) * W), *y = scratch.y.data() + long(tile.first_lane) * D;
    to_lanes<W>([=](int l) { return rows + long(l) * K; }, K, tile.count, x);
    if (s.layer.latent) {
        float *all = at_least(scratch.b, size_t(D) * W);
        matrix<W>(s.call.team, w.fc2_latent_proj, D, input_of<W>(s.call.team, w.fc2_latent_proj, x, K, tile.count),
                  nullptr, all);
        x = all;
    }
    for (long i = 0; i < long(D) * W; i++) y[i] += x[i];
}

inline void make_room_for_experts(const Step &s) {
    size_t count = size_t(s.call.num_lanes) * routed_width(s);
    at_least(scratch.routed_in, count);
    at_least(scratch.routed, count);
    sent.resize(std::max(sent.size(), size_t(s.layer.experts)));
    for (std::vector<Sent> &own : sent) own.clear();
}

}  // namespace twotower
