"""The report of a forecaster: one page of errors, forecasts, and what its experts handle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from apps.timeseries import report
from apps.timeseries.evaluation import calibrate_on_validation, evaluate
from apps.timeseries.examples import choose_examples
from apps.timeseries.loading import Trained
from apps.timeseries.model_settings import ModelConfig, SegMoEConfig, TimeMoEConfig
from apps.timeseries.models.build import build_model
from apps.timeseries.settings import DataConfig, TimeseriesConfig
from apps.timeseries.verbs import make_data
from moecore.scores import LinearScore
from tests.apps import pages

BEFORE = ["Accuracy", "Learning curves", "Forecasts beside the truth", "Error by step of the horizon", "Calibration"]
EXPERTS = [
    "Which experts handle which patterns",
    "What experts see, and when",
    "Experts inside single contexts",
    "Expert load",
]


def read(path: Path) -> pages.Page:
    page = pages.Page(path.read_text())
    page.check_self_contained()
    return page


def frame(count: int, length: int, times: object = "h", missing: float = 0.0) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    ds = np.arange(length) if times is None else pd.date_range("2024-01-01", periods=length, freq=times)
    frames = []
    for i in range(count):
        y = i + np.sin(2 * np.pi * np.arange(length) / 24) + 0.2 * rng.standard_normal(length)
        y[rng.random(length) < missing] = np.nan
        frames.append(pd.DataFrame({"unique_id": f"<b>{i:03d}</b> & $x$", "ds": ds, "y": y}))
    return pd.concat(frames)


def untrained(tmp_path: Path, table: pd.DataFrame, name: str = "segmoe", dense: bool = False, **data):
    """(model with fresh weights, its evaluation, its data)."""
    file = tmp_path / "data.parquet"
    table.to_parquet(file)
    config = TimeseriesConfig()
    config.data = DataConfig(source=str(file), **({"context": 24, "horizon": 6} | data))
    seg = SegMoEConfig(patch_size=4, d_model=8, d_ff=8, num_layers=2, num_heads=2, num_experts=3, segments=(2, 3))
    time = TimeMoEConfig(hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2, horizons=(1, 4))
    config.model = ModelConfig(name=name, dense=dense, segmoe=seg, timemoe=time)
    config.trainer.accelerator = "cpu"
    made = make_data(config)
    torch.manual_seed(0)
    model = build_model(config.model, made.spec).eval()
    trained = Trained(model, config, made.spec, None, calibrate_on_validation(model, made))
    return trained, evaluate(trained.title, model, made, trained.intervals, progress=False), made


@pytest.fixture(scope="module")
def page(ts, segmoe_run, tmp_path_factory) -> pages.Page:
    """Of a tiny training, by the command line."""
    target = tmp_path_factory.mktemp("report") / "deep" / "page.html"
    done = ts("report", "--ckpt_path", segmoe_run, "--output", target)
    assert (done.code, done.err) == (0, "")
    assert f"report: {target}" in done.out
    return read(target)


def test_the_page_has_all_sections_and_needs_nothing_else(page):
    assert page.headings[0].endswith(": SegMoE")
    assert page.headings[1:] == [*BEFORE, "Error per series", *EXPERTS, "All figures"]
    assert len(page.sources) >= 10


def test_its_figures_are_those_of_the_test(page, segmoe_run):
    figures = json.loads((segmoe_run / "test.json").read_text())
    cells = dict(zip(page.cells, page.cells[1:], strict=False))
    assert float(cells["h6/mae"]) == pytest.approx(figures["h6/mae"], abs=1e-3)
    assert cells["params_total"] == f"{figures['params_total']:,}"
    assert f"{figures['h6/mse']:.3g}" in page.words
    below = figures["h6/mae"] < figures["h6/SeasonalNaive/mae"]
    change = abs(figures["h6/mae"] / figures["h6/SeasonalNaive/mae"] - 1)
    assert f"{change:.1%} {'below' if below else 'above'} that of SeasonalNaive" in page.words
    assert {"SegMoE", "SeasonalNaive", "DLinear"} <= set(page.cells)


def test_series_are_listed_from_the_worst_on(page, segmoe_run):
    errors = json.loads((segmoe_run / "test.json").read_text())["details"]["h6/SegMoE"]["per_series"]["mase"]
    order = sorted(errors, key=errors.get, reverse=True)
    assert [cell for cell in page.cells if cell in errors] == order


@pytest.mark.parametrize(("name", "changes"), [("ldl_moe", {"model__ldl_moe__pattern": "true"}), ("timemoe", {})])
def test_pages_of_the_other_models(trained_runs, ts, tmp_path, name, changes):
    run = trained_runs(model__name=name, run__name=name, **changes)
    assert ts("report", "--ckpt_path", run, "--output", tmp_path / "page.html").code == 0
    page = read(tmp_path / "page.html")
    assert page.headings[1:] == [*BEFORE, "Error per series", *EXPERTS, "All figures"]
    assert ("What the forecast above is the sum of" in page.words) == (name == "ldl_moe")
    assert ("Weights of the experts" in page.words) == (name == "ldl_moe")
    assert ("coloured by the expert" in page.words) == (name != "ldl_moe")
    if name == "ldl_moe":
        assert {"trend", "seasonality", "changepoint", "volatility"} <= set(page.cells)


@pytest.mark.parametrize(("name", "dense"), [("segmoe", True), ("seasonal_naive", False)])
def test_models_without_experts_have_a_shorter_page(tmp_path, name, dense):
    parts = untrained(tmp_path, frame(2, 150), name, dense)
    page = read(report.write_report(*parts, tmp_path / "report.html"))
    assert page.headings[1:] == [*BEFORE, "Error per series", "All figures"]


def test_one_series_with_gaps_and_times_that_are_numbers(tmp_path):
    """No calendar, no other series or frequency: nothing to tell experts apart by."""
    parts = untrained(tmp_path, frame(1, 200, None, missing=0.3))
    page = read(report.write_report(*parts, tmp_path / "report.html"))
    assert page.headings[1:] == [*BEFORE, *EXPERTS, "All figures"]
    assert "Share of the label" not in page.words
    assert "nan" not in [cell.lower() for cell in page.cells]


def test_many_series_are_cut_to_the_worst_and_one_step_has_no_course(tmp_path):
    parts = untrained(tmp_path, frame(45, 60, "D"), horizon=1)
    page = read(report.write_report(*parts, tmp_path / "report.html"))
    assert "Error by step of the horizon" not in page.headings
    assert "The 30 series with the largest errors, of 45." in page.words
    assert "the 30 of 45 that depart most" in page.words
    assert len({cell for cell in page.cells if cell.startswith("<b>")}) == 30


def test_every_horizon_has_its_rows_and_dead_experts_are_named(tmp_path):
    trained, evaluation, data = untrained(tmp_path, frame(2, 200), test_horizons=(4, 12))
    for module in trained.model.modules():
        if isinstance(module, LinearScore):
            torch.nn.init.zeros_(module.weight)  # of equal scores the first expert wins
    page = read(report.write_report(trained, evaluation, data, tmp_path / "report.html"))
    assert "At 4 steps the mean absolute error is" in page.words
    assert page.cells.count("4") >= 3
    assert page.cells.count("12") >= 3
    assert "test windows of 12 steps" in page.words
    assert "No curves: metrics.csv is not beside the checkpoint." in page.words
    assert "block 0: experts 1, 2 got nothing." in page.words
    assert "No expert is dead" not in page.words


def test_examples_are_the_best_the_middle_and_the_worst_in_their_own_units(tmp_path):
    trained, _, data = untrained(tmp_path, frame(9, 150))
    windows = data.windows("test", 6)
    scales = data.store.naive_errors()
    examples = choose_examples(trained, windows, np.arange(len(windows)), scales)
    assert [one.label.rsplit(", ", 1)[1] for one in examples] == ["best", "median", "worst"] * 3
    assert len({one.series.id for one in examples}) == 9
    errors = []
    for one in examples:
        truth = one.series.y[one.origin : one.origin + 6]
        number = data.store.series.index(one.series)
        mase = np.abs(truth - one.mean).mean() / data.store.std[number] / scales[number]
        assert float(one.label.split("MASE ")[1].split(",")[0]) == pytest.approx(mase, rel=0.01)
        assert np.allclose(one.naive, one.series.y[one.origin - 24 : one.origin - 18], atol=1e-4)
        errors.append(mase)
    assert max(errors[::3]) < min(errors[1::3]) <= max(errors[1::3]) < min(errors[2::3])
