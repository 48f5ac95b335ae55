// One tower's pass over a few tokens of one row, in one call: float32, dense layers only.
//
// Small models wait for dispatch, not for arithmetic; here nothing is dispatched. Activations lie
// feature by feature, W tokens (lanes) side by side, so that every operation runs over the lanes
// and a weight, read once in its released layout, serves all tokens. W is 1, 8 or 16. The equations
// are those of system.md sections 2 and 3; the PyTorch layers are the truth that tests compare with.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

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

// y[R][W] = w[R][K] x[K][W] (+ bias): w's rows and columns are `row`, `column` floats apart.
template <int W, int R>
inline void product_rows(const float *w, long row, long column, int K, const float *x,
                         const float *bias, float *y) {
    typedef float Lanes __attribute__((vector_size(W * 4), aligned(4), may_alias));
    Lanes sum[R];
    for (int r = 0; r < R; r++) sum[r] = Lanes{} + (bias ? bias[r] : 0.0f);
    for (int i = 0; i < K; i++) {
        Lanes value = *reinterpret_cast<const Lanes *>(x + long(i) * W);
        for (int r = 0; r < R; r++) sum[r] += w[r * row + i * column] * value;
    }
    for (int r = 0; r < R; r++) *reinterpret_cast<Lanes *>(y + r * W) = sum[r];
}

// One token: rows are contiguous, each is a dot product; four rows share the loads of x.
template <int R>
inline void dot_rows(const float *w, long row, int K, const float *x, const float *bias, float *y) {
    typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
    Lanes sum[R] = {};
    for (int i = 0; i + 16 <= K; i += 16) {
        Lanes value = *reinterpret_cast<const Lanes *>(x + i);
        for (int r = 0; r < R; r++)
            sum[r] += *reinterpret_cast<const Lanes *>(w + r * row + i) * value;
    }
    for (int r = 0; r < R; r++) {
        float total = bias ? bias[r] : 0.0f;
        for (int lane = 0; lane < 16; lane++) total += sum[r][lane];
        for (int rest = K / 16 * 16; rest < K; rest++) total += w[r * row + rest] * x[rest];
        y[r] = total;
    }
}

template <int W>
void product(const float *w, long row, long column, int rows, int K, const float *x,
             const float *bias, float *y) {
    constexpr int R = W == 1 ? 4 : 8;
    auto some = [&](int r, auto count) {
        constexpr int N = decltype(count)::value;
        const float *b = bias ? bias + r : nullptr;
        if (W == 1 && column == 1)
            dot_rows<N>(w + r * row, row, K, x, b, y + r);
        else
            product_rows<W, N>(w + r * row, row, column, K, x, b, y + long(r) * W);
    };
    int r = 0;
    for (; r + R <= rows; r += R) some(r, std::integral_constant<int, R>());
    for (; r < rows; r++) some(r, std::integral_constant<int, 1>());
}

// y[width][W]: the sum of rows of v (count, width), weighted by p[count][W].
template <int W>
void weighted_sum(const float *v, long row, int width, int count, const float *p, float *y) {
    if (W > 1) return product<W>(v, 1, row, width, count, p, nullptr, y);
    std::fill(y, y + width, 0.0f);
    for (int i = 0; i < count; i++)
        for (int f = 0; f < width; f++) y[f] += p[i] * v[i * row + f];
}

template <int W>
void norm(const float *x, const float *weight, int width, float eps, float *y) {
    float scale[W] = {};
    for (int f = 0; f < width; f++)
        for (int l = 0; l < W; l++) scale[l] += x[f * W + l] * x[f * W + l];
    for (int l = 0; l < W; l++) scale[l] = 1.0f / std::sqrt(scale[l] / width + eps);
    for (int f = 0; f < width; f++)
        for (int l = 0; l < W; l++) y[f * W + l] = x[f * W + l] * scale[l] * weight[f];
}

// x (1 + scale) + shift, both (width,)
template <int W>
void modulate(float *x, const float *shift, const float *scale, int width) {
    for (int f = 0; f < width; f++)
        for (int l = 0; l < W; l++) x[f * W + l] = x[f * W + l] * (1.0f + scale[f]) + shift[f];
}

template <int W>
void to_tokens(const float *x, int width, int length, float *y, long stride) {
    for (int f = 0; f < width; f++)
        for (int t = 0; t < length; t++) y[t * stride + f] = x[f * W + t];
}

struct Scratch {
    std::vector<float> h, u, y, a, b, c, d;
    void need(const Sizes &s, int num_past, int W, int inner) {
        auto grow = [](std::vector<float> &v, size_t n) {
            if (v.size() < n) v.resize(n);
        };
        grow(h, size_t(s.width) * W);
        grow(u, size_t(s.width) * W);
        grow(y, size_t(std::max(s.width, s.head_dim)) * W);
        grow(a, size_t(inner) * W);
        grow(b, size_t(inner) * W);
        grow(c, size_t(inner) * (W + 8));
        grow(d, size_t(num_past + W) * W + size_t(inner) * (W + 8));
    }
};

thread_local Scratch scratch;

// w: q, q bias, k, k bias, v, v bias, o, o bias
template <int W>
void attention(const Call &call, const float *const *w, const Past &past, const Fresh &fresh) {
    const Sizes &s = call.sizes;
    int L = call.length, S = call.num_past, A = s.head_dim, kv_width = s.kv_heads * A;
    float *u = scratch.u.data(), *q = scratch.a.data(), *out = scratch.b.data();
    float *keys = scratch.c.data(), *values = keys + W * kv_width, *flat = scratch.d.data();
    if (fresh.k) keys = fresh.k, values = fresh.v;
    product<W>(w[2], s.width, 1, kv_width, s.width, u, w[3], flat);
    to_tokens<W>(flat, kv_width, L, keys, kv_width);
    product<W>(w[4], s.width, 1, kv_width, s.width, u, w[5], flat);
    to_tokens<W>(flat, kv_width, L, values, kv_width);
    product<W>(w[0], s.width, 1, s.q_heads * A, s.width, u, w[1], q);
    float root = 1.0f / std::sqrt(float(A)), *score = flat;  // (S + L, W)
    for (int head = 0; head < s.q_heads; head++) {
        int at = head / (s.q_heads / s.kv_heads) * A;
        const float *mine = q + head * A * W;
        product<W>(past.k + at, kv_width, 1, S, A, mine, nullptr, score);
        product<W>(keys + at, kv_width, 1, L, A, mine, nullptr, score + long(S) * W);
        if (call.causal)
            for (int j = 0; j < L; j++)
                for (int l = 0; l < std::min(j, W); l++) score[long(S + j) * W + l] = -INFINITY;
        float most[W], sum[W] = {};
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
        float *y = out + head * A * W, *rest = scratch.y.data();
        weighted_sum<W>(past.v + at, kv_width, A, S, score, y);
        weighted_sum<W>(values + at, kv_width, A, L, score + long(S) * W, rest);
        for (int a = 0; a < A; a++)
            for (int l = 0; l < W; l++) y[a * W + l] = (y[a * W + l] + rest[a * W + l]) / sum[l];
    }
    product<W>(w[6], s.q_heads * A, 1, s.width, s.q_heads * A, out, w[7], scratch.y.data());
}

// The recurrence of one row, token by token; y feature by feature, with D x added.
template <int W>
void scan(const Call &call, const float *const *w, const float *mixed, const float *step,
          float *state, float *y) {
    const Sizes &s = call.sizes;
    int P = s.head_size, N = s.state, inner = s.heads * P, channels = inner + 2 * s.groups * N;
    for (int head = 0; head < s.heads; head++) {
        int group = head / (s.heads / s.groups);
        float A = -std::exp(w[5][head]), D = w[6][head];
        for (int t = 0; t < call.length; t++) {
            const float *token = mixed + long(t) * channels;
            const float *B = token + inner + group * N, *C = B + s.groups * N;
            float dt = step[t * s.heads + head], decay = std::exp(dt * A);
            for (int p = 0; p < P; p++) {
                float x = token[head * P + p], add = dt * x, sum = 0.0f;
                float *row = state + (head * P + p) * N;
                for (int n = 0; n < N; n++) {
                    row[n] = row[n] * decay + add * B[n];
                    sum += row[n] * C[n];
                }
                y[(head * P + p) * W + t] = sum + D * x;
            }
        }
    }
}

// w: in, in bias, conv, conv bias, dt bias, A_log, D, norm, out, out bias
template <int W>
void mamba(const Call &call, const float *const *w, const Past &past, const Fresh &fresh) {
    const Sizes &s = call.sizes;
    int L = call.length, inner = s.heads * s.head_size, kept = s.taps - 1;
    int channels = inner + 2 * s.groups * s.state, all = inner + channels + s.heads;
    float *z = scratch.a.data(), *xbc = z + inner * W, *dt = xbc + channels * W;
    float *window = fresh.window ? fresh.window : scratch.c.data();
    float *mixed = fresh.mixed ? fresh.mixed : scratch.d.data();
    float *y = scratch.b.data();
    product<W>(w[0], s.width, 1, all, s.width, scratch.u.data(), w[1], z);
    std::memcpy(window, past.conv, sizeof(float) * kept * channels);
    to_tokens<W>(xbc, channels, L, window + kept * channels, channels);
    std::vector<float> taps(s.taps * channels), steps(L * s.heads), state(inner * s.state);
    for (int c = 0; c < channels; c++)
        for (int k = 0; k < s.taps; k++) taps[k * channels + c] = w[2][c * s.taps + k];
    for (int t = 0; t < L; t++) {
        float *out = mixed + long(t) * channels;
        for (int c = 0; c < channels; c++) out[c] = w[3] ? w[3][c] : 0.0f;
        for (int k = 0; k < s.taps; k++) {
            const float *in = window + long(t + k) * channels, *tap = taps.data() + k * channels;
            for (int c = 0; c < channels; c++) out[c] += in[c] * tap[c];
        }
        for (int c = 0; c < channels; c++) out[c] = silu(out[c]);
    }
    float *step = fresh.step ? fresh.step : steps.data();
    for (int t = 0; t < L; t++)
        for (int h = 0; h < s.heads; h++) step[t * s.heads + h] = softplus(dt[h * W + t] + w[4][h]);
    float *kept_state = fresh.ssm ? fresh.ssm : state.data();
    std::memcpy(kept_state, past.ssm, sizeof(float) * inner * s.state);
    if (L < W) std::fill(y, y + inner * W, 0.0f);
    scan<W>(call, w, mixed, step, kept_state, y);
    for (int i = 0; i < inner * W; i++) y[i] *= silu(z[i]);
    int part = inner / s.groups;
    for (int g = 0; g < s.groups; g++)
        norm<W>(y + g * part * W, w[7] + g * part, part, s.eps, y + g * part * W);
    product<W>(w[8], inner, 1, s.width, inner, y, w[9], scratch.y.data());
}

// w: up, up bias, down, down bias
template <int W>
void mlp(const Call &call, const float *const *w) {
    const Sizes &s = call.sizes;
    float *a = scratch.a.data();
    product<W>(w[0], s.width, 1, s.inner, s.width, scratch.u.data(), w[1], a);
    for (int i = 0; i < s.inner * W; i++) {
        float x = a[i] > 0.0f ? a[i] : (a[i] != a[i] ? a[i] : 0.0f);
        a[i] = x * x;
    }
    product<W>(w[2], s.inner, 1, s.width, s.inner, a, w[3], scratch.y.data());
}

struct Tower {
    const Sizes *sizes;
    const char *kinds;              // M, * or -, ended by 0
    const float *embeddings, *norm;
    const float *const *weights;    // 11 of each layer: its norm, then those of its kind
};

template <int W>
void run(const Tower &tower, const Call &call, const int64_t *ids, const float *const *modulations,
         const Past *past, const Fresh *fresh, float *hidden) {
    const Sizes &s = call.sizes;
    int D = s.width;
    int inner = std::max({s.inner, s.q_heads * s.head_dim, 2 * s.kv_heads * s.head_dim,
                          2 * s.heads * s.head_size + 2 * s.groups * s.state + s.heads});
    scratch.need(s, call.num_past, W, inner);
    float *h = scratch.h.data(), *u = scratch.u.data(), *y = scratch.y.data();
    for (int l = 0; l < W; l++) {
        const float *row = tower.embeddings + ids[std::min(l, call.length - 1)] * D;
        for (int f = 0; f < D; f++) h[f * W + l] = row[f];
    }
    for (int i = 0; tower.kinds[i]; i++) {
        const float *const *w = tower.weights + 11 * i;
        const float *m = modulations ? modulations[i] : nullptr;  // shift, scale, gate
        bool modulates_first = tower.kinds[i] != '-';
        std::copy(h, h + D * W, u);
        if (m && modulates_first) modulate<W>(u, m, m + D, D);
        norm<W>(u, w[0], D, s.eps, u);
        if (m && !modulates_first) modulate<W>(u, m, m + D, D);
        if (tower.kinds[i] == 'M') mamba<W>(call, w + 1, past[i], fresh[i]);
        else if (tower.kinds[i] == '*') attention<W>(call, w + 1, past[i], fresh[i]);
        else mlp<W>(call, w + 1);
        for (int f = 0; f < D; f++)
            for (int l = 0; l < W; l++) h[f * W + l] += y[f * W + l] * (m ? m[2 * D + f] : 1.0f);
    }
    norm<W>(h, tower.norm, D, s.eps, u);
    to_tokens<W>(u, D, call.length, hidden, D);
}

template <int W>
void linear(const float *w, int rows, int K, const float *x, int length, float *y) {
    std::vector<float> lanes(K * W), out(long(rows) * W);
    for (int l = 0; l < W; l++)
        for (int f = 0; f < K; f++) lanes[f * W + l] = x[long(std::min(l, length - 1)) * K + f];
    product<W>(w, K, 1, rows, K, lanes.data(), nullptr, out.data());
    to_tokens<W>(out.data(), rows, length, y, rows);
}

}  // namespace

// 1 to 16 tokens of one row after num_past others; 1 if an id is outside the vocabulary, else 0.
extern "C" int32_t twotower_pass(const Tower *tower, int32_t length, int32_t num_past, int32_t causal,
                                 const int64_t *ids, const float *const *modulations,
                                 const Past *past, const Fresh *fresh, float *hidden) {
    for (int t = 0; t < length; t++)
        if (ids[t] < 0 || ids[t] >= tower->sizes->vocabulary) return 1;
    Call call{*tower->sizes, length, num_past, causal != 0};
    if (length == 1) run<1>(*tower, call, ids, modulations, past, fresh, hidden);
    else if (length <= 8) run<8>(*tower, call, ids, modulations, past, fresh, hidden);
    else run<16>(*tower, call, ids, modulations, past, fresh, hidden);
    return 0;
}

// y (length, rows) = x (length, K) w^T for any length >= 1.
extern "C" void twotower_linear(const float *w, int32_t rows, int32_t K, const float *x,
                                int32_t length, float *y) {
    for (int32_t at = 0; at < length; at += 16) {
        int32_t part = std::min(16, length - at);
        const float *in = x + long(at) * K;
        float *out = y + long(at) * rows;
        if (part == 1) linear<1>(w, rows, K, in, part, out);
        else if (part <= 8) linear<8>(w, rows, K, in, part, out);
        else linear<16>(w, rows, K, in, part, out);
    }
}
