"""What all forecasters take and give: batches of windows in, forecasts out.

B windows, L context points, H horizon points, N = L + H points of a whole window, Q quantile levels. Missing values are
NaN, and so is the padding on the left of a context that is shorter than L: one notion of absence for all models.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Windows:
    """A batch of windows cut from series; NaN where nothing was observed."""

    past: Float[Tensor, "B L"]
    future: Float[Tensor, "B H"] | None = None
    """The truth to learn or compare with; None when forecasting."""
    futr: Float[Tensor, "B M Cf"] | None = None
    """Covariates known in the future too, over context and horizon (M = L + H points, or more)."""
    hist: Float[Tensor, "B L Ch"] | None = None
    """Covariates known only in the past."""
    stat: Float[Tensor, "B Cs"] | None = None
    """Constants of each series."""
    segments: Int[Tensor, "B N"] | None = None
    """Packed sequences: which of several series a point of (past, future) belongs to; attention stays within one."""
    season: int = 1
    """Season length of the series in points, for what needs to know it (24 for hourly data)."""

    @property
    def sequence(self) -> Float[Tensor, "B N"]:
        """Context and horizon as one."""
        return self.past if self.future is None else torch.cat([self.past, self.future], 1)

    def __len__(self) -> int:
        return self.past.shape[0]

    def to(self, device: torch.device | str) -> Windows:
        """The same on a device."""
        return self._map(lambda t: t.to(device))

    def __getitem__(self, rows: slice | Tensor) -> Windows:
        """Some of the windows."""
        return self._map(lambda t: t[rows])

    def _map(self, function) -> Windows:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Windows(**{k: function(v) if isinstance(v, Tensor) else v for k, v in values.items()})


@dataclass(frozen=True)
class Forecast:
    """What a model says of the future, in the units of the windows."""

    mean: Float[Tensor, "B H"]
    """Point forecast."""
    quantiles: Float[Tensor, "B Q H"] | None = None
    """One row per level that was asked for, in that order; None from models that give points only."""
    components: dict[str, Float[Tensor, "B H"]] = field(default_factory=dict)
    """Named parts that sum to the point forecast, where the model has such."""


class ForecastModel(nn.Module, ABC):
    """Base of all forecasters.

    Attributes:
        probabilistic: whether `forecast` gives quantiles by itself. Points become intervals by calibration elsewhere.
        covariates: whether it looks at `futr`, `hist` and `stat` of its windows.
        max_context: longest context it takes, None for any.
    """

    probabilistic = False
    covariates = False
    max_context: int | None = None

    @abstractmethod
    def loss(self, windows: Windows) -> Float[Tensor, ""]:
        """Training loss of a batch, without balance losses: those are read from `moecore.record`.

        What is not observed counts for nothing; a batch without anything to learn from gives zero.
        """

    @abstractmethod
    def forecast(self, windows: Windows, horizon: int, quantiles: Sequence[float] = ()) -> Forecast:
        """The next `horizon` points after each context. `windows.future` is not looked at.

        The last point of every context is observed: see `apps.timeseries.forecasting`, which sees to it.

        Args:
            windows: contexts, and covariates that reach as far as the horizon.
            horizon: H, any number of points.
            quantiles: levels in (0, 1); only probabilistic models look at them.
        """

    def trace(self, windows: Windows) -> Int[Tensor, " P"]:
        """One pass over the contexts, for what `moecore.record` sees of it.

        Returns:
            Where in the context each of the P positions that layers see begins, in points; empty where layers see the
            context as a whole. A layer with fewer units (segments) spreads them evenly over the positions.
        """
        self.forecast(windows, 1)
        return torch.empty(0, dtype=torch.long)


def observed(x: Tensor) -> Bool[Tensor, ...]:
    """Where there is a value."""
    return torch.isfinite(x)


def filled(x: Tensor, value: float = 0.0) -> Tensor:
    """The values with `value` where there is none: for arithmetic whose result is masked."""
    return torch.where(torch.isfinite(x), x, value)


def masked_mean(values: Tensor, mask: Tensor) -> Float[Tensor, ""]:
    """Mean of the values where the mask is true; zero (with a gradient path) where it never is."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


@dataclass(frozen=True)
class Scale:
    """Mean and deviation of each context, to normalise by and to return from."""

    mean: Float[Tensor, "B 1"]
    std: Float[Tensor, "B 1"]

    def normalize(self, x: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """To mean 0 and deviation 1; NaN stays NaN."""
        return (x - self.mean) / self.std

    def restore(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """Back to the units of the windows; for `[B, N]` and `[B, Q, N]`."""
        lead = (-1, *[1] * (x.dim() - 1))
        return x * self.std.view(lead) + self.mean.view(lead)


def instance_scale(past: Float[Tensor, "B L"], eps: float = 1e-5) -> Scale:
    """Mean and deviation of what each context shows (RevIN without affine, Kim et al. 2022).

    A context that never changes gets deviation 1 and one without any value mean 0, so that nothing is divided by zero.
    """
    mask = observed(past)
    count = mask.sum(1, keepdim=True).clamp(min=1)
    values = filled(past)
    mean = values.sum(1, keepdim=True) / count
    centred = torch.where(mask, values - mean, 0.0)
    std = (centred.square().sum(1, keepdim=True) / count).sqrt()
    floor = eps * mean.abs().clamp(min=1.0)  # rounding of a large constant is not a deviation
    return Scale(mean, torch.where(std > floor, std, 1.0))
