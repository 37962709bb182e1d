"""Series at hand without a download: the real ones that come with statsmodels, and synthetic ones to pretrain on."""

from __future__ import annotations

import importlib

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from apps.errors import UserError
from apps.timeseries.series import Series

YEARLY = {"sunspots": ("SUNACTIVITY", "1700"), "nile": ("volume", "1871")}
"""Column and first year."""
QUARTERLY = {"macrodata": "1959-01", "danish_data": "1974-01", "interest_inflation": "1972-04"}
"""First quarter; every column but those of dates is a series."""
NAMES = ("co2", "elnino", "elec_equip", *YEARLY, *QUARTERLY)
CHUNK = 256
"""Synthetic series drawn together."""
CALENDARS = {
    "hour": (0.60, (24, 168, 8766)),
    "30min": (0.03, (48, 336, 17532)),
    "15min": (0.06, (96, 672, 35064)),
    "5min": (0.03, (288, 2016, 105192)),
    "minute": (0.02, (60, 1440, 10080)),
    "day": (0.10, (7, 365, 91)),
    "week": (0.04, (52, 13, 4)),
    "month": (0.06, (12, 3, 6)),
    "quarter": (0.02, (4, 2, 8)),
    "business day": (0.02, (5, 21, 261)),
    "day of the month": (0.02, (30, 7, 365)),
}
"""Step of a synthetic series: share among them, and its seasons in points, the strongest first. Hours lead: small
models learn few periods well, and most series with strong seasons are hourly."""


def embedded_series(name: str = "statsmodels") -> list[Series]:
    """Real series out of the statsmodels package: 24 yearly, quarterly, monthly and weekly ones.

    CO2 at Mauna Loa (weekly, with true gaps), sea surface temperatures of El Niño and turnover of electrical equipment
    (monthly), sunspots and the Nile (yearly), macroeconomic series of the USA, Denmark and Germany (quarterly).

    Args:
        name: "statsmodels" for all, or one data set of it, such as "co2".

    Raises:
        UserError: no such data set, or statsmodels is missing.
    """
    if name not in ("statsmodels", *NAMES):
        raise UserError(f"data.source={name}: no embedded series; choose statsmodels, {', '.join(NAMES)}")
    return [series for one in (NAMES if name == "statsmodels" else (name,)) for series in _embedded(one)]


def _embedded(name: str) -> list[Series]:
    try:
        data = importlib.import_module(f"statsmodels.datasets.{name}").load_pandas().data
    except ImportError as error:
        raise UserError(f"data.source={name}: statsmodels is missing; pip install statsmodels") from error
    if name == "co2":
        return [_one(name, data["co2"], str(data.index[0]), "W-SAT")]
    if name == "elnino":
        return [_one(name, data.drop(columns="YEAR").stack(), "1950-01", "MS")]
    if name == "elec_equip":
        return [_one(name, data.iloc[:, 0], str(data.index[0]), "MS")]
    if name in YEARLY:
        column, first = YEARLY[name]
        return [_one(name, data[column], first, "YS-JAN")]
    values = data.drop(columns=["year", "quarter"], errors="ignore")
    return [_one(f"{name}/{column}", values[column], QUARTERLY[name], "QS-JAN") for column in values]


def _one(id: str, values: pd.Series, start: str, freq: str) -> Series:
    first = pd.Timestamp(start).as_unit("us")
    return Series.plain(id, values.to_numpy(np.float64), first, freq)


def synthetic_series(count: int, length: int, seed: int = 0) -> list[Series]:
    """Draw synthetic series to pretrain on, with integer times; series i is the same whatever `count` is.

    Sums and products of random parts, after KernelSynth (Ansari et al. 2024, arXiv 2403.07815, section 4.2), whose
    kernels are drawn from directly here: trends (linear kernel; also bent and exponential), up to three seasons of a
    calendar (periodic kernels; smooth ones and sharp peaks), smooth wandering (RBF kernel, by random Fourier
    features), random walks and autoregressive noise, in part with heavy tails or growing with the level; on some of
    them level shifts, outliers, or counts with many zeros. Levels and scales differ by orders of magnitude.

    Args:
        count: number of series.
        length: points of each.
        seed: of the draw.
    """
    parts = [
        _synthetic(np.random.default_rng([seed, chunk]), length)[: count - chunk] for chunk in range(0, count, CHUNK)
    ]
    return [Series.plain(f"synthetic/{i}", y) for i, y in enumerate(y for part in parts for y in part)]


def _synthetic(rng: np.random.Generator, length: int) -> Float[np.ndarray, "S T"]:
    """A chunk of series, each with parts of its own."""
    time = np.linspace(0, 1, length)
    shares, periods = zip(*CALENDARS.values(), strict=True)
    calendar = rng.choice(periods, CHUNK, p=shares)[:, :, None]  # [S, 3, 1]
    parts = ((1.5, 0.9), (1.0, 0.4), (1.0, 0.15))  # size and share of the seasons
    season = sum(
        size * _weight(rng, share) * _season(rng, length, calendar[:, i]) for i, (size, share) in enumerate(parts)
    )
    trend = _weight(rng, 0.6) * _trend(rng, time)
    drift = _weight(rng, 0.5) * _smooth(rng, time) + _weight(rng, 0.25) * _walk(rng, length)
    shifts = _weight(rng, 0.2) * _shifts(rng, length)
    noise = rng.uniform(0.02, 0.6, (CHUNK, 1)) * _noise(rng, length)
    base = trend + drift + shifts
    multiplied = np.exp(0.5 * base) * (1 + 0.3 * season) * np.exp(0.3 * noise)
    y = np.where(_some(rng, 0.3), multiplied, base + season + noise)
    outliers = (rng.random((CHUNK, length)) < 0.005) * rng.standard_t(2, (CHUNK, length)) * 3
    y = y + _some(rng, 0.1) * outliers
    y = np.where(_some(rng, 0.08), _counts(rng, y), y)
    scale = np.exp(rng.normal(0, 2, (CHUNK, 1)))
    level = rng.normal(0, 3, (CHUNK, 1)) * _some(rng, 0.7)
    return (y + level) * scale


def _some(rng: np.random.Generator, share: float) -> np.ndarray:
    """[S, 1]: which series have a part."""
    return rng.random((CHUNK, 1)) < share


def _weight(rng: np.random.Generator, share: float) -> np.ndarray:
    """[S, 1]: size of a part, zero in the series without it."""
    return _some(rng, share) * rng.lognormal(0, 0.5, (CHUNK, 1))


def _season(rng: np.random.Generator, length: int, calendar: Int[np.ndarray, "S 1"]) -> Float[np.ndarray, "S T"]:
    """A period of the calendar or any other, as decaying harmonics or as one peak a period."""
    any_period = np.exp(rng.uniform(np.log(3), np.log(max(length / 2, 4)), (CHUNK, 1)))
    period = np.where(_some(rng, 0.8), calendar, any_period)
    angle = 2 * np.pi * (np.arange(length) / period + rng.random((CHUNK, 1)))
    decay = rng.uniform(0.5, 2.5, (CHUNK, 1))
    waves = sum(
        rng.normal(0, 1, (CHUNK, 1)) * k**-decay * np.sin(k * angle + 2 * np.pi * rng.random((CHUNK, 1)))
        for k in (1, 2, 3, 4)
    )
    sharpness = rng.uniform(1, 12, (CHUNK, 1))
    peaks = 2 * np.exp(sharpness * (np.cos(angle) - 1)) - 0.5
    return np.where(_some(rng, 0.25), peaks, waves)


def _trend(rng: np.random.Generator, time: Float[np.ndarray, " T"]) -> Float[np.ndarray, "S T"]:
    """A straight line, one with a bend, or exponential growth."""
    slope, bend, rate = rng.normal(0, 2, (3, CHUNK, 1))
    straight = slope * time + _some(rng, 0.4) * bend * np.maximum(time - rng.random((CHUNK, 1)), 0)
    return np.where(_some(rng, 0.2), np.expm1(np.clip(rate, -2, 2) * time), straight)


def _smooth(rng: np.random.Generator, time: Float[np.ndarray, " T"]) -> Float[np.ndarray, "S T"]:
    """Draws of a Gaussian process with RBF kernel, by random Fourier features (Rahimi and Recht 2007)."""
    waves = 16
    frequency = rng.normal(0, 1, (CHUNK, waves)) / np.exp(rng.uniform(np.log(0.02), np.log(0.5), (CHUNK, 1)))
    phase = 2 * np.pi * rng.random((CHUNK, waves))
    drawn = np.zeros((CHUNK, len(time)))
    for wave in range(waves):
        drawn += np.cos(frequency[:, wave, None] * time + phase[:, wave, None])
    return drawn * np.sqrt(2 / waves)


def _walk(rng: np.random.Generator, length: int) -> Float[np.ndarray, "S T"]:
    return np.cumsum(rng.normal(0, 1, (CHUNK, length)), 1) / np.sqrt(length)


def _shifts(rng: np.random.Generator, length: int) -> Float[np.ndarray, "S T"]:
    """One to three jumps of the level."""
    where = rng.integers(1, max(length, 2), (CHUNK, 3, 1))
    size = rng.normal(0, 1.5, (CHUNK, 3, 1)) * (np.arange(3)[:, None] < rng.integers(1, 4, (CHUNK, 1, 1)))
    return sum(size[:, i] * (np.arange(length) >= where[:, i]) for i in range(3))


def _noise(rng: np.random.Generator, length: int) -> Float[np.ndarray, "S T"]:
    """AR(1) noise of variance 1, normal or Student's t with 3 degrees of freedom."""
    shock = np.where(_some(rng, 0.3), rng.standard_t(3, (CHUNK, length)) / np.sqrt(3), rng.normal(size=(CHUNK, length)))
    memory = (rng.uniform(0, 0.95, (CHUNK, 1)) * _some(rng, 0.6))[:, 0]
    noise, innovation = np.empty_like(shock), np.sqrt(1 - memory**2)
    state = shock[:, 0]
    for t in range(length):
        state = shock[:, 0] if t == 0 else memory * state + innovation * shock[:, t]
        noise[:, t] = state
    return noise


def _counts(rng: np.random.Generator, y: Float[np.ndarray, "S T"]) -> Float[np.ndarray, "S T"]:
    """Demand of spare parts: counts whose rate follows the series, many of them zero."""
    centred = (y - y.mean(1, keepdims=True)) / (y.std(1, keepdims=True) + 1e-9)
    return rng.poisson(np.exp(np.clip(centred, -4, 4) + rng.uniform(-2, 1, (CHUNK, 1)))).astype(np.float64)
