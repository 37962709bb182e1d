"""DLinear: one linear map of the trend and one of the rest (Zeng et al. 2023, arXiv 2205.13504)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from apps.errors import UserError
from apps.timeseries.model_settings import DLinearConfig
from apps.timeseries.models.base import Forecast, ForecastModel, Windows, filled, masked_mean, observed

RIDGES = tuple(10 ** (exponent / 2) for exponent in range(-12, 5))
"""Strengths that `DLinear.fit` tries, in units of the mean variance of the inputs: 1e-6 to 1e2."""


class DLinear(ForecastModel):
    """The trend is a moving average with repeated edges; it and the rest each have a linear map to the horizon.

    DLinear has no notion of missing values. Inside a context they are interpolated linearly between their neighbours;
    before the first observed value, where short contexts are padded, that value is repeated, and after the last one
    that. Longer horizons are rolled out.

    Args:
        config: kernel of the moving average.
        context: L, points the maps take; of longer contexts the last L are used.
        horizon: H, points predicted at once.
    """

    def __init__(self, config: DLinearConfig, context: int, horizon: int) -> None:
        super().__init__()
        self.kernel, self.context, self.horizon = config.kernel, context, horizon
        self.rest, self.trend = nn.Linear(context, horizon), nn.Linear(context, horizon)
        for part in (self.rest, self.trend):
            nn.init.constant_(part.weight, 1 / context)

    def loss(self, windows: Windows) -> Float[Tensor, ""]:
        """Mean squared error over the observed future."""
        if windows.future is None:
            raise ValueError("future=None: training windows have a future")
        target = windows.future[:, : self.horizon]
        error = self(self._inputs(windows.past))[:, : target.shape[1]] - filled(target)
        return masked_mean(error.square(), observed(target))

    @torch.no_grad()
    def forecast(self, windows: Windows, horizon: int, quantiles: Sequence[float] = ()) -> Forecast:
        """Points only. What was predicted is context for what lies beyond."""
        context = self._inputs(windows.past)
        while context.shape[1] < self.context + horizon:
            context = torch.cat([context, self(context[:, -self.context :])], 1)
        return Forecast(context[:, self.context : self.context + horizon])

    def forward(self, context: Float[Tensor, "B L"]) -> Float[Tensor, "B H"]:
        """Contexts without gaps -> the next points."""
        trend = moving_average(context, self.kernel)
        return self.rest(context - trend) + self.trend(trend)

    def _inputs(self, past: Float[Tensor, "B N"]) -> Float[Tensor, "B L"]:
        """Contexts of the maps' length, without gaps."""
        past = interpolated(past)
        missing = max(self.context - past.shape[1], 0)
        return torch.cat([past[:, :1].expand(-1, missing), past[:, -self.context :]], 1)

    @torch.no_grad()
    def fit(self, batches: Iterable[Windows], validation: Iterable[Windows], ridges: Sequence[float] = RIDGES) -> Ridge:
        """Set the maps to the minimum of the squared error plus a ridge penalty, in closed form.

        Both maps shrink towards zero; the bias is free. Among the strengths, the one with the least error on the
        validation windows is taken. Windows whose future is not observed throughout are left out on either side: with
        them every step of the horizon would have normal equations of its own.

        Args:
            batches: training windows; gone through once.
            validation: windows to choose the strength on; gone through once.
            ridges: strengths, in units of the mean variance of the inputs.

        Raises:
            UserError: no window has a complete future.
        """
        train, held = (self._moments(part, name) for part, name in ((batches, "train"), (validation, "validation")))
        average = moving_average(torch.eye(self.context, dtype=torch.float64), self.kernel).T
        features = torch.cat([torch.eye(self.context, dtype=torch.float64) - average, average])  # [2 L, L]
        values, vectors = torch.linalg.eigh(features @ train.past_past @ features.T)
        projected = vectors.T @ (features @ train.past_future)  # [2 L, H]
        candidates = []
        for strength in ridges:
            penalty = strength * values.mean()
            maps = vectors @ (projected / (values.clamp(min=0)[:, None] + penalty))  # [2 L, H]
            error = held.error(features.T @ maps, train)
            candidates.append((error, strength, maps))
        error, strength, maps = min(candidates, key=lambda c: c[0])
        rest, trend = maps.T.split(self.context, 1)
        self.rest.weight.copy_(rest)
        self.trend.weight.copy_(trend)
        self.rest.bias.zero_()
        self.trend.bias.copy_(train.future_mean - train.past_mean @ (features.T @ maps))
        return Ridge(strength, error)

    def _moments(self, batches: Iterable[Windows], name: str) -> _Moments:
        moments = _Moments(self.context, self.horizon)
        for windows in batches:
            complete = observed(windows.future).all(1)
            moments.add(self._inputs(windows.past[complete]), windows.future[complete])
        if moments.count == 0:
            raise UserError(f"{name} windows=none with a complete future: DLinear cannot be fitted in closed form")
        return moments


@dataclass(frozen=True)
class Ridge:
    """What `DLinear.fit` chose."""

    strength: float
    """In units of the mean variance of the inputs."""
    validation_mse: float
    """Mean squared error on the validation windows."""


class _Moments:
    """First and second moments of contexts and futures, in float64: all that least squares needs."""

    def __init__(self, context: int, horizon: int) -> None:
        self.count, self.context = 0, context
        self._sum = torch.zeros(context + horizon, dtype=torch.float64)
        self._square = torch.zeros(context + horizon, context + horizon, dtype=torch.float64)

    def add(self, past: Float[Tensor, "B L"], future: Float[Tensor, "B H"]) -> None:
        """Add a batch without gaps."""
        both = torch.cat([past, future], 1).double().cpu()
        self.count += len(both)
        self._sum += both.sum(0)
        self._square.addmm_(both.T, both)

    @property
    def past_mean(self) -> Float[Tensor, " L"]:
        return self._sum[: self.context] / self.count

    @property
    def future_mean(self) -> Float[Tensor, " H"]:
        return self._sum[self.context :] / self.count

    @property
    def past_past(self) -> Float[Tensor, "L L"]:
        """Covariance."""
        mean, size = self.past_mean, self.context
        return self._square[:size, :size] / self.count - mean[:, None] * mean

    @property
    def past_future(self) -> Float[Tensor, "L H"]:
        """Covariance."""
        size = self.context
        return self._square[:size, size:] / self.count - self.past_mean[:, None] * self.future_mean

    def error(self, maps: Float[Tensor, "L H"], fitted: _Moments) -> float:
        """Mean squared error here of linear maps whose bias makes them right on average where they were fitted."""
        size = self.context
        full = torch.cat([-maps, torch.eye(maps.shape[1], dtype=maps.dtype)])  # future - maps past
        shift = fitted.future_mean - fitted.past_mean @ maps
        raw = (full * (self._square @ full)).sum() / self.count
        mean = self._sum @ full / self.count
        return float((raw - 2 * shift @ mean + shift @ shift) / (full.shape[0] - size))


def moving_average(x: Float[Tensor, "B L"], kernel: int) -> Float[Tensor, "B L"]:
    """Centred mean over `kernel` points (odd), the first and last point repeated beyond the edges."""
    side = (kernel - 1) // 2
    padded = F.pad(x[:, None], (side, side), mode="replicate")
    return F.avg_pool1d(padded, kernel, stride=1).squeeze(1)


def interpolated(x: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """Gaps filled linearly, ends repeated outwards; zero where there is no value at all."""
    seen = observed(x)
    if not torch.compiler.is_exporting() and bool(seen.all()):  # graphs cannot branch on values
        return x
    length = x.shape[1]
    place = torch.arange(length, device=x.device).expand_as(x)
    before = _running_max(torch.where(seen, place, -1))
    after = length - 1 - _running_max(torch.where(seen, length - 1 - place, -1).flip(1)).flip(1)
    left = torch.where(before < 0, after, before).clamp(max=length - 1)
    right = torch.where(after == length, before, after).clamp(min=0)
    values = filled(x)
    low, high = values.gather(1, left), values.gather(1, right)
    share = (place - left).to(x.dtype) / (right - left).clamp(min=1)
    return torch.lerp(low, high, share.clamp(0, 1))


def _running_max(x: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Of indices from -1 up; by pooling, since ONNX has no `cummax`."""
    padded = F.pad(x[:, None].float(), (x.shape[1] - 1, 0), value=-1)
    return F.max_pool1d(padded, x.shape[1], stride=1).squeeze(1).long()
