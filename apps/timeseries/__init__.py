"""Forecasting with Mixture-of-Experts models."""

from apps.cli import App
from apps.settings import other_models
from apps.timeseries.arguments import ARGUMENTS
from apps.timeseries.settings import TimeseriesConfig

APP = App(
    name="timeseries",
    title="Forecasts with uncertainty from Mixture-of-Experts models: Seg-MoE, Time-MoE, Moirai-MoE, LDL-MoE.",
    config=TimeseriesConfig,
    arguments=ARGUMENTS,
    unused=lambda config: other_models(config.model),
)
