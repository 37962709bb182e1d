"""Where a program's numbers lie: constants in external memory, tensors in buffers that are used again."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from export.fpga.formats import bits_of
from export.fpga.program import Program, Store

STORES: tuple[Store, ...] = ("weights", "constants")
"""Blobs in external memory."""


@dataclass
class Blob:
    """Constants behind one pointer, one behind the other; variants of a constant follow each other."""

    width: int
    """Bits of each number."""
    offsets: dict[str, int] = field(default_factory=dict)
    """Of each constant's first variant, in elements."""
    codes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def dtype(self) -> np.dtype:
        """Of the file: the narrowest type of whole bytes."""
        return np.dtype(f"<i{max(1, 1 << (self.width - 1).bit_length() >> 3)}")

    def bytes(self) -> bytes:
        """The file."""
        return self.codes.astype(self.dtype).tobytes()


def blobs(program: Program) -> dict[Store, Blob]:
    """External memory of a program: weights as narrow numbers, everything else as wide ones."""
    found: dict[Store, Blob] = {}
    for store in STORES:
        held = [constant for constant in program.constants.values() if constant.store == store]
        settings = program.settings
        width = settings.weight_width if store == "weights" else settings.activation_width
        codes = [constant.codes.reshape(-1) for constant in held]
        whole = np.concatenate(codes) if codes else np.zeros(1, np.int64)  # no pointer to nothing
        blob = Blob(max(width, bits_of(int(np.abs(whole).max()))), {}, whole)
        start = 0
        for constant in held:
            blob.offsets[constant.name] = start
            start += constant.codes.size
        found[store] = blob
    return found


@dataclass
class Buffer:
    """An array on the chip that several tensors use, one after the other."""

    name: str
    width: int
    size: int


@dataclass
class Plan:
    """Which tensor lies in which buffer."""

    buffers: list[Buffer] = field(default_factory=list)
    place: dict[str, Buffer] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        """Of all buffers."""
        return sum(buffer.width * buffer.size for buffer in self.buffers)


def plan_buffers(program: Program) -> Plan:
    """Buffers by first need: a tensor takes the tightest free one of its width, or the largest, which then grows."""
    plan, free = Plan(), []
    unread = program.last_uses()
    for number, layer in enumerate(program.layers):
        for name in layer.outputs:
            tensor = program.tensors[name]
            fitting = [buffer for buffer in free if buffer.width == tensor.format.width]
            roomy = [buffer for buffer in fitting if buffer.size >= tensor.size]
            if roomy:
                chosen = min(roomy, key=lambda buffer: buffer.size)
            elif fitting:
                chosen = max(fitting, key=lambda buffer: buffer.size)
                chosen.size = tensor.size
            else:
                chosen = Buffer(f"buffer_{len(plan.buffers)}", tensor.format.width, tensor.size)
                plan.buffers.append(chosen)
            free = [buffer for buffer in free if buffer is not chosen]
            plan.place[name] = chosen
        free += [plan.place[name] for name in unread.get(number, ()) if name in plan.place]
    return plan
