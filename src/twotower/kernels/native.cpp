// One tower's pass over a few tokens of one row, in one call: dense layers only.
//
// Small models wait for dispatch, not for arithmetic; here nothing is dispatched. Activations lie
// feature by feature, W tokens (lanes) side by side, so that every operation runs over the lanes
// and a weight, read once, serves all tokens. W is 1, 8 or 16.
#include "native_layers.h"

namespace twotower {

struct Tower {
    const Sizes *sizes;
    const char *kinds;              // M, * or -, ended by 0
    const float *embeddings, *norm;
    const Weight *weights;          // 11 of each layer: its norm, then those of its kind
};

// h += gate y of features begin to end; gate (width,), null for 1.
template <int W>
void leave(const float *y, const float *gate, float *h, int begin, int end) {
    for (int f = begin; f < end; f++) {
        float open = gate ? gate[f] : 1.0f;
        for (int l = 0; l < W; l++) h[f * W + l] += y[f * W + l] * open;
    }
}

template <int W>
void run(const Tower &tower, const Call &call, const int64_t *ids, const float *const *modulations,
         const Past *past, const Fresh *fresh, float *hidden) {
    const Sizes &s = call.sizes;
    int D = s.width;
    int inner = std::max({s.inner, s.q_heads * s.head_dim, 2 * s.kv_heads * s.head_dim,
                          2 * s.heads * s.head_size + 2 * s.groups * s.state + s.heads});
    scratch.need(s, W, inner);
    float *h = scratch.h.data(), *u = scratch.u.data(), *y = scratch.y.data();
    for (int l = 0; l < W; l++) {
        const float *row = tower.embeddings + ids[std::min(l, call.length - 1)] * D;
        for (int f = 0; f < D; f++) h[f * W + l] = row[f];
    }
    const float *gate = nullptr;
    for (int i = 0; tower.kinds[i]; i++) {
        const Weight *w = tower.weights + 11 * i;
        const float *m = modulations ? modulations[i] : nullptr;  // shift, scale, gate
        bool modulates_first = tower.kinds[i] != '-';
        over_features<W>(call.team, D, [=](int begin, int end) {
            if (i > 0) leave<W>(y, gate, h, begin, end);
            std::copy(h + long(begin) * W, h + long(end) * W, u + long(begin) * W);
            if (m && modulates_first) modulate<W>(u, m, m + D, begin, end);
        });
        norm<W>(call.team, u, w[0].wide, D, s.eps, u);
        if (m && !modulates_first) modulate<W>(u, m, m + D, 0, D);
        Fresh left = fresh ? fresh[i] : Fresh{};
        if (tower.kinds[i] == 'M') mamba<W>(call, w + 1, past[i], left);
        else if (tower.kinds[i] == '*') attention<W>(call, w + 1, past[i], left);
        else mlp<W>(call, w + 1);
        gate = m ? m + 2 * D : nullptr;
    }
    leave<W>(y, gate, h, 0, D);
    norm<W>(call.team, h, tower.norm, D, s.eps, u);
    to_tokens<W>(u, D, call.length, hidden, D);
}

template <int W>
void linear(Team &team, const Weight &w, int rows, int K, const float *x, int length, float *y) {
    std::vector<uint8_t> bytes(size_t(K + 4) * W);
    std::vector<float> lanes(size_t(K) * W), out(size_t(rows) * W);
    for (int l = 0; l < W; l++)
        for (int f = 0; f < K; f++) lanes[size_t(f) * W + l] = x[long(std::min(l, length - 1)) * K + f];
    Input<W> in = as_input<W>(team, w, lanes.data(), K, bytes.data());
    matrix<W>(team, w, rows, in, nullptr, out.data());
    to_tokens<W>(out.data(), rows, length, y, rows);
}

}  // namespace twotower

using namespace twotower;

// 1 to 16 tokens of one row after num_past others; 1 if an id is outside the vocabulary, else 0.
extern "C" int32_t twotower_pass(const Tower *tower, int32_t length, int32_t num_past, int32_t causal,
                                 int32_t threads, const int64_t *ids,
                                 const float *const *modulations, const Past *past,
                                 const Fresh *fresh, float *hidden) {
    for (int t = 0; t < length; t++)
        if (ids[t] < 0 || ids[t] >= tower->sizes->vocabulary) return 1;
    Team team(threads);
    Call call{*tower->sizes, length, num_past, causal != 0, team};
    if (length == 1) run<1>(*tower, call, ids, modulations, past, fresh, hidden);
    else if (length <= 8) run<8>(*tower, call, ids, modulations, past, fresh, hidden);
    else run<16>(*tower, call, ids, modulations, past, fresh, hidden);
    return 0;
}

// The Mamba states after the first `count` tokens, 0 to 16, of a pass that left their inputs.
extern "C" void twotower_states(const Tower *tower, int32_t count, int32_t threads,
                                const Past *past, const Fresh *fresh) {
    Team team(threads);
    for (int i = 0; tower->kinds[i]; i++)
        if (tower->kinds[i] == 'M')
            state_after(*tower->sizes, team, tower->weights + 11 * i + 1, count, past[i], fresh[i]);
}

// y (length, rows) = x (length, K) w^T for any length >= 1.
extern "C" void twotower_linear(const Weight *w, int32_t rows, int32_t K, int32_t threads,
                                const float *x, int32_t length, float *y) {
    Team team(threads);
    for (int32_t at = 0; at < length; at += 16) {
        int32_t part = std::min(16, length - at);
        const float *in = x + long(at) * K;
        float *out = y + long(at) * rows;
        if (part == 1) linear<1>(team, *w, rows, K, in, part, out);
        else if (part <= 8) linear<8>(team, *w, rows, K, in, part, out);
        else linear<16>(team, *w, rows, K, in, part, out);
    }
}
