"""Which rows are for training, validation and testing: decided row by row, so that streams are split as frames are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Int

from apps.errors import UserError
from apps.loading import derive_seed
from apps.recsys.tables import CHUNK, WHOLE, Table
from apps.recsys.vocabulary import read_ids

PARTS = ("train", "val", "test")
SAMPLE = 1_000_000
"""Times that are looked at to find borders; with more rows, evenly spaced ones."""
EXACT = 2.0**-53


@dataclass(frozen=True)
class Rule:
    """Says which part (by number) each row of a frame is in."""

    columns: tuple[str, ...]
    """That it needs."""
    part: Callable[[pd.DataFrame, int], Int[np.ndarray, " n"]]
    """Of a frame and the number of its file."""


class Rows:
    """The rows of a table that are in one part.

    Args:
        table: all rows.
        rule: says which part a row is in; None: all are in this one.
        number: of the part.
    """

    def __init__(self, table: Table, rule: Rule | None = None, number: int = 0) -> None:
        self.table, self.rule, self.number = table, rule, number

    def chunks(self, unit: int, columns: Sequence[str] | None = None, rows: int = CHUNK) -> Iterator[pd.DataFrame]:
        """The rows of a unit of the table, in pieces read so many at a time."""
        extra = [] if self.rule is None or columns is None else [c for c in self.rule.columns if c not in columns]
        wanted = None if columns is None else [*columns, *extra]
        for frame in self.table.chunks(unit, wanted, rows):
            if self.rule is not None:
                frame = frame[self.rule.part(frame, self.table.units[unit].file) == self.number]
            yield frame.drop(columns=extra) if extra else frame

    def frames(self, columns: Sequence[str] | None = None, rows: int = CHUNK) -> Iterator[pd.DataFrame]:
        """All rows, in order."""
        for unit in range(len(self.table.units)):
            yield from self.chunks(unit, columns, rows)

    def frame(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """All rows at once."""
        return pd.concat(list(self.frames(columns, rows=WHOLE)), ignore_index=True)

    @cached_property
    def counts(self) -> Int[np.ndarray, " units"]:
        """Rows of the part in each unit; reads only what it must."""
        units = self.table.units
        if self.rule is None and all(unit.rows is not None for unit in units):
            return np.array([unit.rows for unit in units])
        columns = self.rule.columns if self.rule is not None and self.rule.columns else self.table.columns[:1]
        return np.array([sum(map(len, self.chunks(unit, columns, 1 << 20))) for unit in range(len(units))])

    def __len__(self) -> int:
        return int(self.counts.sum())


def split(
    table: Table,
    how: str,
    shares: Sequence[float],
    seed: int,
    time: str | None = None,
    user: str | None = None,
    names: Sequence[str] = PARTS,
) -> dict[str, Rows]:
    """Cut a table into parts.

    Args:
        table: all rows.
        how: time, user or random.
        shares: of the parts.
        seed: of the split by user or at random.
        time: column to split by.
        user: column to split by.
        names: of the parts.

    Raises:
        UserError: a part is empty, or the column is not there.
    """
    if how == "random":
        rule = Rule((), lambda frame, file: _by_chance(_mixed(frame.index.to_numpy(), derive_seed(seed, file)), shares))
    elif how == "user":
        table.expect([_needed(user, "user", how)])
        rule = Rule((user,), lambda frame, file: _by_chance(_mixed(user_numbers(frame[user]), seed), shares))
    else:
        table.expect([_needed(time, "time", how)])
        borders = _borders(table, time, shares)
        if len(set(borders)) < len(borders):
            raise UserError(f"data.split=time: too many rows have one time in column {time!r}; split at random")
        rule = by_borders(time, borders)
    return check({name: Rows(table, rule, i) for i, name in enumerate(names)}, how)


def by_borders(column: str, borders: Sequence[float | str]) -> Rule:
    """A rule by time: before the first border is for training, from the second on for testing."""

    def part(frame: pd.DataFrame, file: int) -> Int[np.ndarray, " n"]:
        return np.searchsorted(np.asarray(borders, np.float64), times(frame[column]), side="right")

    return Rule((column,), part)


def by_rows(parts: Int[np.ndarray, " N"]) -> Rule:
    """A rule that lists the part of each row of a table of one frame."""
    return Rule((), lambda frame, file: parts[frame.index.to_numpy()])


def check(parts: dict[str, Rows], how: str) -> dict[str, Rows]:
    """The parts, once it is clear that none is empty."""
    for name, rows in parts.items():
        if not len(rows):
            raise UserError(f"data.split={how}: no row is left for {name}; change data.shares, or give more rows")
    return parts


def times(column: pd.Series) -> np.ndarray:
    """Times as numbers that rise with them.

    Raises:
        UserError: it holds what is no time, or gaps.
    """
    given = column
    if not pd.api.types.is_numeric_dtype(column):
        column = pd.to_datetime(column, errors="coerce", format="ISO8601", utc=True).astype("datetime64[us, UTC]")
        column = column.astype(np.int64).where(column.notna())
    values = column.to_numpy(np.float64, na_value=np.nan)
    if np.isnan(values).any():
        place = int(np.isnan(values).argmax())
        value = given.iloc[place]
        is_gap = pd.isna(value) or value == ""
        ask = "is empty; fill it in" if is_gap else f"{value!r} is no time; write 2024-05-31 18:30:00, or a number"
        raise UserError(f"column {column.name!r}, row {column.index[place]}: {ask}; or split otherwise (data.split)")
    return values


def user_numbers(column: pd.Series) -> Int[np.ndarray, " n"]:
    """A number per user, the same in every process; -1 for a missing one."""
    ids = read_ids(column)
    if ids.integers is not None:
        return np.where(ids.missing, -1, ids.integers)
    encoded = ids.text.dictionary_encode()
    names = encoded.dictionary.to_numpy(zero_copy_only=False)
    if not len(names):
        return np.full(len(ids), -1)
    hashed = (pd.util.hash_array(names, categorize=False) >> np.uint64(1)).astype(np.int64)
    return np.where(ids.missing, -1, hashed[encoded.indices.fill_null(0).to_numpy(zero_copy_only=False)])


def _needed(column: str | None, name: str, how: str) -> str:
    if column is None:
        raise UserError(f"data.split={how}: the schema says no {name} column; give it as `{name}:` there")
    return column


def _borders(table: Table, time: str, shares: Sequence[float]) -> list[float]:
    kept, stride = [], 1
    for unit in range(len(table.units)):
        for frame in table.chunks(unit, [time], 1 << 20):
            kept.append(times(frame[time])[::stride])
            if sum(map(len, kept)) > SAMPLE:
                kept, stride = [np.concatenate(kept)[::2]], stride * 2
    ordered = np.sort(np.concatenate(kept))
    at = (np.cumsum(shares)[:-1] * len(ordered)).astype(int)
    return ordered[np.minimum(at, len(ordered) - 1)].tolist()


def _mixed(values: Int[np.ndarray, " n"], seed: int) -> np.ndarray:
    """Numbers in [0, 1) that look random (splitmix64)."""
    with np.errstate(over="ignore"):
        state = values.astype(np.int64).view(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(derive_seed(seed))
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((state ^ (state >> np.uint64(31))) >> np.uint64(11)) * EXACT


def _by_chance(chance: np.ndarray, shares: Sequence[float]) -> Int[np.ndarray, " n"]:
    return np.searchsorted(np.cumsum(shares)[:-1], chance, side="right")
