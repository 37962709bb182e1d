// What a simulation sees of each layer; nothing is left of it in hardware.
#ifndef MOECORE_WATCH_H
#define MOECORE_WATCH_H

#include "fixed.h"

#ifndef __SYNTHESIS__
#include <vector>

// Of the testbench.
void compare_layer(int layer, int part, const std::vector<long long>& codes);

template <int W>
void watch(int layer, int part, const ap_int<W>* codes, int size) {
    std::vector<long long> copied(size);
    for (int i = 0; i < size; ++i) copied[i] = (long long)codes[i];
    compare_layer(layer, part, copied);
}
#else
template <int W>
void watch(int, int, const ap_int<W>*, int) {}
#endif

#endif
