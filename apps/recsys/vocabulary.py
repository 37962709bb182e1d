"""From ids and categories, as text or numbers, to rows of embedding tables."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Bool, Int

from apps.errors import UserError
from apps.recsys.batch import MISSING, UNKNOWN
from apps.recsys.dates import DAY, TIME, canonical, form_of, is_date, write_date, write_dates

FIRST = 2
"""Row of the first value; those before are MISSING and UNKNOWN."""
PRIME = 2**31 - 1
HASH_A, HASH_B = 1_103_515_245, 12_345
"""Hash of an integer x: ((A (x mod P) + B) mod P) mod buckets, of the universal family of Carter and Wegman 1979. No
step leaves int64, so any runtime that has integer Mul, Add and Mod gives the same rows."""
TEXT_KEY = "moecore-recsys-1"
"""Key of the hash that turns text into an integer."""
NUMBER = r"^[+-]?\d{1,19}(\.0*)?$"
LARGEST = 2**63 - 1
"""Integers beyond are text."""
DENSE_RANGE = 8
"""Integers are looked up in an array if their range is at most so many times (and a little) their number."""


@dataclass(frozen=True)
class Ids:
    """Values of a column: integers, or else text."""

    missing: Bool[np.ndarray, " n"]
    integers: Int[np.ndarray, " n"] | None
    """0 where missing."""
    text: pa.Array | None = None
    """Null where missing."""

    def __len__(self) -> int:
        return len(self.missing)

    def as_text(self) -> pa.Array:
        """As text, whole numbers without a decimal point."""
        if self.text is not None:
            return self.text
        return pc.if_else(pa.array(self.missing), None, pa.array(self.integers).cast(pa.string()))

    def as_integers(self) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """As integers, and where there is one; true and false, as text, are those of a column of booleans."""
        if self.integers is not None:
            return self.integers, ~self.missing
        text = pc.utf8_trim_whitespace(self.text)
        number = pc.match_substring_regex(text, NUMBER)
        if not pc.all(number).as_py():
            for word, digit in (("true", "1"), ("false", "0")):
                text = pc.replace_substring_regex(text, f"^(?i:{word})$", digit)
            number = pc.match_substring_regex(text, NUMBER)
        number = number.fill_null(False)
        size = pc.if_else(number, pc.replace_substring_regex(text, r"^[+-]|\.0*$", ""), "0").cast(pa.uint64())
        size = size.to_numpy(zero_copy_only=False)
        known = number.to_numpy(zero_copy_only=False) & (size <= LARGEST)
        sign = np.where(pc.starts_with(text, "-").fill_null(False).to_numpy(zero_copy_only=False), -1, 1)
        return sign * np.where(known, size, 0).astype(np.int64), known


def read_ids(column: pd.Series | np.ndarray | pa.Array) -> Ids:
    """The ids of a column of any type; NaN, infinities, None and empty text are missing.

    Args:
        column: integers, floats, booleans, text, categories, dates, or objects of several kinds. If all numbers are
            whole, they are integers (a column of ids with gaps is one of floats), else they are text; so are integers
            beyond 64 bits, and dates (see `apps.recsys.dates`).
    """
    if isinstance(column, pa.Array) and pa.types.is_null(column.type):  # nothing at all, or lists that are all empty
        return Ids(np.ones(len(column), bool), np.zeros(len(column), np.int64))
    if isinstance(column, pa.Array):
        column = pd.Series(column.to_numpy(zero_copy_only=False)) if _is_number(column.type) else column
    if isinstance(column, pa.Array):
        return _from_text(write_dates(column) if is_date(column.type) else column)
    column = pd.Series(column) if isinstance(column, np.ndarray) else column
    if isinstance(column.dtype, pd.CategoricalDtype):
        return _from_categories(column)
    if pd.api.types.is_bool_dtype(column) or pd.api.types.is_integer_dtype(column):
        missing = column.isna().to_numpy(bool)
        if not missing.all() and column.max() > LARGEST:
            return _from_text(_arrow(column).cast(pa.string()))
        values = column.to_numpy(np.int64, na_value=0) if missing.any() else column.to_numpy(np.int64)
        return Ids(missing, values)
    if pd.api.types.is_float_dtype(column):
        return _from_floats(column.to_numpy(np.float64, na_value=np.nan))
    return _from_objects(column)


def _arrow(column: pd.Series) -> pa.Array:
    values = pa.array(column, from_pandas=True)
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _from_floats(values: np.ndarray) -> Ids:
    missing = ~np.isfinite(values)
    values = np.where(missing, 0, values)
    if (np.abs(values) < 2**62).all() and (values == np.trunc(values)).all():
        return Ids(missing, values.astype(np.int64))
    unique, codes = np.unique(values, return_inverse=True)
    names = pa.array([str(int(v)) if v == int(v) else repr(float(v)) for v in unique])
    return Ids(missing, None, pc.if_else(pa.array(missing), None, names.take(pa.array(codes))))


def _from_categories(column: pd.Series) -> Ids:
    ids, codes = read_ids(pd.Series(column.cat.categories)), column.cat.codes.to_numpy()
    if len(ids) == 0:
        return Ids(np.ones(len(codes), bool), np.zeros(len(codes), np.int64))
    missing = (codes < 0) | ids.missing[codes]
    if ids.integers is not None:
        return Ids(missing, np.where(missing, 0, ids.integers[codes]))
    return Ids(missing, None, ids.text.take(pa.array(np.where(codes < 0, 0, codes), mask=missing)))


def _from_objects(column: pd.Series) -> Ids:
    try:
        values = _arrow(column)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # several kinds in one column, or beyond 64 bits
        return _from_texts(column)
    if pa.types.is_null(values.type):
        return Ids(np.ones(len(column), bool), np.zeros(len(column), np.int64))
    if is_date(values.type):
        cut = pa.types.is_date(values.type) and any(isinstance(value, datetime.datetime) for value in column)
        return _from_texts(column) if cut else _from_text(write_dates(values))  # Arrow forgets hours after a date
    if _is_number(values.type):
        numbers = (
            values.to_pandas(integer_object_nulls=False)
            if values.null_count == 0
            else pd.Series(column).astype(
                "Int64"
                if pa.types.is_integer(values.type)
                else "Float64"
                if pa.types.is_floating(values.type)
                else "boolean"
            )
        )
        return read_ids(numbers)
    if pa.types.is_nested(values.type):
        raise UserError(
            f"column {column.name!r}: holds lists or records; make it a sequence in the schema, or one value"
        )
    return _from_text(values if _is_text(values.type) else values.cast(pa.string()))


def _from_texts(column: pd.Series) -> Ids:
    return _from_text(pa.array([_as_text(value) for value in column], pa.string()))


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _as_text(value: Any) -> str | None:
    number = isinstance(value, (float, np.floating))
    if value is None or value is pd.NA or value is pd.NaT or (number and not np.isfinite(value)):
        return None
    if isinstance(value, (datetime.date, np.datetime64)):
        return write_date(value)
    whole = number and value == int(value)
    return str(int(value)) if whole or isinstance(value, (bool, np.bool_)) else str(value)


def _from_text(values: pa.Array) -> Ids:
    values = values.cast(pa.string()) if pa.types.is_dictionary(values.type) else values
    empty = pc.equal(pc.binary_length(values), 0)
    if pc.any(empty).as_py():
        values = pc.if_else(empty, None, values)
    return Ids(values.is_null().to_numpy(zero_copy_only=False), None, values)


class Vocabulary:
    """Which value has which row of a table.

    Args:
        integer: values are integers; those that come as text are read as such.
        values: sorted; None: hashed.
        buckets: rows for hashed values.
        dates: form of values that are dates (`apps.recsys.dates`), into which others are brought; None: they are none.
    """

    def __init__(
        self,
        integer: bool,
        values: Int[np.ndarray, " V"] | pa.Array | None = None,
        buckets: int | None = None,
        dates: str | None = None,
    ) -> None:
        self.integer, self.values, self.buckets, self.dates = integer, values, buckets, dates

    @property
    def rows(self) -> int:
        """Of the table, MISSING and UNKNOWN included."""
        return FIRST + (self.buckets if self.buckets is not None else len(self.values))

    def lookup(self, ids: Ids) -> Int[np.ndarray, " n"]:
        """Rows of values: MISSING, UNKNOWN for those never seen, or their own."""
        if self.integer:
            values, known = ids.as_integers()
            rows = hash_integers(values, self.buckets) if self.buckets is not None else self._find(values)
            return np.where(ids.missing, MISSING, np.where(known, rows, UNKNOWN))
        encoded = ids.as_text().dictionary_encode()
        names, codes = encoded.dictionary, encoded.indices.fill_null(0).to_numpy(zero_copy_only=False)
        if len(names) == 0:
            return np.full(len(ids), MISSING)
        rows = self._rows_of(names if self.dates is None else canonical(names, self.dates))
        return np.where(ids.missing, MISSING, rows[codes])

    def _rows_of(self, names: pa.Array) -> Int[np.ndarray, " n"]:
        if self.buckets is None:
            return self._find_text(names)
        rows = hash_text(names.fill_null(""), self.buckets)
        return np.where(names.is_null().to_numpy(zero_copy_only=False), UNKNOWN, rows)

    def spelled(self, ids: Ids) -> list[str]:
        """Text as it is looked up; empty where missing, and as it is where it should be a date and is none."""
        encoded = ids.as_text().dictionary_encode()
        names = encoded.dictionary
        if self.dates is not None:
            names = pc.coalesce(canonical(names, self.dates), names)
        return names.take(encoded.indices).fill_null("").to_pylist()

    def _find(self, values: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        if self._array is None:
            return np.maximum(self._index.get_indexer(values) + FIRST, UNKNOWN)
        low, array = self._array
        inside = (values >= low) & (values < low + len(array))
        return np.where(inside, array[np.where(inside, values - low, 0)], UNKNOWN)

    def _find_text(self, names: pa.Array) -> Int[np.ndarray, " n"]:
        wanted = pd.Index(names.to_numpy(zero_copy_only=False), dtype=object)
        return np.maximum(self._index.get_indexer(wanted) + FIRST, UNKNOWN)

    @cached_property
    def _index(self) -> pd.Index:
        if self.integer:
            return pd.Index(self.values, copy=False)
        return pd.Index(self.values.to_numpy(zero_copy_only=False), dtype=object)

    @cached_property
    def _array(self) -> tuple[int, Int[np.ndarray, " R"]] | None:
        """Least value, and the row of each value from there on, if that takes little room."""
        if len(self.values) == 0:
            return None
        low, high = int(self.values[0]), int(self.values[-1])
        if high - low >= DENSE_RANGE * len(self.values) + 1024:
            return None
        array = np.full(high - low + 1, UNKNOWN)
        array[self.values - low] = np.arange(FIRST, FIRST + len(self.values))
        return low, array

    def plain(self) -> dict[str, Any]:
        """As plain data and tensors, for a checkpoint."""
        values: Any = None
        if self.values is not None and self.integer:
            values = torch.from_numpy(np.array(self.values, np.int64))
        elif self.values is not None:
            text = [value.encode() for value in self.values.to_pylist()]
            letters = torch.frombuffer(bytearray(b"".join(text)), dtype=torch.uint8) if any(text) else torch.empty(0)
            values = {"utf8": letters.to(torch.uint8), "lengths": torch.tensor([len(t) for t in text])}
        return {"integer": self.integer, "buckets": self.buckets, "values": values, "dates": self.dates}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Vocabulary:
        """From plain data."""
        values = plain["values"]
        if isinstance(values, dict):
            ends = np.concatenate([[0], np.cumsum(values["lengths"].numpy())]).astype(int)
            letters = values["utf8"].numpy().tobytes()
            pairs = zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
            values = pa.array([letters[a:b].decode() for a, b in pairs], pa.string())
        elif values is not None:
            values = values.numpy()
        return cls(plain["integer"], values, plain["buckets"], plain.get("dates"))


def hash_integers(values: Int[np.ndarray, " n"], buckets: int) -> Int[np.ndarray, " n"]:
    """Rows of hashed integers."""
    return FIRST + (HASH_A * (values % PRIME) + HASH_B) % PRIME % buckets


def hash_text(values: pa.Array, buckets: int) -> Int[np.ndarray, " n"]:
    """Rows of hashed text, the same in every process."""
    hashed = pd.util.hash_array(values.to_numpy(zero_copy_only=False), hash_key=TEXT_KEY, categorize=False)
    return hash_integers((hashed >> np.uint64(1)).astype(np.int64), buckets)


class Counter:
    """Counts the values of a column, part by part."""

    PENDING = 1_000_000

    def __init__(self, hashed: bool) -> None:
        self.hashed = hashed
        self.seen = 0
        """Values that are not missing."""
        self._text = False
        self._forms: set[str | None] = set()
        """Of the dates among all values; None: of others."""
        self._parts: dict[bool, list[pd.Series]] = {False: [], True: []}

    def add(self, ids: Ids) -> None:
        """Count more values."""
        here = int(len(ids) - ids.missing.sum())
        self.seen += here
        self._text |= ids.text is not None and here > 0
        if here and None not in self._forms:
            self._forms.add(None if ids.text is None else form_of(pc.unique(ids.text.drop_null())))
        if self.hashed or not here:
            return
        if ids.text is None:
            values, counts = np.unique(ids.integers[~ids.missing], return_counts=True)
        else:
            found = pc.value_counts(ids.text.drop_null())
            values, counts = (found.field(i).to_numpy(zero_copy_only=False) for i in (0, 1))
        parts = self._parts[ids.text is not None]
        parts.append(pd.Series(counts, values))
        if sum(map(len, parts)) > max(self.PENDING, 2 * len(parts[0])):
            parts[:] = [_merged(parts)]

    def vocabulary(self, min_count: int, buckets: int | None) -> Vocabulary:
        """Of the values that were counted often enough."""
        dates = next((form for form in (None, TIME, DAY) if form in self._forms), None)
        if self.hashed:
            return Vocabulary(not self._text, buckets=buckets, dates=dates)
        numbers, text = (_merged(self._parts[kind]) for kind in (False, True))
        if not self._text:
            kept = numbers.index[numbers >= min_count]
            return Vocabulary(True, np.sort(kept.to_numpy(np.int64)))
        numbers.index = numbers.index.astype(str).astype(object)
        both = _merged([numbers, text])
        if dates is not None:
            both.index = canonical(pa.array(both.index, pa.string()), dates).to_numpy(zero_copy_only=False)
            both = _merged([both])
        return Vocabulary(False, pa.array(sorted(both.index[both >= min_count]), pa.string()), dates=dates)


def _merged(parts: list[pd.Series]) -> pd.Series:
    """Counts of parts added up, by value."""
    if not parts:
        return pd.Series([], [], dtype=np.int64)
    whole = pd.concat([part for part in parts if len(part)] or parts[:1])
    return whole.groupby(level=0, sort=False).sum()
