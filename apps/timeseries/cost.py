"""What a forecast costs: parameters and multiply-adds."""

from __future__ import annotations

from torch import nn

import moecore
from apps.timeseries.models.base import ForecastModel, Windows


class Forecasting(nn.Module):
    """A model as a function of windows, for what calls modules: counters and timers."""

    def __init__(self, model: ForecastModel, horizon: int) -> None:
        super().__init__()
        self.model, self.horizon = model, horizon

    def forward(self, windows: Windows):
        """The forecast of `horizon` points."""
        return self.model.forecast(windows, self.horizon)


def forecast_cost(model: ForecastModel, windows: Windows, horizon: int) -> moecore.Cost:
    """Parameters, and multiply-adds of forecasting these windows; samples of probabilistic models all count."""
    device = next((p.device for p in model.parameters()), "cpu")
    return moecore.count_cost(Forecasting(model, horizon), windows.to(device))
