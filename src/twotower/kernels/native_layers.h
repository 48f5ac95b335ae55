// The layers of a pass: norms, attention, Mamba-2, dense MLP.
//
// The equations are those of system.md sections 2 and 3; the PyTorch layers are the truth that
// tests compare with. What follows a product stays float32.
#pragma once

#include <vector>

#include "native_products.h"

namespace twotower {

struct Sizes {
    int32_t vocabulary, width, q_heads, kv_heads, head_dim, heads, head_size, groups, state, taps, inner;
    float eps;
};

struct Past {  // of one layer and row; what a kind does not need is null
    const float *k, *v;  // (S, Hk, A)
    const float *conv;   // (taps - 1, C), oldest first
    const float *ssm;    // (H, P, N)
};

struct Fresh {  // what the pass leaves behind; null where nobody asks
    float *k, *v;      // (L, Hk, A)
    float *window;     // (taps - 1 + L, C)
    float *mixed;      // (L, C): heads, B, C after the convolution
    float *step;       // (L, H): dt after softplus
    float *ssm;        // (H, P, N)
};

struct Call {
    const Sizes &sizes;
    int length, num_past;
    bool causal;
    Team &team;
};

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

// y[width][W]: the sum of rows of v (count, width), weighted by p[count][W].
template <int W>
void weighted_sum(const float *v, long row, int width, int count, const float *p, float *y) {
    if (W > 1) return product<W>(v, 1, row, width, count, p, nullptr, y);
    std::fill(y, y + width, 0.0f);
    for (int i = 0; i < count; i++)
        for (int f = 0; f < width; f++) y[f] += p[i] * v[i * row + f];
}

inline float *room_for(std::vector<float> &room, size_t count) {
    if (room.size() < count) room.resize(count);
    return room.data();
}

struct Scratch {
    std::vector<float> h, u, y, a, b, c, d, own;
    std::vector<uint8_t> bytes;
    void need(const Sizes &s, int W, int inner) {
        for (auto *one : {&h, &u, &y}) room_for(*one, size_t(s.width) * W);
        room_for(a, size_t(inner) * W);
        room_for(b, size_t(inner) * W);
        room_for(c, size_t(inner) * (W + 8));
        room_for(d, size_t(inner) * (W + 8));
        size_t widest = size_t(std::max(s.width, inner) + 4) * W;
        if (bytes.size() < widest) bytes.resize(widest);
    }
};

inline thread_local Scratch scratch;

// Sums of squares over chunks of features: whoever makes them, they are added in one order.
template <int W>
void norm(Team &team, const float *x, const float *weight, int width, float eps, float *y) {
    constexpr int CHUNK = 64;
    int chunks = (width + CHUNK - 1) / CHUNK;
    float *part = room_for(scratch.own, size_t(chunks) * W), scale[W] = {};
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

template <int W>
void to_tokens(const float *x, int width, int length, float *y, long stride) {
    for (int f = 0; f < width; f++)
        for (int t = 0; t < length; t++) y[t * stride + f] = x[f * W + t];
}

// One head's share: out[A][W], scores of S + L keys in between.
template <int W>
void attend(const Call &call, const float *q, const Past &past, const float *keys,
            const float *values, float *y) {
    const Sizes &s = call.sizes;
    int L = call.length, S = call.num_past, A = s.head_dim, kv_width = s.kv_heads * A;
    float *score = room_for(scratch.own, size_t(S + L + A) * W), *rest = score + long(S + L) * W;
    product<W>(past.k, kv_width, 1, S, A, q, nullptr, score);
    product<W>(keys, kv_width, 1, L, A, q, nullptr, score + long(S) * W);
    if (call.causal)
        for (int j = 0; j < L; j++)
            for (int l = 0; l < std::min(j, W); l++) score[long(S + j) * W + l] = -INFINITY;
    float root = 1.0f / std::sqrt(float(A)), most[W], sum[W] = {};
    for (int l = 0; l < W; l++) most[l] = -INFINITY;
    for (int j = 0; j < S + L; j++)
        for (int l = 0; l < W; l++) most[l] = std::max(score[long(j) * W + l], most[l]);
    for (int j = 0; j < S + L; j++)
        for (int l = 0; l < W; l++) {
            float &p = score[long(j) * W + l];
            float away = (p - most[l]) * root;
            p = away < -87.0f ? 0.0f : exponential(away);  // a hidden key has no weight at all
            sum[l] += p;
        }
    weighted_sum<W>(past.v, kv_width, A, S, score, y);
    weighted_sum<W>(values, kv_width, A, L, score + long(S) * W, rest);
    for (int a = 0; a < A; a++)
        for (int l = 0; l < W; l++) y[a * W + l] = (y[a * W + l] + rest[a * W + l]) / sum[l];
}

// w: q, q bias, k, k bias, v, v bias, o, o bias
template <int W>
void attention(const Call &call, const Weight *w, const Past &past, const Fresh &fresh) {
    const Sizes &s = call.sizes;
    int L = call.length, A = s.head_dim, q_width = s.q_heads * A, kv_width = s.kv_heads * A;
    uint8_t *bytes = scratch.bytes.data();
    float *q = scratch.a.data(), *out = scratch.b.data(), *flat = scratch.d.data();
    float *keys = scratch.c.data(), *values = keys + W * kv_width;
    if (fresh.k) keys = fresh.k, values = fresh.v;
    Input<W> in = as_input<W>(call.team, w[0], scratch.u.data(), s.width, bytes);
    matrix<W>(call.team, w[2], kv_width, in, w[3].wide, flat);
    to_tokens<W>(flat, kv_width, L, keys, kv_width);
    matrix<W>(call.team, w[4], kv_width, in, w[5].wide, flat);
    to_tokens<W>(flat, kv_width, L, values, kv_width);
    matrix<W>(call.team, w[0], q_width, in, w[1].wide, q);
    call.team.split(s.q_heads, [&](int begin, int end) {
        for (int head = begin; head < end; head++) {
            int at = head / (s.q_heads / s.kv_heads) * A;
            Past own{past.k + at, past.v + at, nullptr, nullptr};
            attend<W>(call, q + head * A * W, own, keys + at, values + at, out + head * A * W);
        }
    });
    matrix<W>(call.team, w[6], s.width, as_input<W>(call.team, w[6], out, q_width, bytes), w[7].wide,
              scratch.y.data());
}

// Depthwise over time, then silu, in place: channels begin to end of x[channels][W] after the past
// (taps - 1, C).
template <int W>
void convolve(const Sizes &s, const Weight *w, int channels, const float *past, float *x, int begin,
              int end) {
    const float *weight = w[2].wide, *bias = w[3].wide;
    int kept = s.taps - 1, stride = kept + W;
    float *window = room_for(scratch.own, size_t(end - begin) * stride);
    for (int k = 0; k < kept; k++)
        for (int c = begin; c < end; c++)
            window[long(c - begin) * stride + k] = past[long(k) * channels + c];
    for (int c = begin; c < end; c++)
        for (int l = 0; l < W; l++) window[long(c - begin) * stride + kept + l] = x[long(c) * W + l];
    for (int c = begin; c < end; c++) {
        const float *in = window + long(c - begin) * stride;
        float sum[W];
        for (int l = 0; l < W; l++) sum[l] = bias ? bias[c] : 0.0f;
        for (int k = 0; k < s.taps; k++)
            for (int l = 0; l < W; l++) sum[l] += in[k + l] * weight[c * s.taps + k];
        for (int l = 0; l < W; l++) x[long(c) * W + l] = sum[l];
    }
    for (long i = long(begin) * W; i < long(end) * W; i++) x[i] = silu(x[i]);
}

// R rows of next (P, N) = keep state + x[P][W] added (L, N): the state after L tokens.
template <int W, int R>
void advance_rows(const float *state, float keep, const float *x, const float *added, int L, int N,
                  float *next) {
    typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
    int n = 0;
    for (; n + 16 <= N; n += 16) {
        Lanes sum[R];
        for (int r = 0; r < R; r++)
            sum[r] = *reinterpret_cast<const Lanes *>(state + r * N + n) * keep;
        for (int t = 0; t < L; t++) {
            Lanes one = *reinterpret_cast<const Lanes *>(added + t * N + n);
            for (int r = 0; r < R; r++) sum[r] += one * x[r * W + t];
        }
        for (int r = 0; r < R; r++) *reinterpret_cast<Lanes *>(next + r * N + n) = sum[r];
    }
    for (; n < N; n++)
        for (int r = 0; r < R; r++) {
            float sum = state[r * N + n] * keep;
            for (int t = 0; t < L; t++) sum += added[t * N + n] * x[r * W + t];
            next[r * N + n] = sum;
        }
}

template <int W>
void advance(const float *state, float keep, const float *x, const float *added, int L, int P,
             int N, float *next) {
    constexpr int R = W == 1 ? 1 : 8;  // one token: in the order of memory
    int p = 0;
    for (; p + R <= P; p += R)
        advance_rows<W, R>(state + p * N, keep, x + p * W, added, L, N, next + p * N);
    for (; p < P; p++)
        advance_rows<W, 1>(state + p * N, keep, x + p * W, added, L, N, next + p * N);
}

// One head's state next (P, N) after L >= 1 tokens of x[P][W], B (L, N); decay: log, from the start
// through each token; room for L * N numbers in added.
template <int W>
void next_state(const float *dt, const float *decay, const float *x, const float *B,
                const float *state, int L, int P, int N, float *added, float *next) {
    for (int t = 0; t < L; t++) {
        float kept = exponential(decay[L - 1] - decay[t]) * dt[t];
        for (int n = 0; n < N; n++) added[t * N + n] = B[t * N + n] * kept;
    }
    advance<W>(state, exponential(decay[L - 1]), x, added, L, P, N, next);
}

// One head of the recurrence as products: y[P][W] of x[P][W] after the state (P, N).
// near[L][W]: B of each token times C of each; B (L, N); C [N][W]; dt[W].
template <int W>
void scan_head(const Call &call, float A, float D, const float *x, const float *near,
               const float *B, const float *C, const float *dt, const float *state, float *next,
               float *y) {
    int L = call.length, P = call.sizes.head_size, N = call.sizes.state;
    float *mix = room_for(scratch.own, size_t(L + P) * W + size_t(L) * N), *own = mix + L * W;
    float *added = own + P * W, decay[W], total = 0.0f;  // decay: log, from the start through t
    for (int l = 0; l < W; l++) decay[l] = total += dt[l] * A;
    for (int t = 0; t < L; t++)
        for (int l = 0; l < W; l++) {
            float kept = exponential(decay[l] - decay[t]) * dt[t] * near[t * W + l];
            mix[t * W + l] = l < t ? 0.0f : kept;
        }
    for (int t = 0; t < std::min(L, W); t++) mix[t * W + t] += D;
    product<W>(x, W, 1, P, L, mix, nullptr, own);
    product<W>(state, N, 1, P, N, C, nullptr, y);
    for (int l = 0; l < W; l++) {
        float kept = exponential(decay[l]);
        for (int p = 0; p < P; p++) y[p * W + l] = y[p * W + l] * kept + own[p * W + l];
    }
    if (next != nullptr) next_state<W>(dt, decay, x, B, state, L, P, N, added, next);
}

// All heads: xbc[C][W] after the convolution, dt[H][W] after softplus; y feature by feature,
// gated by z.
template <int W>
void scan(const Call &call, const Weight *w, const float *z, const float *xbc, const float *dt,
          const float *state, float *next, float *y) {
    const Sizes &s = call.sizes;
    int L = call.length, P = s.head_size, N = s.state, inner = s.heads * P;
    std::vector<float> near(size_t(s.groups) * L * W), tokens(size_t(s.groups) * L * N);
    for (int g = 0; g < s.groups; g++) {
        const float *B = xbc + long(inner + g * N) * W, *C = B + long(s.groups) * N * W;
        product<W>(B, 1, W, L, N, C, nullptr, near.data() + g * L * W);
        to_tokens<W>(B, N, L, tokens.data() + g * L * N, N);
    }
    call.team.split(s.heads, [&](int begin, int end) {
        for (int head = begin; head < end; head++) {
            int g = head / (s.heads / s.groups);
            long at = long(head) * P * N;
            scan_head<W>(call, -std::exp(w[5].wide[head]), w[6].wide[head], xbc + long(head) * P * W,
                         near.data() + g * L * W, tokens.data() + g * L * N,
                         xbc + long(inner + (s.groups + g) * N) * W, dt + head * W, state + at,
                         next ? next + at : nullptr, y + long(head) * P * W);
            for (long i = long(head) * P * W; i < long(head + 1) * P * W; i++) y[i] *= silu(z[i]);
        }
    });
}

// fresh.ssm after the first `count` tokens of a pass that left `mixed` and `step`.
inline void state_after(const Sizes &s, Team &team, const Weight *w, int count, const Past &past,
                        const Fresh &fresh) {
    constexpr int W = 16;
    int P = s.head_size, N = s.state, inner = s.heads * P, channels = inner + 2 * s.groups * N;
    team.split(s.heads, [&](int begin, int end) {
        float *x = room_for(scratch.own, size_t(P) * W + 2 * size_t(W) * N);
        float *B = x + P * W, *added = B + W * N;
        for (int head = begin; head < end; head++) {
            long at = long(head) * P * N;
            const float *first = fresh.mixed + head * P;
            const float *group = fresh.mixed + inner + head / (s.heads / s.groups) * N;
            float A = -std::exp(w[5].wide[head]), dt[W], decay[W], total = 0.0f;
            for (int t = 0; t < count; t++) {
                dt[t] = fresh.step[t * s.heads + head];
                decay[t] = total += dt[t] * A;
                for (int p = 0; p < P; p++) x[p * W + t] = first[long(t) * channels + p];
                std::copy(group + long(t) * channels, group + long(t) * channels + N, B + t * N);
            }
            if (count == 0) std::copy(past.ssm + at, past.ssm + at + long(P) * N, fresh.ssm + at);
            else next_state<W>(dt, decay, x, B, past.ssm + at, count, P, N, added, fresh.ssm + at);
        }
    });
}

// w: in, in bias, conv, conv bias, dt bias, A_log, D, norm, out, out bias
template <int W>
void mamba(const Call &call, const Weight *w, const Past &past, const Fresh &fresh) {
    const Sizes &s = call.sizes;
    int L = call.length, inner = s.heads * s.head_size, kept = s.taps - 1;
    int channels = inner + 2 * s.groups * s.state, all = inner + channels + s.heads;
    float *z = scratch.a.data(), *xbc = z + inner * W, *dt = xbc + channels * W;
    float *y = scratch.b.data();
    uint8_t *bytes = scratch.bytes.data();
    if (fresh.window) std::memcpy(fresh.window, past.conv, sizeof(float) * kept * channels);
    Input<W> in = as_input<W>(call.team, w[0], scratch.u.data(), s.width, bytes);
    matrix<W>(call.team, w[0], all, in, w[1].wide, z, [&](int first, int last) {
        first = std::max(first - inner, 0), last = std::min(last - inner, channels);
        if (first >= last) return;
        float *mine = xbc + long(first) * W;
        if (fresh.window)
            to_tokens<W>(mine, last - first, L, fresh.window + kept * channels + first, channels);
        convolve<W>(s, w, channels, past.conv, xbc, first, last);
        if (fresh.mixed) to_tokens<W>(mine, last - first, L, fresh.mixed + first, channels);
    });
    for (int h = 0; h < s.heads; h++)
        for (int l = 0; l < W; l++) dt[h * W + l] = softplus(dt[h * W + l] + w[4].wide[h]);
    if (fresh.step) to_tokens<W>(dt, s.heads, L, fresh.step, s.heads);
    scan<W>(call, w, z, xbc, dt, past.ssm, fresh.ssm, y);
    int part = inner / s.groups;
    for (int g = 0; g < s.groups; g++)
        norm<W>(call.team, y + g * part * W, w[7].wide + g * part, part, s.eps, y + g * part * W);
    matrix<W>(call.team, w[8], s.width, as_input<W>(call.team, w[8], y, inner, bytes), w[9].wide,
              scratch.y.data());
}

// w: up, up bias, down, down bias
template <int W>
void mlp(const Call &call, const Weight *w) {
    const Sizes &s = call.sizes;
    float *a = scratch.a.data();
    uint8_t *bytes = scratch.bytes.data();
    Input<W> in = as_input<W>(call.team, w[0], scratch.u.data(), s.width, bytes);
    matrix<W>(call.team, w[0], s.inner, in, w[1].wide, a, [&](int first, int last) {
        for (long i = long(first) * W; i < long(last) * W; i++) {
            float x = a[i] > 0.0f ? a[i] : (a[i] != a[i] ? a[i] : 0.0f);
            a[i] = x * x;
        }
    });
    matrix<W>(call.team, w[2], s.width, as_input<W>(call.team, w[2], a, s.inner, bytes), w[3].wide,
              scratch.y.data());
}

}  // namespace twotower
