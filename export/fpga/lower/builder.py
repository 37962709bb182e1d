"""What every rule of the compiler builds with: formats for tensors, codes for constants, layers, views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from export.errors import ExportError
from export.fpga.calibrate import Observed
from export.fpga.formats import FLAG, INDEX, LIMIT, Fixed, Requantise, bits_of, choose, declare
from export.fpga.graph import NEAREST, Graph, Node
from export.fpga.ops import Op
from export.fpga.ops.base import nest, strides_of
from export.fpga.ops.moves import Copy
from export.fpga.program import Constant, FixedSettings, Layer, Program, Store, Tensor, View

UNBOUNDED = 1 << 20
"""More bits behind the binary point than any format has."""
Operand = tuple[str, Fixed]
"""A name in the program, and its format."""


@dataclass(frozen=True)
class Limit:
    """What a constant's values are brought to before they are quantised."""

    infinity: float | None = None
    """Stands for infinity; None: more than twice the constant's largest finite value."""
    most: float = math.inf
    """Finite values beyond this are so far that no more need be known of them."""

    @classmethod
    def outside(cls, form: Fixed, infinity: float | None = None) -> Limit:
        """Beyond a format by a factor of two: still counted as an overflow where it is taken."""
        return cls(infinity, math.ldexp(1.0, form.integer))


FREE = Limit()


class Builder:
    """Turns nodes into layers of a program.

    Args:
        graph: what is compiled.
        settings: widths and tiles.
        tasks: whose variants constants hold.
    """

    def __init__(self, graph: Graph, settings: FixedSettings, tasks: Sequence[str]) -> None:
        self.graph, self.settings = graph, settings
        self.program = Program(settings, tuple(tasks))
        self.node = Node("", "", (), ())
        """The node that is being compiled."""

    @property
    def width(self) -> int:
        """Bits of activations."""
        return self.settings.activation_width

    def refuse(self, reason: str = "", nearest: str = NEAREST) -> ExportError:
        """An error for the node at hand."""
        what = f"{self.node.op} {reason}".strip()
        return ExportError(f"{self.where}: {what} has no fixed-point form here; {nearest}")

    @property
    def where(self) -> str:
        """The module or node at hand."""
        return self.node.origin or self.node.name or self.node.outputs[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self.graph.shape(name)

    def static(self, name: str) -> np.ndarray:
        """A constant that is the same for all tasks.

        Raises:
            ExportError: if it depends on inputs or tasks.
        """
        if not self.graph.is_constant(name):
            raise self.refuse(f"with {name} computed from inputs")
        array = self.graph.constant(name)
        if len(array) > 1:
            raise self.refuse(f"with {name} differing between tasks")
        return array[0]

    def observed(self, name: str) -> Observed:
        """What calibration saw of a tensor."""
        found = self.graph.observed.get(name)
        return found if found is not None and found.low <= found.high else Observed((), "f", 0.0, 0.0)

    def result(self, name: str, fraction: int = UNBOUNDED, bounds: tuple[float, float] | None = None) -> Fixed:
        """The format of a tensor that a layer is to give.

        Args:
            name: of the tensor.
            fraction: bits behind the binary point that the layer can give at most.
            bounds: values that its function cannot leave, whatever the input.
        """
        kind = self.graph.kind(name) if name in self.graph.observed else "f"
        if kind != "f":
            return FLAG if kind == "b" else INDEX
        seen = self.observed(name)
        if bounds is not None:
            form = choose(*bounds, self.width)
        else:
            form = choose(*seen.reach, self.width, 0 if seen.infinite else self.settings.margin)
        return Fixed(self.width, max(form.integer, self.width - fraction))

    def rule(self, fraction: int, form: Fixed) -> Requantise:
        """From an accumulator with so many bits behind the binary point to a format."""
        return Requantise(fraction - form.fraction, form.width, self.settings.wrap)

    def shifted(self, form: Fixed, result: Fixed) -> Requantise:
        """From one format to another; the shift is checked."""
        rule = self.rule(form.fraction, result)
        self.accumulator(form.width, rule)
        return rule

    def accumulator(self, bits: int, rule: Requantise) -> int:
        """Its declared width, for values of so many bits.

        Raises:
            ExportError: if that is over 64.
        """
        return declare(
            rule.bits(bits), f"{self.where} ({self.node.op})", "choose smaller widths of weights or activations"
        )

    def operand(self, name: str, fraction: int = UNBOUNDED, store: Store = "constants", limit: Limit = FREE) -> Operand:
        """A tensor to read, and its format.

        Args:
            name: a tensor, or a constant, which is then quantised.
            fraction: of a constant, bits behind the binary point at most.
            store: of a constant.
            limit: of a constant, what becomes of values that are infinite or far away.
        """
        if self.graph.is_constant(name):
            return self.constant(self.graph.base(name), self.graph.constant(name), fraction, store, limit)
        base = self.graph.base(name)
        return base, self.program.format(base)

    def constant(
        self,
        name: str,
        array: np.ndarray,
        fraction: int = UNBOUNDED,
        store: Store = "constants",
        limit: Limit = FREE,
    ) -> Operand:
        """An array `[variants, *shape]` as codes in the finest format that holds it.

        Raises:
            ExportError: for NaN, or whole numbers beyond 32 bits.
        """
        if array.dtype.kind in "iub":
            form, store = FLAG if array.dtype.kind == "b" else INDEX, "constants"
        else:
            array = self._finite(name, array, limit)
            width = self.settings.weight_width if store == "weights" else self.width
            form = choose(min(float(array.min()), 0.0), max(float(array.max()), 0.0), width)
            form = Fixed(width, max(form.integer, width - fraction))
        if form.overflows(array):
            raise self.refuse(f"with constant {name} beyond {form.width} bits")
        return self.codes(name, form.encode(array), form, store), form

    def _finite(self, name: str, array: np.ndarray, limit: Limit) -> np.ndarray:
        seen = Observed((), "f")
        seen.add(array)
        if seen.missing:
            raise self.refuse(f"with NaN in {name}")
        infinity = seen.infinity if limit.infinity is None else limit.infinity
        array = np.where(np.isinf(array), np.sign(array) * infinity, array.astype(np.float64))
        return np.clip(array, -limit.most, limit.most)

    def codes(self, name: str, codes: np.ndarray, form: Fixed, store: Store) -> str:
        """Register codes `[variants, *shape]`; the same ones under one name once."""
        codes = codes.reshape(len(codes), -1)
        unique, number = name, 1
        while (known := self.program.constants.get(unique)) is not None:
            if known.format == form and known.store == store and np.array_equal(known.codes, codes):
                return unique
            number += 1
            unique = f"{name}.{number}"
        self.program.constants[unique] = Constant(unique, codes, form, store)
        return unique

    def zeros(self, size: int) -> str:
        """A bias of nothing."""
        return self.codes(f"zeros.{size}", np.zeros((1, size), np.int64), Fixed(self.width, 1), "constants")

    def largest(self, name: str) -> int:
        """Magnitude of the largest code of an operand."""
        base, _ = self.program.resolve(name)
        constant = self.program.constants.get(base)
        if constant is None:
            return 1 << (self.program.format(base).width - 1)
        return int(np.abs(constant.codes).max(initial=0))

    def tensor(self, name: str, shape: Sequence[int], form: Fixed) -> str:
        """Register a tensor that a layer gives."""
        seen = self.observed(name)
        self.program.tensors[name] = Tensor(name, tuple(map(int, shape)), form, seen.low, seen.high)
        return name

    def layer(self, op: Op, inputs: Sequence[str], output: str, form: Fixed, shape: Sequence[int] | None = None) -> str:
        """Add a layer with one output; without a shape it is a tensor of the graph."""
        return self.layers(op, inputs, [(output, self.graph.shape(output) if shape is None else shape, form)])

    def layers(self, op: Op, inputs: Sequence[str], outputs: Sequence[tuple[str, Sequence[int], Fixed]]) -> str:
        """Add a layer with several outputs (name, shape, format); returns the first one's name."""
        names = tuple(self.tensor(*output) for output in outputs)
        name = self.node.name or names[0]
        self.program.layers.append(Layer(name, op, tuple(inputs), names, self.node.origin))
        return names[0]

    def move(self, source: str, output: str, shape: Sequence[int], strides: Sequence[int], offset: int = 0) -> str:
        """Elements of a tensor in another order: a view where they are consecutive, else a copy.

        Args:
            source: a tensor or constant of the program.
            output: the new tensor.
            shape: its sizes.
            strides: in the source, one for each.
            offset: of the first element.
        """
        steps = zip(shape, strides, strides_of(shape), strict=True)
        if all(stride == consecutive for size, stride, consecutive in steps if size > 1):
            self.program.views[output] = View(source, offset, int(np.prod(shape, dtype=np.int64)))
            return output
        loops = nest(shape, strides)
        if loops is None:
            raise self.refuse(f"over {len(shape)} dimensions")
        form = self.program.format(source)
        return self.layers(Copy(*loops, offset), [source], [(output, shape, form)])

    def transposed(self, name: str, order: Sequence[int], output: str) -> str:
        """A tensor of the graph with its dimensions in another order."""
        shape = self.shape(name)
        strides = strides_of(shape)
        source, _ = self.operand(name)
        return self.move(source, output, [shape[a] for a in order], [strides[a] for a in order])


def align(a: Fixed, b: Fixed) -> int:
    """Bits behind the binary point at which two operands meet: the finer one's, as far as 62 bits go."""
    return min(max(a.fraction, b.fraction), 61 - max(a.integer, b.integer))


def aligned_bits(form: Fixed, fraction: int) -> int:
    """Bits of an operand at another binary point."""
    shift = form.fraction - fraction
    if shift >= LIMIT - 1:
        return LIMIT + 1  # nothing would be left of it
    return form.width - shift if shift <= 0 else max(form.width - shift, 1) + 1


def product_bits(largest: int, count: int, more: int = 0) -> int:
    """Bits of a sum of `count` products of at most `largest`, and of what is added to it."""
    return bits_of(largest * count + more)
