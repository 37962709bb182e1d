"""What fixed point costs: outputs, decisions and routing against float, width by width, from the simulator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from export.fpga.calibrate import FloatGraph
from export.fpga.compiler import Feeds, read_graphs
from export.fpga.lower import compile_graph
from export.fpga.ops.experts import Experts
from export.fpga.program import FixedSettings, Layer, Program
from export.fpga.simulate import simulate
from export.lowering.node import is_opaque
from moecore.files import atomic_path

if TYPE_CHECKING:
    import onnx

Varied = Literal["both", "weights", "activations"]
WIDTHS = tuple(range(8, 25, 2))


@dataclass(frozen=True)
class Precision:
    """How a model in fixed point compares with itself in float."""

    weight_width: int
    activation_width: int
    error: float
    """Root of the mean square of the outputs' errors, relative to that of the outputs."""
    decisions: float | None
    """Share of equal argmaxes; None where no output has two values to choose from."""
    routing: float | None
    """Share of (token, expert) pairs chosen in float that fixed point chooses too; None without routed experts."""
    overflows: int
    """Results that did not fit, over all inputs."""

    def scalars(self) -> dict[str, float]:
        """Figures by flat name; those that do not exist are left out."""
        return {name: float(value) for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass
class _Reference:
    """What float gave for one input."""

    feed: Mapping[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    routing: list[np.ndarray]
    """Of each mixture of experts who was chosen, `[T, E]`."""


def sweep(
    proto: onnx.ModelProto,
    calibration: Feeds,
    inputs: Feeds,
    widths: Iterable[int] = WIDTHS,
    varied: Varied = "both",
    settings: FixedSettings | None = None,
    axis: int = 1,
) -> list[Precision]:
    """Compile at several widths and compare with float.

    Args:
        proto: as `export_fpga` takes it.
        calibration: inputs that formats are chosen from.
        inputs: others, to compare on.
        widths: bits.
        varied: of weights, of activations, or of both at once; what is not varied is as in `settings`.
        settings: everything else.
        axis: of every output, over which the largest value decides.

    Returns:
        A row for each width.
    """
    settings = settings or FixedSettings()
    names = {"both": ("weight_width", "activation_width"), "weights": ("weight_width",)}.get(
        varied, ("activation_width",)
    )
    graph = read_graphs({"": proto}, calibration)
    whole = FloatGraph(proto)
    references = [_reference(whole, feed) for feed in inputs]
    rows = []
    for width in widths:
        program = compile_graph(graph, dataclasses.replace(settings, **dict.fromkeys(names, width)))
        rows.append(_compare(program, references, axis))
    return rows


def _reference(graph: FloatGraph, feed: Mapping[str, np.ndarray]) -> _Reference:
    values = graph.run(feed)
    routing = [
        _chosen(values[node.input[1]], len(graph.constants[node.input[3]]))
        for node in graph.proto.graph.node
        if is_opaque(node)
    ]
    return _Reference(feed, {name: values[name].astype(np.float64) for name in graph.outputs}, routing)


def _chosen(expert: np.ndarray, experts: int) -> np.ndarray:
    """Expert numbers `[T, K]` -> `[T, E]`; number E is an empty slot."""
    return (expert[..., None] == np.arange(experts)).any(1)


def _compare(program: Program, references: Sequence[_Reference], axis: int) -> Precision:
    errors, scale = 0.0, 1e-300
    counts = np.zeros((2, 2))  # decisions and routing: equal, all
    overflows = 0
    for reference in references:
        routing: list[np.ndarray] = []

        def watch(layer: Layer, results: list[np.ndarray], lost: int, found: list[np.ndarray] = routing) -> None:
            if isinstance(layer.op, Experts):
                found.append(_queued(layer.op, results[1], results[2]))

        made = simulate(program, reference.feed, watch=watch)
        overflows += sum(made.overflows.values())
        for name, expected in reference.outputs.items():
            found = made.outputs[name]
            errors += float(((found - expected) ** 2).sum())
            scale += float((expected**2).sum())
            if expected.ndim > axis and expected.shape[axis] > 1:
                equal = found.argmax(axis) == expected.argmax(axis)
                counts[0] += equal.sum(), equal.size
        for ours, theirs in zip(routing, reference.routing, strict=True):
            counts[1] += (ours & theirs).sum(), theirs.sum()
    shares = [float(same / total) if total else None for same, total in counts]
    settings = program.settings
    return Precision(settings.weight_width, settings.activation_width, (errors / scale) ** 0.5, *shares, overflows)


def _queued(op: Experts, queue: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Queues -> who was chosen, `[T, E]`."""
    chosen = np.zeros((op.tokens, op.experts), bool)
    chosen[queue[: lengths.sum()], np.repeat(np.arange(op.experts), lengths)] = True
    return chosen


def as_table(rows: Sequence[Precision]) -> str:
    """Rows as a Markdown table."""
    lines = [
        "| weights, bits | activations, bits | error, relative rms | decisions equal | routing equal | overflows |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = ["-" if share is None else f"{100 * share:.2f}%" for share in (row.decisions, row.routing)]
        cells = [row.weight_width, row.activation_width, f"{row.error:.2e}", *shares, row.overflows]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plot(sweeps: Mapping[str, Sequence[Precision]], path: Path) -> Path:
    """Error over width, and what is decided and routed otherwise than in float.

    Args:
        sweeps: rows by what they vary: "both", "weights" or "activations".
        path: of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for varied, rows in sweeps.items():
        bits = [row.weight_width if varied == "weights" else row.activation_width for row in rows]
        left.semilogy(bits, [row.error for row in rows], marker="o", label=varied)
        for share, style in (("decisions", "-"), ("routing", "--")):
            shares = [getattr(row, share) for row in rows]
            if None not in shares:
                right.plot(bits, [100 * (1 - value) for value in shares], style, marker="o", label=f"{share}, {varied}")
    left.set(xlabel="bits", ylabel="relative rms error of outputs")
    right.set(xlabel="bits", ylabel="not as in float, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=120)
    return path
