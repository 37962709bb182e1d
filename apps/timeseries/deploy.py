"""Forecasters ready for export: the pass over a context, and of Time-MoE the cached decoding step beside it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apps.errors import UserError
from apps.timeseries.data import SeriesData
from apps.timeseries.deploy_fixed import fixed_exportable
from apps.timeseries.deploy_step import squared_error, step_exportable
from apps.timeseries.forecasting import Intervals
from apps.timeseries.loading import Trained
from apps.timeseries.models.base import ForecastModel, Windows, observed
from apps.timeseries.models.distributions import COMPONENTS, FIXED_SCALE, MAX_SAMPLE, PARAMETERS, log_likelihood
from apps.timeseries.models.moirai_export import NextPatches
from apps.timeseries.models.moirai_moe import MoiraiMoE
from apps.timeseries.models.moirai_tokens import MAX_VALUE
from apps.timeseries.models.timemoe import TimeMoE
from apps.timeseries.windows import SeriesStore, WindowSet, evaluation_index, training_index
from export.decisions import nearness
from export.exportable import Exportable, Outputs, Sample, Score, samples_of
from moecore import __version__

COMPARED, BATCH = 1000, 50
"""Test windows that files are compared on at most, and how many at a time."""
LEVELS = (0.1, 0.5, 0.9)
"""Quantile levels of the calibrated intervals that a file's metadata keep."""


class Points(nn.Module):
    """Contexts -> point forecasts of a fixed horizon, a function of one tensor."""

    def __init__(self, model: ForecastModel, horizon: int, season: int) -> None:
        super().__init__()
        self.model, self.horizon, self.season = model, horizon, season

    def forward(self, context: Float[Tensor, "B L"]) -> Float[Tensor, "B H"]:
        """[B, L] -> [B, H]; NaN where a value is missing."""
        return self.model.forecast(Windows(context, season=self.season), self.horizon).mean


def exportables(trained: Trained, data: SeriesData, calibration: int, device: bool) -> dict[str, Exportable]:
    """What there is to export of a model, the first under "".

    Args:
        trained: the model.
        data: whose test windows files are compared on, and whose training windows ranges are taken from.
        calibration: how many of the latter.
        device: for a form with fixed shapes and without NaN: of Time-MoE the decoding step alone.

    Raises:
        UserError: if no series is long enough to test on, all test windows begin after a gap, or the model has no form
            for devices.
    """
    if device and isinstance(trained.model, MoiraiMoE):
        raise UserError("export: Moirai-MoE takes NaN for points to come, which devices do not; use format=onnx")
    model = copy.deepcopy(trained.model).cpu().float().eval()
    trained = dataclasses.replace(trained, model=model)
    horizon = model.config.horizons[-1] if isinstance(model, TimeMoE) else trained.spec.horizon
    test = _test_windows(trained, data, horizon)
    training = _training_windows(trained, data, horizon, calibration)
    metadata = _metadata(trained, horizon)
    if device:
        test, training = _without_gaps(test), _without_gaps(training)
    if not test:
        raise UserError("export: no test window without gaps, which devices have no number for; use format=onnx")
    if isinstance(model, MoiraiMoE):
        return {"": _distributions(trained, test, training, metadata)}
    if not isinstance(model, TimeMoE):
        return {"": _points(Points(model, horizon, trained.spec.season).eval(), test, training, metadata)}
    if device:
        return {"": fixed_exportable(model, test, training, metadata)}
    whole = _points(model.step_module(), test, training, metadata)
    return {"": whole, "step": step_exportable(model, test, training, metadata)}


def _points(
    module: nn.Module, test: Sequence[Windows], training: Sequence[Windows], metadata: dict[str, Any]
) -> Exportable:
    """Contexts -> the next points."""
    truth = torch.cat([windows.future for windows in test])  # [W, H]

    def mse(outputs: Outputs) -> float:
        return squared_error(torch.from_numpy(outputs[0]), truth[: len(outputs[0])])

    samples = samples_of(("context",), *((windows.past,) for windows in test))
    return Exportable(
        module=module,
        inputs=("context",),
        outputs=("forecast",),
        example=_two(samples),
        samples=samples,
        calibration=samples_of(("context",), *((windows.past,) for windows in training)),
        metadata=metadata | {"output": f"[batch, {truth.shape[1]}], the next points in the units of the input"},
        decide=nearness(),
        score=Score("mse", mse, relative=True),
        timed=_whole(samples),
    )


def _distributions(
    trained: Trained, test: Sequence[Windows], training: Sequence[Windows], metadata: dict[str, Any]
) -> Exportable:
    """Contexts -> the distribution of each of the next points; see `NextPatches`."""
    module = NextPatches(trained.model, trained.spec).eval()
    truth = torch.cat([windows.future for windows in test])  # [W, H]

    def likelihood(outputs: Outputs) -> float:
        """Mean negative log-likelihood of the points that came, each given the patches before its own."""
        bounded, mean, std = (torch.from_numpy(output) for output in outputs)
        came = ((truth[: len(mean)] - mean) / std).clamp(-MAX_VALUE, MAX_VALUE)
        return -float(log_likelihood(came[observed(came)], bounded[observed(came)]).mean())

    def samples(windows: Sequence[Windows]) -> list[Sample]:
        return samples_of(module.inputs, *map(module.given, windows))

    batch = {0: torch.export.Dim("batch", min=1)}
    covariates = (tuple(batch for _ in module.covariates),) if module.covariates else ()
    compared = samples(test)
    return Exportable(
        module=module,
        inputs=module.inputs,
        outputs=("parameters", "location", "deviation"),
        example=_two(compared),
        samples=compared,
        calibration=samples(training),
        metadata=metadata | _distribution_notes(trained),
        decide=nearness(),
        score=Score("nll", likelihood),
        dynamic_shapes=(batch, batch, *covariates),
        timed=_whole(compared),
    )


def _distribution_notes(trained: Trained) -> dict[str, Any]:
    """What a host must know to draw from the distributions."""
    return {
        "output": "parameters [batch, horizon, 12] of (y - location) / deviation at each point: weights of the "
        "components, then the parameters; of a point they hold once the patches before its own are in `future`",
        "components": list(COMPONENTS),
        "parameters": list(PARAMETERS),
        "fixed_scale": FIXED_SCALE,
        "max_sample": MAX_SAMPLE,
        "patch_size": trained.model.config.patch_size,
        "covariates": {kind: list(getattr(trained.spec, kind)) for kind in ("futr", "hist", "stat")},
    }


def _metadata(trained: Trained, horizon: int) -> dict[str, Any]:
    """What any host must know."""
    spec, scale = trained.spec, trained.config.data.scale
    notes = {
        "task": "forecasting",
        "model": trained.title,
        "input": f"[batch, {spec.context}], NaN where missing, the last value observed",
        "context": spec.context,
        "horizon": horizon,
        "season": spec.season,
        "scale": scale,
        "moecore_version": __version__,
    }
    if trained.intervals is not None:
        notes["intervals"] = {"levels": LEVELS, "deviations": _deviations(trained.intervals, horizon).tolist()}
    return notes


def _deviations(intervals: Intervals, horizon: int) -> Float[Tensor, "Q H"]:
    """How far quantiles lie from the forecast, in deviations of the context, which here is 1."""
    return intervals.quantiles(torch.zeros(1, horizon), torch.tensor([[-1.0, 1.0]]), LEVELS)[0]


def _test_windows(trained: Trained, data: SeriesData, horizon: int) -> list[Windows]:
    store, context, tested = data.store, trained.spec.context, data.config.horizons[0]
    index = evaluation_index(store, "test", context, tested)
    if not len(index):
        raise UserError(f"data.horizon={tested}: no series is long enough to test on; lower it")
    index = _evenly(_ending_with_a_value(store, index), COMPARED)
    if not len(index):
        raise UserError(f"data.source={data.config.source}: no test window whose context ends with a value")
    limits = np.array([border.test for border in store.borders])
    return _batches(WindowSet(store, index, context, horizon, limits, data.config.season))


def _training_windows(trained: Trained, data: SeriesData, horizon: int, count: int) -> list[Windows]:
    store, context = data.store, trained.spec.context
    index = training_index(store, context, horizon, data.config.min_context)
    index = _evenly(_ending_with_a_value(store, index), count)
    limits = np.array([border.train for border in store.borders])
    return _batches(WindowSet(store, index, context, horizon, limits, data.config.season))


def _batches(windows: WindowSet) -> list[Windows]:
    """In random order: who takes the first few takes some of all series."""
    order = np.random.default_rng(0).permutation(len(windows))
    return [windows.batch(order[start : start + BATCH]) for start in range(0, len(order), BATCH)]


def _without_gaps(windows: Sequence[Windows]) -> list[Windows]:
    """Those whose context is observed throughout."""
    whole = (one[observed(one.past).all(1)] for one in windows)
    return [one for one in whole if len(one)]


def _ending_with_a_value(store: SeriesStore, index: Int[np.ndarray, "W 2"]) -> Int[np.ndarray, "V 2"]:
    return index[np.isfinite(store.y[store.starts[index[:, 0]] + index[:, 1] - 1])]


def _evenly(index: Int[np.ndarray, "W 2"], most: int) -> Int[np.ndarray, "V 2"]:
    """`most` of the windows, or all if they are fewer."""
    return index[np.arange(most) * len(index) // most] if len(index) > most else index


def _two(samples: Sequence[Sample]) -> tuple[Tensor, ...]:
    """Inputs of two rows, to trace with."""
    return tuple(tensor[:1].repeat(2, *[1] * (tensor.dim() - 1)) for tensor in samples[0].tensors)


def _whole(samples: Sequence[Sample]) -> Sample:
    """One row to time: the first whose context has no gaps, if there is one."""
    for sample in samples:
        rows = observed(sample.tensors[0]).all(1).nonzero()
        if len(rows):
            row = int(rows[0])
            break
    else:
        sample, row = samples[0], 0
    names = tuple(sample.feed)
    return samples_of(names, tuple(tensor[row : row + 1] for tensor in sample.tensors))[0]
