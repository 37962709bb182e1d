"""Trained forecasters from checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from apps.errors import UserError
from apps.runs import load_checkpoint
from apps.timeseries.forecasting import Intervals
from apps.timeseries.models.base import ForecastModel
from apps.timeseries.models.build import FAMILIES, as_trained, build_model
from apps.timeseries.models.spec import SeriesSpec
from apps.timeseries.settings import TimeseriesConfig
from apps.training import load_weights, on_device
from apps.tree import restore


@dataclass(frozen=True)
class Trained:
    """A model with its weights, and where they came from."""

    model: ForecastModel
    config: TimeseriesConfig
    spec: SeriesSpec
    path: Path | None
    """Of the checkpoint; None for weights that come otherwise."""
    intervals: Intervals | None
    """What widens points to quantiles."""

    @property
    def title(self) -> str:
        """The model's name in tables and columns."""
        return FAMILIES[self.config.model.name].title


def load_trained(path: Path, config: TimeseriesConfig | None = None) -> Trained:
    """The model of a checkpoint, on the GPU if there is one.

    Args:
        path: of the checkpoint.
        config: settings to build it by; None: those it was trained with.

    Raises:
        UserError: if the weights are of another architecture.
    """
    checkpoint = load_checkpoint(path, "timeseries")
    config = config or restore(TimeseriesConfig, checkpoint["config"])
    spec = SeriesSpec.from_plain(checkpoint["spec"])
    model = build_model(as_trained(config.model, checkpoint.get("sizes")), spec)
    model = load_weights(model, checkpoint, path, config.trainer)
    return Trained(model, config, spec, path, Intervals.from_plain(checkpoint.get("intervals")))


def load_untrained(config: TimeseriesConfig) -> Trained:
    """A model that needs no checkpoint of ours: published weights, or one that learns nothing.

    Raises:
        UserError: if the configured model must be trained first.
    """
    own = getattr(config.model, config.model.name, None)
    ready = config.model.name == "seasonal_naive" or getattr(own, "pretrained", None) is not None
    if not ready:
        raise UserError(f"ckpt_path: is required for model.name={config.model.name}; train first, then give `last`")
    data = config.data
    spec = SeriesSpec(data.context, data.horizon, data.season or 1)
    model = build_model(config.model, spec)
    return Trained(on_device(model, config.trainer), config, spec, None, None)
