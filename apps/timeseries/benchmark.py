"""Latency, throughput and memory of a forecaster beside its dense twin."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import moecore
from apps.timeseries.cost import forecast_cost
from apps.timeseries.loading import Trained
from apps.timeseries.models.base import ForecastModel, Windows
from apps.timeseries.models.build import FAMILIES, build_model
from apps.timeseries.models.spec import SeriesSpec
from apps.timeseries.settings import TimeseriesConfig
from moecore.benchmark.timing import interleave, peak_memory
from moecore.errors import require

LEAST = 4096
"""Points in a small batch from which on its training memory can be told from noise."""


def run_benchmark(
    config: TimeseriesConfig, trained: Trained | None, batch_sizes: list[int], rounds: int
) -> list[dict[str, Any]]:
    """One row per model and batch size.

    Models: the dense twin of equal active multiply-adds, the MoE model, and the same with every expert computed.

    Args:
        config: settings of the model, context and horizon.
        trained: the model to measure; None: fresh weights.
        batch_sizes: windows per call.
        rounds: interleaved rounds.

    Raises:
        ConfigError: for a model without MoE layers.
    """
    spec = trained.spec if trained else SeriesSpec(config.data.context, config.data.horizon, config.data.season or 24)
    moe = trained.model if trained else build_model(config.model, spec)
    has_experts = any(isinstance(m, moecore.MoE) for m in moe.modules())
    require(has_experts, "model.name", config.model.name, "has no MoE layers here to compare with a dense twin")
    device = next(moe.parameters()).device.type
    twin = build_model(dataclasses.replace(config.model, dense=True), spec).to(device)
    models = {"dense": twin.eval(), "moe": moe.eval(), "moe, all experts": _all_experts(moe)}
    future = FAMILIES[config.model.name].future(config.model, spec.horizon)
    rows = []
    for batch in batch_sizes:
        windows = example_windows(spec, batch, future).to(device)
        costs = {name: forecast_cost(model, windows, spec.horizon) for name, model in models.items()}
        forward = interleave({n: _forecast(m, windows, spec.horizon) for n, m in models.items()}, rounds, device=device)
        training = _training_figures(config, spec, models, windows, rounds)
        for name in models:
            seconds = forward[name].median
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "forecast_ms": seconds * 1e3,
                    "windows_per_s": batch / seconds,
                    "forecast_ratio": forward[name].ratio,
                    **training[name],
                    "params_total": costs[name].total_params,
                    "params_active": costs[name].active_params,
                    "multiply_adds": costs[name].all_experts_macs if "all" in name else costs[name].macs,
                }
            )
    return rows


def example_windows(spec: SeriesSpec, batch: int, future: int) -> Windows:
    """Noisy sine waves with everything that a model of the spec looks at."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(spec.context + future)
    wave = torch.sin(2 * torch.pi * time / max(spec.season, 2)) + torch.randn(batch, len(time), generator=generator)

    def noise(*shape: int) -> Tensor | None:
        return torch.randn(*shape, generator=generator) if shape[-1] else None

    return Windows(
        past=wave[:, : spec.context],
        future=wave[:, spec.context :],
        futr=noise(batch, len(time), len(spec.futr)),
        hist=noise(batch, spec.context, len(spec.hist)),
        stat=noise(batch, len(spec.stat)),
        season=spec.season,
    )


def _forecast(model: ForecastModel, windows: Windows, horizon: int) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> None:
        model.eval()
        model.forecast(windows, horizon)

    return call


def _training(model: ForecastModel, windows: Windows) -> Callable[[], object]:
    def call() -> None:
        model.train()
        model.loss(windows).backward()
        model.zero_grad()

    return call


def _training_figures(
    config: TimeseriesConfig, spec: SeriesSpec, models: dict[str, ForecastModel], windows: Windows, rounds: int
) -> dict[str, dict[str, float | None]]:
    """Part of each model's row; nothing for weights in half precision, which are not trained."""
    if next(models["moe"].parameters()).dtype != torch.float32:
        return {name: dict.fromkeys(("training_ms", "training_ratio", "training_peak_mib")) for name in models}
    device = windows.past.device.type
    timings = interleave({n: _training(m, windows) for n, m in models.items()}, rounds, device=device)
    size, future = len(windows), windows.future.shape[1]
    return {
        name: {
            "training_ms": timings[name].median * 1e3,
            "training_ratio": timings[name].ratio,
            "training_peak_mib": _peak(config, spec, name, size, future) if device == "cpu" else None,
        }
        for name in models
    }


def _all_experts(model: ForecastModel) -> ForecastModel:
    """The same weights with every expert computed for every token."""
    dense = copy.deepcopy(model)
    for module in dense.modules():
        if isinstance(module, moecore.MoE):
            module.executor = "dense"
    return dense


def _peak(config: TimeseriesConfig, spec: SeriesSpec, name: str, batch: int, future: int) -> float | None:
    """Peak memory of a training step in MiB, beyond weights and input; None where it is too small to tell."""
    if batch < 16 and batch * spec.context < LEAST:
        return None
    peak = peak_memory(functools.partial(_build, config, spec, name, batch, future))
    return None if peak is None else round(peak / 2**20, 1)


class _Loss(nn.Module):
    """The training loss as a function of the context, for `peak_memory`."""

    def __init__(self, model: ForecastModel, windows: Windows) -> None:
        super().__init__()
        self.model, self.windows = model, windows

    def forward(self, past: Tensor) -> Tensor:
        rows = slice(0, len(past))
        return self.model.loss(dataclasses.replace(self.windows[rows], past=past))


def _build(config: TimeseriesConfig, spec: SeriesSpec, name: str, batch: int, future: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(config.model, dense=name == "dense"), spec).train()
    model = _all_experts(model) if "all" in name else model
    windows = example_windows(spec, batch, future)
    return _Loss(model, windows), windows.past
