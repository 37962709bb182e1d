"""What an app hands over: a function of tensors, real inputs for it, and what its outputs decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from export.decisions import Decide, nothing

if TYPE_CHECKING:
    import onnx

Outputs = list[np.ndarray]
"""What a call gives, an array for each output."""


@dataclass(frozen=True)
class Sample:
    """One call on real data."""

    tensors: tuple[Tensor, ...]
    """What the PyTorch module takes, `[B, ...]` each as a rule."""
    feed: Mapping[str, np.ndarray]
    """What the file takes, by name."""


Runner = Callable[[Sample], Outputs]
"""A model in some form, applied to a call."""


@dataclass(frozen=True)
class Score:
    """A figure of the task, from all outputs: how good the model is."""

    name: str
    of: Callable[[Outputs], float]
    """Outputs of all samples, joined along the batch -> figure."""
    relative: bool = False
    """Whether changes count relative to the figure (errors with units) or as they are (shares)."""

    def change(self, before: float, after: float) -> float:
        """How far it moved, up or down."""
        return abs(after - before) / (abs(before) or 1.0) if self.relative else abs(after - before)


@dataclass(frozen=True)
class Exportable:
    """A trained model ready for export."""

    module: nn.Module
    """On the CPU; gives a tensor, or a tuple of as many as there are outputs."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: tuple[Tensor, ...]
    """To trace with; sizes that vary are at least 2."""
    samples: Sequence[Sample]
    """What files are compared on: real inputs that the model was not trained on, batch by batch."""
    calibration: Sequence[Sample] = ()
    """Training inputs, from which ranges are taken."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    decide: Decide = nothing
    score: Score | None = None
    dynamic_shapes: tuple[Any, ...] | None = None
    """Of each input the dimensions that vary; None: the first."""
    finish: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None
    """Puts in front of the graph, or behind it, what PyTorch does not compute."""
    further: Callable[[Path, bool], Mapping[str, float]] | None = None
    """Further figures of an ONNX file, measured before it is kept: its path, and whether it must give PyTorch's
    numbers; raises `ExportError` if it must and does not."""
    tasks: Mapping[str, nn.Module] | None = None
    """For FPGAs: modules of the same structure that differ in gates alone, by task, of which `module` is the first."""
    timed: Sample | None = None
    """The call that is timed; None: the first row of the first sample."""

    def single(self) -> Sample:
        """One call of one row."""
        if self.timed is not None:
            return self.timed
        first = self.samples[0]
        return Sample(tuple(t[:1] for t in first.tensors), {name: array[:1] for name, array in first.feed.items()})


def samples_of(names: Sequence[str], *batches: tuple[Tensor, ...]) -> list[Sample]:
    """Samples whose file takes the very tensors of the module."""
    return [
        Sample(batch, {name: tensor.contiguous().numpy() for name, tensor in zip(names, batch, strict=True)})
        for batch in batches
    ]


def in_torch(module: nn.Module) -> Runner:
    """The model in PyTorch, eager."""

    def run(sample: Sample) -> Outputs:
        with torch.no_grad():
            found = module(*sample.tensors)
        return [each.numpy() for each in ((found,) if isinstance(found, Tensor) else found)]

    return run
