// Elements brought to other places: strided copies, concatenation, look-ups, scattering, resized images.
#ifndef MOECORE_MOVES_H
#define MOECORE_MOVES_H

#include "fixed.h"

template <typename SIZES, typename STRIDES, int OFFSET, int WX, int WY>
void copy(const ap_int<WX>* x, ap_int<WY>* y, Counter&) {
    int place = 0;
    for (int i0 = 0; i0 < SIZES::d0; ++i0)
        for (int i1 = 0; i1 < SIZES::d1; ++i1)
            for (int i2 = 0; i2 < SIZES::d2; ++i2)
                for (int i3 = 0; i3 < SIZES::d3; ++i3)
                    for (int i4 = 0; i4 < SIZES::d4; ++i4) {
#pragma HLS PIPELINE II = 1
                        y[place++] = (long long)x[OFFSET + STRIDES::at(i0, i1, i2, i3, i4)];
                    }
}

// x [OUTER, LENGTH] into columns START and on of y [OUTER, TOTAL].
template <int OUTER, int LENGTH, int TOTAL, int START, int SHIFT, bool WRAP, int WX, int WY>
void place(const ap_int<WX>* x, ap_int<WY>* y, Counter& overflow) {
    for (int n = 0; n < OUTER; ++n)
        for (int i = 0; i < LENGTH; ++i) {
#pragma HLS PIPELINE II = 1
            y[n * TOTAL + START + i] = requantise<SHIFT, WRAP, WY>(x[n * LENGTH + i], overflow);
        }
}

// A number within [0, SIZE): negative ones count from the end, what is outside is clamped and counted.
template <int SIZE>
inline int inside(long long index, Counter& overflow) {
    if (index < 0) index += SIZE;
    if (index < 0 || index >= SIZE) {
        ++overflow;
        return index < 0 ? 0 : SIZE - 1;
    }
    return (int)index;
}

// Blocks of x [OUTER, INNER, COLUMNS] by number, index [COUNT].
template <int OUTER, int INNER, int COLUMNS, int COUNT, int WX, int WI, int WY>
void gather(const ap_int<WX>* x, const ap_int<WI>* index, ap_int<WY>* y, Counter& overflow) {
    for (int j = 0; j < COUNT; ++j) {
        const int from = inside<INNER>(index[j], overflow);
        for (int n = 0; n < OUTER; ++n)
            for (int c = 0; c < COLUMNS; ++c) {
#pragma HLS PIPELINE II = 1
                y[(n * COUNT + j) * COLUMNS + c] = (long long)x[(n * INNER + from) * COLUMNS + c];
            }
    }
}

// Elements of x [OUTER, INNER, COLUMNS] by number, index [OUTER, COUNT, COLUMNS].
template <int OUTER, int INNER, int COLUMNS, int COUNT, int WX, int WI, int WY>
void gather_elements(const ap_int<WX>* x, const ap_int<WI>* index, ap_int<WY>* y, Counter& overflow) {
    for (int n = 0; n < OUTER; ++n)
        for (int j = 0; j < COUNT; ++j)
            for (int c = 0; c < COLUMNS; ++c) {
#pragma HLS PIPELINE II = 1
                const int to = (n * COUNT + j) * COLUMNS + c;
                y[to] = (long long)x[(n * INNER + inside<INNER>(index[to], overflow)) * COLUMNS + c];
            }
}

// y = x [OUTER, INNER, COLUMNS], then elements replaced or added to, index and updates [OUTER, COUNT, COLUMNS].
template <int OUTER, int INNER, int COLUMNS, int COUNT, bool ADD, int SHIFT_X, int SHIFT_UPDATE, bool WRAP, int WX, int WI,
          int WU, int WY>
void scatter_elements(const ap_int<WX>* x, const ap_int<WI>* index, const ap_int<WU>* updates, ap_int<WY>* y,
                      Counter& overflow) {
    for (int i = 0; i < OUTER * INNER * COLUMNS; ++i) {
#pragma HLS PIPELINE II = 1
        y[i] = requantise<SHIFT_X, WRAP, WY>(x[i], overflow);
    }
    for (int n = 0; n < OUTER; ++n)
        for (int j = 0; j < COUNT; ++j)
            for (int c = 0; c < COLUMNS; ++c) {
                const int from = (n * COUNT + j) * COLUMNS + c;
                const int to = (n * INNER + inside<INNER>(index[from], overflow)) * COLUMNS + c;
                const long long update = requantise<SHIFT_UPDATE, WRAP, WY>(updates[from], overflow);
                y[to] = ADD ? requantise<0, WRAP, WY>(update + (long long)y[to], overflow) : ap_int<WY>(update);
            }
}

// x [CHANNELS, HEIGHT, WIDTH]; rows [3, OUT_HEIGHT] and columns [3, OUT_WIDTH]: first, second, weight of the second.
template <int CHANNELS, int HEIGHT, int WIDTH, int OUT_HEIGHT, int OUT_WIDTH, int WEIGHT_BITS, int ACC, int SHIFT, bool WRAP,
          int WX, int WI, int WY>
void resize(const ap_int<WX>* x, const ap_int<WI>* rows, const ap_int<WI>* columns, ap_int<WY>* y, Counter& overflow) {
    const long long one = 1LL << WEIGHT_BITS;
    for (int n = 0; n < CHANNELS; ++n)
        for (int r = 0; r < OUT_HEIGHT; ++r)
            for (int c = 0; c < OUT_WIDTH; ++c) {
#pragma HLS PIPELINE II = 1
                const int top = (n * HEIGHT + (int)rows[r]) * WIDTH, bottom = (n * HEIGHT + (int)rows[OUT_HEIGHT + r]) * WIDTH;
                const int left = (int)columns[c], right = (int)columns[OUT_WIDTH + c];
                const long long down = rows[2 * OUT_HEIGHT + r], across = columns[2 * OUT_WIDTH + c];
                const long long first = (long long)x[top + left] * (one - down) + (long long)x[bottom + left] * down;
                const long long second = (long long)x[top + right] * (one - down) + (long long)x[bottom + right] * down;
                const ap_int<ACC> total = first * (one - across) + second * across;
                y[(n * OUT_HEIGHT + r) * OUT_WIDTH + c] = requantise<SHIFT, WRAP, WY>(total, overflow);
            }
}

#endif
