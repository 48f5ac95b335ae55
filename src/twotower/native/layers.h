// What all layers share: a pass, its tiles of tokens, scratch memory, norms; and the MLP.
//
// The equations are those of system.md sections 2 and 3; the PyTorch layers are the truth that
// tests compare with. What follows a product stays float32.
#pragma once

#include <vector>

#include "products.h"

namespace twotower {

constexpr int WIDE = 64;  // tokens of a tile where a weight that is read once serves more

// Tokens of one row in a tile: `count` from its `at`-th on, in the lanes from `lane` on.
struct Segment {
    int row, at, count, lane;
};

// Tokens that are computed side by side: `count` of `width` lanes, of which the
// first is lane `first_lane` of the pass.
struct Tile {
    int first_lane, width, count, first_segment, num_segments;
};

struct Call {
    const Tower &tower;
    const Row *rows;
    int num_rows;
    bool causal;
    int kv_dtype;  // of keys and values, by `layout.DTYPES`
    Team &team;
    std::vector<Tile> tiles;
    std::vector<Segment> segments;
    int num_lanes = 0;
};

// One row's side of a layer.
struct RowState {
    Past past;
    Outputs out;
    int length, num_past;
    const int32_t *depths;
    const uint32_t *sees;

    bool is_last(const Segment &s) const { return s.at + s.count == length; }
};

// One layer of a pass.
struct Step {
    const Call &call;
    const Layer &layer;
    RowState *rows;
};

template <typename Weights>
const Weights &weights_of(const Layer &layer) {
    return *reinterpret_cast<const Weights *>(layer.weights);
}

// work(width) with the width of a tile as a type. A token's numbers do not depend on it, but for 1.
template <typename Work>
void with_width(int width, Work work) {
    if (width == 1) work(std::integral_constant<int, 1>());
    else if (width <= 4) work(std::integral_constant<int, 4>());
    else if (width <= 8) work(std::integral_constant<int, 8>());
    else if (width <= LANES) work(std::integral_constant<int, LANES>());
    else if (width <= 2 * LANES) work(std::integral_constant<int, 2 * LANES>());
    else work(std::integral_constant<int, WIDE>());
}

inline int width_of(int count) {
    for (int width : {1, 4, 8, LANES, 2 * LANES})
        if (count <= width) return width;
    return WIDE;
}

// How many of the `left` tokens of a long row its next tile takes; fewer than 8 lanes stay nobody's
inline int tile_of(int left) {
    for (int width : {WIDE, 2 * LANES})
        if (left > width - 8) return std::min(left, width);
    return std::min(left, LANES);
}

// The tiles of a pass: short rows share one, a long row has its own.
inline void make_tiles(Call &call) {
    int count = 0;
    auto add = [&](int row, int at, int tokens) {
        call.segments.push_back({row, at, tokens, count});
        count += tokens;
    };
    auto close = [&] {
        if (count == 0) return;
        int known = call.tiles.empty() ? 0 : call.tiles.back().first_segment + call.tiles.back().num_segments;
        call.tiles.push_back({call.num_lanes, width_of(count), count, known, int(call.segments.size()) - known});
        call.num_lanes += call.tiles.back().width;
        count = 0;
    };
    for (int r = 0; r < call.num_rows; r++) {
        int length = call.rows[r].length;
        if (length > LANES || count + length > WIDE) close();
        for (int at = 0; at < length; at += call.segments.back().count) {
            add(r, at, length > LANES ? tile_of(length - at) : length);
            if (length > LANES) close();
        }
    }
    close();
}

// work(width, tile) for each tile, in order; width is its width as a type.
template <typename Work>
void each_tile(const Call &call, Work work) {
    for (const Tile &tile : call.tiles)
        with_width(tile.width, [&](auto width) { work(width, tile); });
}

template <typename Work>
void each_segment(const Call &call, const Tile &tile, Work work) {
    for (int i = 0; i < tile.num_segments; i++) work(call.segments[tile.first_segment + i]);
}

// e^x of each lane, to 1e-7 of it, where x lies between -87.3 and 88.3; NaN stays NaN
template <int V>
inline Floats<V> exponential_within(Floats<V> x) {
    Floats<V> shift = Floats<V>{} + 0x1.8p23f;
    Floats<V> n = add_product<V>(shift, x, 1.44269504088896341f) - shift;  // rounded to a whole number
    Floats<V> r = add_product<V>(add_product<V>(x, n, -0.693359375f), n, 2.12194440e-4f);
    Floats<V> p = Floats<V>{} + 1.9875691500e-4f;
    for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = add_product<V>(Floats<V>{} + next, p, r);
    p = add_product<V>(r, p, r * r) + 1.0f;
    Ints<V> bits = (__builtin_convertvector(n, Ints<V>) + 127) << 23;
    Floats<V> scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

template <int V>
inline Floats<V> exponential(Floats<V> x) {
    Floats<V> least = Floats<V>{} - 87.3f, most = Floats<V>{} + 88.3f;
    x = x < least ? least : x;
    return exponential_within<V>(x > most ? most : x);
}

inline float exponential(float x) { return exponential<1>(Floats<1>{x})[0]; }

// x / (1 + e^-x) of `count` numbers, in place
inline void silu(float *x, long count) {
    long i = 0;
    for (; i + VECTOR <= count; i += VECTOR)
        floats<VECTOR>(x + i) = floats<VECTOR>(x + i) / (1.0f + exponential<VECTOR>(-floats<VECTOR>(x + i)));
    for (; i < count; i++) x[i] = x[i] / (1.0f + exponential(-x[i]));
}

inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

template <typename T>
T *at_least(std::vector<T> &buffer, size_t count) {
    if (buffer.size() < count) buffer.resize(count);
    return buffer.data();
}

// Memory of a pass, kept for the next one. All tokens: h, y, q, keys, values, window, angles. One
// tile: u, a, b, flat, rows, bytes. ssm: a layer's state between tiles. routed_in, routed (lane, K): what routed
// experts get and make. All belong to the thread that runs the pass but `own` and `lanes`, which are of each
// helper.
struct Scratch {
    std::vector<float> h, y, q, keys, values, window, angles, routed_in, routed;
    std::vector<float> u, a, b, flat, rows, ssm, own, lanes;
    std::vector<uint8_t> bytes;
};

inline thread_local Scratch scratch;

constexpr int PARTS = 16;  // of a sum of squares: features p, p + 16, p + 32 and so on

// part[PARTS][W], those from begin to end: in the same order for one token and for many.
template <int W>
void square_parts(const float *x, int width, int begin, int end, float *part) {
    std::fill(part + begin * W, part + end * W, 0.0f);
    int first = 0;
    if constexpr (W == 1) {
        Floats<VECTOR> sum[PARTS / VECTOR] = {};
        for (; first + PARTS <= width; first += PARTS)
            for (int p = 0; p < PARTS / VECTOR; p++) {
                Floats<VECTOR> own = floats<VECTOR>(x + first + p * VECTOR);
                sum[p] = add_product<VECTOR>(sum[p], own, own);
            }
        std::memcpy(part, &sum, sizeof sum);
    }
    for (; first < width; first += PARTS)
        for (int p = begin; p < std::min(end, width - first); p++)
            for (int l = 0; l < W; l++) {
                float value = x[long(first + p) * W + l];
                part[p * W + l] = add_product(part[p * W + l], value, value);
            }
}

// scale[W]: 1 / rms
template <int W>
void scale_by_parts(const float *part, int width, float eps, float *scale) {
    float sum[W] = {};
    for (int p = 0; p < PARTS; p++)
        for (int l = 0; l < W; l++) sum[l] += part[p * W + l];
    for (int l = 0; l < W; l++) scale[l] = 1.0f / std::sqrt(sum[l] / width + eps);
}

template <int W>
void multiply(const float *x, const float *scale, const float *weight, int begin, int end, float *y) {
    float own[W];
    std::copy(scale, scale + W, own);
    for (int f = begin; f < end; f++)
        for (int l = 0; l < W; l++) y[f * W + l] = x[f * W + l] * own[l] * weight[f];
}

template <int W>
void norm(Team &team, const float *x, const float *weight, int width, float eps, float *y) {
    float part[PARTS * W], scale[W];
    over_features<W>(team, PARTS, width, [x, width, &part](int begin, int end) {
        square_parts<W>(x, width, begin, end, part);
    });
    scale_by_parts<W>(part, width, eps, scale);
    over_features<W>(team, width, width, [&scale, x, weight, y](int begin, int end) {
        multiply<W>(x, scale, weight, begin, end, y);
    });
}

// x (1 + scale) + shift, both (width,), of features begin to end
template <int W>
void modulate(float *x, const float *shift, const float *scale, int begin, int end) {
    for (int f = begin; f < end; f++)
        for (int l = 0; l < W; l++) x[f * W + l] = x[f * W + l] * (1.0f + scale[f]) + shift[f];
}

// Lanes x[width][W] to rows y (count, width), `stride` floats apart; 16 features at a time, since
// rows may lie so far apart that they push each other out of the cache
template <int W>
void to_rows(const float *x, int width, int count, float *y, long stride) {
    constexpr int V = std::min(W, 16);
    for (int l = 0; l < count; l += V)
        for (int first = 0; first < width; first += 16) {
            int here = std::min(count - l, V), features = std::min(width - first, 16);
            if (W >= 16 && here == 16 && features == 16)
                turn<16>(x + long(first) * W + l, W, y + l * stride + first, stride);
            else if (W >= 16 && features == 16) {
                float rows[16 * 16];
                turn<16>(x + long(first) * W + l, W, rows, 16);
                for (int t = 0; t < here; t++) std::copy_n(rows + t * 16, 16, y + (l + t) * stride + first);
            } else
                for (int t = 0; t < here; t++)
                    for (int f = 0; f < features; f++) y[(l + t) * stride + first + f] = x[long(first + f) * W + l + t];
        }
}

// Lanes [K][W] of `count` tokens, of which number l is at row(l) (K,); the last one's in those left over
template <int W, typename Row>
void to_lanes(Row row, int K, int count, float *lanes) {
    for (int first = 0; first < K; first += 16)
        for (int l = 0; l < W; l++) {
            const float *x = row(std::min(l, count - 1));
            for (int f = first; f < std::min(K, first + 16); f++) lanes[size_t(f) * W + l] = x[f];
        }
}

// Of matrices that share an input, one that wants it in whole numbers, if there is one: a GGUF file may have
// others in full precision.
inline const Weight &packed_of(const Weight &one, const Weight &other) {
    return one.int8 || one.int4 ? one : other;
}

// The input of the next product: `count` tokens x[K][W]
template <int W>
Input<W> input_of(Team &team, const Weight &w, const float *x, int K, int count) {
    return as_input<W>(team, w, x, K, count, at_least(scratch.bytes, input_bytes<W>(K)));
}

inline bool exists(const Weight &w) { return w.full || w.half || w.int8 || w.int4; }

// The matrices of an MLP of `inner` features; no gate: squared ReLU.
struct Dense {
    Weight up, gate, down;
    const float *up_bias, *gate_bias, *down_bias;
    int inner;
};

// a[inner][W], rows of blocks begin to end: relu(up x)^2, where NaN stays NaN
template <int W>
void squared(const Dense &w, const Input<W> &in, float *a, int begin, int end) {
    product_blocks<W>(w.up, w.inner, in, w.up_bias, a, begin, end);
    for (long i = long(begin) * ROWS * W; i < long(std::min(w.inner, end * ROWS)) * W; i++) {
        float x = a[i] > 0.0f ? a[i] : (a[i] != a[i] ? a[i] : 0.0f);
        a[i] = x * x;
    }
}

// The same: silu(gate x) times up x
template <int W>
void gated(const Dense &w, const Input<W> &in, float *a, float *up, int begin, int end) {
    product_blocks<W>(w.gate, w.inner, in, w.gate_bias, a, begin, end);
    product_blocks<W>(w.up, w.inner, in, w.up_bias, up, begin, end);
    long first = long(begin) * ROWS * W, last = long(std::min(w.inner, end * ROWS)) * W;
    silu(a + first, last - first);
    for (long i = first; i < last; i++) a[i] *= up[i];
}

// y[width][W] of `count` tokens x[width][W]
template <int W>
void dense(Team &team, const Dense &w, const float *x, int width, int count, float *y) {
    float *a = at_least(scratch.a, size_t(w.inner) * W);
    float *up = exists(w.gate) ? at_least(scratch.flat, size_t(w.inner) * W) : nullptr;
    Input<W> in = input_of<W>(team, packed_of(w.up, w.gate), x, width, count);
    team.split(blocks_of(w.inner), [&w, &in, a, up](int begin, int end) {
        if (up) gated<W>(w, in, a, up, begin, end);
        else squared<W>(w, in, a, begin, end);
    });
    matrix<W>(team, w.down, width, input_of<W>(team, w.down, a, w.inner, count), w.down_bias, y);
}

// A tile: scratch.u to its part of scratch.y
template <int W>
void mlp(const Step &s, const Tile &tile) {
    const auto &w = weights_of<MLPWeights>(s.layer);
    Dense own{w.up_proj, w.gate_proj, w.down_proj, w.up_proj_bias.full, w.gate_proj_bias.full, w.down_proj_bias.full,
              s.layer.inner};
    int width = s.call.tower.width;
    dense<W>(s.call.team, own, scratch.u.data(), width, tile.count, scratch.y.data() + long(tile.first_lane) * width);
}

}  // namespace twotower
