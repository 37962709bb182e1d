// Matrix products and convolutions: exact sums of products, then one rounding.
#ifndef MOECORE_PRODUCTS_H
#define MOECORE_PRODUCTS_H

#include "fixed.h"

// x [ROWS, INNER] times weight [OUTPUTS, INNER], plus bias [OUTPUTS]. Each weight is read once.
template <int ROWS, int INNER, int OUTPUTS, int TILE_IN, int TILE_OUT, int ACC, int BIAS_SHIFT, int SHIFT, bool WRAP,
          int WX, int WW, int WB, int WY>
void linear(const ap_int<WX>* x, const ap_int<WW>* weight, const ap_int<WB>* bias, ap_int<WY>* y, Counter& overflow) {
    for (int first = 0; first < OUTPUTS; first += TILE_OUT) {
        ap_int<WW> tile[TILE_OUT][INNER];
#pragma HLS ARRAY_PARTITION variable = tile type = complete dim = 1
#pragma HLS ARRAY_PARTITION variable = tile type = cyclic factor = TILE_IN dim = 2
        for (int o = 0; o < TILE_OUT; ++o)
            for (int i = 0; i < INNER; ++i) {
#pragma HLS PIPELINE II = 1
                tile[o][i] = first + o < OUTPUTS ? weight[(first + o) * INNER + i] : ap_int<WW>(0);
            }
        for (int r = 0; r < ROWS; ++r) {
            ap_int<ACC> total[TILE_OUT];
#pragma HLS ARRAY_PARTITION variable = total type = complete
            for (int o = 0; o < TILE_OUT; ++o) {
#pragma HLS UNROLL
                total[o] = first + o < OUTPUTS ? shift_left(bias[first + o], BIAS_SHIFT) : 0;
            }
            for (int start = 0; start < INNER; start += TILE_IN) {
#pragma HLS PIPELINE II = 1
                for (int o = 0; o < TILE_OUT; ++o) {
#pragma HLS UNROLL
                    for (int i = start; i < start + TILE_IN; ++i) {
#pragma HLS UNROLL
                        if (i < INNER) total[o] += x[r * INNER + i] * tile[o][i];
                    }
                }
            }
            for (int o = 0; o < TILE_OUT; ++o) {
#pragma HLS UNROLL
                if (first + o < OUTPUTS)
                    y[r * OUTPUTS + first + o] = requantise<SHIFT, WRAP, WY>(total[o], overflow);
            }
        }
    }
}

// a [BATCH, ROWS, INNER] times b [BATCH, INNER, COLUMNS]; STEP_A and STEP_B are 0 where one serves the whole batch.
template <int BATCH, int ROWS, int INNER, int COLUMNS, int STEP_A, int STEP_B, int TILE_IN, int TILE_OUT, int ACC,
          int SHIFT, bool WRAP, int WA, int WB, int WY>
void matmul(const ap_int<WA>* a, const ap_int<WB>* b, ap_int<WY>* y, Counter& overflow) {
    for (int n = 0; n < BATCH; ++n)
        for (int first = 0; first < COLUMNS; first += TILE_OUT) {
            ap_int<WB> tile[TILE_OUT][INNER];
#pragma HLS ARRAY_PARTITION variable = tile type = complete dim = 1
#pragma HLS ARRAY_PARTITION variable = tile type = cyclic factor = TILE_IN dim = 2
            for (int i = 0; i < INNER; ++i)
                for (int c = 0; c < TILE_OUT; ++c) {
#pragma HLS PIPELINE II = 1
                    tile[c][i] = first + c < COLUMNS ? b[n * STEP_B + i * COLUMNS + first + c] : ap_int<WB>(0);
                }
            for (int r = 0; r < ROWS; ++r) {
                ap_int<ACC> total[TILE_OUT];
#pragma HLS ARRAY_PARTITION variable = total type = complete
                for (int c = 0; c < TILE_OUT; ++c) {
#pragma HLS UNROLL
                    total[c] = 0;
                }
                for (int start = 0; start < INNER; start += TILE_IN) {
#pragma HLS PIPELINE II = 1
                    for (int c = 0; c < TILE_OUT; ++c) {
#pragma HLS UNROLL
                        for (int i = start; i < start + TILE_IN; ++i) {
#pragma HLS UNROLL
                            if (i < INNER) total[c] += a[n * STEP_A + r * INNER + i] * tile[c][i];
                        }
                    }
                }
                for (int c = 0; c < TILE_OUT; ++c) {
#pragma HLS UNROLL
                    if (first + c < COLUMNS)
                        y[(n * ROWS + r) * COLUMNS + first + c] = requantise<SHIFT, WRAP, WY>(total[c], overflow);
                }
            }
        }
}

// x [CHANNELS, HEIGHT, WIDTH], weight [OUTPUTS, CHANNELS / GROUPS, KH, KW], bias [OUTPUTS].
template <int CHANNELS, int HEIGHT, int WIDTH, int OUTPUTS, int GROUPS, int KH, int KW, int SH, int SW, int DH, int DW,
          int TOP, int LEFT, int OUT_HEIGHT, int OUT_WIDTH, int TILE_OUT, int ACC, int BIAS_SHIFT, int SHIFT, bool WRAP,
          int WX, int WW, int WB, int WY>
void conv2d(const ap_int<WX>* x, const ap_int<WW>* weight, const ap_int<WB>* bias, ap_int<WY>* y, Counter& overflow) {
    const int own = CHANNELS / GROUPS, outputs = OUTPUTS / GROUPS;
    for (int g = 0; g < GROUPS; ++g)
        for (int first = 0; first < outputs; first += TILE_OUT) {
            ap_int<WW> tile[TILE_OUT][own * KH * KW];
#pragma HLS ARRAY_PARTITION variable = tile type = complete dim = 1
            for (int o = 0; o < TILE_OUT; ++o)
                for (int i = 0; i < own * KH * KW; ++i) {
#pragma HLS PIPELINE II = 1
                    tile[o][i] = first + o < outputs ? weight[(g * outputs + first + o) * own * KH * KW + i] : ap_int<WW>(0);
                }
            for (int row = 0; row < OUT_HEIGHT; ++row)
                for (int column = 0; column < OUT_WIDTH; ++column) {
                    ap_int<ACC> total[TILE_OUT];
#pragma HLS ARRAY_PARTITION variable = total type = complete
                    for (int o = 0; o < TILE_OUT; ++o) {
#pragma HLS UNROLL
                        total[o] = first + o < outputs ? shift_left(bias[g * outputs + first + o], BIAS_SHIFT) : 0;
                    }
                    for (int c = 0; c < own; ++c)
                        for (int ky = 0; ky < KH; ++ky)
                            for (int kx = 0; kx < KW; ++kx) {
#pragma HLS PIPELINE II = 1
                                const int iy = row * SH - TOP + ky * DH, ix = column * SW - LEFT + kx * DW;
                                if (iy < 0 || iy >= HEIGHT || ix < 0 || ix >= WIDTH) continue;
                                const ap_int<WX> value = x[((g * own + c) * HEIGHT + iy) * WIDTH + ix];
                                for (int o = 0; o < TILE_OUT; ++o) {
#pragma HLS UNROLL
                                    total[o] += value * tile[o][(c * KH + ky) * KW + kx];
                                }
                            }
                    for (int o = 0; o < TILE_OUT; ++o) {
#pragma HLS UNROLL
                        if (first + o < outputs)
                            y[((g * outputs + first + o) * OUT_HEIGHT + row) * OUT_WIDTH + column] =
                                requantise<SHIFT, WRAP, WY>(total[o], overflow);
                    }
                }
        }
}

// x [OUTER, CHANNELS, INNER] times a factor plus a summand per channel.
template <int OUTER, int CHANNELS, int INNER, int BIAS_SHIFT, int ACC, int SHIFT, bool WRAP, int WX, int WS, int WB, int WY>
void affine(const ap_int<WX>* x, const ap_int<WS>* scale, const ap_int<WB>* bias, ap_int<WY>* y, Counter& overflow) {
    for (int n = 0; n < OUTER; ++n)
        for (int c = 0; c < CHANNELS; ++c)
            for (int i = 0; i < INNER; ++i) {
#pragma HLS PIPELINE II = 1
                const int place = (n * CHANNELS + c) * INNER + i;
                ap_int<ACC> total = x[place] * scale[c];
                total += shift_left(bias[c], BIAS_SHIFT);
                y[place] = requantise<SHIFT, WRAP, WY>(total, overflow);
            }
}

#endif
