"""Columns of a frame as numbers, labels and lists."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from apps.errors import UserError
from apps.recsys.batch import MISSING
from apps.recsys.printed import split_lists
from apps.recsys.vocabulary import Ids, Vocabulary, read_ids

BLANK = ("", "NA", "N/A", "NaN", "nan", "<NA>", "null", "NULL", "None")


def read_numbers(column: pd.Series, what: str) -> Float[np.ndarray, " n"]:
    """A column as numbers; what is missing or infinite is NaN.

    Args:
        column: numbers, booleans, or text that holds numbers.
        what: feature or label, for the error.

    Raises:
        UserError: a value is no number.
    """
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype if not column.hasnans else object)
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_complex_dtype(column):
        values = column.to_numpy(np.float64, na_value=np.nan)
    else:
        values = pd.to_numeric(column.astype(object), errors="coerce").to_numpy(np.float64, na_value=np.nan)
        for i in np.flatnonzero(np.isnan(values) & column.notna().to_numpy(bool)):
            if str(column.iloc[i]).strip() not in BLANK:
                shown = str(column.iloc[i])[:40]
                raise UserError(
                    f"{what}: column {column.name!r}, row {column.index[i]}: {shown!r} is no number; mend the data, or "
                    "say another kind in the schema"
                )
    infinite = np.isinf(values)
    return np.where(infinite, np.nan, values) if infinite.any() else values


def read_label(column: pd.Series, name: str) -> Float[np.ndarray, " n"]:
    """A column of 0 and 1; NaN where missing: outside of the task.

    Raises:
        UserError: there is another value.
    """
    values = read_numbers(column, f"labels.{name}")
    bad = ~np.isnan(values) & (values != 0) & (values != 1)
    if bad.any():
        i = int(bad.argmax())
        raise UserError(
            f"labels.{name}: column {column.name!r}, row {column.index[i]}: {values[i]:g} is neither 0 nor 1; make the "
            "label 0, 1 or empty"
        )
    return values


@dataclass(frozen=True)
class Lists:
    """A column of lists, end to end."""

    ids: Ids
    lengths: Int[np.ndarray, " n"]

    def padded(self, vocabulary: Vocabulary, max_len: int) -> Int[np.ndarray, "n L"]:
        """Rows of a table: the latest `max_len` values, oldest first, padded on the right; missing ones left out."""
        rows, count = vocabulary.lookup(self.ids), len(self.lengths)
        owner = np.repeat(np.arange(count), self.lengths)
        if (rows == MISSING).any():
            owner, rows = owner[rows != MISSING], rows[rows != MISSING]
        lengths = np.bincount(owner, minlength=count)
        place = np.arange(len(rows)) - (np.cumsum(lengths) - lengths)[owner]
        place -= np.maximum(lengths - max_len, 0)[owner]
        padded = np.full((count, max_len), MISSING)
        kept = place >= 0
        padded[owner[kept], place[kept]] = rows[kept]
        return padded


def read_lists(column: pd.Series, separator: str) -> Lists:
    """A column of lists: lists or arrays, text with separators, printed lists (JSON, Python, NumPy), or single values.

    Raises:
        UserError: a printed list whose values cannot be told apart; text with another separator.
    """
    values = _arrow(column)
    if values is None:  # lists that Arrow cannot take: of several kinds, or of integers beyond 64 bits
        parts = [one if isinstance(one, (list, tuple, np.ndarray)) else [one] for one in column]
        flat = pd.Series([value for part in parts for value in part], dtype=object)
        return Lists(read_ids(flat), np.array([len(part) for part in parts], int))
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        values = split_lists(values, separator, column)
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        return Lists(read_ids(values.flatten()), _lengths(values))
    return Lists(read_ids(column), np.ones(len(column), int))


def _arrow(column: pd.Series) -> pa.Array | None:
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object)
    try:
        values = pa.array(column, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return None
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def _lengths(values: pa.Array) -> Int[np.ndarray, " n"]:
    return pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


class Moments:
    """Mean, deviation and quantiles of columns, part by part.

    Quantiles are those of evenly spaced rows, `SAMPLE` at most.
    """

    SAMPLE = 200_000

    def __init__(self, logarithm: list[bool]) -> None:
        self.logarithm = np.array(logarithm, bool)
        self.count, self.mean, self.square = (np.zeros(len(logarithm)) for _ in range(3))
        self._sample: list[np.ndarray] = []
        self._stride, self._seen = 1, 0

    def add(self, values: Float[np.ndarray, "n N"]) -> None:
        """Count more rows."""
        if not values.size:
            return
        first = -self._seen % self._stride
        self._seen += len(values)
        self._sample.append(values[first :: self._stride])
        if sum(map(len, self._sample)) > self.SAMPLE:
            self._sample, self._stride = [np.concatenate(self._sample)[::2]], self._stride * 2
        values = np.where(self.logarithm, np.sign(values) * np.log1p(np.abs(values)), values)
        there = ~np.isnan(values)
        count = there.sum(0)
        mean = np.where(there, values, 0).sum(0) / np.maximum(count, 1)
        square = (np.where(there, values - mean, 0) ** 2).sum(0)
        total = np.maximum(self.count + count, 1)
        gap = mean - self.mean  # of two parts: Chan, Golub and LeVeque 1979
        self.square += square + gap**2 * self.count * count / total
        self.mean += gap * count / total
        self.count += count

    @property
    def std(self) -> Float[np.ndarray, " N"]:
        """Deviations; 1 where all values are the same."""
        std = np.sqrt(self.square / np.maximum(self.count, 1))
        return np.where(std > 1e-12 * np.abs(self.mean), std, 1.0)

    def edges(self, column: int, bins: int) -> Float[np.ndarray, " E"]:
        """Quantiles of a column, with the least and the largest value; frequent values are edges of their own."""
        values = np.concatenate(self._sample)[:, column]
        values = values[~np.isnan(values)].astype(np.float32)  # as models see them
        unique, counts = np.unique(values, return_counts=True)
        if len(unique) == 1:
            unique = np.append(unique, unique + np.maximum(np.abs(unique), 1))
        if len(unique) <= bins + 1:
            return unique.astype(np.float64)
        heavy = unique[counts * bins >= len(values)]
        rest = values[~np.isin(values, heavy)]
        quantiles = np.quantile(rest, np.linspace(0, 1, max(bins + 1 - len(heavy), 2)), method="nearest")
        return np.unique(np.concatenate([heavy, quantiles, unique[[0, -1]]])).astype(np.float64)
