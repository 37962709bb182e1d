"""A program as synthesizable C++: one function with pointers to inputs, outputs and weights, and calls of the kernels.

Written are `model.h`, `model.cpp` and `tables.h`; `ports.h` and `testbench.cpp` are for the host. The kernels
themselves are files beside this module, the same for every model.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.fpga.memory import Blob, plan_buffers
from export.fpga.program import Constant, Program, Store

KERNELS = Path(__file__).parent / "kernels"
TEMPLATES = Path(__file__).parent / "templates"
FUNCTION = "moecore_model"
"""Name of the top function."""


def sources(program: Program, memory: dict[Store, Blob]) -> dict[str, str]:
    """The generated files by name.

    Args:
        program: compiled.
        memory: its constants, as laid out.
    """
    kernels = {path.name: path.read_text() for path in sorted(KERNELS.glob("*.h"))}
    return {
        **{f"kernels/{name}": text for name, text in kernels.items()},
        "tables.h": _tables(program),
        "model.h": _header(program, memory),
        "model.cpp": _model(program, memory),
        "ports.h": _ports(program),
        "testbench.cpp": (TEMPLATES / "testbench.cpp").read_text(),
        "Makefile": (TEMPLATES / "Makefile").read_text(),
    }


def identifier(name: str) -> str:
    """A name of the model as C++ takes it."""
    return re.sub(r"\W", "_", name, flags=re.ASCII)


def _tables(program: Program) -> str:
    lines = [
        "// Tables of functions.",
        "#ifndef MODEL_TABLES_H",
        "#define MODEL_TABLES_H",
        "",
        '#include "kernels/fixed.h"',
    ]
    for number, constant in enumerate(_of_store(program, "tables")):
        values = textwrap.fill(
            ", ".join(map(str, constant.codes[0].tolist())), 118, initial_indent="  ", subsequent_indent="  "
        )
        lines += [
            "",
            f"// {constant.name}",
            f"static const ap_int<{constant.format.width}> table_{number}[{constant.size}] = {{",
        ]
        lines += [values, "};"]
    return "\n".join([*lines, "", "#endif", ""])


def _of_store(program: Program, store: Store) -> list[Constant]:
    return [constant for constant in program.constants.values() if constant.store == store]


@dataclass(frozen=True)
class Port:
    """An input or output of the top function."""

    name: str
    """Of the model."""
    symbol: str
    """Of the argument."""
    tensor: str
    width: int
    """Bits of each number."""
    size: int
    """Numbers."""


def _ports_of(program: Program) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs."""
    return _ports_along(program, "in", program.inputs), _ports_along(program, "out", program.outputs)


def _ports_along(program: Program, direction: str, names: Mapping[str, str]) -> list[Port]:
    found: list[Port] = []
    for name, tensor in names.items():
        symbol = f"{direction}_{identifier(name)}"
        if any(port.symbol == symbol for port in found):  # names that differ in signs C++ does not have
            symbol = f"{symbol}_{len(found)}"
        found.append(Port(name, symbol, tensor, program.format(tensor).width, program.size(tensor)))
    return found


def _signature(program: Program) -> str:
    inputs, outputs = _ports_of(program)
    arguments = [
        *(f"const ap_int<{port.width}>* {port.symbol}" for port in inputs),
        *(f"ap_int<{port.width}>* {port.symbol}" for port in outputs),
        *("const weight_t* weights", "const constant_t* constants", "int task", "Counter* overflow"),
    ]
    return f"void {FUNCTION}(\n    " + ",\n    ".join(arguments) + ")"


def _header(program: Program, memory: dict[Store, Blob]) -> str:
    weights, constants = memory["weights"], memory["constants"]
    inputs, outputs = _ports_of(program)
    sizes = [f"// {port.symbol}: {port.size} numbers of {port.width} bits" for port in (*inputs, *outputs)]
    return "\n".join(
        [
            "// The accelerator's top function. Inputs and outputs are fixed-point codes, see manifest.json.",
            "#ifndef MODEL_H",
            "#define MODEL_H",
            "",
            '#include "kernels/fixed.h"',
            "",
            f"typedef ap_int<{weights.width}> weight_t;",
            f"typedef ap_int<{constants.width}> constant_t;",
            f"const int WEIGHTS = {len(weights.codes)}, WEIGHT_BYTES = {weights.dtype.itemsize};",
            f"const int CONSTANTS = {len(constants.codes)}, CONSTANT_BYTES = {constants.dtype.itemsize};",
            f"const int LAYERS = {len(program.layers)}, TASKS = {len(program.tasks)};",
            "",
            *sizes,
            "// overflow: for each layer how many results did not fit",
            f"{_signature(program)};",
            "",
            "#endif",
            "",
        ]
    )


def _model(program: Program, memory: dict[Store, Blob]) -> str:
    plan = plan_buffers(program)
    place = _Expressions(program, memory, {name: buffer.name for name, buffer in plan.place.items()})
    lines = [
        *(f'#include "{name}"' for name in ("model.h", "tables.h")),
        *(f'#include "kernels/{name}.h"' for name in ("products", "pointwise", "rows", "moves", "experts", "watch")),
        "",
        *(f"static ap_int<{buffer.width}> {buffer.name}[{buffer.size}];" for buffer in plan.buffers),
        "",
        f"{_signature(program)} {{",
        *_interfaces(program),
        *(["  (void)task;"] if len(program.tasks) == 1 else []),
        "  for (int layer = 0; layer < LAYERS; ++layer) overflow[layer] = 0;",
    ]
    for number, layer in enumerate(program.layers):
        inputs, outputs = ([place(name) for name in names] for names in (layer.inputs, layer.outputs))
        lines += ["", f"  // {number}: {layer.name.splitlines()[0]}"]
        lines.append("  " + layer.op.call(inputs, outputs, f"overflow[{number}]"))
        for part, name in enumerate(layer.outputs):
            lines.append(f"  watch({number}, {part}, {place(name)}, {program.tensors[name].size});")
    lines.append("")
    for port in _ports_of(program)[1]:
        lines.append(
            f"  for (int i = 0; i < {port.size}; ++i) {port.symbol}[i] = (long long)({place(port.tensor)})[i];"
        )
    return "\n".join([*lines, "}", ""])


class _Expressions:
    """Operands as C++ expressions."""

    def __init__(self, program: Program, memory: dict[Store, Blob], buffers: dict[str, str]) -> None:
        self.program, self.memory, self.buffers = program, memory, buffers
        self.ports = {port.tensor: port.symbol for port in _ports_of(program)[0]}
        self.tables = {constant.name: f"table_{i}" for i, constant in enumerate(_of_store(program, "tables"))}

    def __call__(self, name: str) -> str:
        base, offset = self.program.resolve(name)
        if base in self.program.constants:
            constant = self.program.constants[base]
            if constant.store == "tables":
                return self.tables[base]
            start = self.memory[constant.store].offsets[base] + offset
            chosen = f" + task * {constant.size}" if constant.variants > 1 else ""
            return f"{constant.store} + {start}{chosen}"
        found = self.ports.get(base) or self.buffers[base]
        return f"{found} + {offset}" if offset else found


def _interfaces(program: Program) -> Iterable[str]:
    """Pragmas of the top function's ports."""
    for bundle, ports in zip(("in", "out"), _ports_of(program), strict=True):
        for port in ports:
            yield (
                f"#pragma HLS INTERFACE m_axi port = {port.symbol} offset = slave bundle = {bundle} depth = {port.size}"
            )
    yield "#pragma HLS INTERFACE m_axi port = weights offset = slave bundle = weights depth = WEIGHTS"
    yield "#pragma HLS INTERFACE m_axi port = constants offset = slave bundle = constants depth = CONSTANTS"
    yield "#pragma HLS INTERFACE m_axi port = overflow offset = slave bundle = out depth = LAYERS"
    yield "#pragma HLS INTERFACE s_axilite port = task"
    yield "#pragma HLS INTERFACE s_axilite port = return"


def _ports(program: Program) -> str:
    """The host's side: codes as vectors of whole numbers, by number of the port."""
    inputs, outputs = _ports_of(program)
    lines = [
        "// Inputs and outputs for the testbench, in the order of the manifest.",
        "#ifndef MODEL_PORTS_H",
        "#define MODEL_PORTS_H",
        "",
        "#include <vector>",
        "",
        '#include "model.h"',
        "",
        "typedef std::vector<long long> Codes;",
        "",
        "inline void run_model(const std::vector<Codes>& inputs, std::vector<Codes>& outputs, const weight_t* weights,",
        "                      const constant_t* constants, int task, Counter* overflow) {",
    ]
    for number, port in enumerate(inputs):
        given = f"inputs[{number}].begin(), inputs[{number}].end()"
        lines.append(f"  const std::vector<ap_int<{port.width}> > {port.symbol}({given});")
    lines += [f"  std::vector<ap_int<{port.width}> > {port.symbol}({port.size});" for port in outputs]
    pointers = ", ".join(f"{port.symbol}.data()" for port in (*inputs, *outputs))
    lines.append(f"  {FUNCTION}({pointers}, weights, constants, task, overflow);")
    lines.append(f"  outputs.assign({len(outputs)}, Codes());")
    for number, port in enumerate(outputs):
        lines.append(f"  for (auto code : {port.symbol}) outputs[{number}].push_back((long long)code);")
    return "\n".join([*lines, "}", "", "#endif", ""])


def file_codes(codes: np.ndarray) -> bytes:
    """Golden codes, as the testbench reads them."""
    return np.ascontiguousarray(codes, "<i4").tobytes()
