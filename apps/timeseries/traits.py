"""What the parts of contexts look like that an expert works on: their level, rise and roughness.

B windows, L context points, U units of a layer, E experts.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int


class Traits:
    """What the units of each expert look like, in deviations of all units.

    Of normalised contexts. level: the unit's mean. rise: mean of its second half less that of its first; of a single
    point, the step from the point before. roughness: mean absolute step between its points, the step into it included.
    """

    NAMES = ("level", "rise", "roughness")

    def __init__(self, experts: int) -> None:
        self._own = np.zeros((2, len(self.NAMES), experts))  # sums and counts
        self._all = np.zeros((3, len(self.NAMES)))  # sums, squares and counts

    def add(self, past: Float[np.ndarray, "B L"], chosen: Bool[np.ndarray, "B U E"], starts, ends) -> None:
        """Add the units of a batch; padding is not chosen by anyone."""
        units = np.stack(self._of(past, starts, ends))  # [3, B, U], NaN where a unit has too few points
        known = np.isfinite(units) & chosen.any(2)
        units = np.where(known, units, 0.0)
        self._own += [np.einsum("tbu,bue->te", part, chosen) for part in (units, known.astype(float))]
        self._all += [units.sum((1, 2)), (units**2).sum((1, 2)), known.sum((1, 2))]

    @staticmethod
    def _of(past: Float[np.ndarray, "B L"], starts: Int[np.ndarray, " U"], ends: Int[np.ndarray, " U"]) -> list:
        step = np.diff(past, axis=1, prepend=np.nan)
        middle = np.where(ends - starts > 1, (starts + ends) // 2, starts)
        first, second = _means(past, starts, middle), _means(past, middle, ends)
        rise = np.where(ends - starts > 1, second - first, _means(step, starts, ends))
        return [_means(past, starts, ends), rise, _means(np.abs(step), starts, ends)]

    def table(self) -> Float[np.ndarray, "3 E"]:
        """Mean of each trait per expert, less that of all units, over its deviation; 0 where there is nothing."""
        count = np.maximum(self._all[2], 1)
        mean = self._all[0] / count
        std = np.sqrt(np.maximum(self._all[1] / count - mean**2, 0))
        own = self._own[0] / np.maximum(self._own[1], 1)
        scaled = (own - mean[:, None]) / np.where(std > 1e-6, std, np.inf)[:, None]
        return np.where(self._own[1] > 0, scaled, 0.0)


def _means(values: Float[np.ndarray, "B L"], starts, ends) -> Float[np.ndarray, "B U"]:
    """Means of what is observed between starts and ends; NaN where that is nothing."""
    seen = np.isfinite(values)
    count = between(seen.astype(int), starts, ends)
    return np.where(count > 0, between(np.where(seen, values, 0.0), starts, ends) / np.maximum(count, 1), np.nan)


def between(values: Float[np.ndarray, "B L"], starts: Int[np.ndarray, " U"], ends: Int[np.ndarray, " U"]) -> np.ndarray:
    """Sums of values from each start up to each end, [B, U]; positions outside are cut off."""
    sums = np.concatenate([np.zeros((len(values), 1), values.dtype), values.cumsum(1)], 1)
    length = values.shape[1]
    return sums[:, ends.clip(0, length)] - sums[:, starts.clip(0, length)]
