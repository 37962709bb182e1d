"""From a graph with known ranges to a program in fixed point: one rule per ONNX operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from export.fpga.formats import BYTE, Fixed
from export.fpga.graph import Graph, Node
from export.fpga.lower import experts, functions, moves, pointwise, products, rows
from export.fpga.lower.builder import Builder
from export.fpga.program import FixedSettings, Program

RULES: dict[str, Callable[[Builder, Node], None]] = {
    **products.RULES,
    **experts.RULES,
    **pointwise.RULES,
    **functions.RULES,
    **rows.RULES,
    **moves.RULES,
}
"""Operators by name."""


def compile_graph(graph: Graph, settings: FixedSettings, tasks: Sequence[str] = ("",)) -> Program:
    """Choose formats and make layers.

    Args:
        graph: fused, with observed ranges.
        settings: widths and tiles.
        tasks: names of the variants of its constants.

    Raises:
        ExportError: for an operator without a fixed-point form, one line that names it and the nearest form.
    """
    build = Builder(graph, settings, tasks)
    program = build.program
    for name in graph.inputs:
        byte = graph.observed[name].kind == "u"
        form: Fixed = BYTE if byte and graph.observed[name].high < BYTE.high else build.result(name)
        program.inputs[name] = build.tensor(name, graph.shape(name), form)
        program.shapes[name] = graph.shape(name)
    for node in graph.nodes:
        build.node = node
        rule = RULES.get(node.op)
        if rule is None:
            raise build.refuse()
        rule(build, node)
    for name in graph.outputs:
        program.outputs[name] = build.operand(name)[0]
        program.shapes[name] = graph.shape(name)
    return program
