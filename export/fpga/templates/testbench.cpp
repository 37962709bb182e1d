// Runs the model on the golden inputs and compares every layer's output, every expert queue and every count of
// overflows with what the Python simulator gave. Exit status 1 if anything differs.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "ports.h"

// One line of golden/index.txt.
struct Golden {
    std::string kind, file, op, name;
    int number, part, size;
    unsigned overflow;
};

// One run: its lines, and how many values differed in each.
struct Case {
    std::string name;
    int task;
    std::vector<Golden> lines;
};

static const Case* current;
static std::vector<long> differing;
static std::vector<bool> seen;

static void fail(const std::string& what) {
    std::printf("FAILED: %s\n", what.c_str());
    std::exit(1);
}

static Codes read_codes(const std::string& file, int size, int bytes) {
    std::ifstream stream(file.c_str(), std::ios::binary);
    std::vector<unsigned char> raw((size_t)size * bytes);
    if (!stream.read((char*)raw.data(), (std::streamsize)raw.size())) fail(file + ": missing or too short");
    if (stream.peek() != EOF) fail(file + ": too long");
    Codes codes(size);
    for (int i = 0; i < size; ++i) {
        unsigned long long code = 0;
        for (int b = 0; b < bytes; ++b) code |= (unsigned long long)raw[(size_t)i * bytes + b] << (8 * b);
        codes[i] = (long long)(code << (64 - 8 * bytes)) >> (64 - 8 * bytes);
    }
    return codes;
}

static long count_differences(const Codes& expected, const Codes& found) {
    long count = expected.size() == found.size() ? 0 : (long)expected.size();
    for (size_t i = 0; i < expected.size() && i < found.size(); ++i) count += expected[i] != found[i];
    return count;
}

void compare_layer(int layer, int part, const std::vector<long long>& codes) {
    for (size_t i = 0; i < current->lines.size(); ++i) {
        const Golden& line = current->lines[i];
        if (line.kind != "layer" || line.number != layer || line.part != part) continue;
        differing[i] = count_differences(read_codes(line.file, line.size, 4), codes);
        seen[i] = true;
    }
}

static std::vector<Case> read_index() {
    std::ifstream stream("golden/index.txt");
    if (!stream) fail("golden/index.txt: missing");
    std::vector<Case> cases;
    std::string text;
    while (std::getline(stream, text)) {
        std::istringstream fields(text);
        std::string kind;
        fields >> kind;
        if (kind == "case") {
            cases.push_back(Case());
            fields >> cases.back().task >> cases.back().name;
            continue;
        }
        if (cases.empty()) fail("golden/index.txt: does not begin with a run");
        Golden line;
        line.kind = kind;
        fields >> line.number >> line.part >> line.size >> line.overflow >> line.file >> line.op;
        std::getline(fields >> std::ws, line.name);
        cases.back().lines.push_back(line);
    }
    if (cases.empty()) fail("golden/index.txt: names no run");
    return cases;
}

// Mismatches of one case; its values are added to `values` and its overflows to `overflows`.
static long run_case(const Case& one, const std::vector<weight_t>& weights, const std::vector<constant_t>& constants,
                     long& values, unsigned long& overflows) {
    std::vector<Codes> inputs, outputs;
    for (const Golden& line : one.lines)
        if (line.kind == "input") inputs.push_back(read_codes(line.file, line.size, 4));
    std::vector<Counter> overflow(LAYERS + 1);
    current = &one;
    differing.assign(one.lines.size(), 0);
    seen.assign(one.lines.size(), false);
    run_model(inputs, outputs, weights.data(), constants.data(), one.task, overflow.data());
    std::printf("%s\n%5s  %-17s %10s %10s %10s  %s\n", one.name.c_str(), "layer", "operation", "values", "mismatches",
                "overflows", "name");
    long mismatches = 0;
    for (size_t i = 0; i < one.lines.size(); ++i) {
        const Golden& line = one.lines[i];
        if (line.kind == "input") continue;
        if (line.kind == "output") {
            differing[i] = count_differences(read_codes(line.file, line.size, 4), outputs[line.number]);
            seen[i] = true;
        }
        const bool counted = line.kind == "layer" && line.part == 0;
        const unsigned lost = counted ? overflow[line.number] : 0;
        if (!seen[i]) differing[i] = line.size;
        if (counted && lost != line.overflow) ++differing[i];
        std::printf("%5d  %-17s %10d %10ld %10u  %s\n", line.number, line.op.c_str(), line.size, differing[i], lost,
                    line.name.c_str());
        if (lost > 0) std::printf("       overflow: %u results of %s did not fit their format\n", lost, line.name.c_str());
        mismatches += differing[i];
        values += line.size;
        overflows += lost;
    }
    return mismatches;
}

int main() {
    const Codes weight_codes = read_codes("weights/weights.bin", WEIGHTS, WEIGHT_BYTES);
    const Codes constant_codes = read_codes("weights/constants.bin", CONSTANTS, CONSTANT_BYTES);
    const std::vector<weight_t> weights(weight_codes.begin(), weight_codes.end());
    const std::vector<constant_t> constants(constant_codes.begin(), constant_codes.end());
    long mismatches = 0, values = 0;
    unsigned long overflows = 0;
    const std::vector<Case> cases = read_index();
    for (const Case& one : cases) mismatches += run_case(one, weights, constants, values, overflows);
    std::printf("%s: %d layers, %zu runs, %ld values, %ld mismatches, %lu overflows\n", mismatches ? "FAILED" : "PASSED", LAYERS,
                cases.size(), values, mismatches, overflows);
    return mismatches ? 1 : 0;
}
