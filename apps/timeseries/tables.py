"""Tables of series as users have them: files read, and their columns turned into numbers and times, or one clear error.

Rows are named as users find them: by line in text files (the header is line 1), by index from 0 elsewhere.
"""

from __future__ import annotations

import lzma
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from apps.errors import UserError
from apps.timeseries.grid import Stamps

TEXT = (".csv", ".tsv", ".txt")
PARQUET = (".parquet", ".pq")
PACKED = (".gz", ".bz2", ".xz", ".zip")
MISSING = ("", "NA", "N/A", "n/a", "NaN", "nan", "NAN", "-nan", "<NA>", "#N/A", "null", "NULL", "None", "NaT")
"""What counts as missing in text files, save in the column of ids (NA is Namibia)."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a table mean what."""

    id: str = "unique_id"
    """Names the series; a long table without it is one series."""
    time: str = "ds"
    """Timestamps, or integers."""
    target: str = "y"
    """Values."""
    futr: tuple[str, ...] = ()
    """Covariates known in the future too."""
    hist: tuple[str, ...] = ()
    """Covariates known only in the past."""
    stat: tuple[str, ...] = ()
    """Constants of a series."""

    @property
    def covariates(self) -> tuple[str, ...]:
        """All covariates, in the order futr, hist, stat."""
        return (*self.futr, *self.hist, *self.stat)


@dataclass(frozen=True)
class Table:
    """A table and how to speak of it."""

    frame: pd.DataFrame
    name: str
    """For messages."""
    stem: str = "y"
    """Name of the series in a table without ids."""
    text: bool = False
    """From a text file, whose lines are counted."""

    def row(self, index: int) -> str:
        """How a user finds a row."""
        return f"line {index + 2}" if self.text else f"row {index}"

    def has(self, *names: str) -> bool:
        """Whether it has all these columns."""
        return all(name in self.frame.columns for name in names)

    def expect(self, names: Sequence[str], field: str) -> None:
        """Raise `UserError`, which names the columns there are, unless it has all of `names`."""
        lacking = [name for name in names if name not in self.frame.columns]
        if lacking:
            known = ", ".join(map(str, self.frame.columns[:20])) or "none"
            raise UserError(f"{self.name}: no column {lacking[0]!r} ({field}); it has {known}")


def is_table(path: Path) -> bool:
    """Whether the name is that of a table."""
    return _suffix(path) in TEXT + PARQUET and not path.name.startswith(".")


def read_table(path: Path, columns: Columns) -> Table:
    """Read a text file (comma, semicolon or tab; plain or compressed) or Parquet.

    Raises:
        UserError: a file that is not there, empty, or cannot be read.
    """
    stem = path.name[: len(path.name) - len(path.suffix)]
    stem = Path(stem).stem if path.suffix in PACKED else stem
    try:
        if _suffix(path) in PARQUET:
            return Table(pd.read_parquet(path), str(path), stem)
        return Table(_read_text(path, columns), str(path), stem, text=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; save it as CSV in UTF-8") from error
    except pd.errors.EmptyDataError as error:
        raise UserError(f"{path}: the file is empty") from error
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow; pip install pyarrow") from error
    except pd.errors.ParserWarning as error:
        raise UserError(f"{path}: rows have more fields than the header; quote or rename what splits them") from error
    except (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from error


def _suffix(path: Path) -> str:
    return (Path(path.stem) if path.suffix in PACKED else path).suffix.lower()


def _read_text(path: Path, columns: Columns) -> pd.DataFrame:
    head = pd.read_csv(path, nrows=2, header=None, sep="\x1f", dtype=str, encoding="utf-8-sig", quoting=3)
    lines = [str(line) for line in head[0]]
    sep = max(",;\t", key=lines[0].count)
    decimal = "," if sep == ";" and "." not in lines[-1] else "."
    read = {"sep": sep, "decimal": decimal, "encoding": "utf-8-sig", "skipinitialspace": True}
    names = pd.read_csv(path, nrows=0, **read).columns
    with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):  # fields that would be cut off
        frame = pd.read_csv(
            path,
            dtype={columns.id: str},
            keep_default_na=False,
            na_values={name: list(MISSING) if name != columns.id else [""] for name in names},
            low_memory=False,  # one type per column, whatever its length
            index_col=False,
            **read,
        )
    spare = [name for name in frame if name.startswith("Unnamed:") and frame[name].isna().all()]
    return frame.drop(columns=spare)  # trailing commas


def numbers(table: Table, name: str) -> Float[np.ndarray, " n"]:
    """A column as float64, missing values as NaN; integers of any size too.

    Raises:
        UserError: text, named with column, row and value.
    """
    column = table.frame[name]
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_complex_dtype(column):
        return column.to_numpy(np.float64, na_value=np.nan)
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object)
    values = pd.to_numeric(column if _textual(column) else column.astype(str), errors="coerce")
    bad = values.isna().to_numpy() & ~_blank(column)
    if bad.any():
        row = int(bad.argmax())
        raise UserError(
            f"{table.name}: column {name!r}, {table.row(row)}: {_short(column.iloc[row])} is not a number; encode "
            "text as numbers, and leave missing values empty"
        )
    return values.to_numpy(np.float64, na_value=np.nan)


def _textual(column: pd.Series) -> bool:
    return pd.api.types.is_object_dtype(column) or pd.api.types.is_string_dtype(column)


def _blank(column: pd.Series) -> Bool[np.ndarray, " n"]:
    blank = column.isna().to_numpy()
    if _textual(column):
        blank = blank | column.map(lambda v: isinstance(v, str) and v.strip() in MISSING, na_action="ignore").eq(True)
    return np.asarray(blank, bool)


def _short(value: object) -> str:
    text = str(value)
    return repr(text if len(text) <= 40 else text[:37] + "...")


def stamps(table: Table, name: str) -> Stamps:
    """A column of times, in their time zone (UTC where rows differ in it), or of integers.

    Eight-digit integers that are dates (20240131) are taken as such. Days come before months where only that reads all
    rows (31/01/2024).

    Raises:
        UserError: a row without a time, or with something else.
    """
    column = table.frame[name]
    if isinstance(column.dtype, pd.PeriodDtype):
        column = column.dt.to_timestamp()
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object)
    missing = _blank(column)
    if missing.any():
        raise UserError(f"{table.name}: column {name!r}, {table.row(int(missing.argmax()))}: no time; drop the row")
    if pd.api.types.is_numeric_dtype(column):
        return _integer_stamps(table, name)
    times = pd.DatetimeIndex(column) if pd.api.types.is_datetime64_any_dtype(column) else _parse(column)
    if times is None or times.hasnans:
        row = _first_bad(column)
        raise UserError(f"{table.name}: column {name!r}, {table.row(row)}: {_short(column.iloc[row])} is not a time")
    try:
        return Stamps.of(times)
    except ValueError as error:
        raise UserError(f"{table.name}: column {name!r}: {error}; number the rows with integers instead") from error


def _integer_stamps(table: Table, name: str) -> Stamps:
    values = table.frame[name].to_numpy(np.float64, na_value=np.nan)
    odd = values != np.round(values)
    if odd.any():
        row = int(odd.argmax())
        raise UserError(
            f"{table.name}: column {name!r}, {table.row(row)}: {values[row]} is neither a time nor an integer"
        )
    integers = table.frame[name].to_numpy(np.int64)
    if len(integers) and (integers > 19_000_101).all() and (integers < 21_000_101).all():
        dates = pd.to_datetime(pd.Series(integers).astype(str), format="%Y%m%d", errors="coerce")
        if dates.notna().all():
            return Stamps.of(pd.DatetimeIndex(dates))
    return Stamps.of(pd.Index(integers))


def _parse(column: pd.Series) -> pd.DatetimeIndex | None:
    """Times from text by the first of several readings that explains all rows; None if none does."""
    readings: list[Callable[[], pd.DatetimeIndex]] = [
        lambda: pd.to_datetime(column),
        lambda: pd.to_datetime(column, format="ISO8601"),  # midnights written as dates
        lambda: pd.to_datetime(column, dayfirst=True),
        lambda: pd.to_datetime(column, format="ISO8601", utc=True),  # offsets that change with the season
    ]
    with warnings.catch_warnings(action="ignore"):  # pandas' remarks on formats
        for reading in readings:
            try:
                times = reading()
            except (ValueError, TypeError, OverflowError):
                continue
            if pd.api.types.is_datetime64_any_dtype(times):
                return pd.DatetimeIndex(times)
    return None


def _first_bad(column: pd.Series) -> int:
    """The first row that is no time by itself."""
    with warnings.catch_warnings(action="ignore"):
        alone = pd.to_datetime(column.astype(str), errors="coerce", utc=True, format="mixed")
        bad = alone if alone.isna().any() else pd.to_datetime(column.astype(str), errors="coerce", utc=True)
    return int(bad.isna().to_numpy().argmax())


def from_frame(frame: pd.DataFrame, columns: Columns) -> Table:
    """A table of a frame; ids and times may be its index.

    Raises:
        UserError: two columns of one name.
    """
    index = frame.index
    if isinstance(index, pd.DatetimeIndex | pd.PeriodIndex) and columns.time not in frame.columns:
        frame = frame.rename_axis(columns.time).reset_index()
    elif levels := [n for n in index.names if n in (columns.id, columns.time) and n not in frame.columns]:
        frame = frame.reset_index(level=levels)
    twice = frame.columns[frame.columns.duplicated()]
    if len(twice):
        raise UserError(f"data frame: two columns are named {twice[0]!r}; rename one")
    return Table(frame.reset_index(drop=True), "data frame", str(columns.target))
