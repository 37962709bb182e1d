"""Models by the settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from apps.timeseries.model_settings import ModelConfig
from apps.timeseries.models import moirai_published
from apps.timeseries.models.base import ForecastModel
from apps.timeseries.models.baselines import SeasonalNaive
from apps.timeseries.models.dlinear import DLinear
from apps.timeseries.models.ldl_moe import LDLMoE
from apps.timeseries.models.moirai_moe import MoiraiMoE
from apps.timeseries.models.segmoe import SegMoE
from apps.timeseries.models.spec import SeriesSpec
from apps.timeseries.models.timemoe import TimeMoE
from apps.tree import plain, restore
from moecore.errors import ConfigError, require


@dataclass(frozen=True)
class Family:
    """How a model is made, and what its training windows and forecasts are called."""

    title: str
    """Its name in tables, and of its column in predictions."""
    build: Callable[[ModelConfig, SeriesSpec], ForecastModel]
    """(settings, what is known of the series) -> model."""
    future: Callable[[ModelConfig, int], int] = lambda config, horizon: horizon
    """(settings, horizon) -> points of future in a training window."""
    lr: float = 1e-3
    """Learning rate where the settings leave it open."""
    packs: bool = False
    """Whether it keeps several series in one sequence apart."""


def _no_twin(config: ModelConfig) -> None:
    require(not config.dense, "dense", config.dense, f"name={config.name} has no MoE layers to replace")


def _segmoe(config: ModelConfig, spec: SeriesSpec) -> ForecastModel:
    return SegMoE(config.segmoe, spec.context, spec.horizon, spec.season, config.dense)


def _ldl_moe(config: ModelConfig, spec: SeriesSpec) -> ForecastModel:
    return LDLMoE(config.ldl_moe, spec.context, spec.horizon, dense=config.dense)


def _moirai_moe(config: ModelConfig, spec: SeriesSpec) -> ForecastModel:
    own = config.moirai_moe
    if own.pretrained is not None and not config.dense:
        return moirai_published.from_pretrained(own.pretrained, own.num_samples)
    return MoiraiMoE(own, config.dense)


def _timemoe(config: ModelConfig, spec: SeriesSpec) -> ForecastModel:
    return TimeMoE.from_config(config.timemoe, dense=config.dense)


def _dlinear(config: ModelConfig, spec: SeriesSpec) -> ForecastModel:
    _no_twin(config)
    return DLinear(config.dlinear, spec.context, spec.horizon)


def _seasonal_naive(config: ModelConfig, spec: SeriesSpec) -> ForecastModel:
    _no_twin(config)
    return SeasonalNaive()


FAMILIES: dict[str, Family] = {
    "segmoe": Family(
        "SegMoE",
        _segmoe,
        lambda config, horizon: config.segmoe.block or horizon,
    ),
    "timemoe": Family("TimeMoE", _timemoe, lambda config, horizon: max(config.timemoe.horizons), packs=True),
    "moirai_moe": Family("MoiraiMoE", _moirai_moe, packs=True),
    "ldl_moe": Family("LDLMoE", _ldl_moe),
    "dlinear": Family("DLinear", _dlinear),
    "seasonal_naive": Family("SeasonalNaive", _seasonal_naive),
}
"""Models by the name that configurations use."""


def build_model(config: ModelConfig, spec: SeriesSpec) -> ForecastModel:
    """A model with fresh weights.

    Args:
        config: which, and its settings.
        spec: context, horizon and season of the series.

    Raises:
        ConfigError: for settings that do not go together, by their full names.
    """
    try:
        return FAMILIES[config.name].build(config, spec)
    except ConfigError as error:
        field = error.field if error.field.startswith(("data.", "model.")) else f"model.{config.name}.{error.field}"
        field = "model.dense" if error.field == "dense" else field
        raise ConfigError(field, error.value, error.remedy) from None


def resolved_sizes(model: ForecastModel) -> dict[str, Any] | None:
    """Settings of a model as plain data, where they may come from a folder of published weights; else None."""
    return plain(model.config) if isinstance(model, (TimeMoE, MoiraiMoE)) else None


def as_trained(config: ModelConfig, sizes: dict[str, Any] | None) -> ModelConfig:
    """The settings with the sizes that a checkpoint keeps in place of a folder of published weights."""
    own = getattr(config, config.name, None)
    if sizes is None or getattr(own, "pretrained", None) is None:
        return config
    return dataclasses.replace(config, **{config.name: restore(type(own), sizes)})
