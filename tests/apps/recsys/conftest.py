"""Small logs that several files use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from apps.recsys import APP
from apps.recsys.schema import FeatureSpec, LabelSpec, Schema
from tests.apps.conftest import Result, flags_of, run

TINY = {
    "data.rows": 2000,
    "data.batch_size": 200,
    "data.eval_batch_size": 1000,
    "data.embed_dim": 4,
    "model.tower.units": "[8]",
    "model.mmoe.experts.units": "[8]",
    "model.ple.experts.units": "[8]",
    "model.home.experts.units": "[8]",
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": 1,
    "trainer.limit_train_batches": 4,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": "false",
    "run.report": "false",
}
"""A second of training; what the tests rely on is written out, so that other defaults change nothing."""


run_app = functools.partial(run, app=APP)
"""Runs a command line of the app in this process."""


@pytest.fixture(scope="session")
def rec() -> Callable[..., Result]:
    """Runs a command line of the app in this process."""
    return run_app


@pytest.fixture(scope="session")
def small() -> Callable[..., list[str]]:
    """Flags of a run that takes a second; keyword arguments change them, `__` for dots."""
    return flags_of(TINY)


@pytest.fixture(scope="session")
def home_run(rec, small, tmp_path_factory) -> Path:
    """The folder of a run of HoME; tests only read it."""
    root = tmp_path_factory.mktemp("home")
    done = rec("train", *small(root, model__name="home", run__name="home"))
    assert (done.code, done.err) == (0, "")
    return root / "recsys" / "home"


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
