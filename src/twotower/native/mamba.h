// Mamba-2: convolution, the recurrence as small matrix products, and states after any token.
#pragma once

#include "layers.h"

namespace twotower {

inline int channels_of(const Layer &s) { return s.heads * s.head_size + 2 * s.groups * s.state; }

// Depthwise over time, then silu, in place: channels begin to end of x[channels][W] after the past
// (taps - 1, C).
template <int W>
void convolve(const Layer &s, const float *past, float *x, int begin, int end) {
    const auto &w = weights_of<MambaWeights>(s);
    const float *weight = w.conv1d.full, *bias = w.conv1d_bias.full;
    int kept = s.taps - 1, stride = kept + W, channels = channels_of(s);
    float *window = at_least(scratch.own, size_t(ROWS) * stride);
    for (int first = begin; first < end; first += ROWS) {  // what is read at once was written before
        int here = std::min(ROWS, end - first);
        for (int c = 0; c < here; c++) {
            for (int k = 0; k < kept; k++) window[c * stride + k] = past[long(k) * channels + first + c];
            floats<W>(window + c * stride + kept) = floats<W>(x + long(first + c) * W);
        }
        for (int c = 0; c < here; c++) {
            const float *own = weight + (first + c) * s.taps;
            Floats<W> sum = Floats<W>{} + (bias ? bias[first + c] : 0.0f);
            for (int k = 0; k < s.taps; k++) sum = add_product<W>(sum, floats<W>(window + c * stride + k), own[k]);
            floats<W>(x + long(first + c) * W) = sum;
        }
    }
    silu(x + long(begin) * W, long(end - begin) * W);
}

// R rows of next (P, N) = keep state + x[P][W] added (L, N): the state after L tokens.
template <int W, int R>
void advance_rows(const float *state, float keep, const float *x, const float *added, int L, int N,
                  float *next) {
    int n = 0;
    for (; n + VECTOR <= N; n += VECTOR) {
        Floats<VECTOR> sum[R];
        for (int r = 0; r < R; r++) sum[r] = floats<VECTOR>(state + r * N + n) * keep;
        for (int t = 0; t < L; t++) {
            Floats<VECTOR> one = floats<VECTOR>(added + t * N + n);
            for (int r = 0; r < R; r++) sum[r] = add_product<VECTOR>(sum[r], one, x[r * W + t]);
        }
        for (int r = 0; r < R; r++) floats<VECTOR>(next + r * N + n) = sum[r];
    }
    for (; n < N; n++)
        for (int r = 0; r < R; r++) {
            float sum = state[r * N + n] * keep;
            for (int t = 0; t < L; t++) sum = add_product(sum, added[t * N + n], x[r * W + t]);
            next[r * N + n] = sum;
        }
}

// One head's state next (P, N) after L >= 1 tokens of x[P][W], B (L, N); decay: log, from the start
// through each token; added: room for L * N numbers. next may be state itself.
template <int W>
void next_state(const float *dt, const float *decay, const float *x, const float *B,
                const float *state, int L, int P, int N, float *added, float *next) {
    constexpr int R = W == 1 ? 1 : 8;  // one token: in the order of memory
    Floats<W> kept = exponential<W>(decay[L - 1] - floats<W>(decay)) * floats<W>(dt);
    for (int t = 0; t < L; t++)
        for (int n = 0; n < N; n++) added[t * N + n] = B[t * N + n] * kept[t];
    float keep = exponential(decay[L - 1]);
    int p = 0;
    for (; p + R <= P; p += R)
        advance_rows<W, R>(state + p * N, keep, x + p * W, added, L, N, next + p * N);
    for (; p < P; p++)
        advance_rows<W, 1>(state + p * N, keep, x + p * W, added, L, N, next + p * N);
}

// One head of the recurrence over L tokens as products: y[P][W] of x[P][W] after the state (P, N),
// times gate[P][W].
// mixing[L][W]: B of each token times C of each; B (L, N); C [N][W]; dt[W]; next may be null.
template <int W>
void scan_head(const Layer &s, int L, float A, float D, const float *x, const float *mixing,
               const float *B, const float *C, const float *dt, const float *state, const float *gate,
               float *next, float *y) {
    int P = s.head_size, N = s.state;
    float *mix = at_least(scratch.own, size_t(L + P) * W + size_t(L) * N), *own = mix + L * W;
    float *added = own + P * W, decay[W], total = 0.0f;  // decay: log, from the start through t
    for (int l = 0; l < W; l++) decay[l] = total += dt[l] * A;
    Ints<W> lanes;
    for (int l = 0; l < W; l++) lanes[l] = l;
    for (int t = 0; t < L; t++) {
        Floats<W> kept = exponential<W>(floats<W>(decay) - decay[t]) * dt[t] * floats<W>(mixing + t * W);
        floats<W>(mix + t * W) = lanes < t ? Floats<W>{} : kept;
        mix[t * W + t] += D;
    }
    product<W>(x, W, 1, P, L, mix, nullptr, own);
    product<W>(state, N, 1, P, N, C, nullptr, y);
    Floats<W> kept = exponential<W>(floats<W>(decay));
    for (int p = 0; p < P; p++)
        floats<W>(y + p * W) = (floats<W>(y + p * W) * kept + floats<W>(own + p * W)) * floats<W>(gate + p * W);
    if (next != nullptr) next_state<W>(dt, decay, x, B, state, L, P, N, added, next);
}

// All heads over L tokens: xbc[C][W] after the convolution, dt[H][W] after softplus; y feature by
// feature, gated by z.
template <int W>
void scan(const Step &step, int L, float *z, const float *xbc, const float *dt,
          const float *state, float *next, float *y) {
    const Layer &s = step.layer;
    const auto &w = weights_of<MambaWeights>(s);
    int P = s.head_size, N = s.state, inner = s.heads * P;
    std::vector<float> mixing(size_t(s.groups) * L * W), rows(size_t(s.groups) * L * N);
    for (int g = 0; g < s.groups; g++) {
        const float *B = xbc + long(inner + g * N) * W, *C = B + long(s.groups) * N * W;
        product<W>(B, 1, W, L, N, C, nullptr, mixing.data() + g * L * W);
        to_rows<W>(B, N, L, rows.data() + g * L * N, N);
    }
    step.call.team.split(s.heads, [&](int begin, int end) {
        for (int head = begin; head < end; head++) {
            int g = head / (s.heads / s.groups);
            long at = long(head) * P * N;
            float *gate = z + long(head) * P * W;
            silu(gate, long(P) * W);
            scan_head<W>(s, L, -std::exp(w.A_log.full[head]), w.D.full[head],
                         xbc + long(head) * P * W, mixing.data() + g * L * W,
                         rows.data() + g * L * N, xbc + long(inner + (s.groups + g) * N) * W,
                         dt + head * W, state + at, gate, next ? next + at : nullptr,
                         y + long(head) * P * W);
        }
    });
}

// What is between a tile's two products for the tokens of one row: in[inner + C + H][W] holds z, xbc
// and dt; fills y[inner][W].
template <int W>
void mix(const Step &s, const Segment &part, float *in, float *y) {
    const auto &w = weights_of<MambaWeights>(s.layer);
    const RowState &row = s.rows[part.row];
    int heads = s.layer.heads, inner = heads * s.layer.head_size, kept = s.layer.taps - 1;
    int channels = channels_of(s.layer), count = part.count;
    bool is_first = part.at == 0, is_last = row.is_last(part);
    float *z = in, *xbc = z + inner * W, *dt = xbc + channels * W;
    // Inputs of the convolution, for a later tile or the caller; row i: input i - kept of the pass.
    bool keeps = row.out.window || row.out.conv || !is_last;
    float *window = row.out.window;
    if (!window && (keeps || !is_first))
        window = at_least(scratch.window, size_t(kept + row.length) * channels);
    if (keeps && is_first) std::copy_n(row.past.conv, long(kept) * channels, window);
    const float *before = is_first ? row.past.conv : window + long(part.at) * channels;
    int first = row.out.window ? 0 : std::max(0, count - kept);  // a later tile needs the newest alone
    float *mixed = row.out.mixed ? row.out.mixed + long(part.at) * channels : nullptr;
    s.call.team.split(blocks_of(channels), [&](int begin, int end) {
        begin *= ROWS, end = std::min(channels, end * ROWS);
        float *mine = xbc + long(begin) * W;
        if (keeps)
            to_rows<W>(mine + first, end - begin, count - first,
                       window + long(kept + part.at + first) * channels + begin, channels);
        convolve<W>(s.layer, before, xbc, begin, end);
        if (mixed) to_rows<W>(mine, end - begin, count, mixed + begin, channels);
    });
    for (int h = 0; h < heads; h++)
        for (int l = 0; l < W; l++) dt[h * W + l] = softplus(dt[h * W + l] + w.dt_bias.full[h]);
    if (row.out.step) to_rows<W>(dt, heads, count, row.out.step + long(part.at) * heads, heads);
    float *running = row.out.ssm ? row.out.ssm : at_least(scratch.ssm, size_t(inner) * s.layer.state);
    bool has_next = row.out.ssm || !is_last;
    scan<W>(s, count, z, xbc, dt, is_first ? row.past.ssm : running, has_next ? running : nullptr, y);
    if (row.out.conv && is_last)
        std::copy_n(window + long(row.length) * channels, long(kept) * channels, row.out.conv);
}

// The same for some of the tokens of a tile of W lanes: V of them are taken out and put back.
template <int W, int V>
void mix_part(const Step &s, const Segment &part, const float *in, float *y) {
    int inner = s.layer.heads * s.layer.head_size, all = inner + channels_of(s.layer) + s.layer.heads;
    float *own = at_least(scratch.flat, size_t(all + inner) * V), *found = own + long(all) * V;
    for (int f = 0; f < all; f++)
        if (part.count == V) floats<V>(own + f * V) = floats<V>(in + f * W + part.lane);
        else
            for (int l = 0; l < V; l++) own[f * V + l] = in[f * W + part.lane + std::min(l, part.count - 1)];
    mix<V>(s, part, own, found);
    for (int f = 0; f < inner; f++)
        if (part.count == V) floats<V>(y + f * W + part.lane) = floats<V>(found + f * V);
        else std::copy_n(found + f * V, part.count, y + f * W + part.lane);
}

// The same for any row of a tile, LANES tokens at a time: the recurrence is a product of tokens with each other.
template <int W>
void mix_parts(const Step &s, const Segment &all, const float *in, float *y) {
    for (int at = 0; at < all.count; at += LANES) {
        Segment part{all.row, all.at + at, std::min(LANES, all.count - at), all.lane + at};
        auto each = part.count == 1 ? mix_part<W, 1> : part.count <= 8 ? mix_part<W, 8> : mix_part<W, LANES>;
        each(s, part, in, y);
    }
}

// A tile: scratch.u to its part of scratch.y, each row after its past or after the tile before
template <int W>
void mamba(const Step &s, const Tile &tile) {
    const auto &w = weights_of<MambaWeights>(s.layer);
    int inner = s.layer.heads * s.layer.head_size, width = s.call.tower.width;
    int all = inner + channels_of(s.layer) + s.layer.heads;
    float *z = at_least(scratch.a, size_t(all) * W), *y = at_least(scratch.b, size_t(inner) * W);
    matrix<W>(s.call.team, w.in_proj, all, input_of<W>(s.call.team, w.in_proj, scratch.u.data(), width, tile.count),
              w.in_proj_bias.full, z);
    const Segment *segments = s.call.segments.data() + tile.first_segment;
    if constexpr (W <= LANES)
        if (tile.num_segments == 1) mix<W>(s, *segments, z, y);
    if (W > LANES || tile.num_segments > 1) {
        std::fill(y, y + long(inner) * W, 0.0f);  // lanes that are nobody's must be numbers
        each_segment(s.call, tile, [&](const Segment &own) { mix_parts<W>(s, own, z, y); });
    }
    int part = inner / s.layer.groups;
    for (int g = 0; g < s.layer.groups; g++)
        norm<W>(s.call.team, y + g * part * W, w.norm.full + g * part, part, s.call.tower.eps,
                y + g * part * W);
    Input<W> in = input_of<W>(s.call.team, w.out_proj, y, inner, tile.count);
    matrix<W>(s.call.team, w.out_proj, width, in, w.out_proj_bias.full,
              scratch.y.data() + long(tile.first_lane) * width);
}

// out.ssm after the first `count` tokens of a pass that left `mixed` and `step`
inline void state_after(Team &team, const Layer &layer, const Past &past, const Outputs &out, int count) {
    constexpr int W = LANES;
    int P = layer.head_size, N = layer.state, channels = channels_of(layer);
    team.split(layer.heads, [&](int begin, int end) {
        float *x = at_least(scratch.own, size_t(P) * W + 2 * size_t(W) * N);
        float *B = x + P * W, *added = B + W * N;
        for (int head = begin; head < end; head++) {
            long at = long(head) * P * N;
            int group = layer.heads * P + head / (layer.heads / layer.groups) * N;
            float A = -std::exp(weights_of<MambaWeights>(layer).A_log.full[head]);
            const float *state = past.ssm + at;
            float *next = out.ssm + at;
            if (count == 0) std::copy_n(state, long(P) * N, next);
            for (int first = 0; first < count; first += W, state = next) {
                int here = std::min(W, count - first);
                float dt[W] = {}, decay[W] = {}, total = 0.0f;
                for (int t = 0; t < here; t++) {
                    const float *row = out.mixed + long(first + t) * channels;
                    dt[t] = out.step[(first + t) * layer.heads + head];
                    decay[t] = total += dt[t] * A;
                    for (int p = 0; p < P; p++) x[p * W + t] = row[head * P + p];
                    std::copy_n(row + group, N, B + t * N);
                }
                next_state<W>(dt, decay, x, B, state, here, P, N, added, next);
            }
        }
    });
}

}  // namespace twotower
