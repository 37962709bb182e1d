"""metrics.csv: appended to while training goes on, whole at the end, continued when a run is resumed."""

from __future__ import annotations

import csv

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apps.curves import CurveLogger, read_curves


def log(logger: CurveLogger, steps: range) -> None:
    """As a training does: the loss at every other step, validation at every fourth."""
    for step in steps:
        if step % 2:
            logger.log_metrics({"train/loss": 1 / (step + 1), "epoch": step // 4}, step)
        if step % 4 == 3:
            logger.log_metrics({"val/accuracy": step / 3, "epoch": step // 4}, step)


def test_rows_are_there_at_once_and_merged_by_step(tmp_path):
    logger = CurveLogger(tmp_path)
    assert read_curves(logger.file) == []
    logger.log_metrics({"a": 1.0}, 0)
    assert read_curves(logger.file) == [{"step": 0, "a": 1.0}]
    logger.log_metrics({"b": 2.0}, 0)
    logger.log_metrics({"a": 0.1 + 0.2}, 7)
    logger.log_metrics({"b": -1e-20}, 7)
    assert read_curves(logger.file) == [{"step": 0, "a": 1.0, "b": 2.0}, {"step": 7, "a": 0.3, "b": -1e-20}]


def test_the_finished_file_has_one_row_per_step_and_sorted_columns(tmp_path):
    logger = CurveLogger(tmp_path)
    log(logger, range(12))
    logger.finalize("success")
    with open(logger.file, newline="") as text:
        rows = list(csv.DictReader(text))
    assert list(rows[0]) == ["step", "epoch", "train/loss", "val/accuracy"]
    assert [row["step"] for row in rows] == ["1", "3", "5", "7", "9", "11"]
    assert rows[0]["val/accuracy"] == ""
    assert rows[1]["val/accuracy"] == "1"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(checkpoint=st.integers(0, 30), killed=st.integers(0, 30), cut=st.integers(0, 25))
def test_a_run_killed_anywhere_ends_with_the_same_file(tmp_path, checkpoint, killed, cut):
    whole = CurveLogger(tmp_path / "whole")
    log(whole, range(30))
    whole.finalize("success")

    first = CurveLogger(tmp_path / f"{checkpoint}-{killed}-{cut}")
    log(first, range(max(checkpoint, killed)))
    if first.file.is_file() and killed > checkpoint + 1:  # while the last row, of a later step, was being written
        *whole_rows, last = first.file.read_text().splitlines(keepends=True)
        first.file.write_text("".join([*whole_rows, last[: max(0, len(last) - cut)]]))
    second = CurveLogger(first.folder)
    second.continue_from(checkpoint)
    log(second, range(checkpoint, 30))
    second.finalize("success")
    assert second.file.read_text() == whole.file.read_text()


@pytest.mark.parametrize("half", ["2", "23", "23,", "23,0.1"])
def test_a_row_that_was_being_written_is_left_out(tmp_path, half):
    (tmp_path / "metrics.csv").write_text(f"step,a,b\n1,0.5,0.25\n{half}")
    assert read_curves(tmp_path / "metrics.csv") == [{"step": 1, "a": 0.5, "b": 0.25}]


def test_nothing_logged_is_no_file(tmp_path):
    CurveLogger(tmp_path).finalize("failed")
    assert not list(tmp_path.iterdir())


def test_without_a_step_rows_are_counted(tmp_path):
    logger = CurveLogger(tmp_path)
    for value in (1.0, 2.0):
        logger.log_metrics({"a": value})
    assert read_curves(logger.file) == [{"step": 0, "a": 1.0}, {"step": 1, "a": 2.0}]


def test_nan_and_infinity_come_back(tmp_path):
    logger = CurveLogger(tmp_path)
    logger.log_metrics({"a": float("nan"), "b": float("inf")}, 1)
    (row,) = read_curves(logger.file)
    assert row["a"] != row["a"]
    assert row["b"] == float("inf")


def test_logging_costs_the_same_late_in_a_run(tmp_path, monkeypatch):
    """Only a new metric and the end rewrite the file."""
    logger = CurveLogger(tmp_path)
    written = []
    monkeypatch.setattr("apps.curves.write_atomic", lambda path, text: written.append(path.write_text(text)))
    log(logger, range(400))
    assert len(written) == 2
    logger.finalize("success")
    assert len(written) == 3
    assert len(read_curves(logger.file)) == 200


@pytest.mark.parametrize("text", ["", "step,a\n", "step,a"])
def test_a_file_without_rows_is_no_curve(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    assert read_curves(tmp_path / "metrics.csv") == []
