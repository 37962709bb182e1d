"""Scores of rows never seen, and the best candidates of every user."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from apps.recsys.generated import TASKS, generate
from apps.recsys.loading import load_trained

COLUMNS = [f"p_{task}" for task in TASKS]


@pytest.fixture
def candidates(tmp_path):
    """Rows without labels, of users and items of whom some were never seen."""
    frame = generate(300, seed=5).drop(columns=[*TASKS, *(f"bayes_{task}" for task in TASKS)])
    frame.loc[:20, "user_id"] = 10**9
    frame.loc[10:30, "item_id"] = -7
    frame.to_parquet(tmp_path / "candidates.parquet")
    return frame


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_every_row_has_a_score(rec, home_run, candidates, tmp_path, suffix):
    output = tmp_path / f"scores.{suffix}"
    done = rec("predict", "--ckpt_path", home_run, "--input", tmp_path / "candidates.parquet", "--output", output)
    assert (done.code, done.err) == (0, "")
    read = {"csv": pd.read_csv, "json": pd.read_json, "parquet": pd.read_parquet}[suffix]
    scores = read(output)
    assert scores["user_id"].tolist() == candidates["user_id"].tolist()
    values = scores[COLUMNS].to_numpy()
    assert ((values > 0) & (values < 1)).all()
    assert (np.diff(values, axis=1) <= 0).all()  # each step needs the one before
    trained = load_trained(home_run / "checkpoints" / "best.ckpt")
    expected = trained.score(trained.transform.encode(candidates, labels=False))
    np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_the_best_candidates_of_every_user(rec, home_run, candidates, tmp_path):
    options = ["--ckpt_path", home_run, "--input", tmp_path / "candidates.parquet"]
    done = rec("predict", *options, "--top=3", "--by=like", "--output", tmp_path / "top.json")
    assert (done.code, done.err) == (0, "")
    rows = pd.DataFrame(json.loads((tmp_path / "top.json").read_text()))
    counts = candidates["user_id"].value_counts()
    for user, best in rows.groupby("user_id"):
        assert best["rank"].tolist() == list(range(1, min(3, counts[user]) + 1))
        assert best["p_like"].is_monotonic_decreasing
    rec("predict", *options, "--output", tmp_path / "all.csv")
    every = pd.read_csv(tmp_path / "all.csv")
    assert rows.loc[rows["rank"] == 1].set_index("user_id")["p_like"].sort_index().tolist() == pytest.approx(
        every.groupby("user_id")["p_like"].max().tolist(), rel=1e-4
    )


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--top=2", "--by=buy"], "by=buy: no such task; choose one of click, long_view, like, follow"),
        (["--top=0"], "top=0: must be at least 1, or null"),
        (["--output=scores.txt"], "must end in .csv, .parquet or .json"),
    ],
)
def test_mistakes_are_one_line(rec, home_run, candidates, tmp_path, options, line):
    argv = [
        "--ckpt_path",
        home_run,
        "--input",
        tmp_path / "candidates.parquet",
        "--output",
        tmp_path / "x.csv",
        *options,
    ]
    assert line in rec("predict", *argv).line


def test_a_missing_column_is_named_and_nothing_is_written(rec, home_run, candidates, tmp_path):
    candidates.drop(columns="item_id").to_parquet(tmp_path / "candidates.parquet")
    options = ["--input", tmp_path / "candidates.parquet", "--output", tmp_path / "x.csv"]
    assert "item_id" in rec("predict", "--ckpt_path", home_run, *options).line
    assert not (tmp_path / "x.csv").exists()
