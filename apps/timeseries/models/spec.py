"""What a forecaster must know of the series it is made for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SeriesSpec:
    """What a forecaster must know of its series; kept with its weights."""

    context: int
    """Points it sees."""
    horizon: int
    """Points it was trained to forecast."""
    season: int
    """Season length of most series."""
    futr: tuple[str, ...] = ()
    """Covariates known in the future."""
    hist: tuple[str, ...] = ()
    """Covariates known in the past."""
    stat: tuple[str, ...] = ()
    """Constants."""

    def plain(self) -> dict[str, Any]:
        """As plain data, for a checkpoint."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> SeriesSpec:
        """From plain data."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
