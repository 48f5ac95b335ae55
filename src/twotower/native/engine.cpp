// One tower's pass over any number of tokens of any number of rows, in one call.
//
// Small models wait for dispatch, not for arithmetic; here nothing is dispatched. Activations lie
// feature by feature, the tokens of a tile (lanes) side by side, so that every operation runs over
// the lanes and a weight, read once, serves all of them, of whichever row they are. A longer pass goes
// tile by tile through one layer and then through the next.
#include "attention.h"
#include "experts.h"
#include "mamba.h"
#include "pack.h"
#include "ranking.h"

namespace twotower {

// h += gate y of features begin to end; gate (width,), null for 1
template <int W>
void add_residual(const float *y, const float *gate, float *h, int begin, int end) {
    if (gate == nullptr) {
        for (int i = begin * W; i < end * W; i++) h[i] += y[i];
        return;
    }
    for (int f = begin; f < end; f++)
        for (int l = 0; l < W; l++) h[f * W + l] += y[f * W + l] * gate[f];
}

template <int W>
void embed(const Call &call, const Tile &tile) {
    const Tower &tower = call.tower;
    float *h = scratch.h.data() + long(tile.first_lane) * tower.width;
    float *wide = at_least(scratch.u, tower.width);
    each_segment(call, tile, [&](const Segment &s) {
        const Row &row = call.rows[s.row];
        for (int t = 0; t < s.count; t++) {
            int64_t id = row.ids[s.at + t];
            const float *own = wide;
            if (id == tower.vocabulary) own = tower.mask + long(std::min(s.at + t, tower.masks - 1)) * tower.width;
            else Values{tower.embeddings, tower.dtype, tower.width}.read_row(id, wide);
            float *lane = h + s.lane + t;
            for (int f = 0; f < tower.width; f++) lane[f * W] = own[f];
            if (row.added)
                for (int f = 0; f < tower.width; f++) lane[f * W] += row.added[f];
        }
    });
    for (int f = 0; f < tower.width; f++)
        for (int l = tile.count; l < W; l++) h[f * W + l] = h[f * W + tile.count - 1];
}

// What the residual of a tile gets from the layer before (y times gate, none before the first).
struct Before {
    bool is_first;
    const float *gate;
};

// A tile's input of a layer in scratch.u; modulation: shift, scale, gate (3, width) or null
template <int W>
void pre_norm(const Step &s, const Tile &tile, Before before, const float *modulation) {
    int D = s.call.tower.width;
    const float *y = scratch.y.data() + long(tile.first_lane) * D, *m = modulation;
    float *h = scratch.h.data() + long(tile.first_lane) * D, *u = at_least(scratch.u, size_t(D) * W);
    bool modulates_first = s.layer.kind != MLP && s.layer.kind != EXPERTS;  // a fact of the released weights
    over_features<W>(s.call.team, D, D, [=](int begin, int end) {
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
        each_tile(s.call, [&](auto width, const Tile &tile) {
            pre_norm<decltype(width)::value>(s, tile, before, modulation);
            mix(width, tile);
        });
    };
    switch (s.layer.kind) {
    case MAMBA:
        return all_tiles([&](auto width, const Tile &tile) { mamba<decltype(width)::value>(s, tile); });
    case ATTENTION: {
        make_room_for_keys(s);
        all_tiles([&](auto width, const Tile &tile) { project<decltype(width)::value>(s, tile); });
        return each_tile(s.call, [&](auto width, const Tile &tile) { attend<decltype(width)::value>(s, tile); });
    }
    case MLP:
        return all_tiles([&](auto width, const Tile &tile) { mlp<decltype(width)::value>(s, tile); });
    case EXPERTS:
        make_room_for_experts(s);
        all_tiles([&](auto width, const Tile &tile) { route<decltype(width)::value>(s, tile); });
        run_experts(s);
        return each_tile(s.call, [&](auto width, const Tile &tile) { add_routed<decltype(width)::value>(s, tile); });
    }
}

// Angles of the pass's positions, for all layers that turn queries and keys
void turn(const Call &call) {
    const Tower &tower = call.tower;
    for (int i = 0; i < tower.num_layers; i++) {
        if (!tower.layers[i].rotary) continue;
        int A = tower.layers[i].head_dim;
        at_least(scratch.angles, size_t(call.num_lanes) * A);
        return each_tile(call, [&](auto width, const Tile &tile) {
            make_angles<decltype(width)::value>(call, A, tile);
        });
    }
}

void run(const Call &call, const float *const *modulations) {
    const Tower &tower = call.tower;
    int D = tower.width;
    std::vector<RowState> states(call.num_rows);
    at_least(scratch.h, size_t(call.num_lanes) * D);
    at_least(scratch.y, size_t(call.num_lanes) * D);
    each_tile(call, [&](auto width, const Tile &tile) { embed<decltype(width)::value>(call, tile); });
    turn(call);
    Before before{true, nullptr};
    for (int i = 0; i < tower.num_layers; i++) {
        const float *modulation = modulations ? modulations[i] : nullptr;
        for (int r = 0; r < call.num_rows; r++) {
            const Row &row = call.rows[r];
            states[r] = {row.past[i], row.out ? row.out[i] : Outputs{}, row.length, row.num_past, row.depths, row.sees};
        }
        run_layer({call, tower.layers[i], states.data()}, before, modulation);
        before = {false, modulation ? modulation + 2 * D : nullptr};
    }
    each_tile(call, [&](auto width, const Tile &tile) {
        constexpr int W = decltype(width)::value;
        float *h = scratch.h.data() + long(tile.first_lane) * D, *u = at_least(scratch.u, size_t(D) * W);
        if (!before.is_first) add_residual<W>(scratch.y.data() + long(tile.first_lane) * D, before.gate, h, 0, D);
        norm<W>(call.team, h, tower.norm, D, tower.eps, u);
        each_segment(call, tile, [&](const Segment &s) {
            to_rows<W>(u + s.lane, D, s.count, call.rows[s.row].hidden + long(s.at) * D, D);
        });
    });
}

// The tokens x (count, K) of a tile side by side, as a product takes them
template <int W>
Input<W> from_rows(Team &team, const Weight &w, int K, const float *x, int count) {
    float *lanes = at_least(scratch.u, size_t(K) * W);
    to_lanes<W>([=](int l) { return x + long(l) * K; }, K, count, lanes);
    return input_of<W>(team, w, lanes, K, count);
}

template <int W>
void linear(Team &team, const Weight &w, int rows, int K, const float *x, int count, float *y) {
    Input<W> in = from_rows<W>(team, w, K, x, count);
    if (in.bytes)
        return team.split(blocks_of(rows), [&, y](int begin, int end) {
            auto own = w.int4 ? integer_product<W, true, Order::TOKENS_FIRST>
                              : integer_product<W, false, Order::TOKENS_FIRST>;
            own(w, rows, in, nullptr, y, begin, end);
        });
    float *out = at_least(scratch.a, size_t(rows) * W);
    matrix<W>(team, w, rows, in, nullptr, out);
    to_rows<W>(out, rows, count, y, rows);
}

// work(width, first, count) for each tile of a row of tokens
template <typename Work>
void tiles_of(int length, Work work) {
    for (int first = 0, count; first < length; first += count) {
        count = tile_of(length - first);
        with_width(width_of(count), [&](auto width) { work(width, first, count); });
    }
}

}  // namespace twotower

using namespace twotower;

// One pass over the tokens of all rows. 1 if an id is outside the vocabulary, else 0.
extern "C" int32_t twotower_pass(const Tower *tower, int32_t num_rows, const Row *rows, int32_t causal,
                                 int32_t kv_dtype, int32_t threads, const float *const *modulations) {
    for (int r = 0; r < num_rows; r++)
        for (int t = 0; t < rows[r].length; t++)
            if (rows[r].ids[t] < 0 || rows[r].ids[t] >= tower->vocabulary + (tower->mask != nullptr)) return 1;
    Team team(threads);
    Call call{*tower, rows, num_rows, causal != 0, kv_dtype, team, {}, {}};
    make_tiles(call);
    run(call, modulations);
    return 0;
}

// out.ssm of the Mamba layers after the first `count` >= 0 tokens of a pass that left their inputs.
extern "C" void twotower_states(const Tower *tower, int32_t count, int32_t threads,
                                const Past *past, const Outputs *out) {
    Team team(threads);
    for (int i = 0; i < tower->num_layers; i++)
        if (tower->layers[i].kind == MAMBA) state_after(team, tower->layers[i], past[i], out[i], count);
}

// Of a row's tokens behind its num_past, those at the `count` indices of a path come first, in its order: their
// keys and values move there. Indices ascend; a key or value of a feature takes `size` bytes.
extern "C" void twotower_move(const Tower *tower, const Past *past, int32_t size, int32_t num_past,
                              const int32_t *path, int32_t count) {
    for (int i = 0; i < tower->num_layers; i++) {
        const Layer &layer = tower->layers[i];
        if (layer.kind != ATTENTION) continue;
        long width = long(layer.kv_heads) * layer.head_dim * size;
        for (void *part : {past[i].k, past[i].v}) {
            char *behind = static_cast<char *>(part) + num_past * width;
            for (int to = 0; to < count; to++)
                if (path[to] != to) std::copy_n(behind + path[to] * width, width, behind + to * width);
        }
    }
}

// y (length, rows) = x (length, K) w^T for any length >= 1.
extern "C" void twotower_linear(const Weight *w, int32_t rows, int32_t K, int32_t threads,
                                const float *x, int32_t length, float *y) {
    Team team(threads);
    tiles_of(length, [&](auto width, int first, int count) {
        linear<decltype(width)::value>(team, *w, rows, K, x + long(first) * K, count, y + long(first) * rows);
    });
}

// ids (length,) of the largest of w x for each of x (length, K), as `best_rows` says.
extern "C" void twotower_best(const Weight *w, int32_t rows, int32_t K, int32_t threads, const float *x,
                              int32_t length, const int64_t *unused, int32_t num_unused, int64_t *ids) {
    Team team(threads);
    tiles_of(length, [&](auto width, int first, int count) {
        constexpr int W = decltype(width)::value;
        best_rows<W>(team, *w, rows, from_rows<W>(team, *w, K, x + long(first) * K, count), unused, num_unused,
                     ids + first);
    });
}

// Adds to each position of logits (length, rows) but the first what the token before it does: w (rows, K) by
// inner (ids, K), from left to right. ids (length,): where one is `mask`, the most probable stands for it,
// number n of the logits being id drafts[n], or n itself where drafts is null.
extern "C" void twotower_bigrams(const Weight *w, int32_t rows, int32_t K, int32_t threads, const float *inner,
                                 const int64_t *drafts, int64_t mask, const int64_t *ids, int32_t length,
                                 float *logits) {
    Team team(threads);
    float *added = at_least(scratch.y, rows);
    for (int t = 1; t < length; t++) {
        const float *before = logits + long(t - 1) * rows;
        int64_t id = ids[t - 1];
        if (id == mask) {
            id = largest_of(before, rows);
            if (drafts) id = drafts[id];
        }
        with_width(width_of(1), [&](auto width) {
            linear<decltype(width)::value>(team, *w, rows, K, inner + id * K, 1, added);
        });
        for (int v = 0; v < rows; v++) logits[long(t) * rows + v] += added[v];
    }
}

// Of each position of logits (length, size): the `count` most probable tokens and how probable they are, as
// `rank` says; chosen (length,) or null.
extern "C" void twotower_rank(const float *logits, int32_t length, int32_t size, int32_t count,
                              const int64_t *chosen, const int64_t *unused, int32_t num_unused, int64_t *ids,
                              float *probs) {
    for (long t = 0; t < length; t++)
        rank(logits + t * size, size, count, chosen ? chosen[t] : -1, unused, num_unused, ids + t * count,
             probs + t * count);
}

// A matrix (rows, K) of a dtype to the int8 or int4 numbers that products take, at `packed`.
extern "C" void twotower_pack(const void *values, int32_t dtype, int32_t rows, int32_t K, int32_t is_int4,
                              int32_t threads, uint8_t *packed) {
    Team team(threads);
    team.split(blocks_of(rows), [&](int begin, int end) {
        pack_blocks({values, dtype, K}, rows, is_int4 != 0, packed, begin, end);
    });
}
