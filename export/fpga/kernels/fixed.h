// Integers of declared widths, and the one rule by which a wide result becomes a narrow one.
#ifndef MOECORE_FIXED_H
#define MOECORE_FIXED_H

#include <type_traits>

#if defined(__SYNTHESIS__) || defined(MOECORE_VENDOR_INTEGERS)
#include <ap_int.h>
#else

// What these kernels use of the vendor's class of the same name: a two's complement integer that wraps when assigned.
template <int W>
class ap_int {
    static_assert(W >= 1 && W <= 64, "at most 64 bits");
    typedef typename std::conditional<
        W <= 8, signed char,
        typename std::conditional<W <= 16, short, typename std::conditional<W <= 32, int, long long>::type>::type>::type
        Storage;
    Storage code;

    static Storage wrapped(long long value) {
        return (Storage)((long long)((unsigned long long)value << (64 - W)) >> (64 - W));
    }

public:
    ap_int() : code(0) {}
    ap_int(long long value) : code(wrapped(value)) {}
    operator long long() const { return code; }
    ap_int& operator+=(long long value) {
        code = wrapped((long long)((unsigned long long)code + (unsigned long long)value));
        return *this;
    }
};
#endif

// Results of one layer that did not fit their format.
typedef unsigned int Counter;

enum class Function {
    add_, sub_, mul_, max_, min_, equal_, less_, less_equal_, greater_, greater_equal_, and_, or_, xor_,
    copy_, abs_, neg_, sign_, not_, floor_, ceil_, trunc_, sqrt_,
    sum_, mean_, l2_, argmax_, argmin_,
    identity_, relu_, relu2_, table_
};

// Five nested loops: their sizes, or the strides of an operand.
template <int D0, int D1, int D2, int D3, int D4>
struct Nest {
    enum { d0 = D0, d1 = D1, d2 = D2, d3 = D3, d4 = D4 };
    static int at(int i0, int i1, int i2, int i3, int i4) { return i0 * D0 + i1 * D1 + i2 * D2 + i3 * D3 + i4 * D4; }
};

// value * 2^bits; of negative values too, whose shift to the left C++14 leaves open.
inline long long shift_left(long long value, int bits) { return (long long)((unsigned long long)value << bits); }

// floor(value / 2^SHIFT + 1/2); exact to the left where SHIFT is negative.
template <int SHIFT>
inline long long shift_right(long long value) {
    const int right = SHIFT > 0 ? SHIFT : 1, left = SHIFT < 0 ? -SHIFT : 0;
    return SHIFT > 0 ? (value + (1LL << (right - 1))) >> right : shift_left(value, left);
}

// The same for a shift that is known only when it runs, at least 1.
inline long long shift_right_by(long long value, int shift) { return (value + (1LL << (shift - 1))) >> shift; }

// floor(numerator / denominator + 1/2) for a positive denominator.
inline long long divide_rounded(long long numerator, long long denominator) {
    const long long n = 2 * numerator + denominator, d = 2 * denominator;
    const long long quotient = n / d;
    return n % d < 0 ? quotient - 1 : quotient;
}

template <int SHIFT, bool WRAP, int W>
inline ap_int<W> requantise(long long accumulator, Counter& overflow) {
    const long long low = -(1LL << (W - 1)), high = (1LL << (W - 1)) - 1;
    long long code = shift_right<SHIFT>(accumulator);
    if (code < low || code > high) {
        ++overflow;
        if (!WRAP) code = code < low ? low : high;
    }
    return ap_int<W>(code);
}

// The same with its settings in a type.
template <int SHIFT, bool WRAP, int W>
struct Rule {
    typedef ap_int<W> Code;
    static Code apply(long long accumulator, Counter& overflow) { return requantise<SHIFT, WRAP, W>(accumulator, overflow); }
};

#endif
