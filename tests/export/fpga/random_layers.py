"""Random layers of every kind, with narrow formats and extreme values, so that much saturates or wraps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from export.fpga.formats import INDEX, Fixed, Requantise, bits_of
from export.fpga.ops.base import Op, broadcast_strides, nest, strides_of
from export.fpga.ops.experts import Experts
from export.fpga.ops.moves import Concat, Copy, Gather, GatherElements, Resize, ScatterElements
from export.fpga.ops.pointwise import BINARY, UNARY, Binary, Divide, Select, Table, Unary
from export.fpga.ops.products import Affine, Conv2d, Linear, Matmul
from export.fpga.ops.rows import Cumulate, Norm, Reduce, Softmax, TopK
from export.fpga.program import Constant, FixedSettings, Layer, Program, Tensor

WEIGHTS, CONSTANTS = 7, 13


@dataclass
class Bench:
    """A program of unrelated layers, each on inputs of its own."""

    rng: np.random.Generator
    program: Program = field(default_factory=lambda: Program(FixedSettings(WEIGHTS, CONSTANTS), ("",)))
    inputs: dict[str, np.ndarray] = field(default_factory=dict)

    def size(self, most: int = 5, least: int = 1) -> int:
        return int(self.rng.integers(least, most + 1))

    def codes(self, size: int, low: int, high: int) -> np.ndarray:
        """Over the whole range, or near one end of it, or both ends and nothing else."""
        codes = self.rng.integers(low, high, size, endpoint=True)
        mode = self.rng.integers(4)
        if mode == 1:
            codes = self.rng.choice([low, high, 0], size)
        elif mode == 2:
            codes = np.full(size, low if self.rng.integers(2) else high)
        return codes.astype(np.int64)

    def form(self, least: int = 3, most: int = 14) -> Fixed:
        width = self.size(most, least)
        return Fixed(width, int(self.rng.integers(-2, width + 3)))

    def given(self, size: int, form: Fixed | None = None, low: int | None = None, high: int | None = None) -> str:
        """An input of the program."""
        form = form or self.form()
        name = f"in.{len(self.inputs)}"
        codes = self.codes(size, form.low if low is None else low, form.high if high is None else high)
        self.inputs[name] = form.decode(codes)
        self.program.tensors[name] = Tensor(name, (size,), form)
        self.program.inputs[name], self.program.shapes[name] = name, (size,)
        return name

    def fixed(self, size: int, store: str = "constants", codes: np.ndarray | None = None, width: int = 0) -> str:
        """A constant."""
        width = width or {"weights": WEIGHTS, "constants": CONSTANTS}[store]
        form, name = Fixed(width, width), f"{store}.{len(self.program.constants)}"
        codes = self.codes(size, form.low, form.high) if codes is None else codes
        self.program.constants[name] = Constant(name, codes[None], form, store)
        return name

    def width(self, name: str) -> int:
        return self.program.format(name).width

    def rule(self, bits: int) -> Requantise:
        """To a format into which most of an accumulator's values go, but not all."""
        width = self.size(16, 3)
        shift = int(np.clip(bits - width - self.rng.integers(-1, 5), -3, 40))
        return Requantise(shift, width, bool(self.rng.integers(2)))

    def add(self, op: Op, inputs: Sequence[str], outputs: Sequence[tuple[int, int]]) -> None:
        """A layer; outputs are (elements, bits)."""
        number = len(self.program.layers)
        names = [f"out.{number}.{i}" for i in range(len(outputs))]
        for name, (size, width) in zip(names, outputs, strict=True):
            self.program.tensors[name] = Tensor(name, (size,), Fixed(width, width))
        self.program.layers.append(Layer(f"{op.kind} {number}", op, tuple(inputs), tuple(names)))


def linear(bench: Bench) -> None:
    rows, inner, outputs = bench.size(), bench.size(9), bench.size(9)
    x = bench.given(rows * inner)
    weight, bias = bench.fixed(inner * outputs, "weights"), bench.fixed(outputs)
    bits = bits_of((inner << (bench.width(x) + WEIGHTS - 2)) + (1 << CONSTANTS + 1))
    to = bench.rule(bits)
    op = Linear(rows, inner, outputs, bench.size(4), bench.size(4), to.bits(bits), 2, to)
    bench.add(op, [x, weight, bias], [(rows * outputs, to.width)])


def matmul(bench: Bench) -> None:
    batch, rows, inner, columns = bench.size(3), bench.size(), bench.size(), bench.size()
    repeat = bench.rng.integers(2, size=2).astype(bool).tolist() if batch > 1 else [False, False]
    a = bench.given(rows * inner * (1 if repeat[0] else batch))
    b = bench.given(inner * columns * (1 if repeat[1] else batch))
    bits = bits_of(inner << (bench.width(a) + bench.width(b) - 2))
    to = bench.rule(bits)
    tiles = bench.size(3), bench.size(3)
    op = Matmul(batch, rows, inner, columns, *repeat, *tiles, to.bits(bits), to)
    bench.add(op, [a, b], [(batch * rows * columns, to.width)])


def conv2d(bench: Bench) -> None:
    groups, own, each = bench.size(3), bench.size(3), bench.size(3)
    height, width = bench.size(7, 4), bench.size(7, 4)
    pair = lambda least, most: tuple(int(bench.rng.integers(least, most + 1)) for _ in range(2))  # noqa: E731
    kernel, stride, dilation, before = pair(1, 3), pair(1, 2), pair(1, 2), pair(0, 2)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    after = [
        max(1, (size + 2 * pad - r) // s + 1)
        for size, pad, r, s in zip((height, width), before, reach, stride, strict=True)
    ]
    x = bench.given(groups * own * height * width)
    weight = bench.fixed(groups * each * own * kernel[0] * kernel[1], "weights")
    bias = bench.fixed(groups * each)
    bits = bits_of((own * 9 << (bench.width(x) + WEIGHTS - 2)) + (1 << CONSTANTS))
    to = bench.rule(bits)
    sizes = (groups * own, height, width, groups * each, groups)
    op = Conv2d(*sizes, kernel, stride, dilation, before, *after, bench.size(3), to.bits(bits), 1, to)
    bench.add(op, [x, weight, bias], [(groups * each * after[0] * after[1], to.width)])


def affine(bench: Bench) -> None:
    outer, channels, inner = bench.size(3), bench.size(), bench.size()
    x = bench.given(outer * channels * inner)
    bits = bits_of((1 << bench.width(x) + CONSTANTS - 2) + (1 << CONSTANTS + 2))
    to = bench.rule(bits)
    op = Affine(outer, channels, inner, 3, to.bits(bits), to)
    bench.add(op, [x, bench.fixed(channels), bench.fixed(channels)], [(outer * channels * inner, to.width)])


def _loops(bench: Bench, operands: int) -> tuple[list[int], list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Shape, shapes of operands that broadcast to it, and their nest: sizes, then strides."""
    shape = [bench.size(4) for _ in range(bench.size(5))]
    shapes = [tuple(1 if bench.rng.integers(3) == 0 else size for size in shape) for _ in range(operands)]
    loops = nest(shape, *(broadcast_strides(each, shape) for each in shapes))
    assert loops is not None
    return shape, shapes, list(loops)


def binary(bench: Bench) -> None:
    shape, (a, b), (sizes, *strides) = _loops(bench, 2)
    left, right = bench.given(int(np.prod(a))), bench.given(int(np.prod(b)))
    name = str(bench.rng.choice(list(BINARY)))
    shifts = (0, 0) if name == "mul" else bench.rng.integers(-3, 3, size=2).tolist()
    to = bench.rule(16)
    op = Binary(name, sizes, *strides, *shifts, 40, to)
    bench.add(op, [left, right], [(int(np.prod(shape)), to.width)])


def divide(bench: Bench) -> None:
    shape, (a, b), (sizes, *strides) = _loops(bench, 2)
    left, right = bench.given(int(np.prod(a))), bench.given(int(np.prod(b)))
    to = Requantise(0, bench.size(16, 4), bool(bench.rng.integers(2)))
    op = Divide(sizes, *strides, bench.size(8, 0), bench.size(2, 0), 40, to)
    bench.add(op, [left, right], [(int(np.prod(shape)), to.width)])


def select(bench: Bench) -> None:
    shape, (c, a, b), (sizes, *strides) = _loops(bench, 3)
    names = [bench.given(int(np.prod(each))) for each in (c, a, b)]
    width, wrap = bench.size(12, 4), bool(bench.rng.integers(2))
    rules = [Requantise(int(bench.rng.integers(-2, 4)), width, wrap) for _ in range(2)]
    bench.add(Select(sizes, *strides, *rules), names, [(int(np.prod(shape)), width)])


def unary(bench: Bench) -> None:
    size, form = bench.size(40), bench.form()
    low, high = sorted(bench.rng.integers(form.low, form.high, 2, endpoint=True).tolist())
    if bench.rng.integers(2):
        low, high = form.low, form.high
    name, fraction = str(bench.rng.choice(list(UNARY))), bench.size(6, 0)
    bits = form.width + 6
    to = Requantise(int(bench.rng.integers(-2, 3)), bench.size(form.width + 2, 3), bool(bench.rng.integers(2)))
    bench.add(Unary(name, size, fraction, low, high, to.bits(bits), to), [bench.given(size, form)], [(size, to.width)])


def table(bench: Bench) -> None:
    size, form, count, shift = bench.size(40), bench.form(6), bench.size(12), bench.size(4, 0)
    low = int(bench.rng.integers(form.low, form.high))
    values = bench.fixed(count + 1, "tables", bench.codes(count + 1, -500, 500), 10)
    relu = int(bench.rng.integers(-1, 4))
    to = bench.rule(bits_of(500 << shift))
    op = Table(size, low, shift, count, relu, 40, to)
    bench.add(op, [bench.given(size, form), values], [(size, to.width)])


def norm(bench: Bench) -> None:
    rows, inner = bench.size(4), bench.size(9)
    x = bench.given(rows * inner, bench.form(4, 20))
    guard = int(bench.rng.integers(-2, 5))
    to = Requantise(int(bench.rng.integers(12, 24)), bench.size(16, 8), bool(bench.rng.integers(2)))
    epsilon = int(bench.rng.choice([0, 1, 40, 10**6]))
    op = Norm(rows, inner, bool(bench.rng.integers(2)), guard, epsilon, 20, 5, 48, to)
    bench.add(op, [x, bench.fixed(inner), bench.fixed(inner)], [(rows * inner, to.width)])


def softmax(bench: Bench) -> None:
    rows, inner, count, shift = bench.size(4), bench.size(9), bench.size(12, 2), bench.size(5, 0)
    falling = np.sort(bench.rng.integers(0, 1 << 18, count + 1))[::-1].astype(np.int64)
    falling[0] = 1 << 18
    values = bench.fixed(count + 1, "tables", falling, 20)
    to = Requantise(60 - bench.size(10, 4), bench.size(12, 6), bool(bench.rng.integers(2)))
    op = Softmax(rows, inner, shift, count, Requantise(shift, 20), 60, 64, to)
    bench.add(op, [bench.given(rows * inner), values], [(rows * inner, to.width)])


def reduce(bench: Bench) -> None:
    outer, inner, columns = bench.size(3), bench.size(7), bench.size(4)
    name = str(bench.rng.choice(["sum", "mean", "l2", "max", "min", "argmax", "argmin"]))
    to = Requantise(int(bench.rng.integers(-1, 4)), bench.size(12, 4), bool(bench.rng.integers(2)))
    op = Reduce(name, outer, inner, columns, bench.size(4, 0), 48, to)
    bench.add(op, [bench.given(outer * inner * columns)], [(outer * columns, to.width)])


def topk(bench: Bench) -> None:
    rows, inner = bench.size(4), bench.size(9)
    x, count = bench.given(rows * inner, bench.form(3, 5)), bench.size(inner)
    bench.add(TopK(rows, inner, count), [x], [(rows * count, bench.width(x)), (rows * count, 32)])


def cumulate(bench: Bench) -> None:
    outer, inner, columns = bench.size(3), bench.size(7), bench.size(4)
    to = bench.rule(10)
    op = Cumulate(outer, inner, columns, bool(bench.rng.integers(2)), 24, to)
    bench.add(op, [bench.given(outer * inner * columns)], [(outer * inner * columns, to.width)])


def copy(bench: Bench) -> None:
    shape = [bench.size(4) for _ in range(bench.size(5))]
    order = bench.rng.permutation(len(shape)).tolist()
    strides = strides_of(shape)
    sizes, moves, offset = [shape[a] for a in order], [strides[a] for a in order], 0
    if bench.rng.integers(2):  # backwards along one dimension
        offset, moves[0] = (sizes[0] - 1) * moves[0], -moves[0]
    loops = nest(sizes, moves)
    assert loops is not None
    size = int(np.prod(shape))
    x = bench.given(size) if bench.rng.integers(3) else bench.fixed(size, "weights")
    bench.add(Copy(*loops, offset), [x], [(size, bench.width(x))])


def concat(bench: Bench) -> None:
    outer, lengths = bench.size(3), [bench.size() for _ in range(bench.size(4))]
    shifts = bench.rng.integers(-2, 5, len(lengths)).tolist()
    width = bench.size(10, 3)
    op = Concat(outer, tuple(lengths), tuple(shifts), width, bool(bench.rng.integers(2)))
    bench.add(op, [bench.given(outer * length) for length in lengths], [(outer * sum(lengths), width)])


def gather(bench: Bench) -> None:
    outer, inner, columns, count = bench.size(3), bench.size(6), bench.size(3), bench.size(6)
    x = bench.given(outer * inner * columns)
    wild = bench.given(count, INDEX, -2 * inner, 2 * inner)
    bench.add(Gather(outer, inner, columns, count), [x, wild], [(outer * count * columns, bench.width(x))])
    wild = bench.given(outer * count * columns, INDEX, -inner, 2 * inner)
    bench.add(GatherElements(outer, inner, columns, count), [x, wild], [(outer * count * columns, bench.width(x))])


def scatter_elements(bench: Bench) -> None:
    outer, inner, columns, count = bench.size(3), bench.size(6), bench.size(3), bench.size(6)
    x, updates = bench.given(outer * inner * columns), bench.given(outer * count * columns)
    index = bench.given(outer * count * columns, INDEX, -inner, 2 * inner)
    add, shifts, width = bool(bench.rng.integers(2)), bench.rng.integers(-2, 4, 2).tolist(), bench.size(12, 4)
    op = ScatterElements(outer, inner, columns, count, add, *shifts, width, bool(bench.rng.integers(2)))
    bench.add(op, [x, index, updates], [(outer * inner * columns, width)])


def resize(bench: Bench) -> None:
    channels, height, width, rows, columns = (bench.size() for _ in range(5))
    tables = []
    for size, after in ((height, rows), (width, columns)):
        places = np.stack([bench.rng.integers(0, size, (2, after)).ravel()]).reshape(2, after)
        weights = bench.rng.integers(0, 1 << 6, after, endpoint=True)
        codes = np.concatenate([places.ravel(), weights]).astype(np.int64)
        tables.append(bench.fixed(len(codes), "tables", codes, 32))
    x = bench.given(channels * height * width)
    to = Requantise(12, bench.size(12, 4), bool(bench.rng.integers(2)))
    op = Resize(channels, height, width, rows, columns, 6, bench.width(x) + 14, to)
    bench.add(op, [x, *tables], [(channels * rows * columns, to.width)])


def experts(bench: Bench) -> None:
    tokens, top_k, count = bench.size(6), bench.size(3), bench.size(5)
    inner, hidden, outputs = bench.size(6), bench.size(6), bench.size(6)
    gated = bool(bench.rng.integers(2))
    activation = str(bench.rng.choice(["identity", "relu", "relu2", "gelu"]))
    x, weight = bench.given(tokens * inner), bench.given(tokens * top_k)
    chosen = bench.given(tokens * top_k, INDEX, -1, count)  # E and -1 mark empty slots
    up = bench.fixed(count * hidden * inner, "weights")
    gate = bench.fixed(count * hidden * inner, "weights") if gated else up
    down = bench.fixed(count * outputs * hidden, "weights")
    biases = [bench.fixed(count * size) for size in (hidden, hidden, outputs)]
    values = bench.fixed(9, "tables", bench.codes(9, -500, 500), 10)
    rules = [bench.rule(bits) for bits in (18, 18, 12, 20, 18, 20)]
    op = Experts(
        *(tokens, top_k, count, inner, hidden, outputs, gated, activation),
        (1, 2, 0),
        *(-64, 4, 8, int(bench.rng.integers(-1, 3))),
        *(bench.size(3), bench.size(3), (40, 40, 40), 44),
        *rules,
    )
    inputs = [x, chosen, weight, up, gate, down, biases[0], biases[1] if gated else biases[0], biases[2], values]
    sizes = [(tokens * outputs, rules[-1].width), (tokens * top_k, 32), (count, 32)]
    bench.add(op, inputs, sizes)


KINDS: list[Callable[[Bench], None]] = [
    linear,
    matmul,
    conv2d,
    affine,
    binary,
    divide,
    select,
    unary,
    table,
    norm,
    softmax,
    reduce,
    topk,
    cumulate,
    copy,
    concat,
    gather,
    scatter_elements,
    resize,
    experts,
]


def random_program(seed: int, repeats: int) -> tuple[Program, dict[str, np.ndarray]]:
    """So many layers of every kind, and inputs for them."""
    bench = Bench(np.random.default_rng(seed))
    for make in _rounds(repeats):
        make(bench)
    last = bench.program.layers[-1].outputs[0]
    bench.program.outputs["last"] = last
    bench.program.shapes["last"] = bench.program.tensors[last].shape
    return bench.program, bench.inputs


def _rounds(repeats: int) -> Iterator[Callable[[Bench], None]]:
    for _ in range(repeats):
        yield from KINDS
