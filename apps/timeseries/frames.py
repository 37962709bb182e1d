"""Series from data frames and files, long or wide; what is missing stays missing.

Long tables have a row per series and time (unique_id, ds, y and covariates), wide ones a column per series after a
column of times, as the ETT files do. Rows may come in any order. Each series gets a regular grid: gaps are NaN, values
missing before its first one are cut off, those after its last one are kept, so that forecasts begin after its last row.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from apps.errors import UserError
from apps.timeseries.grid import FEWEST, Stamps, anchored, cells, infer_freq, odd_rows
from apps.timeseries.series import Series, parse_freq
from apps.timeseries.tables import Columns, Table, from_frame, is_table, numbers, read_table, stamps

Duplicates = Literal["raise", "mean", "last"]
TIME_NAMES = ("date", "ds", "time", "timestamp", "datetime", "unnamed: 0")
"""What the first column of a wide table may be called, besides the configured name; the last one is an index that
pandas wrote without a name."""
SPARSEST = 200
"""Grid points per row (and per 250 more) beyond which a time is taken for a mistake."""


@dataclass(frozen=True)
class Rows:
    """The rows of one series, sorted by time, no time twice."""

    id: str
    table: Table
    numbers: Int[np.ndarray, " n"]
    """Of the rows in the table."""
    stamps: Stamps
    y: Float[np.ndarray, " n"]
    covariates: Float[np.ndarray, "n C"]

    def error(self, row: int, problem: str) -> UserError:
        """What is wrong with a row."""
        return UserError(f"{self.table.name}: series {self.id!r}, {self.table.row(self.numbers[row])}: {problem}")


def read_series(
    source: str | Path | pd.DataFrame,
    columns: Columns = Columns(),  # noqa: B008 - frozen
    freq: str | int | None = None,
    on_duplicates: Duplicates = "raise",
) -> list[Series]:
    """All series of a frame, a CSV or Parquet file, or a folder of them; those without a single value are left out.

    Args:
        source: frame or path. In a folder, ids that occur in several files get the file's name in front.
        columns: names in long tables; in wide ones, covariates named here are those of every series.
        freq: of all series; by default found for each from its times.
        on_duplicates: several rows of one time are an error, are averaged, or the last one in the table counts.

    Raises:
        UserError: one line that names file, series, row and remedy.
    """
    tables = [from_frame(source, columns)] if isinstance(source, pd.DataFrame) else _tables(Path(source), columns)
    rows = _distinct([list(_rows(table, columns, on_duplicates)) for table in tables])
    rows = [one for one in rows if np.isfinite(one.y).any()]
    if not rows:
        raise UserError(f"{tables[0].name}: no series has a value; check the columns, or leave out empty files")
    counts = tuple(len(names) for names in (columns.futr, columns.hist, columns.stat))
    return [_series(one, grid, counts, columns) for one, grid in zip(rows, _frequencies(rows, freq), strict=True)]


def _tables(path: Path, columns: Columns) -> list[Table]:
    """The tables of a file or folder."""
    if not path.is_dir():
        return [read_table(path, columns)]
    files = sorted(file for file in path.rglob("*") if file.is_file() and is_table(file))
    if not files:
        raise UserError(f"{path}: no .csv or .parquet file in this folder")
    return [read_table(file, columns) for file in files]


def _distinct(tables: list[list[Rows]]) -> list[Rows]:
    """Rows of all tables; ids that several tables have get their table's name in front."""
    seen = Counter(one.id for table in tables for one in table)
    stems = Counter(table[0].table.stem for table in tables if table)
    named = []
    for one in (one for table in tables for one in table):
        prefix = one.table.stem if stems[one.table.stem] == 1 else one.table.name
        named.append(one if seen[one.id] == 1 else dataclasses.replace(one, id=f"{prefix}/{one.id}"))
    return named


def _rows(table: Table, columns: Columns, on_duplicates: Duplicates) -> Iterator[Rows]:
    """The series of one table, in the order in which they first appear."""
    if not len(table.frame):
        raise UserError(f"{table.name}: no rows")
    table.expect(columns.covariates, "a covariate of --data.futr_columns, hist_columns or stat_columns")
    time = _wide_time(table, columns)
    if time is None:
        table.expect([columns.time], "--data.time_column")
        table.expect([columns.target], "--data.target_column")
        codes, ids = _ids(table, columns)
        values = np.stack([numbers(table, name) for name in (columns.target, *columns.covariates)], 1)
        yield from _sorted(table, codes, ids, stamps(table, columns.time), values, 1, on_duplicates)
        return
    skipped = {time, *columns.covariates}
    names = [name for name in table.frame.columns if name not in skipped]
    if not names:
        raise UserError(f"{table.name}: nothing but times; expected a column per series, or {columns.target!r}")
    values = np.stack([numbers(table, name) for name in (*names, *columns.covariates)], 1)
    codes = np.zeros(len(values), np.int64)
    yield from _sorted(table, codes, list(map(str, names)), stamps(table, time), values, len(names), on_duplicates)


def _wide_time(table: Table, columns: Columns) -> object | None:
    """The column of times of a wide table; None for a long one."""
    if table.has(columns.id) or table.has(columns.time, columns.target):
        return None
    if table.has(columns.time):
        return columns.time
    first = table.frame.columns[0]
    return first if str(first).lower() in TIME_NAMES else None


def _ids(table: Table, columns: Columns) -> tuple[Int[np.ndarray, " n"], list[str]]:
    """Number of each row's series, and the ids by number; one series where there is no column of ids."""
    if not table.has(columns.id):
        return np.zeros(len(table.frame), np.int64), [table.stem]
    codes, ids = pd.factorize(table.frame[columns.id])
    if (codes < 0).any():
        row = table.row(int((codes < 0).argmax()))
        raise UserError(f"{table.name}: column {columns.id!r}, {row}: no id; fill it in or drop the row")
    return codes, [str(name) for name in ids]


def _sorted(
    table: Table,
    codes: Int[np.ndarray, " n"],
    ids: list[str],
    times: Stamps,
    values: Float[np.ndarray, "n C"],
    targets: int,
    on_duplicates: Duplicates,
) -> Iterator[Rows]:
    """Sort rows by series and time, settle duplicates, and cut the table into series.

    Args:
        table: where the rows are from.
        codes: series of each row. All zero if there are several targets.
        ids: of the series, or of the targets if there are several.
        times: of the rows.
        values: targets and then covariates.
        targets: how many of the columns are targets.
        on_duplicates: see `read_series`.
    """
    infinite = np.isinf(values)
    if infinite.any():
        row, column = np.argwhere(infinite)[0]
        name = ids[codes[row]] if targets == 1 else ids[min(column, targets - 1)]
        raise UserError(
            f"{table.name}: series {name!r}, {table.row(row)}: infinite value; leave it empty if it is missing"
        )
    order = np.arange(len(codes))
    step = np.diff(codes)
    if ((step < 0) | ((step == 0) & (np.diff(times.utc) <= 0))).any():
        order = np.lexsort((times.utc, codes))
        codes, times, values = codes[order], times[order], values[order]
    same = (np.diff(codes) == 0) & (np.diff(times.utc) == 0)
    if same.any():
        row = int(same.argmax()) + 1
        if on_duplicates == "raise":
            raise UserError(
                f"{table.name}: series {ids[codes[row]]!r}, {table.row(order[row])}: {times.at(row)} is there twice; "
                "remove a row, or use --data.on_duplicates mean"
            )
        kept, values = _settle(np.r_[True, ~same], values, on_duplicates)
        codes, times, order = codes[kept], times[kept], order[kept]
    borders = np.flatnonzero(np.r_[True, np.diff(codes) != 0, True])
    for start, stop in itertools.pairwise(borders):
        part = slice(start, stop)
        for column in range(targets):
            name = ids[codes[start]] if targets == 1 else ids[column]
            yield Rows(name, table, order[part], times[part], values[part, column], values[part, targets:])


def _settle(
    first: np.ndarray, values: Float[np.ndarray, "n C"], how: Duplicates
) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, "k C"]]:
    """One row for each run of duplicates that begins where `first` is true: its number and its values."""
    starts = np.flatnonzero(first)
    last = np.r_[starts[1:], len(first)] - 1
    if how == "last":
        return last, values[last]
    count = np.add.reduceat(np.isfinite(values), starts, 0, dtype=np.int64)
    total = np.add.reduceat(np.nan_to_num(values), starts, 0)
    return last, np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _frequencies(rows: Sequence[Rows], given: str | int | None) -> Iterator[str | int]:
    """The frequency of each series: given, or inferred, or for the shortest ones that of most others."""
    if given is not None:
        bare = "-" not in str(given)
        for one in rows:
            yield anchored(given, one.stamps) if bare else given
        return
    found: list[str | int | None] = []
    for i, one in enumerate(rows):
        same = i > 0 and np.array_equal(one.stamps.utc, rows[i - 1].stamps.utc)
        found.append(found[-1] if same else infer_freq(one.stamps))
    votes = Counter(freq for freq in found if freq is not None)
    for one, freq in zip(rows, found, strict=True):
        if freq is None and not votes:
            raise UserError(
                f"{one.table.name}: series {one.id!r} has fewer than {FEWEST} rows, too few to tell its frequency; "
                "give --data.freq"
            )
        yield anchored(votes.most_common(1)[0][0], one.stamps) if freq is None else freq


def _series(rows: Rows, freq: str | int, counts: tuple[int, int, int], columns: Columns) -> Series:
    """Lay rows out on their grid."""
    cell, rest = cells(rows.stamps, freq)
    odd = odd_rows(rest)
    if odd.any():
        row = int(odd.argmax())
        raise rows.error(
            row,
            f"{rows.stamps.at(row)} does not lie on the grid of freq={freq}; drop the row, resample the series, or "
            "give --data.freq",
        )
    first = int(np.isfinite(rows.y).argmax())
    points = cell[first:] - cell[first]
    length = int(points[-1]) + 1
    if length > SPARSEST * (len(points) + 250):
        row = first + 1 + int(np.diff(points).argmax())
        raise rows.error(
            row,
            f"{rows.stamps.at(row)} leaves a gap of almost all points; correct the time, or give a coarser --data.freq",
        )
    y, covariates = rows.y[first:], rows.covariates[first:]
    steps = np.diff(points)
    if (steps < 1).any():  # a day in which clocks went back
        raise rows.error(first + 1 + int((steps < 1).argmax()), "twice in one step of the grid")
    if length > len(points):
        y, covariates = _spread(y, points, length), _spread(covariates, points, length)
    futr, hist, _ = np.split(covariates, np.cumsum(counts[:2]), 1)
    stat = _constants(rows, rows.covariates[:, sum(counts[:2]) :], columns)
    start = rows.stamps.at(first)
    step = int(freq) if rows.stamps.integer else parse_freq(str(freq)).freqstr
    return Series(rows.id, y.copy(), start, step, futr.copy(), hist.copy(), stat)  # copies let go of the table


def attach_future(
    series: Sequence[Series],
    source: str | Path | pd.DataFrame,
    columns: Columns = Columns(),  # noqa: B008 - frozen
) -> list[Series]:
    """Series with the covariates that are known beyond their last point.

    Args:
        series: as read with the same columns.
        source: frame or file with times and `columns.futr`; with ids if the covariates differ among series. Rows of
            times that the series have already are passed over. The first of the others continues the series, and no
            time is left out.
        columns: names.

    Raises:
        UserError: columns, series or times that are missing or do not continue the series.
    """
    table = from_frame(source, columns) if isinstance(source, pd.DataFrame) else read_table(Path(source), columns)
    table.expect([columns.time], "--data.time_column")
    table.expect(columns.futr, "a covariate of --data.futr_columns")
    times = stamps(table, columns.time)
    values = np.stack([numbers(table, name) for name in columns.futr], 1) if columns.futr else np.empty((len(times), 0))
    if np.isinf(values).any():
        raise UserError(f"{table.name}: {table.row(int(np.argwhere(np.isinf(values))[0, 0]))}: infinite value")
    order, of = np.argsort(times.utc, kind="stable"), {}
    if table.has(columns.id):
        codes, ids = _ids(table, columns)
        order = order[np.argsort(codes[order], kind="stable")]
        of = dict(zip(ids, np.split(order, np.cumsum(np.bincount(codes))[:-1]), strict=True))
    extended = []
    for one in series:
        rows = of.get(one.id, order[:0]) if table.has(columns.id) else order
        extended.append(_extended(one, Rows(one.id, table, rows, times[rows], values[rows, :0], values[rows])))
    return extended


def _extended(one: Series, rows: Rows) -> Series:
    """The series with covariates of the rows after its end."""
    where = f"{rows.table.name}: series {one.id!r}"
    if rows.covariates.shape[1] != one.futr.shape[1]:
        raise UserError(f"{where} has {one.futr.shape[1]} future covariates, not {rows.covariates.shape[1]}")
    start = Stamps.of(one.start)
    if (start.integer, start.tz is None) != (rows.stamps.integer, rows.stamps.tz is None):
        raise UserError(f"{where} has times such as {one.start}; write those of the future in the same way")
    joined = Stamps(
        np.r_[start.utc, rows.stamps.utc], np.r_[start.wall, _wall(rows.stamps, start)], start.tz, start.integer
    )
    cell, rest = cells(joined, one.freq)
    points, odd = (cell - cell[0])[1:], (rest != rest[0])[1:]
    if odd.any():
        row = int(odd.argmax())
        raise rows.error(row, f"{rows.stamps.at(row)} does not continue the grid of freq={one.freq}")
    new = points >= len(one)
    wanted = len(one) + np.arange(new.sum())
    if not new.any() or (points[new] != wanted).any():
        gap = len(one) + int((points[new] != wanted).argmax()) if new.any() else len(one)
        raise UserError(f"{where}: covariates of {one.times(gap, gap + 1)[0]} must be there, once")
    return dataclasses.replace(one, futr=np.concatenate([one.futr[: len(one)], rows.covariates[new]]))


def _wall(times: Stamps, like: Stamps) -> Int[np.ndarray, " n"]:
    """What the clock of `like` shows at these times."""
    if times.tz is None or str(times.tz) == str(like.tz):
        return times.wall
    index = pd.DatetimeIndex(times.utc.astype("datetime64[us]"), tz="UTC")
    return Stamps.of(index.tz_convert(like.tz)).wall


def _spread(values: np.ndarray, points: Int[np.ndarray, " n"], length: int) -> np.ndarray:
    spread = np.full((length, *values.shape[1:]), np.nan)
    spread[points] = values
    return spread


def _constants(rows: Rows, values: Float[np.ndarray, "n Cs"], columns: Columns) -> Float[np.ndarray, " Cs"]:
    """The one value that each column has over all rows."""
    constants = np.full(values.shape[1], np.nan)
    for column, name in enumerate(columns.stat):
        known = np.isfinite(values[:, column])
        if known.any():
            constants[column] = values[known, column][0]
            varies = known & (values[:, column] != constants[column])
            if varies.any():
                raise rows.error(int(varies.argmax()), f"{name!r} is not constant; use it as a hist or futr covariate")
    return constants
