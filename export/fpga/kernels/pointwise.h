// Element by element: arithmetic and comparisons with broadcasting, choices, clamps, functions by table, quotients.
#ifndef MOECORE_POINTWISE_H
#define MOECORE_POINTWISE_H

#include "fixed.h"

template <Function F>
inline long long binary_function(long long a, long long b) {
    switch (F) {
        case Function::add_: return a + b;
        case Function::sub_: return a - b;
        case Function::mul_: return a * b;
        case Function::max_: return a > b ? a : b;
        case Function::min_: return a < b ? a : b;
        case Function::equal_: return a == b;
        case Function::less_: return a < b;
        case Function::less_equal_: return a <= b;
        case Function::greater_: return a > b;
        case Function::greater_equal_: return a >= b;
        case Function::and_: return a != 0 && b != 0;
        case Function::or_: return a != 0 || b != 0;
        case Function::xor_: return (a != 0) != (b != 0);
        default: return 0;
    }
}

// SIZES are of the loops, A and B the operands' strides, 0 where one repeats.
template <Function F, typename SIZES, typename A, typename B, int SHIFT_A, int SHIFT_B, int ACC, int SHIFT, bool WRAP,
          int WA, int WB, int WY>
void binary(const ap_int<WA>* a, const ap_int<WB>* b, ap_int<WY>* y, Counter& overflow) {
    int place = 0;
    for (int i0 = 0; i0 < SIZES::d0; ++i0)
        for (int i1 = 0; i1 < SIZES::d1; ++i1)
            for (int i2 = 0; i2 < SIZES::d2; ++i2)
                for (int i3 = 0; i3 < SIZES::d3; ++i3)
                    for (int i4 = 0; i4 < SIZES::d4; ++i4) {
#pragma HLS PIPELINE II = 1
                        const long long left = shift_right<SHIFT_A>(a[A::at(i0, i1, i2, i3, i4)]);
                        const long long right = shift_right<SHIFT_B>(b[B::at(i0, i1, i2, i3, i4)]);
                        const ap_int<ACC> result = binary_function<F>(left, right);
                        y[place++] = requantise<SHIFT, WRAP, WY>(result, overflow);
                    }
}

template <typename SIZES, typename A, typename B, int SHIFT_A, int SHIFT_B, int ACC, int SHIFT, bool WRAP, int WA, int WB,
          int WY>
void divide(const ap_int<WA>* a, const ap_int<WB>* b, ap_int<WY>* y, Counter& overflow) {
    int place = 0;
    for (int i0 = 0; i0 < SIZES::d0; ++i0)
        for (int i1 = 0; i1 < SIZES::d1; ++i1)
            for (int i2 = 0; i2 < SIZES::d2; ++i2)
                for (int i3 = 0; i3 < SIZES::d3; ++i3)
                    for (int i4 = 0; i4 < SIZES::d4; ++i4) {
#pragma HLS PIPELINE II = 1
                        long long numerator = shift_left(a[A::at(i0, i1, i2, i3, i4)], SHIFT_A);
                        long long denominator = shift_left(b[B::at(i0, i1, i2, i3, i4)], SHIFT_B);
                        if (denominator < 0) {
                            numerator = -numerator;
                            denominator = -denominator;
                        }
                        const long long beyond = numerator < 0 ? -(1LL << WY) : 1LL << WY;  // does not fit
                        const ap_int<ACC> result = denominator == 0 ? beyond : divide_rounded(numerator, denominator);
                        y[place++] = requantise<SHIFT, WRAP, WY>(result, overflow);
                    }
}

template <typename SIZES, typename C, typename A, typename B, int SHIFT_A, int SHIFT_B, bool WRAP, int WC, int WA, int WB,
          int WY>
void select(const ap_int<WC>* condition, const ap_int<WA>* a, const ap_int<WB>* b, ap_int<WY>* y, Counter& overflow) {
    int place = 0;
    for (int i0 = 0; i0 < SIZES::d0; ++i0)
        for (int i1 = 0; i1 < SIZES::d1; ++i1)
            for (int i2 = 0; i2 < SIZES::d2; ++i2)
                for (int i3 = 0; i3 < SIZES::d3; ++i3)
                    for (int i4 = 0; i4 < SIZES::d4; ++i4) {
#pragma HLS PIPELINE II = 1
                        const bool holds = (long long)condition[C::at(i0, i1, i2, i3, i4)] != 0;
                        const long long left = shift_right<SHIFT_A>(a[A::at(i0, i1, i2, i3, i4)]);
                        const long long right = shift_right<SHIFT_B>(b[B::at(i0, i1, i2, i3, i4)]);
                        y[place++] = requantise<0, WRAP, WY>(holds ? left : right, overflow);
                    }
}

// floor(sqrt(value)) of a number below 2^62, digit by digit.
inline long long integer_root(unsigned long long value) {
    unsigned long long root = 0, bit = 1ULL << 60;
    for (int step = 0; step < 31; ++step) {
#pragma HLS PIPELINE II = 1
        if (value >= root + bit) {
            value -= root + bit;
            root = (root >> 1) + bit;
        } else {
            root >>= 1;
        }
        bit >>= 2;
    }
    return (long long)root;
}

template <Function F, int FRACTION>
inline long long unary_function(long long x) {
    switch (F) {
        case Function::copy_: return x;
        case Function::abs_: return x < 0 ? -x : x;
        case Function::neg_: return -x;
        case Function::sign_: return (x > 0) - (x < 0);
        case Function::not_: return x == 0;
        case Function::floor_: return x >> FRACTION;
        case Function::ceil_: return -(-x >> FRACTION);
        case Function::trunc_: return x < 0 ? -(-x >> FRACTION) : x >> FRACTION;
        case Function::sqrt_: return integer_root((unsigned long long)shift_left(x < 0 ? 0 : x, FRACTION));
        default: return 0;
    }
}

template <Function F, int SIZE, int FRACTION, long long LOW, long long HIGH, int ACC, int SHIFT, bool WRAP, int WX, int WY>
void unary(const ap_int<WX>* x, ap_int<WY>* y, Counter& overflow) {
    for (int i = 0; i < SIZE; ++i) {
#pragma HLS PIPELINE II = 1
        const long long value = x[i];
        const long long clamped = value < LOW ? LOW : value > HIGH ? HIGH : value;
        const ap_int<ACC> result = unary_function<F, FRACTION>(clamped);
        y[i] = requantise<SHIFT, WRAP, WY>(result, overflow);
    }
}

// The line through neighbouring entries, 2^SHIFT times as fine as these. The table holds COUNT + 1 values.
template <int SHIFT, int COUNT, int WT>
inline long long interpolate(long long above_low, const ap_int<WT>* table) {
    const long long end = shift_left(COUNT, SHIFT);
    const long long place = above_low < 0 ? 0 : above_low > end ? end : above_low;
    const int segment = (int)(place >> SHIFT), index = segment < COUNT - 1 ? segment : COUNT - 1;
    const long long rest = place - shift_left(index, SHIFT);
    const long long left = table[index], right = table[index + 1];
    return shift_left(left, SHIFT) + (right - left) * rest;
}

// Plus the rectified input where RELU_SHIFT is not negative.
template <int SIZE, long long LOW, int TABLE_SHIFT, int COUNT, int RELU_SHIFT, int ACC, int SHIFT, bool WRAP, int WX,
          int WT, int WY>
void table(const ap_int<WX>* x, const ap_int<WT>* values, ap_int<WY>* y, Counter& overflow) {
    const int relu_shift = RELU_SHIFT < 0 ? 0 : RELU_SHIFT;
    for (int i = 0; i < SIZE; ++i) {
#pragma HLS PIPELINE II = 1
        const long long value = x[i];
        ap_int<ACC> total = interpolate<TABLE_SHIFT, COUNT>(value - LOW, values);
        if (RELU_SHIFT >= 0 && value > 0) total += shift_left(value, relu_shift);
        y[i] = requantise<SHIFT, WRAP, WY>(total, overflow);
    }
}

#endif
