"""A first guess of what the columns of a log mean, to print and edit."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from apps.errors import UserError
from apps.recsys.columns import read_lists
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
WATCH_WORDS = ("click", "view", "watch", "play", "finish")
ID_WORDS = ("id", "uid", "iid", "code", "zip", "sku", "key", "hash", "device", "tab", "hour")
USER_NAMES = ("user_id", "userid", "user", "uid", "member_id", "visitor_id", "customer_id")
ITEM_NAMES = ("item_id", "itemid", "item", "iid", "video_id", "movie_id", "product_id", "ad_id", "article_id", "sku")
TIME_NAMES = ("time_ms", "timestamp", "time", "datetime", "event_time", "ts", "date", "ds")


def infer_schema(data: pd.DataFrame | Table | str | Path) -> Schema:
    """Guess a schema from names and values of the first rows.

    Labels are columns of 0 and 1 whose name says so (click, is_like, label, ...); without such, the last columns of 0
    and 1. Text and whole numbers of few values, or that are called ids, are sparse; lists, and text with separators in
    most rows, are sequences; other numbers are dense. A column without a value or with a single one is left out.

    Args:
        data: a frame, a table, or the path of one.

    Raises:
        UserError: there is no column that could be a label.
    """
    if not isinstance(data, (pd.DataFrame, Table)):
        data = open_table(data)
    name = "the table" if isinstance(data, pd.DataFrame) else data.name
    frame = data if isinstance(data, pd.DataFrame) else next(data.chunks(0, rows=LOOKED_AT))
    frame = frame.iloc[:LOOKED_AT].rename(columns=str)
    columns = list(frame.columns)
    user, item, time = (_called(columns, names) for names in (USER_NAMES, ITEM_NAMES, TIME_NAMES))
    labels = _labels(frame, [column for column in columns if column not in (user, item, time)])
    if not labels:
        raise UserError(f"{name}: no column of 0 and 1 could be a label; write a schema and give it as --data.schema")
    features: dict[str, FeatureSpec] = {}
    for column in columns:
        if column not in labels and column != time and not column.startswith("Unnamed:"):
            spec = _feature(frame[column], column)
            if spec is not None:
                features[column] = spec
    _share(features, item)
    return Schema(features, {column: _label(column) for column in labels}, user=user, item=item, time=time)


def _called(columns: list[str], names: tuple[str, ...]) -> str | None:
    lower = {column.lower(): column for column in reversed(columns)}
    return next((lower[name] for name in names if name in lower), None)


def _labels(frame: pd.DataFrame, columns: list[str]) -> list[str]:
    binary = [column for column in columns if _is_binary(frame[column])]
    named = [column for column in binary if _stem(column) in LABEL_WORDS]
    if named:
        return named
    last = []
    for column in reversed(columns):
        if column not in binary:
            break
        last.insert(0, column)
    return last if len(last) < len(columns) else last[-1:]


def _stem(column: str) -> str:
    return re.sub(r"^(is|has|did)_|_(label|target|flag)$|\d+$", "", column.lower())


def _is_binary(column: pd.Series) -> bool:
    if not pd.api.types.is_numeric_dtype(column):
        return False
    values = column.dropna().unique()
    return 0 < len(values) <= 2 and set(np.asarray(values, float).tolist()) <= {0.0, 1.0}


def _label(column: str) -> LabelSpec:
    return LabelSpec(group="watch" if any(word in column.lower() for word in WATCH_WORDS) else "interact")


def _feature(column: pd.Series, name: str) -> FeatureSpec | None:
    there = column.dropna()
    if not len(there):
        return None
    first = there.iloc[0]
    if isinstance(first, (list, tuple, np.ndarray)):
        return FeatureSpec(kind="sequence")
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        values = there.unique()
        if len(values) < 2:
            return None
        words = re.split(r"[^a-z]+", name.lower())
        whole = bool((np.asarray(there, float) % 1 == 0).all())
        sparse = whole and (len(values) <= FEW or any(word in ID_WORDS for word in words))
        return FeatureSpec(kind="sparse" if sparse else "dense")
    for separator in ("|", ",", ";"):
        if there.astype(str).str.contains(separator, regex=False).mean() > 0.2 and _repeats(there, separator):
            return FeatureSpec(kind="sequence", separator=separator)
    ids = read_ids(there)
    return FeatureSpec() if len(pd.unique(ids.as_text().to_numpy(zero_copy_only=False))) > 1 else None


def _repeats(column: pd.Series, separator: str) -> bool:
    """Whether text is of parts that recur in other combinations, rather than of one piece."""
    parts = read_lists(column.iloc[:10_000], separator).ids.as_text().to_numpy(zero_copy_only=False)
    return len(pd.unique(parts)) < 0.5 * len(parts)


def _share(features: dict[str, FeatureSpec], item: str | None) -> None:
    """Sequences that are called histories hold ids of the item."""
    if item not in features or features[item].kind != "sparse":
        return
    for name, one in features.items():
        if one.kind == "sequence" and re.search(r"hist|seq|behav|recent|last", name.lower()):
            one.share, one.pooling, one.target = item, "target", item
