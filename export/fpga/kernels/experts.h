// The mixture of experts, expert by expert: tokens are queued by expert, each expert's weights are loaded once.
#ifndef MOECORE_EXPERTS_H
#define MOECORE_EXPERTS_H

#include "fixed.h"
#include "pointwise.h"

template <int TOKENS, int TOP_K, int EXPERTS, int INNER, int HIDDEN, int OUTPUTS, int TILE_IN, int TILE_OUT>
struct Sizes {
    enum {
        tokens = TOKENS, slots = TOKENS * TOP_K, top_k = TOP_K, experts = EXPERTS, inner = INNER, hidden = HIDDEN,
        outputs = OUTPUTS, tile_in = TILE_IN, tile_out = TILE_OUT
    };
};

template <Function KIND, long long LOW, int SHIFT, int COUNT, int RELU_SHIFT, int ACC>
struct Activation {
    template <int W, int WT>
    static ap_int<ACC> apply(ap_int<W> x, const ap_int<WT>* table) {
        const long long value = x, positive = value < 0 ? 0 : value;
        if (KIND == Function::identity_) return ap_int<ACC>(value);
        if (KIND == Function::relu_) return ap_int<ACC>(positive);
        if (KIND == Function::relu2_) return ap_int<ACC>(positive * positive);
        ap_int<ACC> total = interpolate<SHIFT, COUNT>(value - LOW, table);
        if (RELU_SHIFT >= 0) total += shift_left(positive, RELU_SHIFT < 0 ? 0 : RELU_SHIFT);
        return total;
    }
};

// To the left, of the biases.
template <int UP, int GATE, int DOWN>
struct Shifts {
    enum { up = UP, gate = GATE, down = DOWN };
};

// Of the accumulators.
template <int UP, int DOWN, int SUM>
struct Widths {
    enum { up = UP, down = DOWN, sum = SUM };
};

// Weights of one expert on the chip.
template <typename S, bool GATED, int WW, int WB>
struct Weights {
    ap_int<WW> up[S::hidden * S::inner], gate[GATED ? S::hidden * S::inner : 1], down[S::outputs * S::hidden];
    ap_int<WB> up_bias[S::hidden], gate_bias[S::hidden], down_bias[S::outputs];
};

template <int SIZE, int W>
void load_block(const ap_int<W>* from, int number, ap_int<W>* to) {
    for (int i = 0; i < SIZE; ++i) {
#pragma HLS PIPELINE II = 1
        to[i] = from[number * SIZE + i];
    }
}

// Where the weights of all experts lie in external memory.
template <int WW, int WB>
struct Bank {
    const ap_int<WW>*up, *gate, *down;
    const ap_int<WB>*up_bias, *gate_bias, *down_bias;
};

template <typename S, bool GATED, int WW, int WB>
void load_expert(const Bank<WW, WB>& bank, int number, Weights<S, GATED, WW, WB>& to) {
    load_block<S::hidden * S::inner>(bank.up, number, to.up);
    load_block<S::outputs * S::hidden>(bank.down, number, to.down);
    load_block<S::hidden>(bank.up_bias, number, to.up_bias);
    load_block<S::outputs>(bank.down_bias, number, to.down_bias);
    if (GATED) {
        load_block<GATED ? S::hidden * S::inner : 1>(bank.gate, number, to.gate);
        load_block<S::hidden>(bank.gate_bias, number, to.gate_bias);
    }
}

// One row [INNER] times weight [OUTPUTS, INNER], plus bias.
template <int INNER, int OUTPUTS, int TILE_IN, int TILE_OUT, int ACC, int BIAS_SHIFT, typename RULE, int WX, int WW, int WB>
void row(const ap_int<WX>* x, const ap_int<WW>* weight, const ap_int<WB>* bias, typename RULE::Code* y, Counter& overflow) {
    for (int first = 0; first < OUTPUTS; first += TILE_OUT) {
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
                    if (i < INNER && first + o < OUTPUTS) total[o] += x[i] * weight[(first + o) * INNER + i];
                }
            }
        }
        for (int o = 0; o < TILE_OUT; ++o) {
#pragma HLS UNROLL
            if (first + o < OUTPUTS) y[first + o] = RULE::apply(total[o], overflow);
        }
    }
}

// One token through one expert: y [OUTPUTS].
template <typename S, bool GATED, typename ACT, typename B, typename W, typename UP, typename GATE, typename ACTED,
          typename PRODUCT, typename DOWN, int WX, int WW, int WB, int WT>
void run_token(const ap_int<WX>* x, const Weights<S, GATED, WW, WB>& own, const ap_int<WT>* table,
               typename DOWN::Code* y, Counter& overflow) {
    typedef typename std::conditional<GATED, typename PRODUCT::Code, typename ACTED::Code>::type Hidden;
    typename UP::Code up[S::hidden];
    Hidden hidden[S::hidden];
    row<S::inner, S::hidden, S::tile_in, S::tile_out, W::up, B::up, UP>(x, own.up, own.up_bias, up, overflow);
    if (GATED) {
        typename GATE::Code gate[S::hidden];
        row<S::inner, S::hidden, S::tile_in, S::tile_out, W::up, B::gate, GATE>(
            x, own.gate, GATED ? own.gate_bias : own.up_bias, gate, overflow);
        for (int i = 0; i < S::hidden; ++i) {
#pragma HLS PIPELINE II = 1
            const long long acted = ACTED::apply(ACT::apply(gate[i], table), overflow);
            hidden[i] = (long long)PRODUCT::apply(acted * (long long)up[i], overflow);
        }
    } else {
        for (int i = 0; i < S::hidden; ++i) {
#pragma HLS PIPELINE II = 1
            hidden[i] = (long long)ACTED::apply(ACT::apply(up[i], table), overflow);
        }
    }
    row<S::hidden, S::outputs, S::tile_in, S::tile_out, W::down, B::down, DOWN>(hidden, own.down, own.down_bias, y, overflow);
}

// All tokens of one expert's queue, added to the sums.
template <typename S, bool GATED, typename ACT, typename B, typename W, typename UP, typename GATE, typename ACTED,
          typename PRODUCT, typename DOWN, int WX, int WK, int WW, int WB, int WT, int WQ>
void run_expert(const ap_int<WX>* x, const ap_int<WK>* weight, const ap_int<WQ>* slot, int start, int length,
                const Weights<S, GATED, WW, WB>& own, const ap_int<WT>* table, ap_int<W::sum>* total, Counter& overflow) {
    for (int i = 0; i < length; ++i) {
#pragma HLS LOOP_TRIPCOUNT min = 0 max = S::slots
        const int from = (int)slot[start + i], token = from / S::top_k;
        typename DOWN::Code y[S::outputs];
        run_token<S, GATED, ACT, B, W, UP, GATE, ACTED, PRODUCT, DOWN>(x + token * S::inner, own, table, y, overflow);
        for (int o = 0; o < S::outputs; ++o) {
#pragma HLS PIPELINE II = 1
            total[token * S::outputs + o] += y[o] * weight[from];
        }
    }
}

// Slots in order of their expert, by counting; slots of no expert are left out.
template <typename S, int WE, int WQ>
void queue_slots(const ap_int<WE>* expert, ap_int<WQ>* slot, int* start) {
    for (int e = 0; e <= S::experts; ++e) {
#pragma HLS PIPELINE II = 1
        start[e] = 0;
    }
    for (int i = 0; i < S::slots; ++i) {
        const long long e = expert[i];
        if (e >= 0 && e < S::experts) ++start[e + 1];
    }
    for (int e = 0; e < S::experts; ++e) start[e + 1] += start[e];
    int next[S::experts];
    for (int e = 0; e < S::experts; ++e) next[e] = start[e];
    for (int i = 0; i < S::slots; ++i) {
        const long long e = expert[i];
        if (e >= 0 && e < S::experts) slot[next[e]++] = i;
    }
}

// x [tokens, inner], expert and weight [tokens, top_k] -> y [tokens, outputs], queue [slots], lengths [experts].
template <typename S, bool GATED, typename ACT, typename B, typename W, typename UP, typename GATE, typename ACTED,
          typename PRODUCT, typename DOWN, typename SUM, int WX, int WE, int WK, int WW, int WB, int WT, int WQ>
void experts(const ap_int<WX>* x, const ap_int<WE>* expert, const ap_int<WK>* weight, const ap_int<WW>* up,
             const ap_int<WW>* gate, const ap_int<WW>* down, const ap_int<WB>* up_bias, const ap_int<WB>* gate_bias,
             const ap_int<WB>* down_bias, const ap_int<WT>* table, typename SUM::Code* y, ap_int<WQ>* queue,
             ap_int<WQ>* lengths, Counter& overflow) {
    static ap_int<W::sum> total[S::tokens * S::outputs];
    static ap_int<WQ> slot[S::slots];
    static Weights<S, GATED, WW, WB> ping, pong;
#pragma HLS ARRAY_PARTITION variable = ping.up type = cyclic factor = S::tile_in
#pragma HLS ARRAY_PARTITION variable = pong.up type = cyclic factor = S::tile_in
#pragma HLS ARRAY_PARTITION variable = ping.gate type = cyclic factor = S::tile_in
#pragma HLS ARRAY_PARTITION variable = pong.gate type = cyclic factor = S::tile_in
#pragma HLS ARRAY_PARTITION variable = ping.down type = cyclic factor = S::tile_in
#pragma HLS ARRAY_PARTITION variable = pong.down type = cyclic factor = S::tile_in
    int start[S::experts + 1], active[S::experts], count = 0;
    queue_slots<S>(expert, slot, start);
    for (int i = 0; i < S::tokens * S::outputs; ++i) {
#pragma HLS PIPELINE II = 1
        total[i] = 0;
    }
    for (int e = 0; e < S::experts; ++e) {
#pragma HLS PIPELINE II = 1
        lengths[e] = start[e + 1] - start[e];
        if (start[e + 1] > start[e]) active[count++] = e;
    }
    const Bank<WW, WB> bank = {up, gate, down, up_bias, gate_bias, down_bias};
    if (count > 0) load_expert(bank, active[0], ping);
    for (int i = 0; i < count; ++i) {
#pragma HLS LOOP_TRIPCOUNT min = 0 max = S::experts
        const int e = active[i], length = start[e + 1] - start[e];
        // Two arrays, not one with two halves: so the load of the next expert can run beside the work of this one.
        if (i % 2 == 0) {
            if (i + 1 < count) load_expert(bank, active[i + 1], pong);
            run_expert<S, GATED, ACT, B, W, UP, GATE, ACTED, PRODUCT, DOWN>(x, weight, slot, start[e], length, ping, table, total, overflow);
        } else {
            if (i + 1 < count) load_expert(bank, active[i + 1], ping);
            run_expert<S, GATED, ACT, B, W, UP, GATE, ACTED, PRODUCT, DOWN>(x, weight, slot, start[e], length, pong, table, total, overflow);
        }
    }
    for (int i = 0; i < S::tokens * S::outputs; ++i) {
#pragma HLS PIPELINE II = 1
        y[i] = SUM::apply(total[i], overflow);
    }
    for (int i = 0; i < S::slots; ++i) {
#pragma HLS PIPELINE II = 1
        queue[i] = i < start[S::experts] ? (int)slot[i] / S::top_k : -1;
    }
}

#endif
