"""What forecasts cost: dense twins of equal multiply-adds, and the benchmark beside them."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

import moecore
from apps.timeseries.benchmark import example_windows
from apps.timeseries.cost import forecast_cost
from apps.timeseries.model_settings import ModelConfig, SegMoEConfig
from apps.timeseries.models.build import FAMILIES, build_model
from apps.timeseries.models.spec import SeriesSpec

SPEC = SeriesSpec(240, 24, 24)
TWINS = {
    "segmoe": {},
    "segmoe whole": {"segmoe": SegMoEConfig(routed="segment")},
    "segmoe two of four": {"segmoe": SegMoEConfig(top_k=2, shared=False, head="shift")},
    "timemoe": {},
    "moirai_moe": {},
    "ldl_moe": {},
}


@pytest.mark.parametrize("case", TWINS)
def test_the_dense_twin_costs_the_same(case):
    """Multiply-adds of a forecast that are really used; fewer weights."""
    name = case.split()[0]
    config = ModelConfig(name=name, **TWINS[case])
    windows = example_windows(SPEC, 2, FAMILIES[name].future(config, SPEC.horizon))
    sparse = forecast_cost(build_model(config, SPEC).eval(), windows, SPEC.horizon)
    twin = build_model(dataclasses.replace(config, dense=True), SPEC).eval()
    dense = forecast_cost(twin, windows, SPEC.horizon)
    assert all(module.experts.num_experts == 1 for module in twin.modules() if isinstance(module, moecore.MoE))
    assert dense.macs == pytest.approx(sparse.macs, rel=0.05)
    assert dense.macs == dense.all_experts_macs
    assert dense.total_params < sparse.total_params


ROW = {"model", "batch", "forecast_ms", "windows_per_s", "forecast_ratio", "training_ms", "training_ratio"}
FIGURES = ROW - {"model"} | {"params_total", "params_active", "multiply_adds"}


def checked(path, batches: list[int]) -> list[dict]:
    rows = json.loads(path.read_text())
    names = ["dense", "moe", "moe, all experts"]
    assert [(row["batch"], row["model"]) for row in rows] == [(batch, name) for batch in batches for name in names]
    for row in rows:
        assert all(row[name] > 0 and math.isfinite(row[name]) for name in FIGURES)
        assert row["windows_per_s"] == pytest.approx(1e3 * row["batch"] / row["forecast_ms"])
    dense, moe, every = rows[:3]
    assert dense["forecast_ratio"] == dense["training_ratio"] == 1
    assert dense["params_total"] == dense["params_active"] < moe["params_total"] == every["params_total"]
    assert moe["multiply_adds"] < every["multiply_adds"]
    return rows


@pytest.mark.parametrize("name", ["segmoe", "timemoe", "moirai_moe", "ldl_moe"])
def test_benchmark_of_fresh_weights(ts, small, tmp_path, name):
    options = ["--rounds=2", "--batch_sizes=[1]", "--json", tmp_path / "b.json"]
    done = ts("benchmark", *small(tmp_path, model__name=name, model__ldl_moe__top_k=1), *options)
    assert (done.code, done.err) == (0, "")
    checked(tmp_path / "b.json", [1])


def test_half_precision_is_for_forecasts_only(ts, small, tmp_path):
    changes = {"model__name": "timemoe", "model__timemoe__precision": "bfloat16"}
    done = ts(
        "benchmark", *small(tmp_path, **changes), "--rounds=1", "--batch_sizes=[2]", "--json", tmp_path / "b.json"
    )
    assert (done.code, done.err) == (0, "")
    for row in json.loads((tmp_path / "b.json").read_text()):
        assert row["forecast_ms"] > 0
        assert row["training_ms"] is row["training_peak_mib"] is None


def test_benchmark_of_a_trained_model(ts, segmoe_run, tmp_path):
    options = ["--rounds=2", "--batch_sizes=[1,3]", "--json", tmp_path / "b.json"]
    done = ts("benchmark", "--ckpt_path", segmoe_run, *options)
    assert (done.code, done.err) == (0, "")
    rows = checked(tmp_path / "b.json", [1, 3])
    assert all(row["training_peak_mib"] is None for row in rows)  # too small to tell
    assert "benchmark: MoE beside the dense twin" in done.out


@pytest.mark.slow
def test_benchmark_measures_memory(ts, small, tmp_path):
    """Each model in a process of its own."""
    done = ts("benchmark", *small(tmp_path), "--rounds=1", "--batch_sizes=[64]", "--json", tmp_path / "b.json")
    assert done.code == 0, done.err
    peaks = [row["training_peak_mib"] for row in json.loads((tmp_path / "b.json").read_text())]
    assert all(peak is None or 0 < peak < 500 for peak in peaks)
    assert any(peak is not None for peak in peaks)


@pytest.mark.parametrize("change", [{"model__name": "dlinear"}, {"model__dense": "true"}])
def test_there_must_be_experts_to_compare(ts, small, tmp_path, change):
    line = ts("benchmark", *small(tmp_path, **change)).line
    assert line.startswith("model.name=") or line.startswith("model.dense=")
    assert "has no MoE layers" in line
