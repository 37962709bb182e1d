"""Small logs that several files use."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from apps.recsys.schema import FeatureSpec, LabelSpec, Schema


def small_log(rows: int = 400, seed: int = 0) -> pd.DataFrame:
    """A log with a column of every kind; `row` numbers its rows."""
    rng = np.random.default_rng(seed)
    lists = [rng.integers(100, 140, size).tolist() for size in rng.integers(0, 6, rows)]
    frame = pd.DataFrame(
        {
            "row": np.arange(rows),
            "user": rng.integers(0, 20, rows),
            "item": rng.integers(100, 140, rows),
            "city": rng.choice(np.array(["rome", "oslo", "lima", None], object), rows),
            "price": np.where(rng.random(rows) < 0.1, np.nan, rng.exponential(10, rows)),
            "when": np.sort(rng.integers(1_000, 9_000, rows)),
            "click": rng.integers(0, 2, rows),
        }
    )
    frame["buy"] = frame["click"] * rng.integers(0, 2, rows)
    frame["seen"] = pd.Series(lists, dtype=object)
    return frame


def small_schema(**changes) -> Schema:
    """What the columns of the small log mean; `row` is a number, so that batches can be traced to rows."""
    features = {
        "row": FeatureSpec("dense", encode="standard"),
        "user": FeatureSpec(),
        "item": FeatureSpec(dim=4),
        "city": FeatureSpec(),
        "price": FeatureSpec("dense", bins=4),
        "seen": FeatureSpec("sequence", share="item", max_len=3, pooling="target", target="item"),
    }
    labels = {"click": LabelSpec(), "buy": LabelSpec(given="click")}
    return Schema(features | changes.pop("features", {}), labels, user="user", item="item", time="when", **changes)


@pytest.fixture
def log() -> pd.DataFrame:
    """400 rows."""
    return small_log()


@pytest.fixture
def schema() -> Schema:
    """Of the small log."""
    return small_schema()


@pytest.fixture
def parquet(tmp_path) -> Callable[..., str]:
    """Writes a frame as a folder of Parquet files with small row groups."""

    def write(frame: pd.DataFrame, files: int = 2, group: int = 50) -> str:
        folder = tmp_path / "log"
        folder.mkdir()
        for i, part in enumerate(np.array_split(np.arange(len(frame)), files)):
            frame.iloc[part].to_parquet(folder / f"part{i}.parquet", row_group_size=group, index=False)
        return str(folder)

    return write
