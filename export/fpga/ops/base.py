"""What every kind of layer offers: exact integer semantics in NumPy, and the C++ call with the same bits."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from export.fpga.formats import Requantise

Codes = np.ndarray
"""int64 codes of a fixed-point tensor."""
RANK = 5
"""Dimensions that a nest of loops may have, after neighbours that move together were merged."""


@dataclass(frozen=True)
class Op(ABC):
    """One layer. Fields are plain numbers, so that a manifest can hold them, and become template arguments."""

    kind: ClassVar[str]
    """Name in manifests and of the C++ function."""

    @abstractmethod
    def run(self, *inputs: Codes) -> tuple[list[Codes], int]:
        """Codes in, of any shape with the right number of elements; codes out, and how many results did not fit."""

    @abstractmethod
    def arguments(self) -> Sequence[Any]:
        """Template arguments of the C++ function."""

    def call(self, inputs: Sequence[str], outputs: Sequence[str], overflow: str) -> str:
        """The C++ statement.

        Args:
            inputs: expressions, in the order that `run` takes them.
            outputs: likewise.
            overflow: the layer's counter.
        """
        return f"{self.kind}<{', '.join(map(spell, self.arguments()))}>({', '.join([*inputs, *outputs, overflow])});"

    @property
    def dims(self) -> dict[str, int]:
        """Sizes by name, for manifests."""
        return {}

    @property
    def macs(self) -> int:
        """Multiply-adds, of all that may be computed."""
        return 0

    def parameters(self) -> dict[str, Any]:
        """Fields as plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, parameters: dict[str, Any]) -> Op:
        """From what `parameters` gave."""
        return cls(**{name: _value(value) for name, value in parameters.items()})


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return Requantise(**value)
    return tuple(value) if isinstance(value, list) else value


def spell(argument: Any) -> str:
    """A template argument in C++: nests of sizes or strides as types, truth values in lower case."""
    if isinstance(argument, Requantise):
        return argument.arguments
    if isinstance(argument, tuple):
        return f"Nest<{', '.join(map(str, argument))}>"
    return str(argument).lower() if isinstance(argument, bool) else str(argument)


def nest(shape: Sequence[int], *strides: Sequence[int]) -> tuple[tuple[int, ...], ...] | None:
    """Merge neighbouring dimensions over which all operands move evenly, and pad on the left to `RANK`.

    Args:
        shape: sizes.
        strides: of each operand, in elements, one per dimension; 0 where it repeats.

    Returns:
        Sizes and the strides of each operand, all of length `RANK`; None if more dimensions remain.
    """
    kept: list[tuple[int, ...]] = []
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if kept and all(outer == inner * size for outer, inner in zip(kept[-1][1:], steps, strict=True)):
            kept[-1] = (kept[-1][0] * size, *steps)
        else:
            kept.append((size, *steps))
    if len(kept) > RANK:
        return None
    padding = [(1, *(0 for _ in strides))] * (RANK - len(kept))
    return tuple(zip(*padding, *kept, strict=True))


def strides_of(shape: Sequence[int]) -> list[int]:
    """Strides of a contiguous array, in elements."""
    return [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]


def broadcast_strides(shape: Sequence[int], onto: Sequence[int]) -> list[int]:
    """Strides of an array that is broadcast, 0 where it repeats."""
    padded = [1] * (len(onto) - len(shape)) + list(shape)
    own = strides_of(padded)
    return [0 if size == 1 else stride for size, stride in zip(padded, own, strict=True)]


def view(codes: Codes, sizes: Sequence[int], strides: Sequence[int], offset: int = 0) -> Codes:
    """The elements that a nest of loops reads, as an array of `sizes`."""
    flat = np.ascontiguousarray(codes).reshape(-1)[offset:] if offset >= 0 else codes.reshape(-1)
    return np.lib.stride_tricks.as_strided(flat, sizes, [stride * flat.itemsize for stride in strides], writeable=False)
