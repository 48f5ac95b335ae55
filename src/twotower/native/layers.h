// What all layers share: a pass, its tiles of up to 16 tokens, scratch memory, norms; and the MLP.
//
// The equations are those of system.md sections 2 and 3; the PyTorch layers are the truth that
// tests compare with. What follows a product stays float32.
#pragma once

#include <vector>

#include "products.h"

namespace twotower {

struct Call {
    const Tower &tower;
    int length, num_past;
    bool causal;
    Team &team;
};

// One layer of a pass. A tile's tokens are `first` to `first + count`, W lanes wide.
struct Step {
    const Call &call;
    const Layer &layer;
    Past past;
    Outputs out;

    bool is_last(int first, int count) const { return first + count == call.length; }
};

template <typename Weights>
const Weights &weights_of(const Layer &layer) {
    return *reinterpret_cast<const Weights *>(layer.weights);
}

// work(width, first, count) for each tile of `length` tokens, in order; width is W as a type.
template <typename Work>
void each_tile(int length, Work work) {
    for (int first = 0; first < length; first += LANES) {
        int count = std::min(LANES, length - first);
        if (count == 1) work(std::integral_constant<int, 1>(), first, count);
        else if (count <= 8) work(std::integral_constant<int, 8>(), first, count);
        else work(std::integral_constant<int, LANES>(), first, count);
    }
}

inline float exponential(float x) {
    x = std::min(std::max(x, -87.3f), 88.3f);  // in this order NaN stays NaN
    float n = std::nearbyint(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

template <typename T>
T *at_least(std::vector<T> &buffer, size_t count) {
    if (buffer.size() < count) buffer.resize(count);
    return buffer.data();
}

// Memory of a pass, kept for the next one. All tokens: h, y, q, keys, values, window. One tile: u,
// a, b, flat, bytes. ssm: a layer's state between tiles. All belong to the thread that runs the pass
// but `own`, which is of each helper.
struct Scratch {
    std::vector<float> h, y, q, keys, values, window, u, a, b, flat, ssm, own;
    std::vector<uint8_t> bytes;
};

inline thread_local Scratch scratch;

// Sums of squares over chunks of features: whoever makes them, they are added in one order.
template <int W>
void norm(Team &team, const float *x, const float *weight, int width, float eps, float *y) {
    constexpr int CHUNK = 64;
    int chunks = (width + CHUNK - 1) / CHUNK;
    float *part = at_least(scratch.own, size_t(chunks) * W), scale[W] = {};
    over_features<W>(team, chunks, [x, width, part](int begin, int end) {
        for (int c = begin; c < end; c++) {
            float sum[W] = {};
            for (int f = c * CHUNK; f < std::min(width, (c + 1) * CHUNK); f++)
                for (int l = 0; l < W; l++) sum[l] += x[f * W + l] * x[f * W + l];
            for (int l = 0; l < W; l++) part[c * W + l] = sum[l];
        }
    });
    for (int c = 0; c < chunks; c++)
        for (int l = 0; l < W; l++) scale[l] += part[c * W + l];
    for (int l = 0; l < W; l++) scale[l] = 1.0f / std::sqrt(scale[l] / width + eps);
    over_features<W>(team, width, [&scale, x, weight, y](int begin, int end) {
        float own[W];
        std::copy(scale, scale + W, own);
        for (int f = begin; f < end; f++)
            for (int l = 0; l < W; l++) y[f * W + l] = x[f * W + l] * own[l] * weight[f];
    });
}

// x (1 + scale) + shift, both (width,), of features begin to end
template <int W>
void modulate(float *x, const float *shift, const float *scale, int begin, int end) {
    for (int f = begin; f < end; f++)
        for (int l = 0; l < W; l++) x[f * W + l] = x[f * W + l] * (1.0f + scale[f]) + shift[f];
}

// Lanes x[width][W] to rows y (count, width), `stride` floats apart
template <int W>
void to_rows(const float *x, int width, int count, float *y, long stride) {
    for (int f = 0; f < width; f++)
        for (int t = 0; t < count; t++) y[t * stride + f] = x[f * W + t];
}

// The input of a tile's next product
template <int W>
Input<W> input_of(const Step &s, const Weight &w, const float *x, int K) {
    return as_input<W>(s.call.team, w, x, K, at_least(scratch.bytes, size_t(K + 4) * W));
}

// A tile: scratch.u to its part of scratch.y. relu(x)^2 keeps NaN.
template <int W>
void mlp(const Step &s, int first, int) {
    const auto &w = weights_of<MLPWeights>(s.layer);
    int width = s.call.tower.width, inner = s.layer.inner;
    float *a = at_least(scratch.a, size_t(inner) * W), *y = scratch.y.data() + long(first) * width;
    Input<W> in = input_of<W>(s, w.up_proj, scratch.u.data(), width);
    matrix<W>(s.call.team, w.up_proj, inner, in, w.up_proj_bias.full, a, [a](int begin, int end) {
        for (long i = long(begin) * W; i < long(end) * W; i++) {
            float x = a[i] > 0.0f ? a[i] : (a[i] != a[i] ? a[i] : 0.0f);
            a[i] = x * x;
        }
    });
    matrix<W>(s.call.team, w.down_proj, width, input_of<W>(s, w.down_proj, a, inner), w.down_proj_bias.full, y);
}

}  // namespace twotower
