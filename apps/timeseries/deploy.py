"""Export of a forecaster to ONNX: the pass over a context, and Time-MoE's cached decoding step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from apps.errors import UserError
from apps.timeseries.data import SeriesData
from apps.timeseries.evaluation import thinned
from apps.timeseries.loading import Trained
from apps.timeseries.models.base import ForecastModel, Windows, instance_scale, observed
from apps.timeseries.models.moirai_moe import MoiraiMoE
from apps.timeseries.models.timemoe import TimeMoE
from apps.timeseries.models.timemoe_export import CachedStep
from export.onnx import ExportError
from export.onnx import export_onnx as write_onnx
from export.verify import TOLERANCE, compare_onnx, open_session
from moecore import __version__
from moecore.files import atomic_path

WINDOWS, ROLLOUTS = 512, 4
"""Test windows that a file is compared on at most, and whole rollouts of the decoding step."""
Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Points(nn.Module):
    """Contexts -> point forecasts of a fixed horizon, a function of one tensor."""

    def __init__(self, model: ForecastModel, horizon: int, season: int) -> None:
        super().__init__()
        self.model, self.horizon, self.season = model, horizon, season

    def forward(self, context: Float[Tensor, "B L"]) -> Float[Tensor, "B H"]:
        """[B, L] -> [B, H]; NaN where a value is missing."""
        return self.model.forecast(Windows(context, season=self.season), self.horizon).mean


def export_onnx(trained: Trained, data: SeriesData, path: Path) -> dict[str, float]:
    """Write the model as ONNX and compare it with PyTorch on test windows.

    Time-MoE gives a second file beside the first, `<name>.step.onnx`: one decoding step over keys and values, which
    also takes the context as its first step.

    Args:
        trained: the model.
        data: whose test windows to compare on.
        path: of the file.

    Returns:
        The comparison's figures.

    Raises:
        UserError: if the model has no ONNX form, or its outputs differ; a file from before then stays as it is.
    """
    model = copy.deepcopy(trained.model).cpu().eval()
    if isinstance(model, MoiraiMoE):
        raise UserError(
            "export: Moirai-MoE forecasts by sampling paths, which has no ONNX form here; export segmoe, timemoe, "
            "ldl_moe or dlinear"
        )
    if isinstance(model, TimeMoE):
        module, horizon = model.step_module(), model.config.horizons[-1]
    else:
        horizon = trained.spec.horizon
        module = Points(model, horizon, trained.spec.season).eval()
    metadata: dict[str, Any] = {
        "task": "forecasting",
        "model": trained.title,
        "input": f"[batch, {trained.spec.context}], NaN where missing, the last value observed",
        "output": f"[batch, {horizon}], the next points in the units of the input",
        "moecore_version": __version__,
    }
    contexts = _contexts(data, trained.spec.context)
    figures = _write(module, path, contexts, metadata)
    if isinstance(model, TimeMoE):
        step = path.with_suffix(".step.onnx")
        figures |= _write_step(model, step, contexts[:ROLLOUTS], metadata)
    return figures


def _contexts(data: SeriesData, length: int) -> Float[Tensor, "W L"]:
    """Contexts of test windows that end with a value, evenly spaced."""
    windows = data.windows("test", data.config.horizons[0])
    windows.index = thinned(windows.index, WINDOWS)
    past = torch.cat([batch.past for _, batch in windows.batches(128)])[:, -length:]
    return past[observed(past[:, -1])]


def _write(module: nn.Module, path: Path, contexts: Float[Tensor, "W L"], metadata: dict[str, Any]) -> dict[str, float]:
    with atomic_path(path) as temporary:
        try:
            write_onnx(module, contexts[:2].repeat(2, 1)[:2], temporary, "context", "forecast", metadata)
        except ExportError as error:
            raise UserError(f"export: {error}") from error
        comparison = compare_onnx(module, temporary, contexts.split(64))
        _refuse(comparison.max_relative_error)
    figures = comparison.scalars()
    figures.pop("decision_agreement")  # the largest of a forecast's points decides nothing
    return figures


def _refuse(error: float) -> None:
    if not error <= TOLERANCE:
        raise UserError(
            f"export: outputs differ from PyTorch by {error:.2g} of their range (over {TOLERANCE}); no file was kept"
        )


def _write_step(
    model: TimeMoE, path: Path, contexts: Float[Tensor, "W L"], metadata: dict[str, Any]
) -> dict[str, float]:
    """The decoding step, driven by onnxruntime over whole forecasts."""
    step = model.step_module(cached=True)
    keys, values = (torch.randn(x.shape[0], 3, *x.shape[2:3], 6, x.shape[4]) for x in step.empty(1))
    limit = model.config.max_positions
    rows, new, past = (torch.export.Dim(n, min=low, max=limit) for n, low in (("batch", 1), ("new", 1), ("past", 0)))
    shapes = ({0: rows, 1: new}, {1: rows, 3: past}, {1: rows, 3: past})
    metadata = metadata | {
        "input": "points [batch, n], normalised; keys and values [layers, batch, heads, m, width], m = 0 at first",
        "output": f"predictions of the heads {list(model.config.horizons)} side by side; keys and values, m + n points",
        "normalize": model.config.normalize,
    }
    inputs, outputs = ("points", "keys", "values"), ("predictions", "keys_out", "values_out")
    horizon = 2 * model.config.horizons[-1]
    contexts = contexts[observed(contexts).all(1)]
    with atomic_path(path) as temporary:
        try:
            write_onnx(step, (torch.randn(3, 5), keys, values), temporary, inputs, outputs, metadata, shapes)
        except ExportError as error:
            raise UserError(f"export: decoding step: {error}") from error
        if not len(contexts):
            raise UserError("export: no test window without gaps to compare the decoding step on")
        ours = roll_out(_session(temporary), model, step, contexts, horizon)
        expected = model.forecast(contexts, horizon)
        error = float((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        _refuse(error)
    return {"step_rollouts": float(len(contexts)), "step_horizon": float(horizon), "step_max_relative_error": error}


def _session(path: Path) -> Step:
    session = open_session(path)
    names = [one.name for one in session.get_inputs()]

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = session.run(None, dict(zip(names, (np.ascontiguousarray(t) for t in tensors), strict=True)))
        return tuple(torch.from_numpy(out) for out in found)

    return step


@torch.no_grad()
def roll_out(
    step: Step, model: TimeMoE, module: CachedStep, contexts: Float[Tensor, "B L"], horizon: int
) -> Float[Tensor, "B H"]:
    """What a host does with the decoding step, whatever runs it: the context first, then what was predicted."""
    scale = instance_scale(contexts) if model.config.normalize == "instance" else None
    points = contexts if scale is None else scale.normalize(contexts)
    keys, values = module.empty(len(contexts))
    parts: list[Tensor] = []
    for start, size in _heads(model, horizon):
        said, keys, values = step(points, keys, values)
        points = said[:, start : start + size]
        parts.append(points)
    whole = torch.cat(parts, 1)
    return whole if scale is None else scale.restore(whole)


def _heads(model: TimeMoE, horizon: int) -> Iterator[tuple[int, int]]:
    """Where the largest head that fits stands among the predictions, and its points, for every step."""
    sizes = model.config.horizons
    while horizon > 0:
        size = max(points for points in sizes if points <= horizon)
        yield sum(sizes[: sizes.index(size)]), size
        horizon -= size
