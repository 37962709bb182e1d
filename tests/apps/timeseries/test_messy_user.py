"""What a new user types and hands over works, or gives one line that says what to do."""

from __future__ import annotations

import pandas as pd
import pytest

from apps.cli import main
from apps.errors import UserError
from apps.timeseries import APP
from apps.timeseries.forecaster import Forecaster


@pytest.mark.parametrize("levels", ["0.1,0.5,0.9", "[0.1,0.5,0.9]", "0.9, 0.5,0.1"])
def test_lists_need_no_brackets(ts, segmoe_run, waves, tmp_path, levels: str) -> None:
    out = tmp_path / "out.csv"
    done = ts("predict", "--input", waves, "--ckpt_path", segmoe_run, "--quantiles", levels, "--output", out)
    assert (done.code, done.err) == (0, "")
    columns = ["unique_id", "ds", "SegMoE", "SegMoE-lo-80", "SegMoE-median", "SegMoE-hi-80"]
    assert list(pd.read_csv(out)) == columns


def test_one_value_is_a_list_of_one(ts, segmoe_run, waves, tmp_path) -> None:
    out = tmp_path / "out.csv"
    done = ts("predict", "--input", waves, "--ckpt_path", segmoe_run, "--quantiles=0.5", "--output", out)
    assert (done.code, done.err) == (0, "")
    assert list(pd.read_csv(out)) == ["unique_id", "ds", "SegMoE", "SegMoE-median"]


def test_wrong_levels_are_one_line(capsys) -> None:
    assert main(APP, ["predict", "--input", "x.csv", "--quantiles", "0.1,high"]) == 2
    assert capsys.readouterr().err == "error: quantiles=high: expected a float\n"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data__horizon": 5000}, "error: data.horizon=5000: no series is long enough"),
        ({"data__corpora": "{nope.jsonl: 1}"}, "error: nope.jsonl: no such file or folder"),
    ],
)
def test_data_that_cannot_be_trained_on_leaves_no_run(ts, small, tmp_path, change, reason: str) -> None:
    done = ts("train", *small(tmp_path, **change))
    assert done.code == 2
    assert done.err.startswith(reason)
    assert not (tmp_path / "timeseries").exists()


def test_centroids_of_another_model_are_one_short_line(ts, small, segmoe_run, tmp_path) -> None:
    flags = small(tmp_path, model__name="moirai_moe", model__moirai_moe__centroids_from=segmoe_run)
    done = ts("train", *flags)
    assert done.code == 2
    assert "of another architecture" in done.err
    assert len(done.err) < 500


@pytest.mark.parametrize(
    ("asked", "reason"),
    [({"h": 2.5}, "h=2.5: must be a whole number"), ({"quantiles": 0.5}, r"quantiles=0.5: must be a list")],
)
def test_numbers_of_the_wrong_kind_are_one_line(segmoe_run, waves, asked: dict, reason: str) -> None:
    forecaster = Forecaster.from_checkpoint(segmoe_run)
    with pytest.raises(UserError, match=reason):
        forecaster.predict(waves, **asked)


def test_a_whole_float_is_a_horizon(segmoe_run, waves) -> None:
    assert len(Forecaster.from_checkpoint(segmoe_run).predict(waves, h=4.0)) == 3 * 4
