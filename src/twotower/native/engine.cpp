// One tower's pass over any number of tokens of one row, in one call.
//
// Small models wait for dispatch, not for arithmetic; here nothing is dispatched. Activations lie
// feature by feature, the tokens of a tile (lanes) side by side, so that every operation runs over
// the lanes and a weight, read once, serves all of them. A longer pass goes tile by tile through one
// layer and then through the next.
#include "attention.h"
#include "mamba.h"

namespace twotower {

// h += gate y of features begin to end; gate (width,), null for 1
template <int W>
void add_residual(const float *y, const float *gate, float *h, int begin, int end) {
    for (int f = begin; f < end; f++) {
        float open = gate ? gate[f] : 1.0f;
        for (int l = 0; l < W; l++) h[f * W + l] += y[f * W + l] * open;
    }
}

template <int W>
void embed(const Tower &tower, const int64_t *ids, int first, int count) {
    float *h = scratch.h.data() + long(first) * tower.width;
    for (int l = 0; l < W; l++) {
        int64_t id = ids[first + std::min(l, count - 1)];
        const float *row = id == tower.vocabulary ? tower.mask : tower.embeddings + id * tower.width;
        for (int f = 0; f < tower.width; f++) h[f * W + l] = row[f];
    }
}

// What the residual of a tile gets from the layer before (y times gate, none before the first).
struct Before {
    bool is_first;
    const float *gate;
};

// A tile's input of a layer in scratch.u; modulation: shift, scale, gate (3, width) or null
template <int W>
void pre_norm(const Step &s, int first, Before before, const float *modulation) {
    int D = s.call.tower.width;
    const float *y = scratch.y.data() + long(first) * D, *m = modulation;
    float *h = scratch.h.data() + long(first) * D, *u = at_least(scratch.u, size_t(D) * W);
    bool modulates_first = s.layer.kind != MLP;  // a fact of the released weights
    over_features<W>(s.call.team, D, [=](int begin, int end) {
        if (!before.is_first) add_residual<W>(y, before.gate, h, begin, end);
        std::copy(h + long(begin) * W, h + long(end) * W, u + long(begin) * W);
        if (m && modulates_first) modulate<W>(u, m, m + D, begin, end);
    });
    norm<W>(s.call.team, u, s.layer.weights[0].full, D, s.call.tower.eps, u);
    if (m && !modulates_first) modulate<W>(u, m, m + D, 0, D);
}

// One layer over all tiles. A new kind of layer is a case here and its weights in layout.py.
void run_layer(const Step &s, Before before, const float *modulation) {
    auto all_tiles = [&](auto mix) {
        each_tile(s.call.length, s.call.is_wide, [&](auto width, int first, int count) {
            pre_norm<decltype(width)::value>(s, first, before, modulation);
            mix(width, first, count);
        });
    };
    switch (s.layer.kind) {
    case MAMBA:
        return all_tiles([&](auto width, int first, int count) {
            constexpr int W = decltype(width)::value;
            if constexpr (W <= LANES) mamba<W>(s, first, count);
        });
    case ATTENTION: {
        Step with_keys = with_room_for_keys(s);
        all_tiles([&](auto width, int first, int count) {
            project<decltype(width)::value>(with_keys, first, count);
        });
        return each_tile(s.call.length, s.call.is_wide, [&](auto width, int first, int count) {
            attend<decltype(width)::value>(with_keys, first, count);
        });
    }
    case MLP:
        return all_tiles([&](auto width, int first, int count) {
            mlp<decltype(width)::value>(s, first, count);
        });
    }
}

// Angles of the pass's positions, for all layers that turn queries and keys
void turn(const Call &call) {
    const Tower &tower = call.tower;
    for (int i = 0; i < tower.num_layers; i++) {
        if (!tower.layers[i].rotary) continue;
        int A = tower.layers[i].head_dim;
        at_least(scratch.angles, size_t(call.length + LANES) * A);
        return each_tile(call.length, call.is_wide, [&](auto width, int first, int count) {
            make_angles<decltype(width)::value>(call, A, first, count);
        });
    }
}

// Mamba layers have tiles of 16: their recurrence is a product of a tile's tokens with each other.
bool may_be_wide(const Tower &tower) {
    auto is_mamba = [](const Layer &layer) { return layer.kind == MAMBA; };
    return std::none_of(tower.layers, tower.layers + tower.num_layers, is_mamba);
}

void run(const Call &call, const int64_t *ids, const float *const *modulations, const Past *past,
         const Outputs *out, float *hidden) {
    const Tower &tower = call.tower;
    int D = tower.width;
    at_least(scratch.h, size_t(call.length + LANES) * D);
    at_least(scratch.y, size_t(call.length + LANES) * D);
    each_tile(call.length, call.is_wide, [&](auto width, int first, int count) {
        embed<decltype(width)::value>(tower, ids, first, count);
    });
    turn(call);
    Before before{true, nullptr};
    for (int i = 0; i < tower.num_layers; i++) {
        const float *modulation = modulations ? modulations[i] : nullptr;
        run_layer({call, tower.layers[i], past[i], out ? out[i] : Outputs{}}, before, modulation);
        before = {false, modulation ? modulation + 2 * D : nullptr};
    }
    each_tile(call.length, call.is_wide, [&](auto width, int first, int count) {
        constexpr int W = decltype(width)::value;
        float *h = scratch.h.data() + long(first) * D, *u = at_least(scratch.u, size_t(D) * W);
        if (!before.is_first) add_residual<W>(scratch.y.data() + long(first) * D, before.gate, h, 0, D);
        norm<W>(call.team, h, tower.norm, D, tower.eps, u);
        to_rows<W>(u, D, count, hidden + long(first) * D, D);
    });
}

template <int W>
void linear(Team &team, const Weight &w, int rows, int K, const float *x, int count, float *y) {
    float *lanes = at_least(scratch.u, size_t(K) * W), *out = at_least(scratch.a, size_t(rows) * W);
    for (int first = 0; first < K; first += 16)
        for (int l = 0; l < W; l++)
            for (int f = first; f < std::min(K, first + 16); f++)
                lanes[size_t(f) * W + l] = x[long(std::min(l, count - 1)) * K + f];
    Input<W> in = as_input<W>(team, w, lanes, K, at_least(scratch.bytes, input_bytes<W>(K)));
    matrix<W>(team, w, rows, in, nullptr, out);
    to_rows<W>(out, rows, count, y, rows);
}

}  // namespace twotower

using namespace twotower;

// length >= 1 tokens of one row after num_past others; past and out have an entry for each layer,
// out may be null. 1 if an id is outside the vocabulary, else 0.
extern "C" int32_t twotower_pass(const Tower *tower, int32_t length, int32_t num_past, int32_t causal,
                                 int32_t threads, const int64_t *ids,
                                 const float *const *modulations, const Past *past,
                                 const Outputs *out, float *hidden) {
    for (int t = 0; t < length; t++)
        if (ids[t] < 0 || ids[t] >= tower->vocabulary + (tower->mask != nullptr)) return 1;
    Team team(threads);
    Call call{*tower, length, num_past, causal != 0, may_be_wide(*tower), team};
    run(call, ids, modulations, past, out, hidden);
    return 0;
}

// out.ssm of the Mamba layers after the first `count` >= 0 tokens of a pass that left their inputs.
extern "C" void twotower_states(const Tower *tower, int32_t count, int32_t threads,
                                const Past *past, const Outputs *out) {
    Team team(threads);
    Call call{*tower, count, 0, true, false, team};
    for (int i = 0; i < tower->num_layers; i++)
        if (tower->layers[i].kind == MAMBA) state_after({call, tower->layers[i], past[i], out[i]}, count);
}

// y (length, rows) = x (length, K) w^T for any length >= 1.
extern "C" void twotower_linear(const Weight *w, int32_t rows, int32_t K, int32_t threads,
                                const float *x, int32_t length, float *y) {
    Team team(threads);
    each_tile(length, true, [&](auto width, int first, int count) {
        linear<decltype(width)::value>(team, *w, rows, K, x + long(first) * K, count,
                                       y + long(first) * rows);
    });
}
