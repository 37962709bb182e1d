"""A compiled model: tensors with formats, constants as codes, layers in order: what is simulated, emitted, stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from export.fpga.formats import Fixed
from export.fpga.ops import Op
from export.settings import FixedSettings

Store = Literal["weights", "constants", "tables"]
"""Where codes lie: in external memory as weights or as wider constants, or on the chip."""


@dataclass(frozen=True)
class Tensor:
    """What a layer gives, or an input of the model."""

    name: str
    shape: tuple[int, ...]
    format: Fixed
    low: float = 0.0
    """Least value that calibration saw."""
    high: float = 0.0

    @property
    def size(self) -> int:
        """Elements."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Constant:
    """Codes that never change, except with the task."""

    name: str
    codes: np.ndarray
    """[variants, size], int64: one variant for all tasks, or one for each."""
    format: Fixed
    store: Store

    @property
    def variants(self) -> int:
        """1, or the number of tasks."""
        return self.codes.shape[0]

    @property
    def size(self) -> int:
        """Elements of a variant."""
        return self.codes.shape[1]


@dataclass(frozen=True)
class View:
    """Consecutive elements of another tensor: a reshape, or a slice that needs no copy."""

    base: str
    offset: int
    size: int


@dataclass(frozen=True)
class Layer:
    """An operation and its operands: names of tensors, views or constants."""

    name: str
    op: Op
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    origin: str = ""
    """The module it came from, where the graph says so."""


@dataclass
class Program:
    """A model in fixed point."""

    settings: FixedSettings
    tasks: tuple[str, ...]
    """Names of the tasks that constants may differ by; one of them for most models."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    views: dict[str, View] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    """Names of the model -> tensors."""
    outputs: dict[str, str] = field(default_factory=dict)
    """Names of the model -> tensors, views or constants."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of inputs and outputs, by the names of the model."""

    def resolve(self, name: str) -> tuple[str, int]:
        """The tensor or constant that a name stands for, and where in it it begins."""
        offset = 0
        while name in self.views:
            offset += self.views[name].offset
            name = self.views[name].base
        return name, offset

    def format(self, name: str) -> Fixed:
        """Of a tensor, view or constant."""
        base, _ = self.resolve(name)
        return (self.tensors.get(base) or self.constants[base]).format

    def size(self, name: str) -> int:
        """Elements of a tensor, view or constant."""
        held = self.tensors.get(name) or self.views.get(name) or self.constants[name]
        return held.size

    def last_uses(self) -> dict[int, list[str]]:
        """Tensors that nobody reads after a layer, by the layer's number; inputs and outputs of the model excepted."""
        kept = {*self.inputs.values(), *(self.resolve(name)[0] for name in self.outputs.values())}
        last = {name: number for number, layer in enumerate(self.layers) for name in layer.outputs}
        for number, layer in enumerate(self.layers):
            last |= {self.resolve(name)[0]: number for name in layer.inputs}
        found: dict[int, list[str]] = {}
        for name, number in last.items():
            if name in self.tensors and name not in kept:
                found.setdefault(number, []).append(name)
        return found

    @property
    def macs(self) -> int:
        """Multiply-adds of one run, if every slot of an expert layer is filled."""
        return sum(layer.op.macs for layer in self.layers)
