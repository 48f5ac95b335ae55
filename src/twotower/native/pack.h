// Matrices in full precision, or as GGUF files have them, to int8 and int4, as integers.h multiplies them.
//
// int8: a row has one scale, of its largest magnitude, which becomes 127. int4: a group of 32 columns
// takes the better of two grids: from its least to its largest number, as GGUF's Q4_1, and from -8 to 7
// times a scale, as Q4_0. What has a grid of 16 numbers in its file keeps that. NaN stays in the scale.
#pragma once

#include "gguf.h"
#include "integers.h"

namespace twotower {

// A matrix of K columns in one of the types of files, by `layout.STORED`.
struct Values {
    const void *first;
    int dtype;
    long K;

    bool is_float() const { return dtype <= FLOAT16; }
    bool has_16_numbers() const { return dtype == Q4_0 || dtype == Q4_1 || dtype == Q4_K; }

    // Of a quantised type
    const uint8_t *row_at(long row) const {
        auto [bytes, columns] = block_size(dtype);
        return static_cast<const uint8_t *>(first) + row * (K / columns * bytes);
    }

    void read_row(long row, float *x) const {
        if (!is_float()) return widen_row(dtype, row_at(row), K, x);
        with_type(first, dtype, [=, this](const auto *numbers) { widen(numbers + row * K, K, x); });
    }
};

// The nearest half-precision number, ties to even
inline uint16_t to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (magnitude < 0x38800000) return uint16_t(sign | uint32_t(std::nearbyint(std::fabs(x) * 0x1p24f)));
    magnitude += 0xfff + (magnitude >> 13 & 1);
    return uint16_t(sign | (magnitude - 0x38000000) >> 13);
}

// A row of x to its places in the bytes [K/4][16][4] of its block; its scale
inline float row_to_bytes(const float *x, long K, int row, uint8_t *block) {
    constexpr int V = VECTOR;
    Ints<V> most = {};
    long whole = K / V * V;
    float rest[V] = {}, largest, scale;
    std::copy(x + whole, x + K, rest);
    auto numbers = [&](long at) { return at < whole ? x + at : rest; };
    for (long at = 0; at < K; at += V) most = larger<V>(most, magnitude<V>(numbers(at)));
    int32_t bits = 0;
    for (int i = 0; i < V; i++) bits = std::max(bits, most[i]);
    std::memcpy(&largest, &bits, 4);
    scale = largest / 127.0f;
    float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    for (long at = 0; at < K; at += V) {
        Ints<V> own = as_whole<V>(floats<V>(numbers(at)) * inverse) + 128;
        auto bytes = __builtin_convertvector(own, Bytes<V>);
        for (int i = 0; i < V && at + i < K; i += 4)
            std::memcpy(block + ((at + i) / 4 * ROWS + row) * 4, reinterpret_cast<const uint8_t *>(&bytes) + i, 4);
    }
    return scale;
}

constexpr int HALF = GROUP / 2;
struct Group {
    Floats<HALF> low, high;  // its numbers
};

// Of a vector's numbers one after the other, halves first
template <typename Take>
inline float reduce(Floats<HALF> x, Take take) {
    float own[HALF];
    std::memcpy(own, &x, sizeof own);
    for (int half = HALF / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) own[i] = take(own[i], own[i + half]);
    return own[0];
}

// A group on a grid, and how far it is from it
struct OnGrid {
    uint16_t scale, offset;
    Group numbers;
    float error;
};

inline OnGrid on_grid(const Group &x, float scale, float offset) {
    OnGrid found{to_half(scale), to_half(offset), {}, 0.0f};
    float step = widened(Half{found.scale}), start = widened(Half{found.offset}), inverse = step != 0.0f ? 1.0f / step : 0.0f;
    auto round = [=](Floats<HALF> part) {
        Floats<HALF> zero = {}, most = zero + 15.0f, shift = zero + 0x1.8p23f, n = (part - start) * inverse;
        n = n > zero ? n : zero;  // NaN too
        n = n < most ? n : most;
        return (n + shift) - shift;
    };
    found.numbers = {round(x.low), round(x.high)};
    Floats<HALF> low = found.numbers.low * step + start - x.low, high = found.numbers.high * step + start - x.high;
    found.error = reduce(low * low + high * high, [](float a, float b) { return a + b; });
    return found;
}

// The nearest of both grids
inline OnGrid nearest_grid(const float *x) {
    Group own{floats<HALF>(x), floats<HALF>(x + HALF)};
    float least = reduce(own.low < own.high ? own.low : own.high, [](float a, float b) { return a < b ? a : b; });
    float most = reduce(own.low > own.high ? own.low : own.high, [](float a, float b) { return a > b ? a : b; });
    Ints<HALF> numbers = (own.low == own.low) & (own.high == own.high);
    int32_t are_numbers[HALF];
    std::memcpy(are_numbers, &numbers, sizeof numbers);
    if (std::count(are_numbers, are_numbers + HALF, 0)) least = most = NAN;
    float largest = most > -least ? most : least;
    OnGrid one = on_grid(own, (most - least) / 15.0f, least), two = on_grid(own, largest / -8.0f, largest);
    return two.error < one.error ? two : one;
}

// The grid that a group has in its file
inline OnGrid stored_grid(const GridColumns &group) {
    Group numbers;
    for (int i = 0; i < HALF; i++) numbers.low[i] = group.number[i], numbers.high[i] = group.number[HALF + i];
    return {to_half(group.step[0]), to_half(group.start[0]), numbers, 0.0f};
}

// A group of a row to its places among the GROUP_BYTES of its block
inline void write_group(const OnGrid &group, int row, uint8_t *out) {
    Ints<HALF> both = __builtin_convertvector(group.numbers.low, Ints<HALF>) |
                      __builtin_convertvector(group.numbers.high, Ints<HALF>) << 4;
    auto bytes = __builtin_convertvector(both, Bytes<HALF>);
    for (int i = 0; i < 4; i++)
        std::memcpy(out + (i * ROWS + row) * 4, reinterpret_cast<const uint8_t *>(&bytes) + 4 * i, 4);
    std::memcpy(out + ROWS * HALF + 2 * row, &group.scale, 2);
    std::memcpy(out + ROWS * HALF + 2 * (ROWS + row), &group.offset, 2);
}

// All groups of a row
inline void row_to_nibbles(const Values &values, long row, float *room, int place, uint8_t *block) {
    long groups = values.K / GROUP;
    if (values.has_16_numbers()) {
        GridColumns own;
        for (long g = 0; g < groups; g++) {
            read_columns(values.dtype, values.row_at(row), g, own);
            write_group(stored_grid(own), place, block + g * GROUP_BYTES);
        }
        return;
    }
    values.read_row(row, room);
    for (long g = 0; g < groups; g++) write_group(nearest_grid(room + g * GROUP), place, block + g * GROUP_BYTES);
}

// Blocks `begin` to `end` of a matrix of so many rows; what lies behind the last row is 0
inline void pack_blocks(const Values &values, int rows, bool is_int4, uint8_t *out, int begin, int end) {
    long K = values.K, quads = (K + 3) / 4, size = is_int4 ? K / GROUP * GROUP_BYTES : quads * 64;
    float *scales = reinterpret_cast<float *>(out + (rows + ROWS - 1) / ROWS * size);
    std::vector<float> x(K);
    for (int b = begin; b < end; b++) {
        uint8_t *block = out + b * size;
        std::fill_n(block, size, is_int4 ? 0 : 128);
        for (int r = 0; r < ROWS; r++) {
            int row = b * ROWS + r;
            if (!is_int4) scales[row] = 0.0f;
            if (row >= rows) continue;
            if (is_int4) row_to_nibbles(values, row, x.data(), r, block);
            else {
                values.read_row(row, x.data());
                scales[row] = row_to_bytes(x.data(), K, r, block);
            }
        }
    }
}

}  // namespace twotower
