"""What a new user types and hands over works, or gives one line that says what to do."""

from __future__ import annotations

import pandas as pd
import pytest

from apps.cli import main
from apps.timeseries import APP


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
