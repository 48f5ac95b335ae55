// The quantised types of GGUF files, as llama.cpp lays them out: of 32 columns of a row the whole numbers and
// the grid that they lie on. A column is number * step + start, as a float32 product and a float32 sum.
#pragma once

#include "numbers.h"

namespace twotower {

constexpr int COLUMNS_OF_GRID = 32;

struct GridColumns {
    int8_t number[32];
    float step[2], start[2];  // of each 16

    void on(float one_step, float one_start) { step[0] = step[1] = one_step, start[0] = start[1] = one_start; }
};

inline float half_at(const uint8_t *x) {
    Half own;
    std::memcpy(&own, x, 2);
    return widened(own);
}

// 16 bytes of nibbles: the first columns are low, the others high; bits: a fifth of each
inline void halves_of(const uint8_t *x, int8_t *number, uint32_t bits = 0) {
    for (int i = 0; i < 16; i++) {
        number[i] = int8_t((x[i] & 15) | (bits >> i & 1) << 4);
        number[16 + i] = int8_t(x[i] >> 4 | (bits >> (16 + i) & 1) << 4);
    }
}

// The six bits of a scale and of a minimum of group g of a K-quant's eight
inline void scale_and_least(const uint8_t *x, int g, int &scale, int &least) {
    if (g < 4) scale = x[g] & 63, least = x[g + 4] & 63;
    else {
        scale = (x[g + 4] & 15) | (x[g - 4] >> 6) << 4;
        least = x[g + 4] >> 4 | (x[g] >> 6) << 4;
    }
}

// The four bits of a number that are an index, in IQ4 and MXFP4
constexpr int8_t IQ4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t FP4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

inline void looked_up(const uint8_t *x, const int8_t *table, int8_t *number) {
    halves_of(x, number);
    for (int i = 0; i < 32; i++) number[i] = table[int(number[i])];
}

// Bytes of a type's block, and how many columns it has
struct BlockSize {
    int bytes, columns;
};

constexpr BlockSize block_size(int dtype) {
    switch (dtype) {
    case Q4_0: case IQ4_NL: return {18, 32};
    case Q4_1: return {20, 32};
    case Q5_0: return {22, 32};
    case Q5_1: return {24, 32};
    case Q8_0: return {34, 32};
    case MXFP4: return {17, 32};
    case Q2_K: return {84, 256};
    case Q3_K: return {110, 256};
    case Q4_K: return {144, 256};
    case Q5_K: return {176, 256};
    case Q6_K: return {210, 256};
    default: return {136, 256};  // IQ4_XS
    }
}

// A block's group g of 32 columns
inline void read_group(int dtype, const uint8_t *x, int g, GridColumns &found) {
    int8_t *number = found.number;
    uint32_t bits;
    switch (dtype) {
    case Q4_0: {
        halves_of(x + 2, number);
        return found.on(half_at(x), -8.0f * half_at(x));
    }
    case Q4_1: {
        halves_of(x + 4, number);
        return found.on(half_at(x), half_at(x + 2));
    }
    case Q5_0: {
        std::memcpy(&bits, x + 2, 4);
        halves_of(x + 6, number, bits);
        return found.on(half_at(x), -16.0f * half_at(x));
    }
    case Q5_1: {
        std::memcpy(&bits, x + 4, 4);
        halves_of(x + 8, number, bits);
        return found.on(half_at(x), half_at(x + 2));
    }
    case Q8_0: {
        std::memcpy(number, x + 2, 32);
        return found.on(half_at(x), 0.0f);
    }
    case IQ4_NL: {
        looked_up(x + 2, IQ4, number);
        return found.on(half_at(x), 0.0f);
    }
    case MXFP4: {
        looked_up(x + 1, FP4, number);
        bits = x[0] < 2 ? 0x00200000u << x[0] : uint32_t(x[0] - 1) << 23;  // half of 2^(x - 127)
        float step;
        std::memcpy(&step, &bits, 4);
        return found.on(step, 0.0f);
    }
    case IQ4_XS: {
        looked_up(x + 8 + 16 * g, IQ4, number);
        int scale = (x[4 + g / 2] >> 4 * (g % 2) & 15) | ((x[2] | x[3] << 8) >> 2 * g & 3) << 4;
        return found.on(half_at(x) * float(scale - 32), 0.0f);
    }
    case Q2_K: {
        for (int i = 0; i < 32; i++) number[i] = int8_t(x[16 + g / 4 * 32 + i] >> 2 * (g % 4) & 3);
        for (int half = 0; half < 2; half++) {
            uint8_t own = x[2 * g + half];
            found.step[half] = half_at(x + 80) * float(own & 15);
            found.start[half] = -(half_at(x + 82) * float(own >> 4));
        }
        return;
    }
    case Q3_K: {
        for (int i = 0; i < 32; i++) {
            int low = x[32 + g / 4 * 32 + i] >> 2 * (g % 4) & 3;
            number[i] = int8_t(low - (x[i] >> g & 1 ? 0 : 4));
        }
        for (int half = 0; half < 2; half++) {
            int at = 2 * g + half, low = x[96 + at % 8] >> (at < 8 ? 0 : 4) & 15;
            int scale = low | (x[104 + at % 4] >> at / 4 * 2 & 3) << 4;
            found.step[half] = half_at(x + 108) * float(scale - 32), found.start[half] = 0.0f;
        }
        return;
    }
    case Q4_K: case Q5_K: {
        const uint8_t *nibbles = x + (dtype == Q4_K ? 16 : 48) + g / 2 * 32;
        for (int i = 0; i < 32; i++) {
            int high = dtype == Q4_K ? 0 : x[16 + i] >> g & 1;
            number[i] = int8_t((nibbles[i] >> 4 * (g % 2) & 15) | high << 4);
        }
        int scale, least;
        scale_and_least(x + 4, g, scale, least);
        return found.on(half_at(x) * float(scale), -(half_at(x + 2) * float(least)));
    }
    default: {  // Q6_K
        const uint8_t *low = x + g / 4 * 64 + g % 2 * 32, *high = x + 128 + g / 4 * 32;
        for (int i = 0; i < 32; i++) {
            int four = low[i] >> (g % 4 < 2 ? 0 : 4) & 15, two = high[i] >> 2 * (g % 4) & 3;
            number[i] = int8_t((four | two << 4) - 32);
        }
        for (int half = 0; half < 2; half++) {
            int8_t scale = int8_t(x[192 + 2 * g + half]);
            found.step[half] = half_at(x + 208) * float(scale), found.start[half] = 0.0f;
        }
    }
    }
}

// Group g of a row
inline void read_columns(int dtype, const uint8_t *row, long g, GridColumns &found) {
    auto [bytes, columns] = block_size(dtype);
    long per_block = columns / COLUMNS_OF_GRID;
    read_group(dtype, row + g / per_block * bytes, int(g % per_block), found);
}

// All K columns of a row
inline void widen_row(int dtype, const uint8_t *row, long K, float *x) {
    GridColumns own;
    for (long g = 0; g < K / COLUMNS_OF_GRID; g++, x += COLUMNS_OF_GRID) {
        read_columns(dtype, row, g, own);
        for (int i = 0; i < COLUMNS_OF_GRID; i++) x[i] = float(own.number[i]) * own.step[i / 16] + own.start[i / 16];
    }
}

}  // namespace twotower
