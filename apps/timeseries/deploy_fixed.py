"""Time-MoE's decoding step for accelerators, whose shapes never change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apps.timeseries.deploy_step import CACHES, by_predictions, scale_of, squared_error
from apps.timeseries.models.base import Windows, observed
from apps.timeseries.models.timemoe import TimeMoE
from apps.timeseries.models.timemoe_export import FixedStep
from export.exportable import Exportable, Outputs, Sample, Score, samples_of

INPUTS, OUTPUTS = ("points", "keys", "values", "position"), ("predictions", "new_keys", "new_values")
GOLDEN = (5**0.5 - 1) / 2
"""Steps of this share of a range fill it evenly from the start."""


def fixed_exportable(
    model: TimeMoE, test: Sequence[Windows], training: Sequence[Windows], metadata: dict[str, Any]
) -> Exportable:
    """A point after the keys and values of all before it -> what every head says next.

    Buffers hold a context and the points of the largest head. Samples are single rows, at positions all along.

    Args:
        model: on the CPU, in float32.
        test: windows to compare on, at least one; contexts are without gaps.
        training: windows to take ranges from, likewise.
        metadata: of the model.
    """
    sequences = _sequences(model, test)
    capacity = min(test[0].past.shape[1] + model.config.horizons[-1], model.config.max_positions)
    step = FixedStep(model, capacity).eval()
    samples = _samples(step, sequences)
    truth = torch.stack([row[_place(row, i) + 1, None] for i, row in enumerate(sequences[: len(samples)])])  # [W, 1]

    def mse(outputs: Outputs) -> float:
        """Of the next point, in deviations of the context."""
        return squared_error(torch.from_numpy(outputs[0][:, :1]), truth[: len(outputs[0])])

    return Exportable(
        module=step,
        inputs=INPUTS,
        outputs=OUTPUTS,
        example=samples[0].tensors,
        samples=samples,
        calibration=_samples(step, _sequences(model, training)),
        metadata=metadata
        | {
            "input": "points [1, 1], normalised; keys and values [1, layers, heads, capacity, width]; position [1], "
            "how many points came before",
            "output": f"predictions of the heads {list(model.config.horizons)} side by side; keys and values of the "
            "point, to be written to its position",
            "heads": list(model.config.horizons),
            "normalize": model.config.normalize,
            "capacity": step.capacity,
        },
        decide=by_predictions,
        score=Score("mse", mse, relative=True),
        timed=samples[0],
    )


def _sequences(model: TimeMoE, windows: Sequence[Windows]) -> list[Float[Tensor, " S"]]:
    """Contexts, with what is known to have come after them, as the layers see them."""
    found = []
    for one in windows:
        sequences = scale_of(model, one.past).normalize(one.sequence)[:, : model.config.max_positions]
        known = observed(sequences).long().cumprod(1).sum(1).tolist()
        found += [row[:count] for row, count in zip(sequences, known, strict=True) if count > 1]
    return found


def _place(row: Float[Tensor, " S"], number: int) -> int:
    """Position of sample `number` in its sequence: however many there are, all along, but for the last point."""
    return int((0.5 + number * GOLDEN) % 1 * (len(row) - 1))


@torch.no_grad()
def _samples(step: FixedStep, sequences: Sequence[Float[Tensor, " S"]]) -> list[Sample]:
    """A row of each sequence, as far as memory goes."""
    cached = step.model.step_module(cached=True)
    layers, _, heads, _, width = cached.empty(1)[0].shape
    buffer = torch.zeros(2, 1, layers, heads, step.capacity, width)
    count = min(len(sequences), max(1, CACHES // (buffer.element_size() * buffer.numel())))
    samples = []
    for number, row in enumerate(sequences[:count]):
        (keys, values), at = buffer.clone(), _place(row, number)
        if at > 0:
            _, *caches = cached(row[None, :at], *cached.empty(1))
            keys[:, :, :, :at], values[:, :, :, :at] = (cache.transpose(0, 1) for cache in caches)
        samples += samples_of(INPUTS, (row[None, at : at + 1], keys, values, torch.tensor([at])))
    return samples
