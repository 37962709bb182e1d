"""A trained model in Python: DataFrames in, DataFrames out."""

from __future__ import annotations

import doctest
import os
import re

import numpy as np
import pandas as pd
import pytest

from apps.errors import UserError
from apps.timeseries.forecaster import Forecaster
from tests.apps.timeseries.conftest import hourly

COLUMNS = ["unique_id", "ds", "SegMoE", "SegMoE-lo-80", "SegMoE-median", "SegMoE-hi-80"]


@pytest.fixture(scope="module")
def forecaster(segmoe_run) -> Forecaster:
    return Forecaster.from_checkpoint(segmoe_run)


def test_the_example_of_the_docstring_runs(segmoe_run, tmp_path, monkeypatch):
    """As it stands there, on a run below runs/ and a file my.csv."""
    (tmp_path / "runs").symlink_to(segmoe_run.parents[1])
    hourly(2, 400).to_csv(tmp_path / "my.csv", index=False)
    monkeypatch.chdir(tmp_path)
    examples = doctest.DocTestParser().get_examples(Forecaster.__doc__)
    assert len(examples) == 6
    names: dict[str, object] = {}
    for example in examples:
        exec(example.source, names)
    assert list(names["forecasts"]) == COLUMNS
    assert len(names["forecasts"]) == 2 * 96
    assert list(names["errors"]) == ["unique_id", "ds", "cutoff", "y", *COLUMNS[2:]]
    assert len(names["errors"]) == 2 * 3 * 96


def test_predictions_continue_every_series(forecaster):
    df = hourly()
    found = forecaster.predict(df.sample(frac=1, random_state=0))
    assert list(found) == COLUMNS
    assert found["unique_id"].value_counts().to_dict() == {"s0": 6, "s1": 6, "s2": 6}  # the horizon of training
    for _, rows in found.groupby("unique_id"):
        assert rows["ds"].tolist() == list(pd.date_range("2024-01-07 06:00", periods=6, freq="h"))
        assert (rows["SegMoE-lo-80"] <= rows["SegMoE-median"]).all()
        assert (rows["SegMoE-median"] <= rows["SegMoE-hi-80"]).all()
    levels = found.groupby("unique_id")["SegMoE"].mean()
    assert [abs(levels[f"s{i}"] - 10 * (i + 1)) < 3 for i in range(3)] == [True] * 3


def test_files_and_wide_tables_are_taken_too(forecaster, waves):
    df = hourly()
    wide = df.pivot(index="ds", columns="unique_id", values="y").reset_index()
    from_frame = forecaster.predict(df, h=9)
    pd.testing.assert_frame_equal(forecaster.predict(wide, h=9), from_frame)
    pd.testing.assert_frame_equal(forecaster.predict(waves, h=9), from_frame)
    pd.testing.assert_frame_equal(forecaster.predict(str(waves), h=9), from_frame)


def test_several_frequencies_in_one_frame(forecaster):
    ends = {"h": "2024-01-02 16:00", "D": "2024-02-10", "MS": "2027-05-01", "W-SUN": "2024-10-13", "B": "2024-02-26"}
    frames = [
        pd.DataFrame({"unique_id": freq, "ds": pd.date_range("2024-01-01", periods=40, freq=freq), "y": np.arange(40)})
        for freq in ends
    ]
    found = forecaster.predict(pd.concat(frames), h=3)
    for freq, first in ends.items():
        own = found.loc[found["unique_id"] == freq, "ds"]
        assert own.tolist() == list(pd.date_range(first, periods=3, freq=freq))


def test_times_may_be_whole_numbers(forecaster):
    df = hourly(1).assign(ds=7 * np.arange(150))
    assert forecaster.predict(df, h=2)["ds"].tolist() == [1050, 1057]
    cut = forecaster.cross_validation(df, h=2)
    assert cut["cutoff"].tolist() == [7 * 147] * 2


def test_series_no_one_has_seen_and_short_ones(forecaster):
    y = [3.0, 1.0, 4.0, 1.0, 5.0]
    five = pd.DataFrame({"unique_id": "five", "ds": pd.date_range("2024-01-01", periods=5), "y": y})
    flat = five.assign(unique_id="flat", y=2.5)
    found = forecaster.predict(pd.concat([five, flat]), h=4)
    assert np.isfinite(found[COLUMNS[2:]].to_numpy()).all()
    assert (found.loc[found["unique_id"] == "flat", COLUMNS[2:]] == 2.5).all(axis=None)
    assert found.loc[found["unique_id"] == "five", "SegMoE"].between(-10, 20).all()


def test_quantiles_by_name_in_order(forecaster):
    found = forecaster.predict(hourly(1), h=3, quantiles=[0.95, 0.5, 0.05, 0.25])
    names = ["SegMoE-lo-90", "SegMoE-lo-50", "SegMoE-median", "SegMoE-hi-90"]
    assert list(found)[3:] == names
    assert (np.diff(found[names].to_numpy(), axis=1) >= 0).all()
    assert list(forecaster.predict(hourly(1), h=3, quantiles=[])) == COLUMNS[:3]


def test_cross_validation_is_prediction_from_the_past(forecaster):
    df = hourly(2)
    found = forecaster.cross_validation(df, h=5, n_windows=3, step_size=4)
    assert list(found) == ["unique_id", "ds", "cutoff", "y", *COLUMNS[2:]]
    cutoffs = sorted(found["cutoff"].unique())
    end = df["ds"].max()
    assert cutoffs == [end - pd.Timedelta(hours=hours) for hours in (13, 9, 5)]
    assert len(found) == 2 * 3 * 5
    for cutoff in cutoffs:
        part = found[found["cutoff"] == cutoff].reset_index(drop=True)
        before = forecaster.predict(df[df["ds"] <= cutoff], h=5)
        pd.testing.assert_frame_equal(part[COLUMNS], before[COLUMNS], rtol=1e-4)
    merged = found.merge(df, on=["unique_id", "ds"], suffixes=("", "_df"))
    assert len(merged) == len(found)
    assert (merged["y"] == merged["y_df"]).all()


def test_cross_validation_defaults_to_steps_of_one_horizon(forecaster):
    found = forecaster.cross_validation(hourly(1), n_windows=2)
    assert found["cutoff"].drop_duplicates().diff().dropna().tolist() == [pd.Timedelta(hours=6)]
    assert found["ds"].is_monotonic_increasing
    assert not found["ds"].duplicated().any()


def test_cross_validation_with_several_kinds_of_times_and_lengths(forecaster):
    """Series too short for an origin have fewer of them, or none."""
    numbers = pd.DataFrame({"unique_id": "n", "ds": np.arange(40), "y": np.arange(40.0)})
    days = pd.DataFrame({"unique_id": "d", "ds": pd.date_range("2024-01-01", periods=8), "y": np.arange(8.0)})
    short = days.iloc[:4].assign(unique_id="short")
    found = forecaster.cross_validation(pd.concat([days, short]), h=4, n_windows=2, step_size=3)
    assert found.groupby("unique_id").size().to_dict() == {"d": 8}
    both = forecaster.cross_validation(numbers, h=4, n_windows=2, step_size=3)
    assert both["cutoff"].drop_duplicates().tolist() == [32, 35]


def test_gaps_have_no_truth(forecaster):
    df = hourly(1)
    df.loc[[147, 149], "y"] = np.nan
    found = forecaster.cross_validation(df, h=6)
    assert found["y"].isna().tolist() == [False, False, False, True, False, True]
    assert np.isfinite(found["SegMoE"]).all()


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda f: f.predict(hourly(1), quantiles=[0.5, 1.0]), r"quantiles=\(0.5, 1.0\): must lie strictly between .*"),
        (lambda f: f.predict("nowhere.csv"), r"nowhere.csv: .*"),
        (lambda f: f.predict(hourly(1).drop(columns="y")), r".*column.*'y'.*"),
        (lambda f: f.predict(hourly(1), h=0), r"h=0: must be at least 1"),
        (lambda f: f.cross_validation(hourly(1), n_windows=0), r"n_windows=0, step_size=6: must be at least 1"),
        (lambda f: f.cross_validation(hourly(1), h=0), r"h=0: must be at least 1"),
        (lambda f: f.cross_validation(hourly(1), step_size=0), r"n_windows=1, step_size=0: must be at least 1"),
        (lambda f: f.cross_validation(hourly(1, 10), h=10), r"h=10: no series has more points than that .*"),
        (lambda f: Forecaster.from_checkpoint("nowhere"), r"ckpt_path=nowhere: no such checkpoint or run folder"),
        (lambda f: Forecaster.from_checkpoint("last", "nowhere"), r"ckpt_path=last: no run with a checkpoint in .*"),
    ],
)
def test_mistakes_are_one_line(forecaster, call, line):
    with pytest.raises(UserError) as refused:
        call(forecaster)
    assert re.fullmatch(line, str(refused.value)), str(refused.value)


def test_the_newest_run_is_the_last(segmoe_run):
    last = Forecaster.from_checkpoint("last", str(segmoe_run.parents[1]))
    assert last.trained.path == segmoe_run / "checkpoints" / "best.ckpt"
    assert os.path.samefile(last.trained.path, Forecaster.from_checkpoint(last.trained.path).trained.path)
