"""A first guess of what the columns of a log mean, to print and edit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from apps.errors import UserError
from apps.recsys.columns import read_lists
from apps.recsys.printed import SEPARATORS, are_printed
from apps.recsys.schema import FeatureSpec, LabelSpec, Schema
from apps.recsys.tables import Table, open_table
from apps.recsys.vocabulary import read_ids

LOOKED_AT = 100_000
"""Rows."""
FEW = 32
"""Whole numbers with at most so many values are categories."""
LABEL_WORDS = [
    "label",
    "target",
    "click",
    "clicked",
    "like",
    "liked",
    "follow",
    "view",
    "viewed",
    "long_view",
    "buy",
    "bought",
    "purchase",
    "conversion",
    "convert",
    "converted",
    "comment",
    "share",
    "forward",
    "favorite",
    "favourite",
    "finish",
    "watched",
    "install",
    "order",
    "cart",
    "profile",
    "profile_enter",
    "play",
    "played",
    "income",
    "marital",
    "hate",
    "collect",
    "download",
    "effective_view",
    "ctr",
    "cvr",
    "ctcvr",
]
PLAIN_WORDS = ("income", "marital", "profile", "order")
"""Of these, those that may as well be what is known beforehand."""
WATCH_WORDS = ("click", "view", "watch", "play", "finish")
ID_WORDS = ("id", "ids", "uid", "iid", "guid", "uuid", "code", "zip", "sku", "key", "hash", "device", "tab", "hour")
ID_NOUNS = ("session", "user", "item", "member", "visitor", "customer", "cookie", "category", "brand", "author", "shop")
"""Ids if they come last in a name: a session, not its length."""
EXACT = 2**53
"""Larger integers are no quantities: floats cannot tell them apart."""
TOKEN_LETTERS = 24
"""Values of a list are no longer than that on average."""
USER_NAMES = ("user_id", "userid", "user", "uid", "member_id", "visitor_id", "customer_id")
ITEM_NAMES = ("item_id", "itemid", "item", "iid", "video_id", "movie_id", "product_id", "ad_id", "article_id", "sku")
TIME_NAMES = ("time_ms", "timestamp", "time", "datetime", "event_time", "ts", "date", "ds")


@dataclass(frozen=True)
class Guess:
    """A schema, and what the user should know of how it was found."""

    schema: Schema
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """The schema in short, a line per kind, and the notes."""
        schema = self.schema
        named = {name: getattr(schema, name) for name in ("user", "item", "time")}
        lines = [f"{name}={column}" for name, column in named.items() if column is not None]
        kinds = {"labels": list(schema.labels)} | {kind: schema.named(kind) for kind in ("sparse", "dense", "sequence")}
        lines += [f"{kind}={', '.join(names)}" for kind, names in kinds.items() if names]
        return [*lines, *(f"note: {note}" for note in self.notes)]


def infer_schema(data: pd.DataFrame | Table | str | Path) -> Schema:
    """Guess a schema from names and values of the first rows; see `guess`."""
    return guess(data).schema


def guess(data: pd.DataFrame | Table | str | Path) -> Guess:
    """Guess a schema from names and values of the first rows.

    Labels are columns of 0 and 1 whose name says so (click, is_like, label, ...); without such, the last columns of 0
    and 1. User and item, text, and whole numbers of few values, beyond 2**53, or that are called ids, are sparse;
    lists, printed lists, and text with a separator between short values in most rows, are sequences; other numbers are
    dense. A column without a value or with a single one is left out, and so is one that is called like a label and
    holds other values than 0 and 1: it would give the answer away.

    Args:
        data: a frame, a table, or the path of one.

    Raises:
        UserError: there is no column that could be a label, or none that could be a feature.
    """
    if not isinstance(data, (pd.DataFrame, Table)):
        data = open_table(data)
    name = "the table" if isinstance(data, pd.DataFrame) else data.name
    frame = data if isinstance(data, pd.DataFrame) else next(data.chunks(0, rows=LOOKED_AT))
    frame = frame.iloc[:LOOKED_AT].rename(columns=str)
    columns = list(frame.columns)
    single = [column for column in columns if not _holds_lists(frame[column])]
    user, item, time = (_called(single, names) for names in (USER_NAMES, ITEM_NAMES, TIME_NAMES))
    others = [column for column in columns if column not in (user, item, time)]
    doubtful = {column: _doubt(frame[column]) for column in others if _outcome(frame[column])}
    labels = _labels(frame, others, bool(doubtful))
    if not labels:
        why = "; ".join(doubtful.values()) or "write a schema and give it as --data.schema"
        raise UserError(
            f"{name}: no column of 0 and 1 could be a label; {why}" if len(frame) else f"{name}: has no row"
        )
    features: dict[str, FeatureSpec] = {}
    for column in columns:
        if column not in (*labels, *doubtful, time) and not column.startswith("Unnamed:"):
            spec = _feature(frame[column], column, column in (user, item))
            if spec is not None:
                features[column] = spec
    if not features:
        raise UserError(f"{name}: {_why_no_feature(frame, [*labels, *doubtful, time])}")
    _share(features, item)
    schema = Schema(features, {column: _label(column) for column in labels}, user=user, item=item, time=time)
    return Guess(schema, tuple(doubtful.values()))


def _why_no_feature(frame: pd.DataFrame, taken: list[str | None]) -> str:
    rest = [column for column in frame.columns if column not in taken]
    if not rest:
        return (
            f"no column is left to be a feature beside {', '.join(c for c in taken if c)}; add what is known of a row"
        )
    if len(frame) == 1:
        return "has one row only, from which nothing can be learned; give more rows"
    return (
        f"no feature: each of {', '.join(rest[:20])} has a single value or none; add columns that differ between rows"
    )


def _holds_lists(column: pd.Series) -> bool:
    there = column.dropna()
    return len(there) > 0 and isinstance(there.iloc[0], (list, tuple, np.ndarray))


def _outcome(column: pd.Series) -> bool:
    """Whether the name is that of a label, and the values are not."""
    stem = _stem(str(column.name))
    return stem in LABEL_WORDS and stem not in PLAIN_WORDS and not _is_binary(column) and not _holds_lists(column)


def _doubt(column: pd.Series) -> str:
    values = [str(value)[:20] for value in pd.unique(column.dropna())[:4]]
    holds = f"holds {', '.join(values[:3])}{', ...' if len(values) > 3 else ''}" if values else "has no value"
    return (
        f"column {column.name!r} is called like a label and {holds}: left out; make it 0, 1 or empty for a label (as "
        "yes -> 1, no -> 0), or name it in a schema as what it is"
    )


def _called(columns: list[str], names: tuple[str, ...]) -> str | None:
    lower = {column.strip().lower(): column for column in reversed(columns)}
    return next((lower[name] for name in names if name in lower), None)


def _labels(frame: pd.DataFrame, columns: list[str], only_named: bool) -> list[str]:
    binary = [column for column in columns if _is_binary(frame[column])]
    named = [column for column in binary if _stem(column) in LABEL_WORDS]
    if named or only_named:
        return named
    last = []
    for column in reversed(columns):
        if column not in binary:
            break
        last.insert(0, column)
    return last if len(last) < len(columns) else last[-1:]


def _stem(column: str) -> str:
    return re.sub(r"^(is|has|did)_|_(label|target|flag)$|\d+$", "", column.strip().lower())


def _is_binary(column: pd.Series) -> bool:
    if not pd.api.types.is_numeric_dtype(column):
        there = column.dropna()
        return len(there) > 0 and there.map(lambda value: isinstance(value, (bool, np.bool_))).all()
    values = column.dropna().unique()
    return 0 < len(values) <= 2 and set(np.asarray(values, float).tolist()) <= {0.0, 1.0}


def _label(column: str) -> LabelSpec:
    return LabelSpec(group="watch" if any(word in column.lower() for word in WATCH_WORDS) else "interact")


def _feature(column: pd.Series, name: str, is_id: bool) -> FeatureSpec | None:
    there = column.dropna()
    if not len(there):
        return None
    if _holds_lists(column):
        return FeatureSpec(kind="sequence")
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return _number(there, name, is_id)
    separator = None if is_id else _separator(there)
    if separator is not None:
        return FeatureSpec(kind="sequence", separator=separator)
    return FeatureSpec() if len(pd.unique(read_ids(there).as_text().to_numpy(zero_copy_only=False))) > 1 else None


def _number(there: pd.Series, name: str, is_id: bool) -> FeatureSpec | None:
    values = np.asarray(there.unique(), float)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return None
    words = re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip()).lower())
    called = any(word in ID_WORDS for word in words) or words[-1] in ID_NOUNS
    whole = bool((values % 1 == 0).all())
    huge = bool(np.abs(values).max() > EXACT)
    sparse = is_id or (whole and (len(values) <= FEW or called or huge))
    return FeatureSpec(kind="sparse" if sparse else "dense")


def _separator(there: pd.Series) -> str | None:
    """What stands between the values of a column of lists as text; None: it is none."""
    there = there.iloc[:10_000].astype(str)
    there = there[there != ""]
    if not len(there):
        return None
    if are_printed(pa.array(there, pa.string())):
        return ","
    for separator in SEPARATORS:
        counts = there.str.count(re.escape(separator)) + 1
        several = (counts > 1).mean() > 0.5 and (counts.nunique() > 1 or counts.iloc[0] > 2)
        letters = (there.str.len() - counts + 1).sum() / counts.sum()
        if several and letters <= TOKEN_LETTERS and _repeats(there, separator):
            return separator
    return None


def _repeats(column: pd.Series, separator: str) -> bool:
    """Whether text is of parts that recur in other combinations, rather than of one piece."""
    parts = read_lists(column, separator).ids.as_text().to_numpy(zero_copy_only=False)
    return len(pd.unique(parts)) < 0.5 * len(parts)


def _share(features: dict[str, FeatureSpec], item: str | None) -> None:
    """Sequences that are called histories hold ids of the item."""
    if item not in features or features[item].kind != "sparse":
        return
    for name, one in features.items():
        if one.kind == "sequence" and re.search(r"hist|seq|behav|recent|last", name.lower()):
            one.share, one.pooling, one.target = item, "target", item
