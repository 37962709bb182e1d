"""Scores as files, piece by piece, so that a log larger than memory can be scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from apps.errors import UserError
from apps.recsys.vocabulary import read_ids
from moecore.files import atomic_path

Write = Callable[[pd.DataFrame], None]


def write_pieces(pieces: Iterator[pd.DataFrame], path: str | Path) -> int:
    """Write frames with the same columns below each other as .csv, .parquet or .json (records), whole or not at all.

    Returns:
        The number of rows.

    Raises:
        UserError: Parquet, and a column has numbers in one piece and text in another.
    """
    path, count = Path(path), 0
    writer = {".parquet": _parquet, ".json": _json}.get(path.suffix, _csv)
    with atomic_path(path) as temporary, writer(temporary) as write:
        for piece in pieces:
            write(piece)
            count += len(piece)
    return count


def join(pieces: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Frames below each other; a column of numbers in one and text in another is text."""
    whole = pd.concat(list(pieces), ignore_index=True)
    return whole.assign(**{str(name): _as_text(column) for name, column in whole.items() if _is_mixed(column)})


def _is_mixed(column: pd.Series) -> bool:
    if not pd.api.types.is_object_dtype(column) or column.map(pd.api.types.is_list_like).any():
        return False
    return column.dropna().map(type).nunique() > 1


def _as_text(column: pd.Series) -> pd.Series:
    return read_ids(column).as_text().to_pandas().set_axis(column.index)


def whole_ids(column: pd.Series) -> pd.Series:
    """Integers that are floats for the gaps between them, as integers with gaps; else the column as it is."""
    if not pd.api.types.is_float_dtype(column):
        return column
    ids = read_ids(column)
    if ids.integers is None:
        return column
    return pd.Series(pd.arrays.IntegerArray(ids.integers, ids.missing), column.index)


@contextmanager
def _csv(path: Path) -> Iterator[Write]:
    with open(path, "w", newline="", encoding="utf-8") as file:
        yield lambda piece: piece.to_csv(file, index=False, header=file.tell() == 0)


@contextmanager
def _json(path: Path) -> Iterator[Write]:
    with open(path, "w", encoding="utf-8") as file:

        def write(piece: pd.DataFrame) -> None:
            records = piece.to_json(orient="records", lines=True, date_format="iso", force_ascii=False).splitlines()
            for record in records:
                file.write("[\n" if file.tell() == 0 else ",\n")
                file.write(record)

        yield write
        file.write("\n]\n" if file.tell() else "[]\n")


@contextmanager
def _parquet(path: Path) -> Iterator[Write]:
    writers: list[pq.ParquetWriter] = []

    def write(piece: pd.DataFrame) -> None:
        if writers:
            writers[0].write_table(_alike(piece, writers[0].schema))
            return
        table = pa.Table.from_pandas(piece, preserve_index=False)
        writers.append(pq.ParquetWriter(path, table.schema))
        writers[0].write_table(table)

    try:
        yield write
    finally:
        for writer in writers:
            writer.close()


def _alike(piece: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    columns = []
    for field in schema:
        try:
            columns.append(pa.Array.from_pandas(piece[field.name]).cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise UserError(
                f"output: column {field.name!r} is {field.type} in the first rows and not later on; write .csv, or "
                "give all input files the same types"
            ) from error
    return pa.table(columns, schema=schema)
