"""Scratch memory that the CPU fast path uses again in every call.

Fresh megabytes cost a page fault per 4 KiB each time the C library hands memory back to the system, which here came
to a tenth of a layer's run time. So each thread keeps one buffer per dtype, as large as its largest call so far.
Only what dies within a call may live in it. On other devices the allocator caches by itself.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Tensor] = {}


_buffers = _Buffers()


def carve(like: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Uninitialised tensors of the given shapes, valid until the next call on this thread."""
    if like.device.type != "cpu":
        return [like.new_empty(shape) for shape in shapes]
    sizes = [math.prod(shape) for shape in shapes]
    buffer = _buffers.by_dtype.get(like.dtype)
    if buffer is None or buffer.numel() < sum(sizes):
        with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
            buffer = _buffers.by_dtype[like.dtype] = torch.empty(sum(sizes), dtype=like.dtype)
    pieces = buffer[: sum(sizes)].split(sizes)
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def release_workspace() -> None:
    """Give this thread's scratch memory back."""
    _buffers.by_dtype.clear()
