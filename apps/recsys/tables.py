"""Logs as users have them: data frames, CSV and Parquet files and folders, read in pieces that fit in memory.

A table is made of units (row groups of Parquet files, text files, frames) that can be opened in any order. Frames keep
the numbers of their rows, counted from 0 in each file, as their index.
"""

from __future__ import annotations

import lzma
import warnings
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from apps.errors import UserError

TEXT = (".csv", ".tsv", ".txt")
PARQUET = (".parquet", ".pq")
PACKED = (".gz", ".bz2", ".xz", ".zip")
CHUNK = 32_768
"""Rows read at a time."""
WHOLE = 1 << 30
"""Enough for all rows."""
Derive = Callable[[pd.DataFrame], pd.DataFrame]


@dataclass(frozen=True)
class Unit:
    """A piece of a table that can be opened by itself."""

    file: int
    """Number of its file or frame."""
    start: int
    """Row of the file that it begins with."""
    rows: int | None
    """None: not known before it is read."""
    group: int = 0
    """Row group of a Parquet file."""


class Table(ABC):
    """Rows in units.

    Args:
        name: for messages.
        columns: there are.
        units: in order.
    """

    def __init__(self, name: str, columns: Sequence[str], units: Sequence[Unit]) -> None:
        self.name, self.columns, self.units = name, tuple(columns), tuple(units)

    @abstractmethod
    def chunks(self, unit: int, columns: Sequence[str] | None = None, rows: int = CHUNK) -> Iterator[pd.DataFrame]:
        """The rows of a unit, at most so many at a time, with the numbers of rows in the file as index."""

    def expect(self, columns: Sequence[str]) -> None:
        """Raise `UserError` unless all of these columns are there."""
        expect(self.name, self.columns, columns)

    def load(self) -> FrameTable:
        """All of it in memory."""
        whole: dict[int, list[pd.DataFrame]] = {}
        for i, unit in enumerate(self.units):
            whole.setdefault(unit.file, []).extend(self.chunks(i, rows=WHOLE))
        return FrameTable([pd.concat(parts) if len(parts) > 1 else parts[0] for parts in whole.values()], self.name)


def expect(name: str, there: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise `UserError`, which says what columns there are, unless those wanted are."""
    known = Counter(there)
    twice = next((column for column in wanted if known[column] > 1), None)
    if twice is not None:
        raise UserError(f"{name}: two columns are called {twice!r}; rename one")
    lacking = [column for column in wanted if column not in known]
    if lacking:
        first = ", ".join(map(str, list(there)[:20])) or "none"
        more = ", ..." if len(there) > 20 else ""
        raise UserError(f"{name}: no column {lacking[0]!r}; it has {first}{more}; mend the table or the schema")


class FrameTable(Table):
    """Frames in memory, each a unit."""

    def __init__(self, frames: pd.DataFrame | Sequence[pd.DataFrame], name: str = "the table") -> None:
        frames = [frames] if isinstance(frames, pd.DataFrame) else list(frames)
        self.frames = [frame.rename(columns=str).reset_index(drop=True) for frame in frames]
        units = [Unit(i, 0, len(frame)) for i, frame in enumerate(self.frames)]
        twice = self.frames[0].columns[self.frames[0].columns.duplicated()]
        if len(twice):
            raise UserError(f"{name}: two columns are called {twice[0]!r}; rename one")
        super().__init__(name, list(self.frames[0].columns), units)

    def chunks(self, unit: int, columns: Sequence[str] | None = None, rows: int = CHUNK) -> Iterator[pd.DataFrame]:
        """Slices of a frame."""
        frame = self.frames[unit] if columns is None else self.frames[unit][list(columns)]
        for start in range(0, max(len(frame), 1), rows):
            yield frame.iloc[start : start + rows]


class ParquetTable(Table):
    """Parquet files; every row group is a unit."""

    def __init__(self, files: Sequence[Path], name: str) -> None:
        self.files, units = list(files), []
        for i, file in enumerate(self.files):
            with _one_line(file), pq.ParquetFile(file) as opened:
                sizes = [opened.metadata.row_group(g).num_rows for g in range(opened.metadata.num_row_groups)]
                names = opened.schema_arrow.names
            starts = np.concatenate([[0], np.cumsum(sizes)])[:-1].astype(int).tolist()
            units += [
                Unit(i, start, size, g) for g, (start, size) in enumerate(zip(starts, sizes, strict=True)) if size
            ]
            if i == 0:
                columns = names
            else:
                expect(str(file), names, columns)
        super().__init__(name, columns, units)

    def chunks(self, unit: int, columns: Sequence[str] | None = None, rows: int = CHUNK) -> Iterator[pd.DataFrame]:
        """Parts of a row group."""
        return _guarded(self.files[self.units[unit].file], self._read(unit, list(columns or self.columns), rows))

    def _read(self, unit: int, columns: list[str], rows: int) -> Iterator[pd.DataFrame]:
        which, start = self.units[unit], self.units[unit].start
        with pq.ParquetFile(self.files[which.file]) as opened:
            for part in opened.iter_batches(rows, [which.group], columns, use_threads=False):
                frame = _to_pandas(part)
                frame.index = pd.RangeIndex(start, start + len(frame))
                start += len(frame)
                yield frame


def _to_pandas(part: pa.RecordBatch) -> pd.DataFrame:
    """Lists stay in Arrow's form, and integers with gaps stay integers."""
    gaps = {part.schema.field(i).type for i, column in enumerate(part.columns) if column.null_count}

    def kind(arrow: pa.DataType):
        if pa.types.is_list(arrow) or pa.types.is_large_list(arrow):
            return pd.ArrowDtype(arrow)
        return pd.Int64Dtype() if pa.types.is_int64(arrow) and arrow in gaps else None

    return part.to_pandas(types_mapper=kind)


class TextTable(Table):
    """Text files with a header; every file is a unit, read from its start."""

    def __init__(self, files: Sequence[Path], name: str) -> None:
        self.files = list(files)
        self.separators = [_separator(file) for file in self.files]
        for i, (file, separator) in enumerate(zip(self.files, self.separators, strict=True)):
            with _one_line(file):
                names = [str(column) for column in pd.read_csv(file, nrows=0, **_reading(separator)).columns]
            twice = [column.rpartition(".")[0] for column in names if _is_second(column, names)]
            if twice:
                raise UserError(f"{file}: two columns are called {twice[0]!r}; rename one")
            if i == 0:
                columns = names
            else:
                expect(str(file), names, columns)
        super().__init__(name, columns, [Unit(i, 0, None) for i in range(len(self.files))])

    def chunks(self, unit: int, columns: Sequence[str] | None = None, rows: int = CHUNK) -> Iterator[pd.DataFrame]:
        """Parts of a file."""
        return _guarded(self.files[unit], self._read(unit, None if columns is None else list(columns), rows))

    def _read(self, unit: int, columns: list[str] | None, rows: int) -> Iterator[pd.DataFrame]:
        reading = _reading(self.separators[unit]) | {"usecols": columns}
        if rows >= WHOLE:
            yield pd.read_csv(self.files[unit], **reading)
            return
        with pd.read_csv(self.files[unit], chunksize=rows, **reading) as reader:
            for frame in reader:
                yield frame if columns is None else frame[columns]


def _is_second(column: str, names: Sequence[str]) -> bool:
    stem, _, number = column.rpartition(".")
    return number == "1" and stem in names


def _separator(file: Path) -> str:
    with _one_line(file):
        head = pd.read_csv(file, nrows=1, header=None, sep="\x1f", dtype=str, encoding="utf-8-sig", quoting=3)
        return max(",;\t", key=str(head.iloc[0, 0]).count)


def _reading(separator: str) -> dict:
    return {
        "sep": separator,
        "encoding": "utf-8-sig",
        "skipinitialspace": True,
        "low_memory": False,
        "index_col": False,
    }


class Derived(Table):
    """A table to which columns are added when it is read (hour of a time, features of users and items).

    Args:
        table: what is read.
        derive: gives the frame with its additional columns; keeps rows, order and index.
        name: for messages.
    """

    def __init__(self, table: Table, derive: Derive, name: str | None = None) -> None:
        self.table, self.derive = table, derive
        first = next(table.chunks(0, rows=8))
        super().__init__(name or table.name, [str(column) for column in derive(first).columns], table.units)

    def chunks(self, unit: int, columns: Sequence[str] | None = None, rows: int = CHUNK) -> Iterator[pd.DataFrame]:
        """Chunks with the additional columns."""
        there = columns is not None and set(columns) <= set(self.table.columns)
        for frame in self.table.chunks(unit, columns if there else None, rows):
            whole = frame if there else self.derive(frame)
            yield whole if columns is None else whole[list(columns)]


def open_table(path: str | Path) -> Table:
    """A table from a file, or from all files of a folder (and those below it).

    Raises:
        UserError: there is none, it is empty, or it cannot be read.
    """
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if is_table(file)) if path.is_dir() else [path]
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not files:
        raise UserError(f"{path}: the folder has no table ({', '.join(TEXT + PARQUET)})")
    kinds = {suffix(file) in PARQUET for file in files}
    if len(kinds) > 1:
        raise UserError(f"{path}: the folder has both text and Parquet files; keep one kind")
    table = ParquetTable(files, str(path)) if kinds == {True} else TextTable(files, str(path))
    if not table.units:
        raise UserError(f"{path}: the table is empty")
    return table


def megabytes(table: Table) -> float:
    """Size of the files of a table; 0 for one in memory."""
    table = table.table if isinstance(table, Derived) else table
    return sum(file.stat().st_size for file in getattr(table, "files", [])) / 1e6


def suffix(path: Path) -> str:
    """Ending of the name, without that of a packed file."""
    return (Path(path.stem) if path.suffix in PACKED else path).suffix.lower()


def is_table(path: Path) -> bool:
    """Whether the name is that of a table."""
    return suffix(path) in TEXT + PARQUET and not path.name.startswith((".", "_")) and path.is_file()


def _guarded(path: Path, pieces: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """The same pieces; what goes wrong in reading the next one is one line."""
    while True:
        with _one_line(path):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """What goes wrong in reading, as one line."""
    try:
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):  # fields that would be cut off
            yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; save it as CSV in UTF-8") from error
    except pd.errors.EmptyDataError as error:
        raise UserError(f"{path}: the file is empty") from error
    except pd.errors.ParserWarning as error:
        raise UserError(f"{path}: rows have more fields than the header; quote or rename what splits them") from error
    except (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from error
