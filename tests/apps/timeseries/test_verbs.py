"""Every verb on tiny runs of every model, from the command line."""

from __future__ import annotations

import csv
import json
import math
import os

import numpy as np
import pandas as pd
import pytest
import yaml

from apps import tree
from apps.timeseries.settings import TimeseriesConfig
from tests.apps.timeseries.conftest import RECIPE, differences, hourly

MODELS = {
    "segmoe": "SegMoE",
    "timemoe": "TimeMoE",
    "moirai_moe": "MoiraiMoE",
    "ldl_moe": "LDLMoE",
    "dlinear": "DLinear",
}
MEASURES = ("mse", "mae", "mase", "smape", "crps", "coverage_80")


def figures(path) -> dict:
    """Figures of a file without times, NaN as text so that they compare."""
    values = json.loads(path.read_text(), parse_constant=str)
    assert values.pop("windows_per_second") > 0
    return values


def test_the_tiny_recipe_trains_and_reports(ts, tmp_path):
    options = ["--run.root", tmp_path, "--trainer.accelerator=cpu", "--trainer.limit_train_batches=2"]
    done = ts("train", "-c", RECIPE, *options, "--json", tmp_path / "t.json", "--data.eval_batch_size=512")
    assert (done.code, done.err) == (0, "")
    run = tmp_path / "timeseries" / "tiny"
    assert figures(tmp_path / "t.json") == figures(run / "test.json")
    assert run.joinpath("report.html").stat().st_size > 10_000
    for title in ("SegMoE", "SeasonalNaive", "DLinear"):
        assert f" {title} " in done.out
    config = tree.build(TimeseriesConfig, yaml.safe_load((run / "config.yaml").read_text()))
    assert (config.data.context, config.model.segmoe.patch_size) == (48, 12)


@pytest.mark.parametrize("name", MODELS)
def test_a_trained_model_is_evaluated_again(ts, trained_runs, tmp_path, name):
    """With the figures of its training's end, to the last bit."""
    run = trained_runs(run__name=name, model__name=name)
    done = ts("evaluate", "--ckpt_path", run, "--json", tmp_path / "e.json")
    assert (done.code, done.err) == (0, "")
    found = figures(tmp_path / "e.json")
    assert not list(differences(found, figures(run / "test.json")))
    assert all(math.isfinite(found[f"h6/{measure}"]) for measure in MEASURES)
    linear = "DLinear (closed form)" if name == "dlinear" else "DLinear"
    assert found[f"h6/{linear}/mse"] != found["h6/mse"]  # fitted, not trained
    assert found["h6/SeasonalNaive/mse"] > 0
    assert found["details"][f"h6/{MODELS[name]}"]["per_series"]["mse"].keys() == {"s0", "s1", "s2"}
    assert f"test: {run}/checkpoints/best.ckpt" in done.out
    with open(run / "metrics.csv", newline="") as text:
        rows = list(csv.DictReader(text))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)
    assert any(float(row["val/mae"]) > 0 for row in rows if row["val/mae"])
    assert any(column.startswith("load/") for column in rows[0]) == (name != "dlinear")


@pytest.mark.parametrize("name", MODELS)
def test_a_trained_model_predicts(ts, trained_runs, waves, tmp_path, name):
    run, output = trained_runs(run__name=name, model__name=name), tmp_path / "deep" / "f.csv"
    done = ts("predict", "--ckpt_path", run, "--input", waves, "--output", output, "--horizon=9")
    assert (done.code, done.err) == (0, "")
    assert f"3 series, 9 points each: {output}" in done.out
    found, title = pd.read_csv(output), MODELS[name]
    assert list(found) == ["unique_id", "ds", title, f"{title}-lo-80", f"{title}-median", f"{title}-hi-80"]
    assert len(found) == 27
    assert np.isfinite(found.iloc[:, 2:].to_numpy()).all()
    assert (np.diff(found.iloc[:, 3:].to_numpy(), axis=1) >= 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_trains_too(ts, small, tmp_path, name):
    """As on GPUs by default; what is tested afterwards runs in full precision."""
    done = ts("train", *small(tmp_path, run__name="half", model__name=name, trainer__precision="bf16-mixed"))
    assert (done.code, done.err) == (0, "")
    assert math.isfinite(figures(tmp_path / "timeseries" / "half" / "test.json")["h6/mse"])


@pytest.mark.parametrize("name", [name for name in MODELS if name != "dlinear"])
def test_dense_twins_train_too(ts, small, load, tmp_path, name):
    done = ts("train", *small(tmp_path, run__name="twin", model__name=name, model__dense="true"))
    assert (done.code, done.err) == (0, "")
    if name == "moirai_moe":  # whose dense run is where a sparse one may start
        folder, limit = tmp_path / "timeseries" / "twin", {"trainer__limit_train_batches": 1}
        options = {"model__name": name, "model__moirai_moe__centroids_from": folder, "optim__lr": 1e-9} | limit
        done = ts("train", *small(tmp_path, run__name="sparse", **options))
        assert (done.code, done.err) == (0, "")
        dense, sparse = (load(tmp_path / "timeseries" / run, "best.ckpt")["state_dict"] for run in ("twin", "sparse"))
        shared = [key for key in dense.keys() & sparse.keys() if "attention" in key]
        assert shared
        for key in shared:
            np.testing.assert_allclose(dense[key], sparse[key], atol=1e-6)


def test_the_same_seed_gives_the_same_run(ts, small, segmoe_run, load, tmp_path):
    for seed, same in ((0, True), (1, False)):
        assert ts("train", *small(tmp_path, run__name=f"seed{seed}", run__seed=seed)).code == 0
        run = tmp_path / "timeseries" / f"seed{seed}"
        assert (not list(differences(load(run)["state_dict"], load(segmoe_run)["state_dict"]))) == same
        assert (figures(run / "test.json") == figures(segmoe_run / "test.json")) == same


MESSY = """unique_id,y,ds
gaps,1.5,2024-01-01 03:00
gaps,2.5,2024-01-01 00:00
flat,4.25,2023-03-01
five,3,2024-01-05
gaps,,2024-01-01 07:00
gaps,0.5,2024-01-01 01:00
gaps,0.75,2024-01-01 05:00
flat,4.25,2023-01-01
flat,4.25,2023-02-01
five,1,2024-01-01
five,4,2024-01-02
five,1,2024-01-03
five,5,2024-01-04
gaps,2.0,2024-01-01 06:00
flat,4.25,2023-04-01
flat,4.25,2023-05-01
"""


def test_a_messy_file_is_forecast_whole(ts, segmoe_run, tmp_path):
    """Unsorted, with gaps, a gap at the end, three frequencies, a constant series and one of five points."""
    (tmp_path / "messy.csv").write_text(MESSY)
    options = ["--input", tmp_path / "messy.csv", "--horizon=3", "--quantiles=[0.9,0.05,0.5]"]
    options += ["--output", tmp_path / "f.csv", "--plots", tmp_path / "plots"]
    done = ts("predict", "--ckpt_path", segmoe_run, *options)
    assert (done.code, done.err) == (0, "")
    found = pd.read_csv(tmp_path / "f.csv")
    assert list(found)[2:] == ["SegMoE", "SegMoE-lo-90", "SegMoE-median", "SegMoE-hi-80"]
    times = found.groupby("unique_id", sort=False)["ds"].agg(list).to_dict()
    assert {name: [str(pd.Timestamp(time)) for time in own] for name, own in times.items()} == {
        "gaps": ["2024-01-01 08:00:00", "2024-01-01 09:00:00", "2024-01-01 10:00:00"],
        "flat": ["2023-06-01 00:00:00", "2023-07-01 00:00:00", "2023-08-01 00:00:00"],
        "five": ["2024-01-06 00:00:00", "2024-01-07 00:00:00", "2024-01-08 00:00:00"],
    }
    assert np.isfinite(found.iloc[:, 2:].to_numpy()).all()
    assert (found.loc[found["unique_id"] == "flat"].iloc[:, 2:] == 4.25).all(axis=None)
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == ["five.png", "flat.png", "gaps.png"]


def test_wide_files_and_folders_are_forecast(ts, segmoe_run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    wide = hourly(2).pivot(index="ds", columns="unique_id", values="y").reset_index().rename(columns={"ds": "date"})
    wide.to_csv(folder / "hours.csv", index=False)
    numbers = pd.DataFrame({"unique_id": "n", "ds": np.arange(30), "y": np.sin(np.arange(30))})
    numbers.to_parquet(folder / "numbers.parquet")
    done = ts("predict", "--ckpt_path", segmoe_run, "--input", folder, "--output", tmp_path / "f.json")
    assert (done.code, done.err) == (0, "")
    rows = json.loads((tmp_path / "f.json").read_text())
    assert [row["unique_id"] for row in rows] == ["s0"] * 6 + ["s1"] * 6 + ["n"] * 6
    assert [row["ds"] for row in rows[12:]] == [30, 31, 32, 33, 34, 35]


@pytest.fixture(scope="module")
def with_covariates(ts, small, tmp_path_factory):
    """A run of Moirai-MoE on series with a covariate that is known ahead, and files of both."""
    root = tmp_path_factory.mktemp("covariates")
    frame = hourly(2)
    frame["price"] = np.sin(np.arange(len(frame)))
    frame.to_csv(root / "past.csv", index=False)
    times = pd.date_range("2024-01-07 06:00", periods=6, freq="h")
    future = pd.concat([pd.DataFrame({"unique_id": f"s{i}", "ds": times, "price": i + 1.0}) for i in range(2)])
    future.to_csv(root / "future.csv", index=False)
    changes = {"data__source": root / "past.csv", "data__futr_columns": "[price]"}
    done = ts("train", *small(root, run__name="cov", model__name="moirai_moe", **changes))
    assert (done.code, done.err) == (0, "")
    return root


def test_training_says_which_columns_a_model_does_not_look_at(ts, small, with_covariates, tmp_path):
    changes = {"data__source": with_covariates / "past.csv", "data__futr_columns": "[price]"}
    done = ts("train", *small(tmp_path, **changes))
    assert "note: segmoe looks at no covariates (price); moirai_moe does" in done.out


def test_covariates_of_the_future_are_asked_for_and_used(ts, with_covariates, tmp_path):
    root = with_covariates
    options = ["--ckpt_path", root / "timeseries" / "cov", "--input", root / "past.csv", "--output", tmp_path / "f.csv"]
    line = ts("predict", *options).line
    assert line == "series s0: price known for 0 of 6 points after its end; give them with --future"
    assert not (tmp_path / "f.csv").exists()
    forecasts = []
    for add in (0, 5):
        future = pd.read_csv(root / "future.csv")
        future.assign(price=future["price"] + add).to_csv(tmp_path / "future.csv", index=False)
        done = ts("predict", *options, "--future", tmp_path / "future.csv")
        assert (done.code, done.err) == (0, "")
        forecasts.append(pd.read_csv(tmp_path / "f.csv")["MoiraiMoE"].to_numpy())
    assert not np.allclose(*forecasts)
    line = ts("predict", *options, "--future", tmp_path / "future.csv", "--horizon=7").line
    assert line == "series s0: price known for 6 of 7 points after its end; give them with --future"
    line = ts("predict", *options, "--future", tmp_path / "nowhere.csv").line
    assert line.startswith(f"{tmp_path / 'nowhere.csv'}: ")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--input=nowhere.csv"], "nowhere.csv: "),
        (["--input={empty}"], "{empty}: "),
        (["--input={waves}", "--data.target_column=load"], "{waves}: "),
        (["--input={waves}", "--output={folder}/f.txt"], "output='{folder}/f.txt': must end in "),
        (["--input={waves}", "--output={waves}/f.csv"], "{waves}: File exists; give another path"),
        (["--input={waves}", "--quantiles=[1]"], "quantiles=(1.0,): must lie strictly between 0 and 1"),
        (["--input={waves}", "--model.segmoe.d_ff=12"], "{run}/checkpoints/best.ckpt: of another architecture"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(ts, segmoe_run, waves, tmp_path, argv, line):
    (tmp_path / "empty.csv").write_text("unique_id,ds,y\n")
    names = {"waves": waves, "folder": tmp_path, "empty": tmp_path / "empty.csv", "run": segmoe_run}
    given = [text.format(**names) for text in argv]
    found = ts("predict", "--ckpt_path", segmoe_run, "--output", tmp_path / "f.csv", *given).line
    assert found.startswith(line.format(**names)), found


def test_seasonal_naive_needs_no_training(ts, small, waves, tmp_path):
    options = small(tmp_path, model__name="seasonal_naive")
    done = ts("evaluate", *options, "--json", tmp_path / "e.json")
    assert (done.code, done.err) == (0, "")
    found = figures(tmp_path / "e.json")
    assert all(math.isfinite(found[f"h6/{measure}"]) for measure in MEASURES)
    assert "h6/SeasonalNaive/mse" not in found  # not beside itself
    line = ts("train", *options).line
    assert line == "model.name=seasonal_naive: learns nothing; `evaluate` measures it without training"
    assert not (tmp_path / "timeseries").exists()
    predict = ["predict", *options, "--input", waves, "--output", tmp_path / "f.csv"]
    assert ts(*predict).line.startswith("horizon: is required")
    assert ts(*predict, "--horizon=30").code == 0
    frame, past = pd.read_csv(tmp_path / "f.csv"), hourly()
    last = past.loc[past["unique_id"] == "s0", "y"].to_numpy()[-24:]
    found = frame.loc[frame["unique_id"] == "s0", "SeasonalNaive"]
    np.testing.assert_allclose(found, np.r_[last, last[:6]], rtol=1e-5)


def test_a_search_trains_its_trials(ts, small, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("model.segmoe.num_experts: {choices: [2, 3]}\noptim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}\n")
    argv = small(tmp_path, run__name="s")
    done = ts("search", *argv, "--space", space, "--num_trials=2", "--json", tmp_path / "best.json")
    assert (done.code, done.err) == (0, "")
    folder = tmp_path / "timeseries" / "search-s"
    with open(folder / "trials.csv", newline="") as text:
        rows = list(csv.DictReader(text))
    assert [row["state"] for row in rows] == ["COMPLETE"] * 2
    values = [float(row["value"]) for row in rows]
    best = json.loads((tmp_path / "best.json").read_text())["best"]
    assert best["trial"] == int(np.argmin(values))  # the least error, not the largest
    with open(folder / f"trial-{best['trial']}" / "metrics.csv", newline="") as text:
        errors = [float(row["val/mae"]) for row in csv.DictReader(text) if row["val/mae"]]
    assert min(errors) == pytest.approx(min(values))
    config = tree.build(TimeseriesConfig, yaml.safe_load((folder / "best.yaml").read_text()))
    assert config.optim.lr == pytest.approx(float(rows[best["trial"]]["optim.lr"]))


@pytest.mark.skipif(not RECIPE.with_name("space.yaml").is_file(), reason="no configs/timeseries/space.yaml")
def test_the_space_of_the_app_suits_its_tiny_recipe(ts, tmp_path):
    argv = ["-c", RECIPE, "--space", RECIPE.with_name("space.yaml"), "--run.root", tmp_path, "--num_trials=2"]
    done = ts("search", *argv, "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1")
    assert (done.code, done.err) == (0, "")


def test_the_report_can_be_written_again(ts, segmoe_run, tmp_path):
    done = ts("report", "--ckpt_path", segmoe_run, "--output", tmp_path / "deep" / "r.html")
    assert (done.code, done.err) == (0, "")
    page = (tmp_path / "deep" / "r.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html")
    assert f"report: {tmp_path / 'deep' / 'r.html'}" in done.out


def test_export_is_compared_with_the_model(ts, trained_runs, tmp_path, exporting):
    run = trained_runs(run__name="dlinear", model__name="dlinear")
    done = ts("export", "--ckpt_path", run, "--output", tmp_path / "m.onnx", "--json", tmp_path / "x.json")
    assert (done.code, done.err) == (0, "")
    assert (tmp_path / "m.onnx").stat().st_size > 1000
    assert 0 <= json.loads((tmp_path / "x.json").read_text())["max_relative_error"] < 1e-4


def test_intervals_are_calibrated_anew_on_other_data(ts, segmoe_run, tmp_path):
    frame = hourly(2)
    frame["y"] = 50 + 30 * np.random.default_rng(0).standard_normal(len(frame))  # nothing like what was trained on
    frame.to_csv(tmp_path / "noise.csv", index=False)
    line = f"intervals: calibrated anew on the validation windows of {tmp_path / 'noise.csv'}"
    for options, said in (([], False), (["--data.source", tmp_path / "noise.csv"], True)):
        done = ts("evaluate", "--ckpt_path", segmoe_run, *options, "--json", tmp_path / "f.json")
        assert (done.code, done.err) == (0, "")
        assert (line in done.out) == said
    figures = json.loads((tmp_path / "f.json").read_text())
    coverage = next(value for name, value in figures.items() if name.endswith("/coverage_80") and name.count("/") == 1)
    assert coverage > 0.6


def test_pretraining_on_corpora(ts, small, waves, tmp_path):
    """Sequences of corpora to learn from; validated, tested and loaded like any other run."""
    changes = {"data__corpora": "{synthetic: 1, train: 1}", "data__corpus_length": 32, "data__synthetic_series": 6}
    done = ts("train", *small(tmp_path, run__name="pre", model__name="timemoe", **changes))
    assert (done.code, done.err) == (0, "")
    run = tmp_path / "timeseries" / "pre"
    options = ["--input", waves, "--output", tmp_path / "f.csv"]
    done = ts("predict", "--ckpt_path", run, *options)
    assert (done.code, done.err) == (0, "")
    assert len(pd.read_csv(tmp_path / "f.csv")) == 18


def test_last_means_the_newest_run_of_the_name_or_of_any(ts, small, segmoe_run, tmp_path):
    for name in ("older", "newer"):
        assert ts("train", *small(tmp_path, run__name=name, trainer__limit_train_batches=1)).code == 0
    older = tmp_path / "timeseries" / "older"
    os.utime(older / "checkpoints" / "last.ckpt", (1e9, 1e9))
    argv = ["evaluate", "--ckpt_path", "last", "--run.root", tmp_path]
    assert f"test: {tmp_path}/timeseries/newer/checkpoints/best.ckpt" in ts(*argv).out
    assert f"test: {older}/checkpoints/best.ckpt" in ts(*argv, "--run.name=older").out


def test_other_data_and_horizons_are_measured_when_asked_for(ts, segmoe_run, tmp_path):
    hourly(2, 200).to_csv(tmp_path / "other.csv", index=False)
    options = [f"--data.source={tmp_path / 'other.csv'}", "--data.test_horizons=[3,14]"]
    done = ts("evaluate", "--ckpt_path", segmoe_run, *options, "--json", tmp_path / "e.json")
    assert (done.code, done.err) == (0, "")
    found = figures(tmp_path / "e.json")
    assert found["h14/windows"] == 2 * 15
    assert found["average/mse"] == pytest.approx((found["h3/mse"] + found["h14/mse"]) / 2)
