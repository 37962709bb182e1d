// Statistics of rows: norms, softmax, reductions, the best of a row.
#ifndef MOECORE_ROWS_H
#define MOECORE_ROWS_H

#include "fixed.h"
#include "pointwise.h"

const int ROOT = 60, RECIPROCAL = 24;

// Layer norm, or RMS norm where not CENTRED: x [ROWS, INNER], scale and bias [INNER].
template <int ROWS, int INNER, bool CENTRED, int GUARD, long long EPSILON, int UNIT, int BIAS_SHIFT, int ACC, int SHIFT,
          bool WRAP, int WX, int WS, int WB, int WY>
void norm(const ap_int<WX>* x, const ap_int<WS>* scale, const ap_int<WB>* bias, ap_int<WY>* y, Counter& overflow) {
    for (int r = 0; r < ROWS; ++r) {
        long long sum = 0;
        for (int i = 0; i < INNER; ++i) {
#pragma HLS PIPELINE II = 1
            sum += shift_right<-GUARD>(x[r * INNER + i]);
        }
        const long long mean = CENTRED ? divide_rounded(sum, INNER) : 0;
        long long squares = 0;
        for (int i = 0; i < INNER; ++i) {
#pragma HLS PIPELINE II = 1
            const long long deviation = shift_right<-GUARD>(x[r * INNER + i]) - mean;
            squares += deviation * deviation;
        }
        long long variance = divide_rounded(squares, INNER) + EPSILON;
        if (variance < 1) variance = 1;
        int power = 0;
        for (int step = 16; step >= 1; step /= 2)
            if (variance < (1LL << (ROOT + 2 - 2 * step))) {
                variance <<= 2 * step;
                power += step;
            }
        const long long reciprocal = (1LL << (ROOT / 2 + RECIPROCAL)) / integer_root((unsigned long long)variance);
        for (int i = 0; i < INNER; ++i) {
#pragma HLS PIPELINE II = 1
            const long long deviation = shift_right<-GUARD>(x[r * INNER + i]) - mean;
            const long long normal = shift_right_by(deviation * reciprocal, ROOT / 2 + RECIPROCAL - power - UNIT);
            ap_int<ACC> total = normal * (long long)scale[i];
            total += shift_left(bias[i], BIAS_SHIFT);
            y[r * INNER + i] = requantise<SHIFT, WRAP, WY>(total, overflow);
        }
    }
}

// x [ROWS, INNER]; TABLE holds exp(-t). The largest is subtracted; one division a row.
template <int ROWS, int INNER, int TABLE_SHIFT, int COUNT, int EXP_SHIFT, int EXP_WIDTH, int RECIP, int ACC, int SHIFT,
          bool WRAP, int WX, int WT, int WY>
void softmax(const ap_int<WX>* x, const ap_int<WT>* table, ap_int<WY>* y, Counter& overflow) {
    for (int r = 0; r < ROWS; ++r) {
        ap_int<EXP_WIDTH> power[INNER];
        Counter none = 0;
        long long largest = x[r * INNER];
        for (int i = 1; i < INNER; ++i) {
#pragma HLS PIPELINE II = 1
            const long long value = x[r * INNER + i];
            if (value > largest) largest = value;
        }
        long long sum = 0;
        for (int i = 0; i < INNER; ++i) {
#pragma HLS PIPELINE II = 1
            const long long exponential = interpolate<TABLE_SHIFT, COUNT>(largest - (long long)x[r * INNER + i], table);
            power[i] = requantise<EXP_SHIFT, false, EXP_WIDTH>(exponential, none);
            sum += (long long)power[i];
        }
        const long long reciprocal = (1LL << RECIP) / sum;
        for (int i = 0; i < INNER; ++i) {
#pragma HLS PIPELINE II = 1
            const ap_int<ACC> share = (long long)power[i] * reciprocal;
            y[r * INNER + i] = requantise<SHIFT, WRAP, WY>(share, overflow);
        }
    }
}

// x [OUTER, INNER, COLUMNS] over INNER; of equals the first.
template <Function F, int OUTER, int INNER, int COLUMNS, int LEFT, int ACC, int SHIFT, bool WRAP, int WX, int WY>
void reduce(const ap_int<WX>* x, ap_int<WY>* y, Counter& overflow) {
    for (int n = 0; n < OUTER; ++n)
        for (int c = 0; c < COLUMNS; ++c) {
            ap_int<ACC> sum = 0;
            long long best = 0;
            int place = 0;
            for (int i = 0; i < INNER; ++i) {
#pragma HLS PIPELINE II = 1
                const long long value = x[(n * INNER + i) * COLUMNS + c];
                const bool least = F == Function::min_ || F == Function::argmin_;
                if (F == Function::sum_ || F == Function::mean_) {
                    sum += value;
                } else if (F == Function::l2_) {
                    sum += value * value;
                } else if (i == 0 || (least ? value < best : value > best)) {
                    best = value;
                    place = i;
                }
            }
            long long result = best;
            if (F == Function::sum_) result = sum;
            if (F == Function::mean_) result = divide_rounded(shift_left(sum, LEFT), INNER);
            if (F == Function::l2_) result = integer_root((unsigned long long)shift_left(sum, LEFT));
            if (F == Function::argmax_ || F == Function::argmin_) result = place;
            y[n * COLUMNS + c] = requantise<SHIFT, WRAP, WY>(result, overflow);
        }
}

// The COUNT largest of each row of x [ROWS, INNER], largest first, of equals the first.
template <int ROWS, int INNER, int COUNT, int W, int WI>
void topk(const ap_int<W>* x, ap_int<W>* values, ap_int<WI>* index, Counter&) {
    for (int r = 0; r < ROWS; ++r) {
        bool taken[INNER];
        for (int i = 0; i < INNER; ++i) {
#pragma HLS PIPELINE II = 1
            taken[i] = false;
        }
        for (int k = 0; k < COUNT; ++k) {
            int place = -1;
            long long best = 0;
            for (int i = 0; i < INNER; ++i) {
#pragma HLS PIPELINE II = 1
                const long long value = x[r * INNER + i];
                if (!taken[i] && (place < 0 || value > best)) {
                    best = value;
                    place = i;
                }
            }
            taken[place] = true;
            values[r * COUNT + k] = best;
            index[r * COUNT + k] = place;
        }
    }
}

// Running sums along INNER of x [OUTER, INNER, COLUMNS].
template <int OUTER, int INNER, int COLUMNS, bool EXCLUSIVE, int ACC, int SHIFT, bool WRAP, int WX, int WY>
void cumulate(const ap_int<WX>* x, ap_int<WY>* y, Counter& overflow) {
    for (int n = 0; n < OUTER; ++n)
        for (int c = 0; c < COLUMNS; ++c) {
            ap_int<ACC> sum = 0;
            for (int i = 0; i < INNER; ++i) {
#pragma HLS PIPELINE II = 1
                const int place = (n * INNER + i) * COLUMNS + c;
                const long long before = sum;
                sum += (long long)x[place];
                y[place] = requantise<SHIFT, WRAP, WY>(EXCLUSIVE ? before : (long long)sum, overflow);
            }
        }
}

#endif
