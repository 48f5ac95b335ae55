// Products in int8 and int4: tokens become whole numbers, sums of whole numbers are exact, scales
// come afterwards, in one order for any number of tokens (docs/quantisation.md).
//
// int8: a scale per row. int4: scale and offset per row and group of 32 columns, as halves or, centred,
// as a checkpoint has them: bfloat16, the offset that of an 8. A token has a scale
// per group, or one alone for matrices of a checkpoint that says so.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "inputs.h"

namespace twotower {

constexpr int ROWS = 16;  // of a packed block
constexpr int AHEAD = 8192;  // bytes that a product asks for in advance
constexpr int GROUP_BYTES = ROWS * (GROUP / 2 + 4);  // two numbers a byte, scales, offsets of two bytes

inline Ints<VECTOR> four_bytes(const uint8_t *bytes) {
    int32_t four;
    std::memcpy(&four, bytes, 4);
    return Ints<VECTOR>{} + four;
}

// How many of a block's rows have their sums of N tokens in registers
template <int N>
constexpr int rows_at_once() {
    int rows = ROWS;
    while (rows > VECTOR && N * rows / VECTOR > SUMS) rows /= 2;
    return rows;
}

// sum[N][ROWS]: H of a block's rows times a few tokens, each weight read once; w [K/4][16][4]
template <int W, int N, int H>
inline void int8_tokens(const uint8_t *w, const Input<W> &in, int first, float *sum) {
    // A single token has two sums, of which none waits for the other.
    constexpr int P = H / VECTOR, C = N == 1 ? 2 : 1;
    Floats<VECTOR> all[N][P] = {};
    int quads = (in.K + 3) / 4, group = (in.group + 3) / 4;
    for (int g = 0; g * group < quads; g++) {
        Ints<VECTOR> part[C][N][P] = {};
        for (int l = 0; l < N; l++)
            for (int p = 0; p < P; p++) part[0][l][p] = Ints<VECTOR>{} + in.zeros[g * W + first + l];
        int q = g * group, end = std::min(quads, q + group);
        auto add = [&](int at, Ints<VECTOR> (&sums)[N][P]) {
            const uint8_t *own = w + long(at) * 64, *token = in.bytes + (at * W + first) * 4;
            __builtin_prefetch(own + AHEAD, 0, 1);
            for (int l = 0; l < N; l++)
                for (int p = 0; p < P; p++)
                    sums[l][p] = add_quads<VECTOR>(sums[l][p], ints<VECTOR>(own + p * VECTOR * 4),
                                                   four_bytes(token + l * 4));
        };
        for (; q + 2 <= end; q += 2) add(q, part[0]), add(q + 1, part[C - 1]);
        if (q < end) add(q, part[0]);
        for (int l = 0; l < N; l++)
            for (int p = 0; p < P; p++) {
                Ints<VECTOR> total = C == 1 ? part[0][l][p] : part[0][l][p] + part[C - 1][l][p];
                all[l][p] = add_product<VECTOR>(all[l][p], __builtin_convertvector(total, Floats<VECTOR>),
                                                in.scales[g * W + first + l]);
            }
    }
    for (int l = 0; l < N; l++) std::memcpy(sum + l * ROWS, all[l], sizeof all[l]);
}

template <int V>
struct Grid {
    Floats<V> scale, offset;
};

// Of V of the 16 rows of a group, from `row` on: a weight is number * scale + offset
template <int V>
inline Grid<V> grid_of(const uint8_t *w, bool is_centred, int row) {
    const uint8_t *scales = w + ROWS * GROUP / 2 + 2 * row, *offsets = scales + 2 * ROWS;
    auto as = [&](auto type, const uint8_t *x) { return widened<V>(reinterpret_cast<const decltype(type) *>(x)); };
    if (!is_centred) return {as(Half{}, scales), as(Half{}, offsets)};
    Floats<V> scale = as(Bfloat{}, scales);
    return {scale, as(Bfloat{}, offsets) - 8.0f * scale};
}

// The same in int4, with the weights' scales, of the rows from `row` on; w: groups of GROUP_BYTES
template <int W, int N, int H>
inline void int4_tokens(const uint8_t *w, bool is_centred, const Input<W> &in, int first, int row, float *sum) {
    constexpr int P = H / VECTOR, C = N == 1 ? 2 : 1;
    Floats<VECTOR> all[N][P] = {};
    Ints<VECTOR> low = Ints<VECTOR>{} + 0x0f0f0f0f;
    for (int g = 0; g < in.K / GROUP; g++, w += GROUP_BYTES) {
        Quads<VECTOR, 15> part[C][N][P];
        const uint8_t *token = in.bytes + g * GROUP * W + first * 4;
        for (int line = 0; line < GROUP_BYTES; line += 64) __builtin_prefetch(w + AHEAD + line);
        for (int i = 0; i < 4; i++)
            for (int p = 0; p < P; p++) {
                Ints<VECTOR> both = ints<VECTOR>(w + i * 64 + (row + p * VECTOR) * 4), high = (both >> 4) & low;
                both &= low;
                for (int l = 0; l < N; l++) {
                    part[0][l][p].add(both, four_bytes(token + (i * W + l) * 4));
                    part[C - 1][l][p].add(high, four_bytes(token + ((i + 4) * W + l) * 4));
                }
            }
        for (int p = 0; p < P; p++) {
            auto [scale, offset] = grid_of<VECTOR>(w, is_centred, row + p * VECTOR);
            for (int l = 0; l < N; l++) {
                Ints<VECTOR> total = part[0][l][p].total();
                if (C > 1) total += part[C - 1][l][p].total();
                Floats<VECTOR> scaled = __builtin_convertvector(total, Floats<VECTOR>) * scale;
                all[l][p] = add_product<VECTOR>(all[l][p], scaled, in.scales[g * W + first + l]);
                all[l][p] = add_product<VECTOR>(all[l][p], offset, in.sums[g * W + first + l]);
            }
        }
    }
    for (int l = 0; l < N; l++) std::memcpy(sum + l * ROWS, all[l], sizeof all[l]);
}

// A block of 16 rows as bytes [K/4][16][4]; scales and offsets [K/32][16] of int4, else null.
struct Block {
    const uint8_t *bytes;
    const float *scales = nullptr, *offsets = nullptr;
};

// An int4 block in `room` of at least K * 20 bytes
inline Block unpack(const uint8_t *w, bool is_centred, int groups, uint8_t *room) {
    Ints<16> low = Ints<16>{} + 0x0f0f0f0f;
    float *scales = reinterpret_cast<float *>(room + groups * GROUP * ROWS);
    float *offsets = scales + groups * ROWS;
    for (int g = 0; g < groups; g++, w += GROUP_BYTES) {
        for (int line = 0; line < GROUP_BYTES; line += 64) __builtin_prefetch(w + AHEAD + line);
        for (int i = 0; i < 4; i++) {
            Ints<16> both = ints<16>(w + i * 64), one = both & low, two = (both >> 4) & low;
            std::memcpy(room + (g * 8 + i) * 64, &one, 64);
            std::memcpy(room + (g * 8 + i + 4) * 64, &two, 64);
        }
        for (int r = 0; r < ROWS; r += VECTOR) {
            auto [scale, offset] = grid_of<VECTOR>(w, is_centred, r);
            floats<VECTOR>(scales + g * ROWS + r) = scale, floats<VECTOR>(offsets + g * ROWS + r) = offset;
        }
    }
    return {room, scales, offsets};
}

// N vectors of V lanes at sum[R][W], of the rows from r on and the tokens from l on.
template <int W, int V, int N, int R, bool IS_INT4>
inline void integer_rows(const Block &w, const Input<W> &in, int r, int l, float *sum) {
    Floats<V> total[R][N] = {};
    int quads = (in.K + 3) / 4, group = (in.group + 3) / 4;
    for (int g = 0; g * group < quads; g++) {
        int at = g * W + l, end = std::min(quads, (g + 1) * group);
        Quads<V, IS_INT4 ? 15 : 255> part[R][N];
        if constexpr (!IS_INT4)
            for (int i = 0; i < R; i++)
                for (int n = 0; n < N; n++) part[i][n].sum = ints<V>(in.zeros + at + n * V);
        for (int q = g * group; q < end; q++) {
            Ints<V> value[N];
            const uint8_t *own = w.bytes + (long(q) * ROWS + r) * 4;
            if (!IS_INT4 && r == 0 && l == 0) __builtin_prefetch(own + AHEAD, 0, 1);
            for (int n = 0; n < N; n++) value[n] = ints<V>(in.bytes + (long(q) * W + l + n * V) * 4);
#pragma GCC unroll 16
            for (int i = 0; i < R; i++) {
                int32_t four;
                std::memcpy(&four, own + i * 4, 4);
                for (int n = 0; n < N; n++) part[i][n].add(Ints<V>{} + four, value[n]);
            }
        }
        for (int i = 0; i < R; i++)
            for (int n = 0; n < N; n++) {
                Floats<V> scaled = __builtin_convertvector(part[i][n].total(), Floats<V>);
                if (IS_INT4) scaled *= w.scales[g * ROWS + r + i];
                total[i][n] = add_product<V>(total[i][n], scaled, floats<V>(in.scales + at + n * V));
                if (IS_INT4)
                    total[i][n] = add_product<V>(total[i][n], floats<V>(in.sums + at + n * V),
                                                 w.offsets[g * ROWS + r + i]);
            }
    }
    for (int i = 0; i < R; i++)
        for (int n = 0; n < N; n++) floats<V>(sum + (r + i) * W + l + n * V) = total[i][n];
}

// How the numbers of a product lie: those of a row side by side, [rows][W], or those of a token.
enum class Order { ROWS_FIRST, TOKENS_FIRST };

// sum of a block's rows and N tokens from `first` on
template <int W, int N, bool IS_INT4, Order ORDER>
inline void few_tokens(const uint8_t *w, bool is_centred, const Input<W> &in, int first, float *sum) {
    constexpr int V = N <= 1 ? 1 : N <= 4 ? 4 : N <= 8 ? 8 : 16, H = rows_at_once<N>();
    float lanes[V * ROWS] = {}, rows[V * ROWS];
    for (int r = 0; r < ROWS; r += H)
        if constexpr (IS_INT4) int4_tokens<W, N, H>(w, is_centred, in, first, r, lanes + r);
        else int8_tokens<W, N, H>(w + r * 4, in, first, lanes + r);
    if constexpr (ORDER == Order::TOKENS_FIRST) std::copy_n(lanes, N * ROWS, sum + first * ROWS);
    else if constexpr (V == W) turn<V>(lanes, ROWS, sum, W);
    else {
        turn<V>(lanes, ROWS, rows, V);
        for (int r = 0; r < ROWS; r++) std::copy_n(rows + r * V, std::min(V, W - first), sum + r * W + first);
    }
}

template <int N>
using Count = std::integral_constant<int, N>;

// The same of all tokens of a tile, the fewer the cheaper; false where they are too many
template <int W, bool IS_INT4, Order ORDER>
inline bool each_few(const uint8_t *w, bool is_centred, const Input<W> &in, float *sum) {
    auto some = [&](int first, auto count) {
        few_tokens<W, decltype(count)::value, IS_INT4, ORDER>(w, is_centred, in, first, sum);
    };
    constexpr bool COUNTS = IS_INT4 || VECTOR < 16;  // arithmetic takes longer than reading
    if constexpr (W == 1) some(0, Count<1>());
    else if constexpr (W == 4) COUNTS && in.count <= 2 ? some(0, Count<2>()) : some(0, Count<4>());
    else if constexpr (W == 8) COUNTS && in.count <= 6 ? some(0, Count<6>()) : some(0, Count<8>());
    else if constexpr (W == 16 && COUNTS) {  // what is not unpacked first is faster
        some(0, Count<8>());
        in.count <= 12 ? some(8, Count<4>()) : some(8, Count<8>());
    } else if constexpr (W == 16) {
        if (in.count > 12) return false;
        some(0, Count<12>());
    } else return false;
    return true;
}

// A block's sums from [16][W] to [W][16]
template <int W>
inline void by_token(float *sum) {
    float turned[ROWS * W];
    for (int l = 0; l < W; l += 16) turn<ROWS>(sum + l, W, turned + l * ROWS, ROWS);
    std::memcpy(sum, turned, sizeof turned);
}

// Of a block's rows, of which `count` exist
inline Floats<ROWS> first_rows(const float *x, int count) {
    if (count == ROWS) return floats<ROWS>(x);
    Floats<ROWS> found = {};
    for (int r = 0; r < count; r++) found[r] = x[r];
    return found;
}

// A block's sums, times a scale and with a bias of each row, where there are any: y from row `first` on.
// `bias ? bias[r] : 0` in the loop would become a masked load at a null pointer: 60 ns on a Zen 5.
template <int W, Order ORDER>
inline void write_block(const float *sum, const float *scales, const float *bias, int count, int first, int rows,
                        float *y) {
    int here = std::min(ROWS, rows - first);
    Floats<ROWS> scale = scales ? first_rows(scales + first, here) : Floats<ROWS>{} + 1.0f;
    if constexpr (ORDER == Order::TOKENS_FIRST) {
        for (int l = 0; l < count; l++) {
            Floats<ROWS> own = floats<ROWS>(sum + l * ROWS) * scale;
            if (here == ROWS) floats<ROWS>(y + long(l) * rows + first) = own;
            else std::copy_n(reinterpret_cast<float *>(&own), here, y + long(l) * rows + first);
        }
    } else {
        constexpr int V = std::min(W, VECTOR);
        Floats<ROWS> added = bias ? first_rows(bias + first, here) : Floats<ROWS>{};
        float own[2][ROWS];
        std::memcpy(own[0], &added, sizeof added), std::memcpy(own[1], &scale, sizeof scale);
        for (int r = 0; r < here; r++)
            for (int l = 0; l < W; l += V)
                floats<V>(y + long(first + r) * W + l) =
                    add_product<V>(Floats<V>{} + own[0][r], floats<V>(sum + r * W + l), own[1][r]);
    }
}

// y of blocks `begin` to `end` of a packed matrix: [rows][W]; or [tokens][rows], without bias
template <int W, bool IS_INT4, Order ORDER = Order::ROWS_FIRST>
void integer_product(const Weight &w, int rows, const Input<W> &in, const float *bias, float *y, int begin,
                     int end) {
    constexpr int V = std::min(W, VECTOR), N = W > V && SUMS > 8 ? 2 : 1, R = SUMS / N;
    static thread_local std::vector<uint8_t> room;
    if (IS_INT4 && room.size() < size_t(in.K) * 20) room.resize(size_t(in.K) * 20);
    const uint8_t *packed = IS_INT4 ? w.int4 : w.int8;
    int groups = in.K / GROUP, blocks = (rows + ROWS - 1) / ROWS;
    long size = IS_INT4 ? groups * GROUP_BYTES : (in.K + 3) / 4 * 64;
    const float *scales = reinterpret_cast<const float *>(packed + blocks * size);  // of int8
    float sum[ROWS * W] = {};  // lanes that are nobody's must be numbers
    for (int b = begin; b < end; b++) {
        const uint8_t *own = packed + b * size;
        if (!each_few<W, IS_INT4, ORDER>(own, w.centred, in, sum)) {
            Block block = IS_INT4 ? unpack(own, w.centred, groups, room.data()) : Block{own};
            for (int l = 0; l < W; l += V * N)
                for (int r = 0; r < ROWS; r += R)
                    integer_rows<W, V, N, R, IS_INT4>(block, in, r, l, sum);
            if constexpr (ORDER == Order::TOKENS_FIRST && W >= 16) by_token<W>(sum);
        }
        write_block<W, ORDER>(sum, IS_INT4 ? nullptr : scales, bias, in.count, b * ROWS, rows, y);
    }
}

}  // namespace twotower
